"""Numbers of eight bits times the scale of their block, the way block-quantised checkpoints keep weights.

    out[i, j] = codes[i, j] * scales[(row + i) // height, j // width]

in fp32, then one rounding to the dtype of `out`. DeepSeek-V3's convention: `weight_scale_inv` is what to multiply by,
blocks are 128 x 128, those at the lower and the right edge are smaller. The matrix is flat, row after row; `out` and
`codes` are any whole rows of it, `row` is the first one's number, `scales` are those of the whole matrix. Their dtype
is any floating one, or F8_E8M0: an exponent alone, 2**(code - 127), of which 255 is NaN.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from streammerge.kernels.numerics import (
    CHUNK,
    CODES,
    NAN,
    Array,
    Span,
    as_f32,
    compiled,
    flags,
    inlined,
    load,
    pointer,
    store,
    table,
    u32,
)

E8M0 = len(CODES)  # a code of this file: scales alone have this dtype


def scale_code(scales: Any) -> int:
    """Of a span."""
    return E8M0 if scales.dtype == "F8_E8M0" else CODES[scales.dtype]


def check(values: Any, codes: Any, scales: Any, columns: int, row: int, block: tuple[int, int]) -> None:
    """What the spans on both sides of a quantisation have to be: whole rows, and scales of at least these."""
    height, width = block
    assert columns > 0
    assert row >= 0
    assert 0 < min(block) <= max(block) < 1 << 31
    assert values.numel == codes.numel
    assert codes.numel % columns == 0
    assert codes.dtype in ("F8_E4M3", "F8_E5M2")
    assert scales.numel >= -(-(row + codes.numel // columns) // height) * -(-columns // width) or not codes.numel


@inlined
def _scales(source: Array, start: int, m: int, scales: Array) -> int:
    if source[1] != E8M0:
        return load(source, start, m, scales)
    exponents, peak = numba.carray(pointer(source[0] + start), (m,), np.uint8), u32(0)
    for i in range(m):
        bits = u32(u32(exponents[i]) << u32(23))
        bits = u32(0x00400000) if exponents[i] == 0 else u32(NAN) if exponents[i] == 255 else bits
        scales[i] = as_f32(bits)
        peak = max(peak, bits)
    return peak


@inlined
def _multiply(x: Array, scale: float, m: int) -> None:
    for i in range(m):
        x[i] *= scale


@compiled(
    numba.int64[:, ::1], numba.int64, numba.int64, numba.int64, numba.int64, numba.int64, numba.uint32[::1]
)  # fmt: skip
def _dequant(spans: Array, columns: int, row: int, height: int, width: int, numel: int, peaks: Array) -> None:
    across, first = (columns + width - 1) // width, row // height
    used = ((row + numel // columns - 1) // height + 1 - first) * across
    x, scales = np.empty(CHUNK, np.float32), np.empty(used, np.float32)
    peaks[1] = _scales(spans[2], first * across, used, scales)
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        peaks[0] = max(peaks[0], load(spans[1], at, m, x))
        i, j, low = at // columns, at % columns, 0
        while low < m:  # from one scale to the next
            high = min(m, low + columns - j, low + width - j % width)
            _multiply(x[low:high], scales[((row + i) // height - first) * across + j // width], high - low)
            j += high - low
            if j == columns:
                i, j = i + 1, 0
            low = high
        store(x, spans[0], at, m)


def host(
    out: Span, codes: Span, scales: Span, columns: int, row: int = 0, block: tuple[int, int] = (128, 128)
) -> Array:
    """Write `out`; say what the codes and the scales that belong to them hold."""
    check(out, codes, scales, columns, row, block)
    peaks = np.zeros(2, np.uint32)
    if codes.numel:
        spans = np.vstack([table(out, codes), [(scales.address, scale_code(scales))]])
        _dequant(spans, columns, row, *block, codes.numel, peaks)
    return flags(peaks)
