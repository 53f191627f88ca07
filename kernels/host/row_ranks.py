"""Ranks of |expert - base| inside each row, and the norms that DELLA's rescaling compares.

The rank of an element is the number of smaller magnitudes in its row, and of equal ones before it: what a stable sort
gives. Magnitudes are compared by their keys, as in magnitude_histogram.py: every NaN lies above infinity.

DELLA keeps an element with a probability that grows with its rank, from density - epsilon for the smallest of a row
to density + epsilon for the largest, evenly. As for DARE, an element stays if its Philox word lies below the
probability in units of 2**-32, here low + floor(rank * step): `chances`. A row of one element has its density.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import (
    BLOCK,
    CHUNK,
    ITEMSIZE,
    LANES,
    Array,
    Span,
    add_magnitudes,
    compiled,
    f32,
    f64,
    fold,
    inlined,
    load,
    magnitude,
    philox,
    subtract,
    table,
    threshold,
    u32,
    u64,
)

SHORT = 48  # elements of a row up to which comparing each with each is quicker than sorting
PIECE = 1 << 16  # elements that are ranked at once where their ranks are used up at once


@inlined
def _fill(spans: Array, at: int, m: int, base: Array, x: Array, keys: Array) -> None:
    """The keys of one row."""
    for low in range(0, m, CHUNK):
        n = min(CHUNK, m - low)
        load(spans[0], at + low, n, base)
        load(spans[1], at + low, n, x)
        subtract(x, base, n)
        for i in range(n):
            keys[low + i] = magnitude(x[i])


@inlined
def _compare(keys: Array, m: int, ranks: Array) -> None:
    for i in range(m):
        rank = u32(0)
        for j in range(m):
            rank = u32(rank + u32((keys[j] < keys[i]) | ((keys[j] == keys[i]) & (j < i))))
        ranks[i] = rank


@inlined
def _sort(keys: Array, m: int, items: Array, other: Array, counts: Array, ranks: Array) -> None:
    """By digits of eight bits, lowest first; a digit that all have in common is passed over."""
    counts[:] = 0
    for i in range(m):
        key = keys[i]
        items[i] = u64(u64(key) << u64(32)) | u64(i)
        for digit in range(4):
            counts[digit, u32(key >> u32(8 * digit)) & u32(255)] += 1
    for digit in range(4):
        if counts[digit, u32(keys[0] >> u32(8 * digit)) & u32(255)] == m:
            continue
        begin = 0
        for value in range(256):
            count = counts[digit, value]
            counts[digit, value] = begin
            begin += count
        for i in range(m):
            value = u64(items[i] >> u64(32 + 8 * digit)) & u64(255)
            other[counts[digit, value]] = items[i]
            counts[digit, value] += 1
        items, other = other, items
    for i in range(m):
        ranks[u64(items[i] & u64(0xFFFFFFFF))] = u32(i)


@compiled(numba.int64[:, ::1], numba.int64, numba.int64, numba.uint32[::1])
def _rank(spans: Array, row: int, numel: int, ranks: Array) -> None:
    base, x, keys = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(row, np.uint32)
    items, other, counts = np.empty(row, np.uint64), np.empty(row, np.uint64), np.empty((4, 256), np.int64)
    for at in range(0, numel, row):
        _fill(spans, at, row, base, x, keys)
        if row <= SHORT:
            _compare(keys, row, ranks[at : at + row])
        else:
            _sort(keys, row, items, other, counts, ranks[at : at + row])


@inlined
def _keep(x: Array, words: Array, ranks: Array, low: int, step: float, m: int) -> None:
    for i in range(m):
        x[i] = x[i] if numba.int64(words[i]) < low + numba.int64(f64(ranks[i]) * step) else f32(0)


@compiled(
    numba.int64[:, ::1],
    numba.int64,
    numba.int64,
    numba.uint32[::1],
    numba.int64,
    numba.float64,
    numba.int64[::1],
    numba.float64[:, ::1],
)
def _norms(
    spans: Array, block: int, numel: int, ranks: Array, low: int, step: float, stream: Array, partials: Array
) -> None:
    base, x, words = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK + 4, np.uint32)
    lanes = np.empty((2, LANES), np.float64)
    for begin in range(0, numel, block):
        lanes[:] = 0.0
        end = min(begin + block, numel)
        for at in range(begin, end, CHUNK):
            m = min(CHUNK, end - at)
            load(spans[0], at, m, base)
            load(spans[1], at, m, x)
            subtract(x, base, m)
            for lane in range(0, m, LANES):
                add_magnitudes(lanes[0], x[lane:m], min(LANES, m - lane))
            element = stream[3] + at
            philox(words, element >> 2, (m + 6) >> 2, stream[0], stream[1], stream[2])
            _keep(x, words[element & 3 :], ranks[at : at + m], low, step, m)
            for lane in range(0, m, LANES):
                add_magnitudes(lanes[1], x[lane:m], min(LANES, m - lane))
        partials[begin // block, 0], partials[begin // block, 1] = fold(lanes[0]), fold(lanes[1])


def chances(density: float, epsilon: float, row: int) -> tuple[int, float]:
    """(low, step): an element of this rank stays if its word lies below low + floor(rank * step)."""
    if not 0 < density < 1 or row < 2:
        return threshold(density), 0.0
    low = threshold(density - epsilon)
    return low, (threshold(density + epsilon) - low) / (row - 1)


def block_of(row: int) -> int:
    """Elements of a logical block of `norms`: whole rows, BLOCK elements at least."""
    return row * -(-BLOCK // row)


def piece_of(row: int) -> int:
    """Elements whose ranks are made at once where they are used up at once: whole blocks of `norms`."""
    return block_of(row) * max(1, PIECE // block_of(row))


def part(span: Span, begin: int, end: int) -> Span:
    return span._replace(address=span.address + begin * ITEMSIZE[span.dtype], numel=end - begin)


def host(base: Span, expert: Span, row: int, ranks: Array) -> None:
    """Write `ranks`, uint32 [numel], of whole rows of `row` elements."""
    assert row > 0
    assert base.numel == expert.numel == len(ranks)
    assert base.numel % row == 0
    _rank(table(base, expert), row, base.numel, ranks)


def norms(
    base: Span,
    expert: Span,
    row: int,
    density: float,
    epsilon: float,
    seed: int,
    tensor_id: int,
    expert_id: int,
    start: int,
    partials: Array,
) -> None:
    """Write (sum |delta|, sum |kept delta|) of each block of block_of(row) elements; the part begins at a block."""
    block, step = block_of(row), piece_of(row)
    assert start % block == 0
    assert partials.shape == (-(-base.numel // block), 2)
    low, slope = chances(density, epsilon, row)
    ranks = np.empty(min(step, base.numel), np.uint32)
    for at in range(0, base.numel, step):
        end = min(at + step, base.numel)
        cut = part(base, at, end), part(expert, at, end)
        host(*cut, row, ranks[: end - at])
        signed = seed - (1 << 64) if seed >= 1 << 63 else seed
        stream = np.array([signed, tensor_id, expert_id, start + at], np.int64)
        _norms(table(*cut), block, end - at, ranks, low, slope, stream, partials[at // block :])
