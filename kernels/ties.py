"""Bounds on magnitudes as sign_elect.py has them, in Triton: what equals a bound stays or goes by its rank.

Ranks are counted in index order over a whole tensor, part by part. Where a bound may cut its equals in two, `count`
reads the inputs for experts that still have some to come, `scan` makes ranks of the counts and moves `ranks` past the
part; `trimmed` then knows for each block how many came before. What need only be counted, `trimmed` counts itself:
nobody reads `ranks` meanwhile.

    table   int64 [experts, COLUMNS]: (L, L_first, L_last, U, U_first, U_last), then what the caller needs
    ranks   int64 [experts, 2]
    ties    int64 [experts] whether `count` looked at them, then [experts, 2, blocks + 1]
"""

# mypy: ignore-errors
from __future__ import annotations

import triton
import triton.language as tl

from .device import ABSOLUTE, load, magnitude, pointer
from .numerics import Array, Span
from .queue import Queue

COLUMNS: tl.constexpr = tl.constexpr(9)
BEYOND: tl.constexpr = tl.constexpr(1 << 62)  # a rank behind the last of every bound
TOGETHER: tl.constexpr = tl.constexpr(1)  # the elements that equal a bound all do the same
LOST: tl.constexpr = tl.constexpr(2)  # they all go, and are counted
DIVIDED: tl.constexpr = tl.constexpr(3)  # some of them may stay and some go
SCAN = 2048  # blocks whose ties are added up at once


@triton.jit
def entry(table, k, column: tl.constexpr):
    return tl.load(pointer(table, tl.int64, 16) + (k * COLUMNS + column))


@triton.jit
def _ties(key, low, high, mask, MASKED: tl.constexpr):
    """1 where a key equals the lower bound, plus 65,536 where it equals the upper one."""
    tie = (key == low.to(tl.uint32)).to(tl.uint32) + ((key == high.to(tl.uint32)).to(tl.uint32) << 16)
    return tl.where(mask, tie, 0) if MASKED else tie


@triton.jit
def _low(packed):
    return (packed & 0xFFFF).to(tl.int64)


@triton.jit
def _high(packed):
    return (packed >> 16).to(tl.int64)


@triton.jit
def _stay(rank, count, first, last):
    """Whether all of so many ties stay, the first of which has this rank."""
    return (count > 0) & (rank >= first) & (rank + count <= last)


@triton.jit
def _cut(rank, count, first, last):
    """Whether some of them stay and some go."""
    some = (count > 0) & (rank < last) & (rank + count > first)
    return some & ((rank < first) | (rank + count > last))


@triton.jit
def _between(key, low, high, take_low, take_high):
    """Where keys lie between two bounds, either taken in or not."""
    least = tl.maximum(low + 1 - take_low.to(tl.int64), 0)
    most = tl.minimum(high - 1 + take_high.to(tl.int64), ABSOLUTE)
    origin = tl.where(least <= most, least, ABSOLUTE)  # above every key: none is 0 beyond it
    return (key - origin.to(tl.uint32)) <= tl.maximum(most - least, 0).to(tl.uint32)


@triton.jit
def _within(rank, first, last, BLOCK: tl.constexpr):
    """[first, last) of a bound, counted from the block's first tie."""
    begin = tl.minimum(tl.maximum(first - rank, 0), BLOCK).to(tl.uint32)
    return begin, tl.minimum(tl.maximum(last - rank, 0), BLOCK).to(tl.uint32)


@triton.jit
def _by_rank(key, tie, table, k, rank_low, rank_high, BLOCK: tl.constexpr):
    """Element by element, for a block in which ties are cut in two."""
    seen = tl.cumsum(tie, 0) - tie
    first, last = _within(rank_low, entry(table, k, 1), entry(table, k, 2), BLOCK)
    stays = ((tie & 0xFFFF) != 0) & ((seen & 0xFFFF) >= first) & ((seen & 0xFFFF) < last)
    keep = stays | (key.to(tl.int32) > tl.minimum(entry(table, k, 0), ABSOLUTE).to(tl.int32))
    first, last = _within(rank_high, entry(table, k, 4), entry(table, k, 5), BLOCK)
    stays = ((tie >> 16) != 0) & ((seen >> 16) >= first) & ((seen >> 16) < last)
    return keep & (stays | (key.to(tl.int32) < tl.minimum(entry(table, k, 3), ABSOLUTE).to(tl.int32)))


@triton.jit
def _ranks_before(ties, k, COUNT: tl.constexpr):
    """Of a block's first ties at both bounds, and how many there are, from a table of ranks."""
    blocks = tl.num_programs(0).to(tl.int64) + 1
    place = pointer(ties, tl.int64, 16) + COUNT + 2 * k * blocks + tl.program_id(0)
    low, high = tl.load(place), tl.load(place + blocks)
    return low, high, tl.load(place + 1) - low, tl.load(place + blocks + 1) - high


@triton.jit
def _lost(tie, ranks, k):
    """Counts a block's ties on the way; none of them stays."""
    packed = tl.sum(tie, 0)
    low, high = _low(packed), _high(packed)
    moved = pointer(ranks, tl.int64, 16) + 2 * k
    if low > 0:
        tl.atomic_add(moved, low, sem="relaxed")
    if high > 0:
        tl.atomic_add(moved + 1, high, sem="relaxed")
    beyond = tl.full((), BEYOND, tl.int64)
    return beyond, beyond, low, high


