"""Products whose operands may be rounded: fp32, TF32 or bfloat16, added up in fp32.

On a CPU the library rounds inside its products (oneDNN, from torch 2.9 on), on a GPU tensors are cast before them.
TF32 is a GPU's; elsewhere it is fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
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
    unit.fp32_precision = "ieee"
    try:
        yield
    finally:
        unit.fp32_precision = precision


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


def product(one: Tensor, other: Tensor, rounds: bool) -> Tensor:
    """one @ other, fp32."""
    import torch

    if not rounds:
        return one @ other
    return (one.to(torch.bfloat16) @ other.to(torch.bfloat16)).float()
