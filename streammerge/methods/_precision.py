"""How exact large products are: fp32 unless less is asked for, and never less by accident.

fp32              the library's products (BLAS), on any device
tf32x3, bf16x3    on a GPU: operands in two parts, three products on tensor cores (kernels/gemm.py has the errors)
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from streammerge import kernel
from streammerge.kernels.numerics import Span

if TYPE_CHECKING:
    from torch import Tensor

PRECISIONS = ("fp32", "tf32x3", "bf16x3")


_blocks = 0  # that are entered, by any thread: the settings are the process's
_lock = threading.Lock()
_restore = ExitStack()


@contextmanager
def exact_products() -> Iterator[None]:
    """Within the block torch multiplies fp32 matrices in fp32, whatever was allowed before the first of such blocks."""
    global _blocks
    with _lock:
        if not _blocks:
            _restore.enter_context(_exact())
        _blocks += 1
    try:
        yield
    finally:
        with _lock:
            _blocks -= 1
            if not _blocks:
                _restore.close()


@contextmanager
def _exact() -> Iterator[None]:
    import torch

    units = [torch.backends.cuda.matmul, getattr(torch.backends.mkldnn, "matmul", None)]
    units = [unit for unit in units if hasattr(unit, "fp32_precision")]  # from torch 2.9 on
    before = [unit.fp32_precision for unit in units]
    try:
        setting = torch.get_float32_matmul_precision()
    except RuntimeError:  # set by the newer names alone: torch will not say it by the older one
        setting = ""
    if setting:
        torch.set_float32_matmul_precision("highest")
    for unit in () if setting else units:
        unit.fp32_precision = "ieee"
    try:
        assert not torch.backends.cuda.matmul.allow_tf32
        yield
    finally:
        if setting:
            torch.set_float32_matmul_precision(setting)
        for unit, value in zip(units, before, strict=True):
            if unit.fp32_precision != value:
                unit.fp32_precision = value


class Products(NamedTuple):
    """Steps that kernels do on a GPU, in a precision of their own."""

    queue: Any
    precision: str

    @staticmethod
    def on(queue: Any, precision: str) -> Products | None:
        """None where the library does them."""
        return None if precision == "fp32" else Products(queue, precision)

    def polar_step(self, matrices: Sequence[Tensor], terms: tuple[float, float, float]) -> None:
        """kernels/polar_step.py; out and x [k, n], then Gram matrix and polynomial [k, k]."""
        spans = [span(each, self.queue) for each in matrices]
        kernel.run("polar_step", *spans, matrices[1].shape[1], terms, self.precision)

    def adam_step(self, matrices: Sequence[Tensor], step: int, *rates: float) -> None:
        """kernels/adam_gemm.py; out, x, Gram matrix, target, both moments, then lr, beta1, beta2, eps."""
        spans = [span(each, self.queue) for each in matrices]
        kernel.run("adam_gemm", *spans, step, *rates, self.precision)


def span(values: Tensor, queue: Any = None, first: int = 0, last: int | None = None) -> Span:
    """Elements [first, last) of a contiguous fp32 tensor; the caller keeps it."""
    assert values.is_contiguous()
    return Span(values.data_ptr() + 4 * first, "F32", (values.numel() if last is None else last) - first, queue)
