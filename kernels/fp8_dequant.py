"""Numbers of eight bits times the scale of their block, the way block-quantised checkpoints keep weights.

    out[i, j] = codes[i, j] * scales[(row + i) // height, j // width]

in fp32, then one rounding to the dtype of `out`. DeepSeek-V3's convention: `weight_scale_inv` is what to multiply by,
blocks are 128 x 128, those at the lower and the right edge are smaller. The matrix is flat, row after row; `out` and
`codes` are any whole rows of it, `row` is the first one's number, `scales` are those of the whole matrix. Their dtype
is any floating one, or F8_E8M0: an exponent alone, 2**(code - 127), of which 255 is NaN. Exact but for the product's
rounding to fp32 and that to `out`; NaN and infinities go through the product like any value.

On a GPU a program takes a tile that lies in one column of blocks, hence one scale per row of the tile. Codes are read
16 at a time where rows begin at multiples of 16.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import (
    ABSOLUTE,
    BF16,
    E4M3,
    INFINITY,
    NAN,
    alignment,
    as_f32,
    as_u32,
    block_size,
    fetch,
    load,
    pointer,
    put,
    store,
)
from .device import codes as dtype_codes
from .host.fp8_dequant import E8M0, check, scale_code
from .numerics import Array, Span
from .queue import Queue

LAUNCH = {"BLOCK": 4096, "COLUMNS": 128, "num_warps": 4}
EXPONENT: tl.constexpr = tl.constexpr(E8M0)

CASES = [
    (rows, columns, dtypes, row, block)
    for dtypes in (("BF16", "F8_E4M3", "F32"), ("F32", "F8_E5M2", "BF16"), ("F16", "F8_E4M3", "BF16"))
    for rows, columns, row, block in (
        (0, 5, 0, (128, 128)), (1, 1, 0, (128, 128)), (127, 129, 0, (128, 128)), (300, 257, 57, (128, 128)),
        (256, 384, 128, (128, 128)), (30, 144, 3, (4, 48)), (9, 320, 1, (1, 320)),
    )
]  # fmt: skip


@triton.jit
def _decode(address, offs, mask, CODE: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """device.load for eight bits in half the instructions: exponents move by an exact product. NaN of E4M3 is +-480."""
    code = fetch(pointer(address, tl.uint8, ALIGN), offs, mask, MASKED)
    if CODE == E4M3:
        top = (code.to(tl.uint32) << 24).to(tl.int32, bitcast=True)
        bits = (top >> 4) & -0x78100000  # of the copies of the sign that came in, the highest stays
        return bits.to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2**(127 - 7)
    else:  # the upper byte of an F16
        return (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _scale(address, offs, mask, CODE: tl.constexpr, MASKED: tl.constexpr):
    if CODE == EXPONENT:
        code = fetch(pointer(address, tl.uint8, 1), offs, mask, MASKED).to(tl.uint32)
        return as_f32(tl.where(code == 0, 0x00400000, tl.where(code == 255, NAN, code << 23)).to(tl.uint32))
    else:
        return load(address, offs, mask, CODE, 1, MASKED)


@triton.jit
def _largest(value, CODE: tl.constexpr):
    """At least 480 in a tile with something other than numbers, as a float or, for whom NaN is NaN, as bits."""
    if CODE == E4M3:
        return tl.max(tl.abs(value))
    else:
        return tl.max((as_u32(value) & ABSOLUTE).to(tl.int32))


@triton.jit
def _tile(
    spans,
    offs,
    places,
    inside,
    rows,
    peaks,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
):
    """`offs` [R, C] of elements and `places` [R] of their scales; `inside` and `rows` are the masks of both."""
    LIMIT: tl.constexpr = 480.0 if CODES[1] == E4M3 else INFINITY
    value = _decode(spans[1], offs, inside, CODES[1], ALIGN, MASKED)
    scale = _scale(spans[2], places, rows, CODES[2], MASKED)
    worst = tl.max((as_u32(scale) & ABSOLUTE).to(tl.int32))
    if (_largest(value, CODES[1]) < LIMIT) & (worst < INFINITY):
        result = value * scale[:, None]
        if CODES[0] == BF16:  # no product is NaN: device.store without its test
            bits = as_u32(result)
            nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).to(tl.uint16)
            put(pointer(spans[0], tl.uint16, ALIGN), offs, nearest, inside, MASKED)
        else:
            store(spans[0], offs, result, inside, CODES[0], ALIGN, MASKED)
    else:
        if CODES[1] == E4M3:
            value = tl.where(tl.abs(value) == 480, as_f32(tl.full(value.shape, NAN, tl.uint32)), value)
        store(spans[0], offs, value * scale[:, None], inside, CODES[0], ALIGN, MASKED)
        highest = tl.max((as_u32(value) & ABSOLUTE).to(tl.int32))
        tl.atomic_max(pointer(peaks, tl.int32, 1), highest, sem="relaxed")
        tl.atomic_max(pointer(peaks, tl.int32, 1) + 1, worst, sem="relaxed")


@triton.jit(do_not_specialize=["rows", "columns", "phase", "first", "across"])
def _dequant(
    spans,
    rows,
    columns,
    phase,
    first,
    across,
    peaks,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """The first row lies `phase` rows below the top of the row of blocks `first`. HEIGHT or WIDTH 0: there is one.

    What is 64 bits wide is one number per program, or the product of two narrower ones: those are cheap.
    """
    tiles = (columns + COLUMNS - 1) // COLUMNS
    top = (tl.program_id(0) // tiles).to(tl.int64) * ROWS
    left = (tl.program_id(0) % tiles).to(tl.int64) * COLUMNS
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    stride = tl.cast(columns, tl.int64)
    stride = tl.multiple_of(stride, 16) if ALIGN > 1 else stride
    offs = (top * stride + left) + (i.to(tl.int64)[:, None] * stride + j[None, :])
    if HEIGHT == 0:
        places = tl.zeros_like(i).to(tl.int64)
    else:
        down = ((phase + top) % HEIGHT).to(tl.int32) + i
        places = (first + (phase + top) // HEIGHT) * across + (down // HEIGHT).to(tl.int64) * tl.cast(across, tl.int64)
    if WIDTH > 0:
        places += left // WIDTH
    if (top + ROWS <= rows) & (left + COLUMNS <= columns):
        _tile(spans, offs, places, offs, i, peaks, CODES, ALIGN, False)
    else:
        below = top + i < rows
        inside = below[:, None] & (left + j < stride)[None, :]
        _tile(spans, offs, places, inside, below, peaks, CODES, ALIGN, True)


def launch(
    queue: Queue,
    out: Span,
    codes: Span,
    scales: Span,
    columns: int,
    row: int = 0,
    block: tuple[int, int] = (128, 128),
) -> Array:
    check(out, codes, scales, columns, row, block)
    peaks, found = queue.peaks(2)
    height, width = block
    rows, whole = codes.numel // columns, width >= columns
    tile = LAUNCH["COLUMNS"] if whole else min(LAUNCH["COLUMNS"], width & -width)
    high = block_size(LAUNCH["BLOCK"]) // tile
    queue.submit(
        _dequant,
        (triton.cdiv(rows, high) * triton.cdiv(columns, tile),),
        (out.address, codes.address, scales.address),
        rows,
        columns,
        row % height,
        row // height,
        triton.cdiv(columns, width),
        peaks,
        CODES=(*dtype_codes(out, codes), scale_code(scales)),
        ALIGN=alignment(out, codes) if columns % 16 == 0 else 1,
        HEIGHT=0 if height >= row + rows else height,
        WIDTH=0 if whole else width,
        ROWS=high,
        COLUMNS=tile,
        num_warps=LAUNCH["num_warps"],
    )
    return found


def spread(scales: Tensor, rows: int, columns: int, row: int, block: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """The fp32 scales of the blocks that the rows touch, [blocks, across], and each element's, [rows, columns]."""
    height, width = block
    if scales.dtype == torch.uint8:  # torch's own name for F8_E8M0 is younger than what this library needs
        exponent = scales.int() << 23
        exponent[scales == 0], exponent[scales == 255] = 0x00400000, NAN.value
        scales = exponent.view(torch.float32)
    first, down = row // height, -(-(row + rows) // height) if rows else row // height
    used = scales.float().view(-1, -(-columns // width))[first:down]
    i = torch.arange(row, row + rows, device=scales.device) // height - first
    return used, used[i][:, torch.arange(columns, device=scales.device) // width]


def reference(
    out: Tensor, codes: Tensor, scales: Tensor, columns: int, row: int = 0, block: tuple[int, int] = (128, 128)
) -> Array:
    """The same in torch; scales of dtype uint8 are F8_E8M0."""
    used, each = spread(scales, codes.numel() // columns, columns, row, block)
    truth.write(out, codes.float() * each.reshape(-1))
    return truth.flags(codes, used)


def inputs(
    rows: int,
    columns: int,
    dtypes: tuple[str, str, str],
    row: int,
    block: tuple[int, int],
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    out, codes = truth.tensors(rows * columns, dtypes[:2], 2, device, seed)
    blocks = -(-(row + rows) // block[0]) * -(-columns // block[1])
    scales = truth.tensors(blocks, dtypes[2:], 2, device, seed + 1)[1]
    return out, codes, scales, columns, row, block


def bytes_moved(out: Any, codes: Any, scales: Any, *rest: Any) -> int:
    return truth.nbytes(out, codes, scales)
