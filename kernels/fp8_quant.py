"""Numbers of eight bits and a scale per block, such that code times scale is near the value: fp8_dequant's inverse.

    scales[b] = max(largest finite |x| of block b / limit, 2**-126), 1 where that is 0          limit: 448 or 57344
    codes[i, j] = x[i, j] / scales[b], to nearest even, saturated

Both divisions are fp32's own. `power` rounds scales up to powers of two: the second division is then exact. The floor
keeps scales normal: a subnormal one has too few digits to divide by. No number exceeds the limit by more than a
rounding, hence no code of a finite one is infinite (with `power`, what lies within half a step of 2**128 stands for
2**128, though: fp32 has no such number). NaN stays NaN; an infinity is 448 in E4M3, which has none, and stays one in
E5M2; neither has a say in the scale. Rows from a multiple of the block's height on, `row`, give the same codes
as the whole; they write the scales of their blocks, in fp32, among those of the whole matrix.

What comes back differs from x by at most 2**-4 of x for E4M3 (2**-3 for E5M2), or, for the small ones, by 2**-10
(2**-17) of the scale. Quantising what comes back gives the same values; the same codes too, unless a block's largest
code is 224 (28672) and scales are powers of two: half the scale then holds them as well, and is taken.

On a GPU a program takes a block, and reads it twice: the second time from the cache beside it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import ABSOLUTE, INFINITY, alignment, as_f32, as_u32, block_size, load, pointer, store
from .device import codes as dtype_codes
from .fp8_dequant import spread
from .host.fp8_quant import LIMITS, check_blocks
from .numerics import Array, Span
from .queue import Queue

LAUNCH = {"BLOCK": 4096, "num_warps": 8}

CASES = [
    (rows, columns, dtypes, row, block, power)
    for dtypes in (("F8_E4M3", "BF16"), ("F8_E5M2", "F32"), ("F8_E4M3", "F16"))
    for rows, columns, row, block, power in (
        (0, 5, 0, (128, 128), False), (1, 1, 0, (128, 128), True), (127, 129, 0, (128, 128), False),
        (300, 257, 128, (128, 128), True), (256, 384, 128, (128, 128), False), (30, 144, 8, (4, 48), True),
    )
]  # fmt: skip


@triton.jit
def _part(first, i, j, stride, below, beside):
    """Elements [R, C] of rows first + i of a block and columns j; which of them exist."""
    return (first + i).to(tl.int64)[:, None] * stride + j[None, :], (first + i < below)[:, None] & (j < beside)[None, :]


@triton.jit
def _block(
    spans,
    at,
    stride,
    below,
    beside,
    place,
    peaks,
    LIMIT: tl.constexpr,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POWER: tl.constexpr,
    MASKED: tl.constexpr,
):
    """A block of `below` rows and `beside` columns whose first element is `at`, ROWS at a time."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    size = tl.zeros((ROWS, COLUMNS), tl.int32)
    for first in range(0, HEIGHT, ROWS):
        offs, mask = _part(first, i, j, stride, below, beside)
        x = load(spans[2], at + offs, mask, CODES[1], ALIGN, MASKED)
        size = tl.maximum(size, (as_u32(x) & ABSOLUTE).to(tl.int32))
    largest = tl.max(size)
    if largest >= INFINITY:  # rare
        tl.atomic_max(pointer(peaks, tl.int32, 1), largest, sem="relaxed")
        size = tl.zeros((ROWS, COLUMNS), tl.int32)
        for first in range(0, HEIGHT, ROWS):
            offs, mask = _part(first, i, j, stride, below, beside)
            bits = (as_u32(load(spans[2], at + offs, mask, CODES[1], ALIGN, MASKED)) & ABSOLUTE).to(tl.int32)
            size = tl.where(bits < INFINITY, tl.maximum(size, bits), size)
        largest = tl.max(size)
    scale = tl.div_rn(as_f32(largest), tl.full([], LIMIT, tl.float32))
    bits = tl.maximum(scale.to(tl.int32, bitcast=True), 0x00800000)
    if POWER:
        bits = (bits + 0x007FFFFF) & 0x7F800000
    scale = as_f32(tl.where(largest == 0, 0x3F800000, bits).to(tl.int32))
    tl.store(pointer(spans[1], tl.float32, 1) + place, scale)
    inverse = tl.div_rn(tl.full([], 1.0, tl.float32), scale)
    for first in range(0, HEIGHT, ROWS):
        offs, mask = _part(first, i, j, stride, below, beside)
        x = load(spans[2], at + offs, mask, CODES[1], ALIGN, MASKED)
        if POWER:  # an exact reciprocal: the product is the quotient
            x = x * inverse
        else:
            x = tl.div_rn(x, scale)
        store(spans[0], at + offs, x, mask, CODES[0], ALIGN, MASKED)


