"""The L1 norms that rescaling after a trim compares: of a task vector, and of what lies strictly between two keys.

Elements that tie at a bound share one magnitude, so their part of the norm is a count times a value; what remains is
this sum. Taken per logical block of 4,096 elements in the order that numerics.py fixes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from . import reference as truth
from .numerics import BLOCK, Array

CASES = [
    (numel, dtypes, low, high)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for numel, low, high in ((0, 0, 9), (1, -1, 1 << 31), (4097, 0x3D000000, 0x3E000000), (9000, 0x3D4CCCCD, 1 << 31))
]


def reference(base: Tensor, expert: Tensor, low: int, high: int, partials: Array) -> None:
    delta = expert.float() - base.float()
    key = truth.magnitude(delta)
    kept = delta.where((key > low) & (key < high), 0)
    for column, value in enumerate((delta, kept)):
        partials[:, column] = truth.block_sums(value.abs(), BLOCK).cpu().numpy()


def inputs(
    numel: int, dtypes: tuple[str, ...], low: int, high: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    _, base, expert = truth.tensors(numel, dtypes, 3, device, seed)
    return base, expert, low, high, np.full((-(-numel // BLOCK), 2), np.nan)


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    return truth.nbytes(base, expert)
