"""Counts of the magnitudes of a task vector, for finding the k-th largest without sorting or keeping it.

The key of an element is the bit pattern of |expert - base| in fp32: 31 bits, in the order of the magnitudes, all NaNs
one key above infinity. Counts are integers, so parts of a tensor add up to the same in any order, on any number of
machines. Two passes with 65,536 and 32,768 brackets find any rank exactly: see select_threshold.py.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import CHUNK, Array, Span, compiled, inlined, load, magnitude, subtract, table, u32

SMALL = 1 << 16  # brackets up to which a second set of counts costs less than it saves


@inlined
def _fill(spans: Array, at: int, m: int, x: Array, base: Array, found: Array) -> None:
    """The keys of one chunk."""
    load(spans[0], at, m, base)
    load(spans[1], at, m, x)
    subtract(x, base, m)
    for i in range(m):
        found[i] = magnitude(x[i])


@inlined
def _below(found: Array, m: int, bound: int) -> int:
    count = u32(0)
    for i in range(m):
        count = u32(count + u32(found[i] < bound))
    return count


@inlined
def _inside(found: Array, m: int, low: int, width: int) -> int:
    count = u32(0)
    for i in range(m):
        count = u32(count + u32(u32(found[i] - low) < width))
    return count


@inlined
def _distances(found: Array, m: int, low: int, kept: Array) -> None:
    for i in range(m):
        kept[i] = u32(found[i] - low)


@inlined
def _compact(found: Array, m: int, low: int, width: int, kept: Array) -> None:
    """Distances from `low` of the keys inside; without a branch, since which ones they are is unpredictable."""
    count = 0
    for i in range(m):
        distance = u32(found[i] - low)
        kept[count] = distance
        count += distance < width


@inlined
def _count_pairs(kept: Array, inside: int, by: int, counts: Array, second: Array) -> None:
    for i in range(0, inside - 1, 2):
        counts[1 + numba.uint64(u32(kept[i] >> by))] += 1
        second[numba.uint64(u32(kept[i + 1] >> by))] += 1
    if inside & 1:
        counts[1 + numba.uint64(u32(kept[inside - 1] >> by))] += 1


@inlined
def _extend(kept: Array, inside: int, low: int, by: int, ends: Array) -> None:
    """The smallest and the largest key of each bracket."""
    for i in range(inside):
        place, key = numba.uint64(u32(kept[i] >> by)), u32(kept[i] + low)
        ends[place, 0] = min(ends[place, 0], key)
        ends[place, 1] = max(ends[place, 1], key)


@compiled(
    numba.int64[:, ::1],
    numba.int64,
    numba.int64,
    numba.int64,
    numba.int64[::1],
    numba.uint32[:, ::1],
    numba.int64[::1],
    numba.int64,
)
def _histogram(
    spans: Array, low: int, shift: int, numel: int, counts: Array, ends: Array, second: Array, guess: int
) -> None:
    """`second` takes every other key, so that equal neighbours need not wait for each other; it may be empty.

    A chunk whose keys inside the brackets all equal `guess` is counted without being sorted out one by one.
    """
    base, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    found, kept = np.empty(CHUNK, np.uint32), np.empty(CHUNK, np.uint32)
    bins = len(counts) - 2
    first, width, by = u32(low), u32(min(bins << shift, (1 << 31) - low)), u32(shift)
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        _fill(spans, at, m, x, base, found)
        below, inside = _below(found, m, first), numba.int64(_inside(found, m, first, width))
        counts[0] += below
        counts[bins + 1] += m - below - inside
        if inside == 0:
            continue
        if guess >= low and _inside(found, m, u32(guess), u32(1)) == inside:
            place = (guess - low) >> shift
            counts[1 + place] += inside
            if len(ends):
                ends[place, 0], ends[place, 1] = min(ends[place, 0], u32(guess)), max(ends[place, 1], u32(guess))
            continue
        if inside == m:
            _distances(found, m, first, kept)
        else:
            _compact(found, m, first, width, kept)
        if len(ends):
            _extend(kept, inside, first, by, ends)
        if len(second):
            _count_pairs(kept, inside, by, counts, second)
        else:
            for i in range(inside):
                counts[1 + numba.uint64(u32(kept[i] >> by))] += 1
    for j in range(len(second)):
        counts[1 + j] += second[j]


@compiled(numba.int64[:, ::1], numba.int64, numba.uint32[::1])
def _keys(spans: Array, numel: int, out: Array) -> None:
    base, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        _fill(spans, at, m, x, base, out[at : at + m])


@compiled(numba.int64[:, ::1], numba.int64, numba.int64, numba.int64[::1])
def _equal(spans: Array, numel: int, key: int, count: Array) -> None:
    base, x, found = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint32)
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        _fill(spans, at, m, x, base, found)
        count[0] += _inside(found, m, u32(key), u32(1))


def check(low: int, shift: int, counts: Array, ends: Array | None) -> None:
    """What every version of the kernel asks of its brackets."""
    assert 0 <= low < 1 << 31
    assert 0 <= shift < 31
    assert len(counts) > 2
    assert counts.dtype == np.int64
    assert low + ((len(counts) - 3) << shift) < 1 << 31, "brackets beyond the largest key"
    assert ends is None or (ends.dtype == np.uint32 and ends.shape == (len(counts) - 2, 2))


def host(
    base: Span, expert: Span, low: int, shift: int, counts: Array, ends: Array | None = None, guess: int = -1
) -> None:
    """Add to counts: [keys < low, one count per bracket of 2**shift keys from `low` on, keys above them].

    `ends`, uint32 [brackets, 2], takes the smallest and the largest key of each bracket. Task vectors of 16-bit
    checkpoints have few different magnitudes: a wide bracket that holds a single one is known to the key. `guess` is
    a key that many elements may have: it makes counting quicker and changes no count.
    """
    check(low, shift, counts, ends)
    assert base.numel == expert.numel
    bins = len(counts) - 2
    second = np.zeros(bins if bins <= SMALL else 0, np.int64)
    ends = np.empty((0, 2), np.uint32) if ends is None else ends
    guess = guess if low <= guess < low + (bins << shift) else -1  # one outside has no bracket to be counted in
    _histogram(table(base, expert), low, shift, base.numel, counts, ends, second, guess)


def keys(base: Span, expert: Span, out: Array) -> None:
    """The keys themselves, as uint32."""
    assert base.numel == expert.numel == len(out)
    _keys(table(base, expert), base.numel, out)


def count_equal(base: Span, expert: Span, key: int) -> int:
    """How many elements have this key: what a part of a tensor adds to the ranks of the parts behind it."""
    count = np.zeros(1, np.int64)
    _equal(table(base, expert), base.numel, key, count)
    return int(count[0])
