"""Inner products of all pairs of inputs (or of inputs minus a base): norms, cosines, Gram matrices.

Values are fp32 (a difference is rounded to fp32), products are fp64 and hence exact, sums are fp64 in a fixed order:
per logical block as numerics.py says, or, in `columns`, one row after the other. Entries are the upper triangle,
i <= j, row by row. A block is 4,096 elements, or a row's length for what is needed per row. Parts that begin at a
multiple of the block give the same bits as the whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from streammerge.kernels.numerics import CHUNK, LANES, Array, Span, compiled, f64, fold, inlined, load, subtract, table


@inlined
def _add_products(total: Array, x: Array, y: Array, m: int) -> None:
    for i in range(m):
        total[i] += f64(x[i]) * f64(y[i])


@inlined
def _read(spans: Array, at: int, m: int, base: Array, rows: Array) -> None:
    """One chunk of every input; spans[0] is the base, or has address 0."""
    if spans[0, 0] != 0:
        load(spans[0], at, m, base)
    for i in range(len(rows)):
        load(spans[i + 1], at, m, rows[i])
        if spans[0, 0] != 0:
            subtract(rows[i], base, m)


@compiled(numba.int64[:, ::1], numba.int64, numba.int64, numba.float64[:, ::1])
def _blocks(spans: Array, block: int, numel: int, partials: Array) -> None:
    count, pairs = len(spans) - 1, partials.shape[1]
    base, rows = np.empty(CHUNK, np.float32), np.empty((count, CHUNK), np.float32)
    lanes = np.empty((pairs, LANES), np.float64)
    for b in range(len(partials)):
        stop = min((b + 1) * block, numel)
        lanes[:] = 0.0
        for at in range(b * block, stop, CHUNK):
            m = min(CHUNK, stop - at)
            _read(spans, at, m, base, rows)
            pair = 0
            for i in range(count):
                for j in range(i, count):
                    for low in range(0, m, LANES):
                        _add_products(lanes[pair], rows[i, low:m], rows[j, low:m], min(LANES, m - low))
                    pair += 1
        for pair in range(pairs):
            partials[b, pair] = fold(lanes[pair])


@compiled(numba.int64[:, ::1], numba.int64, numba.float64[:, ::1])
def _columns(spans: Array, numel: int, sums: Array) -> None:
    count, ncols, pairs = len(spans) - 1, len(sums), sums.shape[1]
    base, rows = np.empty(CHUNK, np.float32), np.empty((count, CHUNK), np.float32)
    total = np.empty((pairs, CHUNK), np.float64)
    for left in range(0, ncols, CHUNK):
        m = min(CHUNK, ncols - left)
        for pair in range(pairs):
            total[pair, :m] = sums[left : left + m, pair]
        for at in range(left, numel, ncols):
            _read(spans, at, m, base, rows)
            pair = 0
            for i in range(count):
                for j in range(i, count):
                    _add_products(total[pair], rows[i], rows[j], m)
                    pair += 1
        for pair in range(pairs):
            sums[left : left + m, pair] = total[pair, :m]


def _table(inputs: Sequence[Span], base: Span | None) -> Array:
    assert all(span.numel == inputs[0].numel for span in inputs)
    return table(base or Span(0, "F32", 0), *inputs)


def host(inputs: Sequence[Span], base: Span | None, block: int, partials: Array) -> None:
    """Write the Gram entries of each block."""
    assert partials.shape == (-(-inputs[0].numel // block), len(inputs) * (len(inputs) + 1) // 2)
    _blocks(_table(inputs, base), block, inputs[0].numel, partials)


def columns(inputs: Sequence[Span], base: Span | None, ncols: int, sums: Array) -> None:
    """Add the Gram entries of each column, over whole rows in their order, to sums[ncols, pairs]."""
    assert sums.shape == (ncols, len(inputs) * (len(inputs) + 1) // 2)
    assert inputs[0].numel % ncols == 0
    _columns(_table(inputs, base), inputs[0].numel, sums)
