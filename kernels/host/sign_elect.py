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
`ranks` says where these ranks begin, and is moved past the part; without it no bound cuts its equals in two: all stay
where first < last, else all go. Ties are rare: a chunk whose ties fall all on one side does not rank them.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numba
import numpy as np

from streammerge.kernels.host import row_ranks
from streammerge.kernels.numerics import (
    CHUNK,
    Array,
    Span,
    compiled,
    f32,
    f64,
    flags,
    inlined,
    load,
    magnitude,
    philox,
    store,
    subtract,
    table,
    u32,
)

ALL = (-1, 0, 0, 1 << 31, 0, 0)  # bounds that keep every element


class Drop(NamedTuple):
    """Random masks: expert k keeps a share `density`.

    `start` is the tensor's element at which the part begins; `expert_ids` name the random streams. With `row`, parts
    are whole rows of so many elements, and within a row the share runs from density - epsilon for the smallest
    magnitude to density + epsilon for the largest (DELLA; row_ranks.py).
    """

    density: float | Array
    seed: int
    tensor_id: int
    expert_ids: Sequence[int]
    start: int
    row: int = 0
    epsilon: float | Array = 0.0


@inlined
def _count(keys: Array, m: int, key: int) -> int:
    count = u32(0)
    for i in range(m):
        count = u32(count + u32(keys[i] == key))
    return count


@inlined
def _keep_between(v: Array, keys: Array, low: int, high: int, m: int) -> None:
    for i in range(m):
        v[i] = v[i] if (keys[i] >= low) & (keys[i] <= high) else f32(0)


@inlined
def _keep_ranked(v: Array, keys: Array, trim: Array, rank_low: int, rank_high: int, m: int) -> None:
    """Element by element, for a chunk in which ties are cut in two."""
    for i in range(m):
        key, keep = numba.int64(keys[i]), True
        if key <= trim[0]:
            keep = key == trim[0] and trim[1] <= rank_low < trim[2]
            rank_low += key == trim[0]
        if key >= trim[3]:
            keep = keep and key == trim[3] and trim[4] <= rank_high < trim[5]
            rank_high += key == trim[3]
        if not keep:
            v[i] = f32(0)


@inlined
def _whole(rank: int, ties: int, first: int, last: int) -> int:
    """1 if all of these ties are kept, 0 if none, -1 if they are cut in two."""
    if ties == 0 or rank >= last or rank + ties <= first:
        return 0
    return 1 if rank >= first and rank + ties <= last else -1


@inlined
def _trim(v: Array, keys: Array, trim: Array, rank: Array, m: int) -> None:
    """Zero what lies outside the bounds, and move the ranks past this chunk."""
    for i in range(m):
        keys[i] = magnitude(v[i])
    low, high = trim[0], trim[3]
    low_ties = numba.int64(_count(keys, m, u32(low))) if low >= 0 else 0
    high_ties = numba.int64(_count(keys, m, u32(high))) if 0 <= high < 1 << 31 else 0
    take_low, take_high = _whole(rank[0], low_ties, trim[1], trim[2]), _whole(rank[1], high_ties, trim[4], trim[5])
    if take_low < 0 or take_high < 0:
        _keep_ranked(v, keys, trim, rank[0], rank[1], m)
    else:
        least, most = low + (0 if take_low else 1), high - (0 if take_high else 1)
        if most < least or most < 0 or least >= 1 << 31:
            v[:m] = f32(0)
        else:
            _keep_between(v, keys, u32(max(least, 0)), u32(min(most, (1 << 31) - 1)), m)
    rank[0] += low_ties
    rank[1] += high_ties


@inlined
def _drop(v: Array, words: Array, last: int, m: int) -> None:
    for i in range(m):
        v[i] = v[i] if words[i] <= last else f32(0)


@inlined
def _drop_by_rank(v: Array, words: Array, ranks: Array, low: int, step: float, m: int) -> None:
    for i in range(m):
        v[i] = v[i] if numba.int64(words[i]) < low + numba.int64(f64(ranks[i]) * step) else f32(0)


