"""Matrix products in fp32 for the kernels that need them: operands formed on the way in, results on the way out.

    acc[r, c] = sum_k a[r, k] * b[c, k]         a, b: spans of any dtype, or the difference of two, widened exactly

What the multiplication unit gets (`precision`), and the largest relative error of one product that comes of it:
  ieee    fp32, multiplied and added in fp32 without tensor cores: none.
  tf32    11 significant bits, to nearest: 2**-10.
  tf32x3  x = high + low, 11 bits each: 1.3 * 2**-20. low * low is dropped; of low the unit cuts all beyond 11 bits.
  bf16x3  x = high + low, 8 bits each: 3 * 2**-16. Of 16 bits, which most differences of two bf16 numbers have at most,
          nothing but low * low is lost: 2**-16.
The sum is fp32 throughout, in order of k, DEPTH at a time. Rounding is written out here and not left to the compiler,
so that Triton's interpreter shows it too; what it cannot show is that tensor cores truncate as they add. An operand
that is infinite counts as NaN, since no split of it has a sum; with tf32 and tf32x3 so does one beyond 2**114.

On Hopper, tensor cores take tf32 from shared memory only with k contiguous, bf16 also otherwise. Tiles arrive by
asynchronous copies of the raw items, are widened and split in registers, and stay there (a) or go to shared memory
again (b). Where k runs across memory and the operand is tf32, b is read such that a thread holds a run of k: its
stores are then 16 bytes wide; read as usual, they would be 4 bytes wide and collide sixteen at a time.
"""

# mypy: ignore-errors
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from .device import INTERPRETED, alignment, as_u32, codes, load, store, width
from .numerics import CODES, ITEMSIZE, Span
from .queue import Queue

# Tile of a program: ROWS x COLUMNS of the result, DEPTH of the sum at a time. Items of more than 4 bytes in all get one
# stage less, so that two programs share a multiprocessor: one splits while the other multiplies. LOOSE is for F64 and
# for what is not aligned; its DEPTH is the same, hence its bits.
LAUNCH: dict[str, dict[str, int]] = {
    "ieee": {"ROWS": 128, "COLUMNS": 128, "DEPTH": 16, "num_warps": 8, "num_stages": 3},
    "tf32": {"ROWS": 64, "COLUMNS": 128, "DEPTH": 32, "num_warps": 4, "num_stages": 3},
    "tf32x3": {"ROWS": 64, "COLUMNS": 128, "DEPTH": 32, "num_warps": 4, "num_stages": 3},
    "bf16x3": {"ROWS": 64, "COLUMNS": 128, "DEPTH": 32, "num_warps": 4, "num_stages": 3},
}
LOOSE: dict[str, int] = {"ROWS": 64, "COLUMNS": 32, "num_warps": 4, "num_stages": 1}
PATCH = 1024  # side of the square of results that programs running together work at: its operands stay in the L2 cache
WIDEST = 1 << 24  # columns: offsets within a tile have 32 bits
SIZES: tl.constexpr = tl.constexpr(tuple(ITEMSIZE[name] for name in CODES))  # by dtype code
PLAIN: tl.constexpr = tl.constexpr(INTERPRETED)  # the interpreter has no bf16 product


@triton.jit
def moved(address, items, CODE: tl.constexpr):
    """The address of a later item; items has 64 bits."""
    return address + items * SIZES[CODE]


@triton.jit
def nearest(x, FACTOR: tl.constexpr):
    """x rounded to 24 - s significant bits, FACTOR being 2**s + 1 (Veltkamp); NaN if x is infinite."""
    scaled = x * FACTOR
    return scaled - (scaled - x)


