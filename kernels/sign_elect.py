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
where first < last, else all go. Ties are rare: a block whose ties fall all on one side does not rank them.

On a GPU every input is read once. Signs need no second look at the experts: their positive and their negative parts
are summed apart, in the order of the experts, and the sum of all says which of the two counts. Where a bound may cut
its equals in two, a first pass counts them per block, for experts that still have some to come, and a scan makes
ranks of the counts; what need only be counted is counted on the way. `ranks` is mirrored: parts launched one after
the other continue from each other on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from . import row_ranks
from .device import (
    ABSOLUTE,
    INFINITY,
    alignment,
    block_size,
    codes,
    fetch,
    int32,
    load,
    magnitude,
    pointer,
    raise_peak,
    store,
    words,
)
from .host.sign_elect import Drop, at_random, bounds_of, divisor_of, factors_of, masks_of
from .numerics import Array, Span
from .queue import Queue
from .row_ranks import rank_rows, scratch_bytes, stays
from .ties import COLUMNS, DIVIDED, entry, mode, rank_blocks, trimmed

LAUNCH = {"BLOCK": 1024, "GROUP": 2, "num_warps": 4}
RANDOM: tl.constexpr = tl.constexpr(1)  # drops, per expert: at random
ALL: tl.constexpr = tl.constexpr(2)  # nothing stays
RANKED: tl.constexpr = tl.constexpr(3)  # at random, by the rank within a row

CASES = [
    (numel, dtypes, experts, normalize, elect, trimmed, dropped)  # dropped: False, True or a row's length
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16", "F32"))
    for numel, experts, normalize, elect, trimmed, dropped in (
        (0, 2, True, True, True, True), (1, 1, False, False, False, True), (5001, 3, True, True, True, False),
        (5001, 3, False, True, False, True), (3000, 2, True, False, True, True), (777, 5, True, True, True, True),
        (40001, 2, True, True, True, False), (1025, 16, True, True, True, True), (1000, 2, False, False, False, False),
        (2048, 3, True, True, False, False), (3000, 3, True, True, False, 600), (40, 2, False, False, False, 1),
    )
]  # fmt: skip