@triton.jit
def trimmed(
    key, mask, table, ranks, ties, k, COUNT: tl.constexpr, TRIMS: tl.constexpr, MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Where keys lie within an expert's bounds."""
    low, high = entry(table, k, 0), entry(table, k, 3)
    if TRIMS == TOGETHER:
        stay_low, stay_high = entry(table, k, 1) < entry(table, k, 2), entry(table, k, 4) < entry(table, k, 5)
        return _between(key, low, high, stay_low, stay_high)
    elif TRIMS == LOST:
        _lost(_ties(key, low, high, mask, MASKED), ranks, k)
        return _between(key, low, high, low < low, low < low)
    else:
        tie = _ties(key, low, high, mask, MASKED)
        if tl.load(pointer(ties, tl.int64, 16) + k) != 0:
            rank_low, rank_high, some_low, some_high = _ranks_before(ties, k, COUNT)
        else:
            rank_low, rank_high, some_low, some_high = _lost(tie, ranks, k)
        first_low, last_low, first_high = entry(table, k, 1), entry(table, k, 2), entry(table, k, 4)
        last_high = entry(table, k, 5)
        if _cut(rank_low, some_low, first_low, last_low) | _cut(rank_high, some_high, first_high, last_high):
            keep = _by_rank(key, tie, table, k, rank_low, rank_high, BLOCK)
        else:
            stay_low = _stay(rank_low, some_low, first_low, last_low)
            stay_high = _stay(rank_high, some_high, first_high, last_high)
            keep = _between(key, low, high, stay_low, stay_high)
        return keep


@triton.jit
def _is_open(table, ranks, k, side: tl.constexpr):
    """Whether some of the elements that equal a bound may stay from here on, so that they must be ranked."""
    key, first, last = entry(table, k, 3 * side), entry(table, k, 3 * side + 1), entry(table, k, 3 * side + 2)
    before = tl.load(pointer(ranks, tl.int64, 16) + (2 * k + side))
    return (key >= 0) & (key < ABSOLUTE) & (first < last) & (before < last)


@triton.jit
def _keys(spans, offs, mask, k: tl.constexpr, CODES: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    base = load(spans[1], offs, mask, CODES[1], ALIGN, MASKED)
    return magnitude(load(spans[k + 2], offs, mask, CODES[k + 2], ALIGN, MASKED) - base)


@triton.jit(do_not_specialize=["numel"])
def count(spans, table, ranks, ties, numel, CODES: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """Ties of each block, for the experts that have a bound to be ranked at."""
    COUNT: tl.constexpr = len(CODES) - 2
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    blocks = tl.num_programs(0).to(tl.int64) + 1
    for k in tl.static_range(COUNT):
        if _is_open(table, ranks, k, 0) | _is_open(table, ranks, k, 1):
            if tl.program_id(0) < blocks - 2:
                key = _keys(spans, offs, offs, k, CODES, ALIGN, False)
                tie = _ties(key, entry(table, k, 0), entry(table, k, 3), offs, False)
            else:
                key = _keys(spans, offs, offs < numel, k, CODES, ALIGN, True)
                tie = _ties(key, entry(table, k, 0), entry(table, k, 3), offs < numel, True)
            packed = tl.sum(tie, 0)
            place = pointer(ties, tl.int64, 16) + COUNT + 2 * k * blocks + tl.program_id(0)
            tl.store(place, _low(packed))
            tl.store(place + blocks, _high(packed))


@triton.jit(do_not_specialize=["blocks"])
def scan(table, ranks, ties, blocks, BLOCK: tl.constexpr):
    """Counts of one expert's blocks become the ranks at which they begin; `ranks` is moved past the last."""
    k = tl.program_id(0).to(tl.int64)
    flag, moved = pointer(ties, tl.int64, 16) + k, pointer(ranks, tl.int64, 16) + 2 * k
    is_open = _is_open(table, ranks, k, 0) | _is_open(table, ranks, k, 1)
    tl.store(flag, is_open.to(tl.int64))
    if is_open:
        for side in tl.static_range(2):
            place = pointer(ties, tl.int64, 16) + tl.num_programs(0) + (2 * k + side) * (blocks + 1)
            rank = tl.load(moved + side)
            for at in range(0, blocks + 1, BLOCK):
                block = at + tl.arange(0, BLOCK)
                some = tl.load(place + block, mask=block < blocks, other=0)
                tl.store(place + block, rank + tl.cumsum(some, 0) - some, mask=block <= blocks)
                rank += tl.sum(some, 0)
            tl.store(moved + side, rank)


def mode(bounds: Array, ranks: Array | None) -> int:
    """What elements that equal a bound do, as far as the bounds say it: 0 if there are none."""
    if not len(bounds):
        return 0
    if ranks is None:
        return int(TOGETHER.value)
    sides = bounds.reshape(-1, 3)
    may_stay = (sides[:, 0] >= 0) & (sides[:, 0] < 1 << 31) & (sides[:, 1] < sides[:, 2])
    return int(DIVIDED.value if may_stay.any() else LOST.value)


def rank_blocks(queue: Queue, spans: tuple[Span, ...], table: int, ranks: int, blocks: int, options: dict) -> int:
    """Count and scan; gives the address of `ties`. `options` are those of the launch that will read it."""
    experts = len(spans) - 2
    ties = queue.scratch(8 * experts * (1 + 2 * (blocks + 1)))
    addresses = tuple(span.address for span in spans)
    queue.submit(count, (blocks,), addresses, table, ranks, ties, spans[0].numel, **options)
    queue.submit(scan, (experts,), table, ranks, ties, blocks, BLOCK=SCAN, num_warps=8)
    return ties