@triton.jit
def halves(x):
    """x as two bf16 numbers, the rest dropped."""
    high = nearest(x, 65537.0)
    low = x - high
    if PLAIN:
        low = nearest(low, 65537.0)
    else:
        high = (as_u32(high) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        low = low.to(tl.bfloat16)
    return high, low


@triton.jit
def accumulate(acc, a, b, PRECISION: tl.constexpr):
    """acc + a b; small products first."""
    if PRECISION == "ieee":
        acc = tl.dot(a + (a - a), b + (b - b), acc, input_precision="ieee")
    elif PRECISION == "tf32":
        acc = tl.dot(nearest(a, 8193.0), nearest(b, 8193.0), acc, input_precision="tf32")
    elif PRECISION == "tf32x3":
        a_high, b_high = nearest(a, 8193.0), nearest(b, 8193.0)
        acc = tl.dot(a - a_high, b_high, acc, input_precision="tf32")
        acc = tl.dot(a_high, b - b_high, acc, input_precision="tf32")
        acc = tl.dot(a_high, b_high, acc, input_precision="tf32")
    else:
        a_high, a_low = halves(a)
        b_high, b_low = halves(b)
        acc = tl.dot(a_low, b_high, acc)
        acc = tl.dot(a_high, b_low, acc)
        acc = tl.dot(a_high, b_high, acc)
    return acc


@triton.jit
def difference(
    spans, at, offs, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, RUN: tl.constexpr, MASKED: tl.constexpr
):
    """Items of the first span, minus those of the second if there is one, as fp32; read up to RUN at a time."""
    FIRST: tl.constexpr = min(ALIGN, RUN * SIZES[CODES[0]])
    x = load(moved(spans[0], at, CODES[0]), offs, mask, CODES[0], FIRST, MASKED)
    if len(CODES) > 1:
        SECOND: tl.constexpr = min(ALIGN, RUN * SIZES[CODES[1]])
        x -= load(moved(spans[1], at, CODES[1]), offs, mask, CODES[1], SECOND, MASKED)
    return x


@triton.jit
def multiply(
    acc,
    a,
    b,
    a_first,
    b_first,
    a_count,
    b_count,
    depth,
    a_stride,
    b_stride,
    A_CODES: tl.constexpr,
    B_CODES: tl.constexpr,
    A_ROWS: tl.constexpr,
    B_ROWS: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    DEPTH: tl.constexpr,
    WARPS: tl.constexpr,
):
    """acc [ROWS, COLUMNS] plus the product of ROWS rows of a from a_first on and COLUMNS rows of b from b_first on.

    a, b: tuples of addresses (see `difference`). A_ROWS: a[r, k] lies at r * a_stride + k, else at k * a_stride + r.
    a_count and b_count rows exist, and depth values of k. ALIGN 16: strides are multiples of 16 and addresses too.
    """
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    if ALIGN > 1:
        a_stride, b_stride = a_stride // 16 * 16, b_stride // 16 * 16  # so that the compiler knows
        if A_ROWS or B_ROWS:
            depth = depth // 16 * 16
        if not A_ROWS:
            a_count = a_count // 16 * 16
        if not B_ROWS:
            b_count = b_count // 16 * 16
    r, c, k = tl.arange(0, ROWS), tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    r_in, c_in = r < a_count - a_first, c < b_count - b_first
    if A_ROWS:
        a_offs, a_step = r[:, None] * a_stride + k[None, :], tl.full([], DEPTH, tl.int64)
        a_at = a_first.to(tl.int64) * a_stride
    else:
        a_offs, a_step = r[:, None] + k[None, :] * a_stride, a_stride.to(tl.int64) * DEPTH
        a_at = a_first.to(tl.int64)
    # b's tile as [k within a group, group, c]: warps that find no columns left share out the groups
    NARROW: tl.constexpr = (not B_ROWS) and (PRECISION == "tf32" or PRECISION == "tf32x3")
    LEAST: tl.constexpr = min(SIZES[B_CODES[0]], SIZES[B_CODES[-1]])
    RUN: tl.constexpr = max(4 // LEAST, 2) if ALIGN > 1 else 1  # 4 bytes: less cannot be copied asynchronously
    GROUPS: tl.constexpr = max(32 * RUN * WARPS // COLUMNS, 1) if NARROW else 1
    B_RUN: tl.constexpr = RUN if NARROW else 16
    inner, group = tl.arange(0, DEPTH // GROUPS), tl.arange(0, GROUPS) * (DEPTH // GROUPS)
    if B_ROWS:
        b_offs, b_step = c[None, :] * b_stride + k[:, None], tl.full([], DEPTH, tl.int64)
        b_at, b_in, b_k = b_first.to(tl.int64) * b_stride, c_in[None, :], k[:, None]
    elif NARROW:
        b_k = inner[:, None, None] + group[None, :, None]
        b_offs, b_step = c[None, None, :] + b_k * b_stride, b_stride.to(tl.int64) * DEPTH
        b_at, b_in = b_first.to(tl.int64), c_in[None, None, :]
    else:
        b_offs, b_step = c[None, :] + k[:, None] * b_stride, b_stride.to(tl.int64) * DEPTH
        b_at, b_in, b_k = b_first.to(tl.int64), c_in[None, :], k[:, None]
    left = depth
    for _ in range(0, tl.cdiv(depth, DEPTH)):
        x = difference(a, a_at, a_offs, r_in[:, None] & (k[None, :] < left), A_CODES, ALIGN, 16, MASKED)
        y = difference(b, b_at, b_offs, b_in & (b_k < left), B_CODES, ALIGN, B_RUN, MASKED)
        if NARROW:
            y = tl.reshape(tl.permute(y, (1, 0, 2)), (DEPTH, COLUMNS))
        acc = accumulate(acc, x, y, PRECISION)
        a_at, b_at, left = a_at + a_step, b_at + b_step, left - DEPTH
    return acc


@triton.jit
def upper_tile(program, patch, patches, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and column of a program's tile; patches on and above the diagonal, one after the other.

    Row p of the triangle of patches has patches - p of them; rows p and patches - 1 - p together have patches + 1.
    If their number is odd, the row in the middle meets itself: the second time it gets a place outside the matrix.
    """
    across = patch // COLUMNS
    tiles = (patch // ROWS) * across
    which, inside = program // tiles, program % tiles
    upper, turn = which // (patches + 1), which % (patches + 1)
    lower = patches - 1 - upper
    first = turn < patches - upper
    down = tl.where(first, upper, tl.where(lower == upper, patches, lower))
    right = tl.where(first, upper + turn, lower + turn - (patches - upper))
    patch = across * COLUMNS  # the same number, and the compiler sees a multiple of a tile
    return down * patch + inside // across * ROWS, right * patch + inside % across * COLUMNS


@triton.jit
def grouped_tile(program, rows, columns, patch, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """First row and column of a program's tile of a full matrix: bands of `patch` rows, each from left to right."""
    height = patch // ROWS
    across = tl.cdiv(columns, COLUMNS)
    band, inside = program // (height * across), program % (height * across)
    height = tl.minimum(height, tl.cdiv(rows, ROWS) - band * height)
    return band * patch + inside % height * ROWS, inside // height * COLUMNS


@triton.jit
def place(first_row, first_column, columns):
    """Where the tile begins, in items."""
    return first_row.to(tl.int64) * columns + first_column


@triton.jit
def tile_of(address, i, j, columns, rows, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ALIGN: tl.constexpr):
    """A tile of an fp32 matrix of `rows` rows; zeros outside."""
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if ALIGN > 1:
        columns = columns // 16 * 16
    inside = (r < rows - i)[:, None] & (c < columns - j)[None, :]
    return load(address + 4 * place(i, j, columns), r[:, None] * columns + c[None, :], inside, 0, ALIGN, True)


@triton.jit
def _symmetric_store(out, acc, i, j, side, MIRROR: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """The tile, and its mirror image; where it crosses the diagonal, of each only its own side."""
    ROWS: tl.constexpr = acc.shape[0]
    COLUMNS: tl.constexpr = acc.shape[1]
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    if ALIGN > 1:
        side = side // 16 * 16
    inside = (r < side - i)[:, None] & (c < side - j)[None, :]
    above = (r + i)[:, None] <= (c + j)[None, :]
    offs = r[:, None] * side + c[None, :]
    if MASKED:
        mask = inside & above
    else:
        mask = inside
    store(out + 4 * place(i, j, side), offs, acc, mask, 0, ALIGN, MASKED)
    if MIRROR:
        image = tl.trans(acc)
        offs = c[:, None] * side + r[None, :]
        if MASKED:
            mask = tl.trans(inside) & ((r + i)[None, :] < (c + j)[:, None])
        else:
            mask = tl.trans(inside)
        store(out + 4 * place(j, i, side), offs, image, mask, 0, ALIGN, MASKED)


@triton.jit(do_not_specialize=["out", "other", "side", "depth", "stride", "patch", "patches"])
def _symmetric(
    out,
    other,
    spans,
    side,
    depth,
    stride,
    patch,
    patches,
    alpha,
    weight,
    CODES: tl.constexpr,
    BY_ROWS: tl.constexpr,
    OTHER: tl.constexpr,
    ONWARD: tl.constexpr,
    MIRROR: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WARPS: tl.constexpr,
):
    i, j = upper_tile(tl.program_id(0), patch, patches, ROWS, COLUMNS)
    out, other = tl.cast(out, tl.int64), tl.cast(other, tl.int64)
    if (i < side) & (j < side) & (j + COLUMNS > i):
        if ONWARD:
            acc = tile_of(other, i, j, side, side, ROWS, COLUMNS, ALIGN)
        else:
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        acc = multiply(
            acc, spans, spans, i, j, side, side, depth, stride, stride, CODES, CODES, BY_ROWS, BY_ROWS,
            PRECISION, ALIGN, MASKED, DEPTH, WARPS,
        )  # fmt: skip
        if not ONWARD:
            acc *= weight
        if OTHER:
            acc = alpha * tile_of(other, i, j, side, side, ROWS, COLUMNS, ALIGN) + acc
        if MASKED or j < i + ROWS:
            _symmetric_store(out, acc, i, j, side, MIRROR, ALIGN, True)
        else:
            _symmetric_store(out, acc, i, j, side, MIRROR, ALIGN, False)


def symmetric(
    queue: Queue,
    out: Span,
    spans: tuple[Span, ...],
    stride: int,
    by_rows: bool,
    other: Span | None,
    alpha: float,
    weight: float,
    mirror: bool,
    precision: str,
) -> None:
    """out = alpha * other + weight * (x^T x), or x x^T with by_rows; x is the first span minus the second, if any.

    x has rows of `stride` items. With alpha = weight = 1 the sum goes on from `other`, term by term; with weight 0
    there is none.
    """
    rows = spans[0].numel // stride
    side, depth = (rows, stride) if by_rows else (stride, rows)
    assert precision in LAUNCH
    assert max(stride, side) < WIDEST, f"{max(stride, side)} columns"
    assert out.numel == side * side
    assert out.dtype == "F32"
    assert all(span.numel == rows * stride for span in spans)
    shape = shape_of(precision, spans, (*spans, out, other or out), (side, side, depth), (stride, side))
    widest = max(shape["ROWS"], shape["COLUMNS"])
    patch = max(min(PATCH, triton.cdiv(side, widest) * widest), widest)
    patches = triton.cdiv(side, patch)
    queue.submit(
        _symmetric,
        (triton.cdiv(patches, 2) * (patches + 1) * (patch // shape["ROWS"]) * (patch // shape["COLUMNS"]),),
        out.address,
        other.address if other else 0,
        tuple(span.address for span in spans),
        side,
        depth if weight else 0,
        stride,
        patch,
        patches,
        float(np.float32(alpha)),
        float(np.float32(weight)),
        CODES=codes(*spans),
        BY_ROWS=by_rows,
        OTHER=other is not None and not alpha == weight == 1,
        ONWARD=other is not None and alpha == weight == 1,
        MIRROR=mirror,
        PRECISION=precision,
        **shape,
    )


def shape_of(
    precision: str, items: tuple[Span, ...], spans: tuple[Span, ...], sizes: tuple[int, int, int], strides: Any
) -> dict[str, Any]:
    """Tile, alignment and masking for a product of sizes (rows, columns, depth) of which `items` are loaded."""
    full = LAUNCH[precision]
    even = all(size % full[part] == 0 for size, part in zip(sizes, ("ROWS", "COLUMNS", "DEPTH"), strict=True))
    align = alignment(*spans) if all(stride % 16 == 0 for stride in strides) else 1
    shape = {**full} if align > 1 and width(*items) <= 8 else {**full, **LOOSE}
    if width(*items) > 4:
        shape["num_stages"] = min(shape["num_stages"], 2)
    return {**shape, "WARPS": shape["num_warps"], "ALIGN": align, "MASKED": not even or align == 1}


def operand(x: Tensor) -> Tensor:
    """What references multiply: infinities count as NaN."""
    return torch.where(x.isinf(), torch.nan, x)