@triton.jit
def _highest(x, BLOCK: tl.constexpr):
    """The largest magnitude's bits among neighbours, which one thread holds: few registers until the end."""
    return tl.max(tl.reshape(x.to(tl.int32, bitcast=True) & ABSOLUTE, (BLOCK // 8, 8)), 1)


@triton.jit
def _block(
    spans, factors, weights, table, ranks, ties, places, pitch, seed_low, seed_high, tensor_id, first, scale, divisor,
    peaks, offs, mask,
    CODES: tl.constexpr, ALIGN: tl.constexpr, ELECT: tl.constexpr, NORMALIZE: tl.constexpr, TRIMS: tl.constexpr,
    DROPS: tl.constexpr, QUAD: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    COUNT: tl.constexpr = len(CODES) - 2
    base = load(spans[1], offs, mask, CODES[1], ALIGN, MASKED)
    highest = _highest(base, BLOCK)
    total, plus, minus = tl.zeros_like(base), tl.zeros_like(base), tl.zeros_like(base)
    plus_weight, minus_weight = tl.zeros_like(base), tl.zeros_like(base)
    for group in tl.static_range(0, COUNT, GROUP):
        # Always so. A branch is what a compiler does not move arithmetic across: it would begin with all loads, and
        # the registers for what they bring would not suffice.
        if spans[group + 2] != 0:
            for k in tl.static_range(group, min(group + GROUP, COUNT)):
                x = load(spans[k + 2], offs, mask, CODES[k + 2], ALIGN, MASKED)
                highest = tl.maximum(highest, _highest(x, BLOCK))
                delta = x - base
                keep = delta != 0
                if TRIMS:
                    keep &= trimmed(magnitude(delta), mask, table, ranks, ties, k, COUNT, TRIMS, MASKED, BLOCK)
                if DROPS[k] == RANDOM:
                    last = (entry(table, k, 6) - 1).to(tl.uint32)
                    keep &= words(first, seed_low, seed_high, tensor_id, entry(table, k, 7), BLOCK, QUAD) <= last
                elif DROPS[k] == RANKED:
                    rank = fetch(
                        pointer(places, tl.uint32, 16) + tl.cast(pitch, tl.int64) * (64 * k), offs, mask, MASKED
                    )
                    word = words(first, seed_low, seed_high, tensor_id, entry(table, k, 7), BLOCK, QUAD)
                    keep &= stays(word, rank, entry(table, k, 6), entry(table, k, 8))
                elif DROPS[k] == ALL:
                    keep = tl.zeros_like(keep)
                v = tl.where(keep, factors[k] * delta, 0.0)
                total += v
                if ELECT:
                    plus, minus = tl.where(v > 0, plus + v, plus), tl.where(v < 0, minus + v, minus)
                if ELECT and NORMALIZE:
                    plus_weight = tl.where(v > 0, plus_weight + weights[k], plus_weight)
                    minus_weight = tl.where(v < 0, minus_weight + weights[k], minus_weight)
    counted = total
    if ELECT:
        counted = tl.where(total >= 0, plus, minus)
    mean = counted
    if ELECT and NORMALIZE:
        sum = tl.where(total >= 0, plus_weight, minus_weight)
        mean = tl.div_rn(counted, tl.where(sum == 0, 1.0, sum))
    elif NORMALIZE:
        mean = tl.div_rn(counted, tl.zeros_like(base) + divisor)
    result = tl.where(counted == 0, base, base + scale * mean)
    store(spans[0], offs, result, mask, CODES[0], ALIGN, MASKED)
    if tl.max(highest, 0) >= INFINITY:  # rare: say which input it was
        for k in tl.static_range(1, len(CODES)):
            if spans[k] != 0:
                raise_peak(peaks, k - 1, load(spans[k], offs, mask, CODES[k], ALIGN, MASKED), 1)


@triton.jit(do_not_specialize=["pitch", "seed_low", "seed_high", "tensor_id", "start", "numel"])
def _merge(
    spans, factors, weights, table, ranks, ties, places, pitch, seed_low, seed_high, tensor_id, start,
    scale, divisor, numel, peaks,
    CODES: tl.constexpr, ALIGN: tl.constexpr, ELECT: tl.constexpr, NORMALIZE: tl.constexpr, TRIMS: tl.constexpr,
    DROPS: tl.constexpr, QUAD: tl.constexpr, BLOCK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK
    offs = at + tl.arange(0, BLOCK)
    if at + BLOCK <= numel:
        _block(
            spans, factors, weights, table, ranks, ties, places, pitch, seed_low, seed_high, tensor_id, at + start,
            scale, divisor, peaks, offs, offs, CODES, ALIGN, ELECT, NORMALIZE, TRIMS, DROPS, QUAD, False, BLOCK, GROUP,
        )  # fmt: skip
    else:
        _block(
            spans, factors, weights, table, ranks, ties, places, pitch, seed_low, seed_high, tensor_id, at + start,
            scale, divisor, peaks, offs, offs < numel, CODES, ALIGN, ELECT, NORMALIZE, TRIMS, DROPS, QUAD, True, BLOCK,
            GROUP,
        )  # fmt: skip


def launch(
    queue: Queue,
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
    """A batch needs 16 bytes for each expert and block where bounds cut; with rows, `row_bytes`."""
    count, spans = len(experts), (out, base, *experts)
    weights = np.ascontiguousarray(weights, np.float32)
    assert len(weights) == count
    assert all(span.numel == out.numel for span in spans)
    bounds, (masks, steps, (seed, tensor_id, start)) = bounds_of(trims, ranks, count), masks_of(drop, count)
    block = min(block_size(LAUNCH["BLOCK"]), 1 << 15)  # two counts of a block share 32 bits
    row = 0 if drop is None else drop.row
    random, trimming, table, moved, tied = at_random(masks), mode(bounds, ranks), 0, 0, 0
    drawn = RANKED.value if row else RANDOM.value
    drops = tuple(drawn if k in random else ALL.value if len(masks) and masks[k, 0] == 0 else 0 for k in range(count))
    if trimming or random:
        rows = np.zeros((count, COLUMNS.value), np.int64)
        rows[:, :6], rows[:, 6:8] = bounds if len(bounds) else 0, masks if len(masks) else 0
        rows[:, 8] = steps.view(np.int64)
        table = queue.constant(rows)
    blocks = triton.cdiv(out.numel, block)
    common = {"CODES": codes(*spans), "ALIGN": alignment(*spans), "BLOCK": block, "num_warps": LAUNCH["num_warps"]}
    addresses = tuple(span.address for span in spans)
    if ranks is not None and trimming:
        moved = queue.mirror(ranks)
    if trimming == DIVIDED.value and blocks:
        tied = rank_blocks(queue, spans, table, moved, blocks, common)
    places = _places(queue, base, experts, row, random) if row and random else 0
    peaks, found = queue.peaks(count + 1)
    queue.submit(
        _merge,
        (blocks,),
        addresses,
        tuple(float(f) for f in factors_of(weights, rescale)),
        tuple(float(w) for w in weights),
        table,
        moved,
        tied,
        places,
        _pitch(out.numel),
        int32(int(seed)),
        int32(int(seed) >> 32),
        int32(int(tensor_id)),
        int(start),
        float(np.float32(scale)),
        float(divisor_of(weights)),
        out.numel,
        peaks,
        ELECT=elect,
        NORMALIZE=normalize,
        TRIMS=trimming,
        DROPS=drops,
        QUAD=int(start) % 4 == 0,
        GROUP=1 if trimming == DIVIDED.value else LAUNCH["GROUP"],
        **common,
    )
    return found


def _pitch(numel: int) -> int:
    """64s of elements from one expert's ranks to the next one's."""
    return -(-numel // 64)


def row_bytes(numel: int, experts: int, row: int) -> int:
    """What a batch needs to draw masks by the ranks within rows."""
    return 256 * _pitch(numel) * experts + scratch_bytes(numel, row) + 512


def _places(queue: Queue, base: Span, experts: Sequence[Span], row: int, random: Sequence[int]) -> int:
    """Ranks within rows of the experts that are thinned by them."""
    assert base.numel % row == 0
    size = 256 * _pitch(base.numel)
    places, room = queue.scratch(size * len(experts)), queue.scratch(scratch_bytes(base.numel, row))
    for k in random:
        rank_rows(queue, base, experts[k], row, places + k * size, room)
    return places


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
    factors, (masks, steps, _) = factors_of(weights, rescale), masks_of(drop, len(experts))
    bounds = bounds_of(trims, ranks, len(experts))
    b, votes = base.float(), []
    for k, expert in enumerate(experts):
        delta = expert.float() - b
        keep = torch.ones_like(delta, dtype=torch.bool)
        if trims is not None:
            keys = truth.magnitude(delta)
            keep &= _kept(keys, bounds[k], (0, 0) if ranks is None else ranks[k])
            if ranks is not None:
                ranks[k] += [int((keys == int(bounds[k, side])).sum()) for side in (0, 3)]
        if drop is not None:
            numel, stream = delta.numel(), (drop.seed, drop.tensor_id, drop.expert_ids[k])
            below = torch.full_like(keep, 0, dtype=torch.int64) + int(masks[k, 0])
            if drop.row:
                places = np.empty(numel, np.uint32)
                row_ranks.reference(base, expert, drop.row, places)
                below += torch.from_numpy((places * steps[k]).astype(np.int64)).to(below.device)
            keep &= truth.philox(drop.start, numel, *stream, delta.device) < below
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
    dropped: int,
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
        row, epsilon = (0, 0.0) if dropped is True else (dropped, np.minimum(density, 1 - density) / 2)
        drop = Drop(density, 2026 + seed, 0xDEADBEEF, list(range(experts)), 5, row, epsilon)
    if trimmed or dropped:
        rescale = random.uniform(1, 3, experts)
    return out, base, others, weights, rescale, 0.7, normalize, elect, trims, ranks, drop


def bytes_moved(out: Any, base: Any, experts: Sequence[Any], *rest: Any) -> int:
    return truth.nbytes(out, base, *experts)