@triton.jit(do_not_specialize=["rows", "columns", "first", "across"])
def _quant(
    spans,
    rows,
    columns,
    first,
    across,
    peaks,
    LIMIT: tl.constexpr,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    HEIGHT: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    POWER: tl.constexpr,
):
    """`first` is the number of the first row of blocks, COLUMNS the power of two that holds a block's."""
    down, right = (tl.program_id(0) // across).to(tl.int64), (tl.program_id(0) % across).to(tl.int64)
    stride = tl.cast(columns, tl.int64)
    stride = tl.multiple_of(stride, 16) if ALIGN > 1 else stride
    at, place = down * HEIGHT * stride + right * WIDTH, (first + down) * across + right
    below, beside = tl.minimum(rows - down * HEIGHT, HEIGHT), tl.minimum(stride - right * WIDTH, WIDTH)
    if (HEIGHT % ROWS == 0) & (below == HEIGHT) & (beside == COLUMNS):
        _block(spans, at, stride, below, beside, place, peaks, LIMIT, CODES, ALIGN, HEIGHT, ROWS, COLUMNS, POWER, False)
    else:
        _block(spans, at, stride, below, beside, place, peaks, LIMIT, CODES, ALIGN, HEIGHT, ROWS, COLUMNS, POWER, True)


def launch(
    queue: Queue,
    codes: Span,
    scales: Span,
    x: Span,
    columns: int,
    row: int = 0,
    block: tuple[int, int] = (128, 128),
    power: bool = False,
) -> Array:
    check_blocks(codes, scales, x, columns, row, block)
    peaks, found = queue.peaks(1)
    height, width = block
    across = triton.cdiv(columns, width)
    tall, wide = triton.next_power_of_2(height), triton.next_power_of_2(width)
    part = min(tall, max(block_size(LAUNCH["BLOCK"]) // wide, 1))
    even = columns % 16 == 0 and width % 16 == 0
    queue.submit(
        _quant,
        (triton.cdiv(x.numel // columns, height) * across,),
        (codes.address, scales.address, x.address),
        x.numel // columns,
        columns,
        row // height,
        across,
        peaks,
        LIMIT=LIMITS[codes.dtype],
        CODES=dtype_codes(codes, x),
        ALIGN=alignment(codes, x) if even else 1,
        HEIGHT=height,
        WIDTH=width,
        ROWS=part,
        COLUMNS=wide,
        POWER=power,
        num_warps=min(max(LAUNCH["num_warps"], part * wide // 512), 16),  # more for blocks that are one long row
    )
    return found


def reference(
    codes: Tensor,
    scales: Tensor,
    x: Tensor,
    columns: int,
    row: int = 0,
    block: tuple[int, int] = (128, 128),
    power: bool = False,
) -> Array:
    """The same in torch."""
    (height, width), rows, value = block, x.numel() // columns, x.float()
    down, across = -(-rows // height), -(-columns // width)
    size = torch.where(value.isfinite(), value.abs(), 0).view(rows, columns)
    size = torch.nn.functional.pad(size, (0, across * width - columns, 0, down * height - rows))
    largest = size.view(down, height, across, width).amax((1, 3)) if rows else size.new_zeros(0, across)
    limit = torch.full_like(largest, LIMITS[truth.NAMES[codes.dtype]])  # by a number, CUDA would take the reciprocal
    scale = (largest / limit).clamp(min=2.0**-126)
    if power:
        scale = ((scale.view(torch.int32) + 0x007FFFFF) & 0x7F800000).view(torch.float32)
    scale = torch.where(largest == 0, 1, scale)
    scales.view(-1, across)[row // height : row // height + down] = scale
    truth.write(codes, value / spread(scales, rows, columns, row, block)[1].reshape(-1))
    return truth.flags(x)


def inputs(
    rows: int,
    columns: int,
    dtypes: tuple[str, str],
    row: int,
    block: tuple[int, int],
    power: bool,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    codes, x = truth.tensors(rows * columns, dtypes, 2, device, seed)
    blocks = -(-(row + rows) // block[0]) * -(-columns // block[1])
    scales = torch.full((blocks,), np.nan, device=device)
    return codes, scales, x, columns, row, block, power


def bytes_moved(codes: Any, scales: Any, x: Any, *rest: Any) -> int:
    return truth.nbytes(codes, scales, x)