@inlined
def _scale_add(v: Array, c: float, total: Array, m: int) -> None:
    """v becomes c * v where it is kept; a dropped element stays +0, even under an infinite or negative c."""
    for i in range(m):
        v[i] = f32(0) if v[i] == f32(0) else c * v[i]
        total[i] += v[i]


@inlined
def _elect(v: Array, total: Array, weight: float, counted: Array, weights: Array, m: int) -> None:
    """Add one expert's votes where they go with the majority."""
    for i in range(m):
        agrees = v[i] > f32(0) if total[i] >= f32(0) else v[i] < f32(0)
        counted[i] += v[i] if agrees else f32(0)
        weights[i] += weight if agrees else f32(0)


@inlined
def _finish(base: Array, counted: Array, weights: Array, divide: bool, scale: float, m: int) -> None:
    if divide:
        for i in range(m):
            divisor = f32(1) if weights[i] == f32(0) else weights[i]
            mean = counted[i] / divisor
            counted[i] = base[i] if counted[i] == f32(0) else base[i] + scale * mean
    else:
        for i in range(m):
            counted[i] = base[i] if counted[i] == f32(0) else base[i] + scale * counted[i]


@compiled(
    numba.int64[:, ::1],  # out, base, experts
    numba.float32[:, ::1],  # per expert: the factor of its delta, its weight
    numba.int64[:, ::1],  # trims, or no rows
    numba.int64[:, ::1],  # ranks
    numba.int64[:, ::1],  # per expert: threshold of its random words, its stream; or no rows
    numba.float64[::1],  # per expert: what the threshold grows by with each rank
    numba.uint32[:, ::1],  # per expert: ranks inside rows; or no rows
    numba.int64[::1],  # seed, tensor, first element
    numba.boolean,
    numba.boolean,
    numba.float32,
    numba.float32,
    numba.int64,
    numba.uint32[::1],
)
def _merge(
    spans: Array,
    factors: Array,
    trims: Array,
    ranks: Array,
    masks: Array,
    steps: Array,
    places: Array,
    stream: Array,
    normalize: bool,
    elect: bool,
    divisor: float,
    scale: float,
    numel: int,
    peaks: Array,
) -> None:
    experts = len(factors)
    base, total, v = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty((experts, CHUNK), np.float32)
    counted, weights = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    keys, words = np.empty(CHUNK, np.uint32), np.empty(CHUNK + 4, np.uint32)
    weights[:] = divisor
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        peaks[0] = max(peaks[0], load(spans[1], at, m, base))
        total[:m] = f32(0)
        for k in range(experts):
            peaks[k + 1] = max(peaks[k + 1], load(spans[k + 2], at, m, v[k]))
            subtract(v[k], base, m)
            if len(trims) > 0:
                _trim(v[k], keys, trims[k], ranks[k], m)
            if len(masks) > 0 and masks[k, 0] == 0:
                v[k, :m] = f32(0)
            elif len(masks) > 0 and masks[k, 0] < 1 << 32:
                element = stream[2] + at
                philox(words, element >> 2, (m + 6) >> 2, stream[0], stream[1], masks[k, 1])
                if len(places) > 0:
                    _drop_by_rank(v[k], words[element & 3 :], places[k, at : at + m], masks[k, 0], steps[k], m)
                else:
                    _drop(v[k], words[element & 3 :], u32(masks[k, 0] - 1), m)
            _scale_add(v[k], factors[k, 0], total, m)
        if elect:
            counted[:m] = f32(0)
            weights[:m] = f32(0)
            for k in range(experts):
                _elect(v[k], total, factors[k, 1], counted, weights, m)
            _finish(base, counted, weights, normalize, scale, m)
            store(counted, spans[0], at, m)
        else:
            _finish(base, total, weights, normalize, scale, m)
            store(total, spans[0], at, m)


