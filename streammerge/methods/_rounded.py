"""Products whose operands may be rounded: fp32, TF32 or bfloat16, added up in fp32.

On a CPU the library rounds operands inside its products (oneDNN, from torch 2.9 on), on a GPU tensors are cast before
them. Either way the result is fp32, and not rounded but where `product_of_rounded` says so. TF32 is a GPU's; elsewhere
it is fp32.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any

from streammerge.methods._precision import exact_products

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = ("fp32", "tf32", "bf16")


@contextmanager
def products(precision: str, device: Any) -> Iterator[None]:
    """Within the block torch's fp32 products are as exact as that."""
    unit = _rounding_unit(precision, device)
    if unit is None:
        with exact_products():
            yield
        return
    before = unit.fp32_precision
    unit.fp32_precision = precision
    try:
        yield
    finally:
        unit.fp32_precision = before


@contextmanager
def exact_within(precision: str, device: Any) -> Iterator[None]:
    """Within the block, itself within one of `products(precision, device)`, products are fp32."""
    unit = _rounding_unit(precision, device)
    if unit is None:
        yield
        return
    before = unit.fp32_precision
    unit.fp32_precision = "ieee"
    try:
        yield
    finally:
        unit.fp32_precision = before


def _rounding_unit(precision: str, device: Any) -> Any:
    """The setting by which a library rounds the operands of its products itself, if it can."""
    import torch

    name = str(getattr(device, "type", device))
    unit: Any = getattr(torch.backends.cuda if name == "cuda" else torch.backends.mkldnn, "matmul", None)
    wanted = {"cuda": "tf32", "cpu": "bf16"}.get(name)
    return unit if precision == wanted and hasattr(unit, "fp32_precision") else None


def casts(precision: str, device: Any) -> bool:
    """Whether operands are cast before a product; on meta too, since a library that rounds itself makes copies too."""
    import torch

    if precision != "bf16":
        return False
    return device.type != "cpu" or not hasattr(getattr(torch.backends.mkldnn, "matmul", None), "fp32_precision")


def multiplies_bf16(device: Any) -> bool:
    """Whether a device takes less time for bfloat16; meta counts as one that does.

    oneDNN says yes to every x86 with AVX-512, though those without instructions for bfloat16 are slower with it.
    """
    import torch

    if device.type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    known = [getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile")]
    return platform.machine() not in ("x86_64", "AMD64") or any(ask() for ask in known if ask is not None)


def product(one: Tensor, other: Tensor, rounds: bool) -> Tensor:
    """one [..., k] @ other [k, n], fp32; can be differentiated by `one`, once."""
    import torch

    if not rounds:
        return one @ other
    return torch.as_tensor(_rounded().apply(one, other.to(torch.bfloat16)))


def product_of_rounded(one: Tensor, other: Tensor) -> Tensor:
    """one [m, k] @ other [k, n] of bfloat16, fp32. CPUs round the result, GPUs of NVIDIA do not."""
    import torch

    if one.device.type == "cuda" and torch.version.hip is None:
        return torch.mm(one, other, out_dtype=torch.float32)
    return (one @ other).float()


@cache
def _rounded() -> Any:
    import torch
    from torch.autograd import Function
    from torch.autograd.function import once_differentiable

    class Rounded(Function):  # type: ignore[misc]  # torch is untyped here
        """A product with its operands rounded, and so in its derivative: torch has none for unrounded results."""

        @staticmethod
        def forward(ctx: Any, one: Tensor, other: Tensor) -> Tensor:
            ctx.save_for_backward(other)
            return _many_rows(one, other)

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, *given: Tensor) -> Any:
            return _many_rows(given[0], ctx.saved_tensors[0].T), None

    def _many_rows(one: Tensor, other: Tensor) -> Tensor:
        found = product_of_rounded(one.flatten(0, -2).to(torch.bfloat16), other)
        return found.view(*one.shape[:-1], -1)

    return Rounded
