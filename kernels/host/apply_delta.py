"""A merged task vector on top of the base, for methods that make one of whole matrices.

    out = base + scale * delta          where scale * delta is zero: base, to the sign of a zero

fp32, one rounding at the end.
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import CHUNK, Array, Span, compiled, f32, flags, inlined, load, store, table


@inlined
def _step(row: Array, delta: Array, scale: float, m: int) -> None:
    for i in range(m):
        step = scale * delta[i]
        row[i] = row[i] if step == f32(0) else row[i] + step


@compiled(numba.int64[:, ::1], numba.float32, numba.int64, numba.uint32[::1])
def _apply(spans: Array, scale: float, numel: int, peaks: Array) -> None:
    row, delta = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        peaks[0] = max(peaks[0], load(spans[1], at, m, row))
        peaks[1] = max(peaks[1], load(spans[2], at, m, delta))
        _step(row, delta, scale, m)
        store(row, spans[0], at, m)


def host(out: Span, base: Span, delta: Span, scale: float) -> Array:
    """Write `out`; say of base and delta what they hold."""
    assert out.numel == base.numel == delta.numel
    peaks = np.zeros(2, np.uint32)
    _apply(table(out, base, delta), np.float32(scale), out.numel, peaks)
    return flags(peaks)
