"""A tensor in another dtype: widened exactly or rounded once, every NaN as one pattern.

From any of the six dtypes to any, to nearest even or, with `rounding`, up or down by chance (numerics.Stochastic):
right on average, the same bits wherever a tensor is cut, exact values untouched. As everywhere the value passes
through fp32: F64 is rounded to it first, an F64 output holds it. F8_E4M3 saturates at 448; elsewhere what lies beyond
the largest finite number becomes an infinity, by rounding to nearest even where rounding is by chance too.

On a GPU this is add_deltas without experts, so small tensors are done by one launch with those that it merges.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import add_deltas
from . import reference as truth
from .add_deltas import LAUNCH as LAUNCH
from .numerics import Array, Span, Stochastic
from .queue import Queue

ONCE = np.ones((1, 1), np.float32)

CASES = [
    (numel, "BF16", source, start, by_chance)
    for source in ("F32", "F16")
    for numel, start, by_chance in ((0, 0, False), (1, 0, False), (4099, 0, False), (777, (1 << 33) + 1, True))
] + [
    (40_003, out, source, 8, by_chance)
    for out, source, by_chance in (
        ("F32", "BF16", False), ("BF16", "F32", False), ("F16", "F64", False), ("F64", "F16", False),
        ("F8_E4M3", "BF16", False), ("F8_E5M2", "F32", False), ("BF16", "F8_E4M3", False), ("F16", "F8_E5M2", False),
        ("F32", "F64", True), ("BF16", "F32", True), ("F16", "F32", True), ("F64", "F32", True),
        ("F8_E4M3", "F32", True), ("F8_E5M2", "F16", True),
    )
]  # fmt: skip


def launch(queue: Queue, out: Span, source: Span, start: int = 0, rounding: Stochastic | None = None) -> Array:
    return add_deltas.launch(queue, out, source, (), ONCE, start, rounding=rounding)


def reference(out: Tensor, source: Tensor, start: int = 0, rounding: Stochastic | None = None) -> Array:
    """The same in torch."""
    truth.write(out, source.float(), start, rounding)
    return truth.flags(source)


def inputs(
    numel: int, out: str, source: str, start: int, by_chance: bool, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    """Magnitudes go from what is nothing in the narrow dtypes to what is too much."""
    target, near = truth.tensors(numel, (out, "F32"), 2, device, seed)
    exponents = torch.randint(-30, 20, (numel,), generator=torch.Generator().manual_seed(seed)).to(device)
    given = truth.rounded(torch.ldexp(near, exponents), truth.DTYPES[source])
    return target, given, start, Stochastic(7 + seed, 0xDEADBEEF) if by_chance else None


def bytes_moved(out: Any, source: Any, *rest: Any) -> int:
    return truth.nbytes(out, source)
