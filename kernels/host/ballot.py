"""One sample's gradient of a tensor into its votes and into the sum of all samples'; on a GPU torch does it.

    votes += sign(-g)      I8 or I16; 0 and NaN abstain          or, with votes of F32 (the mean estimator): votes += g
    total += g             F32; a NaN counts as 0

One pass over the memory, on one thread.
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import CHUNK, Array, Span, compiled, f32, inlined, load, pointer, table

I8, I16, F32 = range(3)
KINDS = {"I8": I8, "I16": I16, "F32": F32}
INFINITY = 0x7F800000


@inlined
def _vote(votes: Array, row: Array, m: int) -> None:
    for i in range(m):
        votes[i] += (row[i] < f32(0)) - (row[i] > f32(0))


@inlined
def _sum(total: Array, row: Array, m: int) -> None:
    for i in range(m):
        total[i] += row[i]


@inlined
def _without_nans(row: Array, m: int) -> int:
    count = 0
    for i in range(m):
        if row[i] != row[i]:
            row[i] = f32(0)
            count += 1
    return count


@compiled(numba.int64[:, ::1], numba.int64, numba.int64, numba.int64, numba.int64, numba.int64[::1])
def _add(source: Array, votes: int, kind: int, total: int, numel: int, nans: Array) -> None:
    row = np.empty(CHUNK, np.float32)
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        peak = load(source[0], at, m, row)
        if kind == F32:
            _sum(numba.carray(pointer(votes + 4 * at), (m,), np.float32), row, m)
        elif kind == I8:
            _vote(numba.carray(pointer(votes + at), (m,), np.int8), row, m)
        else:
            _vote(numba.carray(pointer(votes + 2 * at), (m,), np.int16), row, m)
        if peak > INFINITY:
            nans[0] += _without_nans(row, m)
        _sum(numba.carray(pointer(total + 4 * at), (m,), np.float32), row, m)


def add(gradient: Span, votes: Span, total: Span) -> int:
    """Enter one gradient; the number of its NaNs."""
    assert gradient.numel == votes.numel == total.numel
    assert total.dtype == "F32"
    nans = np.zeros(1, np.int64)
    _add(table(gradient), votes.address, KINDS[votes.dtype], total.address, gradient.numel, nans)
    return int(nans[0])
