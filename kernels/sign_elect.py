"""Sparse task vectors, elected signs and their weighted sum, in one pass: TIES, DARE, Breadcrumbs and their kin.

    v_k = float32(w_k * rescale_k) * (expert_k - base) where element and expert are kept, else 0
    out = base + scale * (sum of the counted v_k) / divisor                      fp32, experts in order, one rounding

Kept: inside expert k's bounds on the magnitude (trims) and not dropped by its random mask (drop). Counted: all; with
`elect` those whose sign is the majority's, which is + where sum_k v_k >= 0 and - elsewhere (a zero is never counted).
Divisor: 1, or with `normalize` the sum of the weights counted (0 -> 1); without `elect` the sum of all weights
(below 1e-8 in magnitude -> 1). Where the numerator is 0 the result is the base, to the bit. An expert whose NaN loses
the election leaves no trace in the result; the flags tell.

Bounds are (L, L_first, L_last, U, U_first, U_last), keys as in magnitude_histogram.py: kept are keys between L and U,
and of the keys that equal a bound those whose rank among their equals, in index order, lies in [first, last) of it.
Ties are rare: a chunk whose ties fall all on one side is done without looking at them one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference as truth
from .host.sign_elect import Drop, divisor_of, factors_of, masks_of
from .numerics import Array

CASES = [
    (numel, dtypes, experts, normalize, elect, trimmed, dropped)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16", "F32"))
    for numel, experts, normalize, elect, trimmed, dropped in (
        (0, 2, True, True, True, True), (1, 1, False, False, False, True), (5001, 3, True, True, True, False),
        (5001, 3, False, True, False, True), (3000, 2, True, False, True, True), (777, 5, True, True, True, True),
    )
]  # fmt: skip


def _kept(key: Tensor, trim: Array, rank: Any) -> Tensor:
    """Where a key lies within its bounds."""
    low, low_first, low_last, high, high_first, high_last = (int(t) for t in trim)
    is_low, is_high = key == low, key == high
    low_rank, high_rank = is_low.cumsum(0) - 1 + int(rank[0]), is_high.cumsum(0) - 1 + int(rank[1])
    above = (key > low) | (is_low & (low_first <= low_rank) & (low_rank < low_last))
    return above & ((key < high) | (is_high & (high_first <= high_rank) & (high_rank < high_last)))


def reference(
    out: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    weights: Array,
    rescale: Array | None,
    scale: float,
    normalize: bool,
    elect: bool,
    trims: Array | None,
    ranks: Array | None,
    drop: Drop | None,
) -> Array:
    """The same in torch."""
    weights = np.asarray(weights, np.float32)
    factors, (masks, _) = factors_of(weights, rescale), masks_of(drop, len(experts))
    b, votes = base.float(), []
    for k, expert in enumerate(experts):
        delta = expert.float() - b
        keep = torch.ones_like(delta, dtype=torch.bool)
        if trims is not None:
            keys = truth.magnitude(delta)
            keep &= _kept(keys, trims[k], (0, 0) if ranks is None else ranks[k])
            if ranks is not None:
                ranks[k] += [int((keys == int(trims[k, side])).sum()) for side in (0, 3)]
        if drop is not None:
            numel, stream = delta.numel(), (drop.seed, drop.tensor_id, drop.expert_ids[k])
            keep &= truth.philox(drop.start, numel, *stream, delta.device) < int(masks[k, 0])
        votes.append(torch.where(keep & (delta != 0), float(factors[k]) * delta, 0))
    total = counted = torch.zeros_like(b)
    for v in votes:
        total = total + v
    divisor = torch.full_like(b, float(divisor_of(weights)))
    if elect:
        majority, divisor = torch.where(total >= 0, 1.0, -1.0), torch.zeros_like(b)
        for v, weight in zip(votes, weights, strict=True):
            agrees = v.sign() * majority > 0
            counted = counted + v.where(agrees, 0)
            divisor = divisor + torch.where(agrees, float(weight), 0.0)
        divisor = torch.where(divisor == 0, 1, divisor)
    else:
        counted = total
    mean = counted / divisor if normalize else counted
    truth.write(out, torch.where(counted == 0, b, b + float(np.float32(scale)) * mean))
    return truth.flags(base, *experts)


def inputs(
    numel: int,
    dtypes: tuple[str, ...],
    experts: int,
    normalize: bool,
    elect: bool,
    trimmed: bool,
    dropped: bool,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    out, base, *others = truth.tensors(numel, dtypes, experts + 2, device, seed)
    random = np.random.default_rng(seed)
    weights = random.normal(1, 0.5, experts).astype(np.float32)
    trims = ranks = drop = rescale = None
    if trimmed:
        low, high = np.array([0.05, 0.2], np.float32).view(np.int32)
        trims = np.array([(low, 0, 2, high, 1, 3)] * experts, np.int64)
        ranks = np.array([(1, 0)] * experts, np.int64)
    if dropped:
        density = random.uniform(0.2, 1, experts)
        drop = Drop(density, 2026 + seed, 0xDEADBEEF, list(range(experts)), 5)
    if trimmed or dropped:
        rescale = random.uniform(1, 3, experts)
    return out, base, others, weights, rescale, 0.7, normalize, elect, trims, ranks, drop


def bytes_moved(out: Any, base: Any, experts: Sequence[Any], *rest: Any) -> int:
    return truth.nbytes(out, base, *experts)
