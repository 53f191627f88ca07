"""Numbers of eight bits and a scale per block, such that code times scale is near the value: fp8_dequant's inverse.

    scales[b] = max(largest finite |x| of block b / limit, 2**-126), 1 where that is 0          limit: 448 or 57344
    codes[i, j] = x[i, j] / scales[b], to nearest even, saturated

Both divisions are fp32's own. `power` rounds scales up to powers of two: the second division is then exact. The floor
keeps scales normal: a subnormal one has too few digits to divide by. No number exceeds the limit by more than a
rounding, hence no code of a finite one is infinite (with `power`, what lies within half a step of 2**128 stands for
2**128, though: fp32 has no such number). NaN stays NaN; an infinity is 448 in E4M3, which has none, and stays one in
E5M2; neither has a say in the scale. Rows from a multiple of the block's height on, `row`, give the same codes
as the whole; they write the scales of their blocks, in fp32, among those of the whole matrix.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from streammerge.kernels.host.fp8_dequant import check
from streammerge.kernels.numerics import (
    CHUNK,
    INFINITY,
    Array,
    Span,
    as_f32,
    as_u32,
    compiled,
    f32,
    flags,
    inlined,
    load,
    pointer,
    store,
    table,
    u32,
)

LIMITS = {"F8_E4M3": 448.0, "F8_E5M2": 57344.0}
LARGEST = 1 << 14  # elements of a block, both sides rounded up to powers of two: one program of a GPU takes them
LONGEST = 1 << 13  # elements of its rows: one is held at once


def check_blocks(codes: Any, scales: Any, x: Any, columns: int, row: int, block: tuple[int, int]) -> None:
    """What the spans of a quantisation have to be beside that."""
    check(x, codes, scales, columns, row, block)
    height, width = block
    assert row % height == 0
    assert width <= LONGEST
    assert scales.dtype == "F32"
    assert 1 << (height - 1).bit_length() + (width - 1).bit_length() <= LARGEST


@inlined
def _largest(x: Array, m: int) -> int:
    """The largest finite magnitude's bits."""
    peak = u32(0)
    for i in range(m):
        bits = u32(as_u32(x[i]) & u32(0x7FFFFFFF))
        peak = max(peak, bits if bits < u32(INFINITY) else u32(0))
    return peak


@inlined
def _divide(x: Array, scale: float, m: int) -> None:
    for i in range(m):
        x[i] = x[i] / scale


@inlined
def _scale(peak: int, limit: float, power: bool) -> float:
    if peak == u32(0):
        return f32(1)
    scale = max(as_u32(f32(as_f32(peak) / limit)), u32(0x00800000))
    return as_f32(u32(u32(scale + u32(0x007FFFFF)) & u32(0x7F800000)) if power else scale)


@compiled(
    numba.int64[:, ::1], numba.int64, numba.int64, numba.int64, numba.int64, numba.int64, numba.float32,
    numba.boolean, numba.uint32[::1],
)  # fmt: skip
def _quant(
    spans: Array,
    columns: int,
    row: int,
    height: int,
    width: int,
    numel: int,
    limit: float,
    power: bool,
    peaks: Array,
) -> None:
    across = (columns + width - 1) // width
    x, largest, scales = np.empty(CHUNK, np.float32), np.empty(across, np.uint32), np.empty(across, np.float32)
    for top in range(0, numel, height * columns):  # a row of blocks: read twice, the second time from the cache
        bottom = min(numel, top + height * columns)
        largest[:] = 0
        for writing in (False, True):
            for at in range(top, bottom, CHUNK):
                m = min(CHUNK, bottom - at)
                peaks[0] = max(peaks[0], load(spans[2], at, m, x))
                j, low = at % columns, 0
                while low < m:  # from one block to the next
                    high, b = min(m, low + columns - j, low + width - j % width), j // width
                    if writing:
                        _divide(x[low:high], scales[b], high - low)
                    else:
                        largest[b] = max(largest[b], _largest(x[low:high], high - low))
                    j = (j + high - low) % columns
                    low = high
                if writing:
                    store(x, spans[0], at, m)
            if not writing:
                for b in range(across):
                    scales[b] = _scale(largest[b], limit, power)
        place = (row + top // columns) // height * across
        numba.carray(pointer(spans[1, 0] + 4 * place), (across,), np.float32)[:] = scales


def host(
    codes: Span,
    scales: Span,
    x: Span,
    columns: int,
    row: int = 0,
    block: tuple[int, int] = (128, 128),
    power: bool = False,
) -> Array:
    """Write the codes and their blocks' scales; say what `x` holds."""
    check_blocks(codes, scales, x, columns, row, block)
    peaks = np.zeros(1, np.uint32)
    _quant(table(codes, scales, x), columns, row, *block, x.numel, LIMITS[codes.dtype], power, peaks)
    return flags(peaks)