def divisor_of(weights: Array) -> Any:
    """The divisor without an election: the weights' sum in fp32, one after the other."""
    total = np.float32(0)
    for weight in weights:
        total = np.float32(total + weight)
    return np.float32(1) if abs(total) < 1e-8 else total


def factors_of(weights: Array, rescale: Array | None) -> Array:
    """fp32 w_k * rescale_k, the product taken in fp64."""
    wide = weights.astype(np.float64)
    return (wide if rescale is None else wide * np.asarray(rescale, np.float64)).astype(np.float32)


def masks_of(drop: Drop | None, experts: int) -> tuple[Array, Array, Array]:
    """Per expert what its words must lie below and its stream; how the former grows by rank; seed, tensor, start."""
    if drop is None:
        return np.empty((0, 2), np.int64), np.zeros(experts), np.zeros(3, np.int64)
    shares = np.broadcast_to(np.asarray(drop.density, np.float64), (experts,))
    reach = np.broadcast_to(np.asarray(drop.epsilon, np.float64), (experts,))
    chances = [row_ranks.chances(float(d), float(e), drop.row) for d, e in zip(shares, reach, strict=True)]
    masks = [(low, stream) for (low, _), stream in zip(chances, drop.expert_ids, strict=True)]
    seed = drop.seed - (1 << 64) if drop.seed >= 1 << 63 else drop.seed
    steps = np.array([step for _, step in chances], np.float64)
    return np.array(masks, np.int64).reshape(experts, 2), steps, np.array([seed, drop.tensor_id, drop.start], np.int64)


def at_random(masks: Array) -> list[int]:
    """The experts that are neither kept nor dropped whole."""
    return [k for k, (low, _) in enumerate(masks) if 0 < low < 1 << 32]


def bounds_of(trims: Array | None, ranks: Array | None, experts: int) -> Array:
    """A row of bounds per expert, or none; where there are no ranks, each lets all of its equals in, or none."""
    if trims is None:
        return np.empty((0, 6), np.int64)
    bounds = np.array(trims, np.int64)
    assert bounds.shape == (experts, 6)
    assert ranks is None or (ranks.dtype == np.int64 and ranks.shape == (experts, 2))
    if ranks is None:
        sides = bounds.reshape(-1, 3)
        sides[:, 2] = np.where(sides[:, 1] < sides[:, 2], 1 << 62, 0)
        sides[:, 1] = 0
    return bounds


def host(
    out: Span,
    base: Span,
    experts: Sequence[Span],
    weights: Array,
    rescale: Array | None,
    scale: float,
    normalize: bool,
    elect: bool,
    trims: Array | None,
    ranks: Array | None,
    drop: Drop | None,
) -> Array:
    """Write `out`; say per input (base first) what it holds. `ranks`, int64 [experts, 2], is moved past this part."""
    count = len(experts)
    weights = np.ascontiguousarray(weights, np.float32)
    assert len(weights) == count
    assert all(span.numel == out.numel for span in (base, *experts))
    bounds = bounds_of(trims, ranks, count)
    begun = np.zeros((count, 2), np.int64) if ranks is None else ranks
    factors = np.ascontiguousarray(np.stack([factors_of(weights, rescale), weights], 1))
    masks, steps, stream = masks_of(drop, count)
    peaks = np.zeros(count + 1, np.uint32)
    spans, fixed = (out, base, *experts), divisor_of(weights)
    row = drop.row if drop is not None else 0
    piece = row_ranks.piece_of(row) if row else max(1, out.numel)
    places = np.empty((count if row else 0, min(piece, out.numel)), np.uint32)
    for at in range(0, out.numel, piece):
        cut = [row_ranks.part(span, at, min(at + piece, out.numel)) for span in spans]
        for k in at_random(masks) if row else ():
            row_ranks.host(cut[1], cut[k + 2], row, places[k, : cut[0].numel])
        where, options = stream + np.array([0, 0, at]), (normalize, elect, fixed, np.float32(scale), cut[0].numel)
        _merge(table(*cut), factors, bounds, begun, masks, steps, places, where, *options, peaks)
    return flags(peaks)
