"""The L1 norms that rescaling after a trim compares: of a task vector, and of what lies strictly between two keys.

Elements that tie at a bound share one magnitude, so their part of the norm is a count times a value; what remains is
this sum. Taken per logical block of 4,096 elements in the order that numerics.py fixes.
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import (
    BLOCK,
    CHUNK,
    LANES,
    Array,
    Span,
    add_magnitudes,
    compiled,
    f32,
    fold,
    inlined,
    load,
    magnitude,
    subtract,
    table,
)


@inlined
def _between(x: Array, low: int, high: int, m: int) -> None:
    for i in range(m):
        key = numba.int64(magnitude(x[i]))
        x[i] = x[i] if low < key < high else f32(0)


@compiled(numba.int64[:, ::1], numba.int64, numba.int64, numba.int64, numba.float64[:, ::1])
def _norms(spans: Array, low: int, high: int, numel: int, partials: Array) -> None:
    base, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    lanes = np.empty((2, LANES), np.float64)
    for block in range(len(partials)):
        lanes[:] = 0.0
        for at in range(block * BLOCK, min((block + 1) * BLOCK, numel), CHUNK):
            m = min(CHUNK, numel - at)
            load(spans[0], at, m, base)
            load(spans[1], at, m, x)
            subtract(x, base, m)
            for first in range(0, m, LANES):
                add_magnitudes(lanes[0], x[first:m], min(LANES, m - first))
            _between(x, low, high, m)
            for first in range(0, m, LANES):
                add_magnitudes(lanes[1], x[first:m], min(LANES, m - first))
        partials[block, 0], partials[block, 1] = fold(lanes[0]), fold(lanes[1])


def host(base: Span, expert: Span, low: int, high: int, partials: Array) -> None:
    """Write (sum |delta|, sum |delta| over low < key < high) of each block."""
    assert base.numel == expert.numel
    assert partials.shape == (-(-base.numel // BLOCK), 2)
    _norms(table(base, expert), low, high, base.numel, partials)
