"""A tensor in another dtype: widened exactly or rounded once, every NaN as one pattern.

From any of the six dtypes to any, to nearest even or, with `rounding`, up or down by chance (numerics.Stochastic):
right on average, the same bits wherever a tensor is cut, exact values untouched. As everywhere the value passes
through fp32: F64 is rounded to it first, an F64 output holds it. F8_E4M3 saturates at 448; elsewhere what lies beyond
the largest finite number becomes an infinity, by rounding to nearest even where rounding is by chance too.
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import (
    CHUNK,
    ROUNDING,
    Array,
    Span,
    Stochastic,
    compiled,
    dither,
    flags,
    key,
    load,
    store,
    table,
    words_from,
)


@compiled(numba.int64[:, ::1], numba.int64, numba.int64[::1], numba.int64, numba.uint32[::1])
def _cast(spans: Array, start: int, rounding: Array, numel: int, peaks: Array) -> None:
    row, words = np.empty(CHUNK, np.float32), np.empty(CHUNK + 8, np.uint32)
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        peaks[0] = max(peaks[0], load(spans[1], at, m, row))
        if len(rounding) > 0:
            dither(row, words_from(words, start + at, m, rounding, ROUNDING), spans[0, 1], m)
        store(row, spans[0], at, m)


def host(out: Span, source: Span, start: int = 0, rounding: Stochastic | None = None) -> Array:
    """Write `out`, whose first element is element `start` of the tensor; say whether the source is finite."""
    assert out.numel == source.numel
    peaks = np.zeros(1, np.uint32)
    _cast(table(out, source), start, key(rounding), out.numel, peaks)
    return flags(peaks)
