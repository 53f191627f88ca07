"""The L1 norms that DARE's rescaling compares: of a task vector, and of what a random mask leaves of it.

An element stays if its Philox word lies below density * 2**32. The mask is a function of seed, tensor, expert and
element alone, so sign_elect.py draws the same one again instead of reading it. Sums are taken per logical block of
4,096 elements in the order that numerics.py fixes: parts, machines and devices agree to the bit.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor

from . import reference as truth
from .numerics import BLOCK, Array, threshold

CASES = [
    (numel, dtypes, density, start)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for numel, density, start in ((0, 0.5, 0), (1, 0.5, 0), (4097, 0.3, 4096), (9000, 1.0, 0), (9000, 0.0, 1 << 34))
]


def reference(
    base: Tensor,
    expert: Tensor,
    density: float,
    seed: int,
    tensor_id: int,
    expert_id: int,
    start: int,
    partials: Array,
) -> None:
    delta = expert.float() - base.float()
    words = truth.philox(start, delta.numel(), seed, tensor_id, expert_id, delta.device)
    kept = delta.where(words < threshold(density), 0)
    for column, value in enumerate((delta, kept)):
        partials[:, column] = truth.block_sums(value.abs(), BLOCK).cpu().numpy()


def inputs(
    numel: int, dtypes: tuple[str, ...], density: float, start: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    _, base, expert = truth.tensors(numel, dtypes, 3, device, seed)
    return base, expert, density, 2026 + seed, 0xDEADBEEF, 1, start, np.full((-(-numel // BLOCK), 2), np.nan)


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    return truth.nbytes(base, expert)
