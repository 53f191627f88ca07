"""Counts of the magnitudes of a task vector, for finding the k-th largest without sorting or keeping it.

The key of an element is the bit pattern of |expert - base| in fp32: 31 bits, in the order of the magnitudes, all NaNs
one key above infinity. Counts are integers, so parts of a tensor add up to the same in any order, on any number of
machines. Two passes with 65,536 and 32,768 brackets find any rank exactly: see select_threshold.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference as truth
from .numerics import Array

CASES = [
    (numel, dtypes, low, shift, bins)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for numel, low, shift, bins in (
        (0, 0, 15, 1 << 16), (1, 0, 15, 1 << 16), (5001, 0, 15, 1 << 16), (5001, 0x3DCC0000, 8, 256), (5001, 0, 0, 4),
    )
]  # fmt: skip


def reference(
    base: Tensor, expert: Tensor, low: int, shift: int, counts: Array, ends: Array | None = None, guess: int = -1
) -> None:
    bins = len(counts) - 2
    key = truth.magnitude(expert.float() - base.float())
    place = torch.where(key < low, 0, (1 + ((key - low) >> shift)).clamp(max=bins + 1))
    counts += torch.bincount(place, minlength=bins + 2).cpu().numpy()
    if ends is not None:
        where = place.cpu().numpy() - 1
        inside = (where >= 0) & (where < bins)
        found = key.cpu().numpy()[inside].astype(np.uint32)
        np.minimum.at(ends[:, 0], where[inside], found)
        np.maximum.at(ends[:, 1], where[inside], found)


def inputs(
    numel: int, dtypes: tuple[str, ...], low: int, shift: int, bins: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    _, base, expert = truth.tensors(numel, dtypes, 3, device, seed)
    ends = np.tile(np.array([[1 << 31, 0]], np.uint32), (bins, 1)) if shift % 2 else None
    guess = low + (1 << shift) // 2 if shift % 2 else -1
    return base, expert, low, shift, np.zeros(bins + 2, np.int64), ends, guess


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    return truth.nbytes(base, expert)
