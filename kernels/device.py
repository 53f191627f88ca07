"""What every kernel shares on a GPU, in Triton: loads and stores of any dtype, Philox, sums in a fixed order.

The same arithmetic as numerics.py, to the bit: fp32, conversions by integer operations (Triton's interpreter truncates
to bf16, and fp8 is not native everywhere), no contraction of a*b + c (OPTIONS), no approximate division, no float
atomics. Addresses are plain integers, so a launch needs no tensor; offsets are 64 bits wide from the program's number
on. Whole blocks are read without a mask: a mask of unknown alignment would make the compiler read item by item.

Works in Triton 3.6 to 3.9, and element by element on the CPU with TRITON_INTERPRET=1.
"""

# mypy: ignore-errors
from __future__ import annotations

import os
from typing import Any

import triton
import triton.language as tl

from .numerics import CODES, ITEMSIZE, LANES, Span

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OPTIONS: dict[str, Any] = {"enable_fp_fusion": False}  # of every launch: rounding is part of the result

F32: tl.constexpr = tl.constexpr(CODES["F32"])
BF16: tl.constexpr = tl.constexpr(CODES["BF16"])
F16: tl.constexpr = tl.constexpr(CODES["F16"])
F64: tl.constexpr = tl.constexpr(CODES["F64"])
E4M3: tl.constexpr = tl.constexpr(CODES["F8_E4M3"])
E5M2: tl.constexpr = tl.constexpr(CODES["F8_E5M2"])
INFINITY: tl.constexpr = tl.constexpr(0x7F800000)
NAN: tl.constexpr = tl.constexpr(0x7FC00000)
ABSOLUTE: tl.constexpr = tl.constexpr(0x7FFFFFFF)


def codes(*spans: Span) -> tuple[int, ...]:
    """Dtype codes, as constants of a kernel."""
    return tuple(CODES[span.dtype] for span in spans)


def alignment(*spans: Span) -> int:
    """16 if every address can be read 16 bytes at a time, else 1: items are aligned, no more."""
    return 16 if all(span.address % 16 == 0 for span in spans) else 1


def block_size(usual: int) -> int:
    """Elements of a program: the interpreter wants few large ones."""
    return 1 << 16 if INTERPRETED else usual


def int32(word: int) -> int:
    """A 32-bit word as an argument: a kernel is compiled anew where an int no longer fits 32 bits and a sign."""
    return (word & 0xFFFFFFFF) - ((word & 0x80000000) << 1)


def width(*spans: Span) -> int:
    return sum(ITEMSIZE[span.dtype] for span in spans)


@triton.jit
def pointer(address, KIND: tl.constexpr, ALIGN: tl.constexpr):
    """An integer as a pointer to KIND; ALIGN is 16 or 1, which promises nothing beyond the item's own."""
    p = tl.cast(address, tl.pointer_type(KIND))
    return tl.multiple_of(p, ALIGN) if ALIGN > 1 else p


@triton.jit
def fetch(p, offs, mask, MASKED: tl.constexpr):
    """Items; 0 where the mask says no."""
    if MASKED:
        return tl.load(p + offs, mask=mask, other=0)
    return tl.load(p + offs)


@triton.jit
def put(p, offs, value, mask, MASKED: tl.constexpr):
    if MASKED:
        tl.store(p + offs, value, mask=mask)
    else:
        tl.store(p + offs, value)


@triton.jit
def as_f32(bits):
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def as_u32(value):
    return value.to(tl.uint32, bitcast=True)


@triton.jit
def magnitude(value):
    """Sort keys of |value|, uint32: bits in the order of the magnitudes, every NaN one key above infinity."""
    bits = as_u32(value) & ABSOLUTE
    return tl.where(bits > INFINITY, NAN, bits).to(tl.uint32)


@triton.jit
def peak(value):
    """The largest magnitude's bits, NaN above infinity, as int32: what flags are made of."""
    return tl.max((as_u32(value) & ABSOLUTE).to(tl.int32), 0)


@triton.jit
def widen(code, MANTISSA: tl.constexpr, BIAS: tl.constexpr, FINITE: tl.constexpr, TOP: tl.constexpr):
    """fp32 bits of a narrow magnitude; FINITE is the largest finite code, TOP infinity's (or FINITE: there is none)."""
    bits = (code << (23 - MANTISSA)).to(tl.uint32)
    LEAST: tl.constexpr = (128 - BIAS) << 23  # the smallest normal number
    least = tl.full(bits.shape, LEAST, tl.uint32)
    tiny = as_u32(as_f32(bits + least) - as_f32(least))
    normal = bits + ((127 - BIAS) << 23)
    special = tl.where(code == TOP, INFINITY, NAN).to(tl.uint32)
    result = tl.where(code < (1 << MANTISSA), tiny, normal)
    return tl.where(code > FINITE, special, result)


@triton.jit
def narrow(bits, MANTISSA: tl.constexpr, BIAS: tl.constexpr, TOP: tl.constexpr, NOT: tl.constexpr, SIGN: tl.constexpr):
    """The nearest code to an fp32 pattern, sign at bit SIGN; TOP is what overflow gives, NOT is the only NaN."""
    size = bits & ABSOLUTE
    odd = (size >> (23 - MANTISSA)) & 1
    normal = (size - ((127 - BIAS) << 23) + ((1 << (22 - MANTISSA)) - 1) + odd) >> (23 - MANTISSA)
    MAGIC: tl.constexpr = (151 - BIAS - MANTISSA) << 23  # its last bit is the subnormal step: the addition rounds
    magic = tl.full(bits.shape, MAGIC, tl.uint32)
    tiny = as_u32(as_f32(size) + as_f32(magic)) - magic
    code = tl.where(size < ((128 - BIAS) << 23), tiny, tl.minimum(normal, TOP))
    code = code | ((bits >> 31) << SIGN)
    return tl.where(size > INFINITY, NOT, code).to(tl.uint32)


@triton.jit
def load(address, offs, mask, CODE: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """Items of any dtype as fp32, exactly (F64 is rounded)."""
    if CODE == BF16:
        return as_f32(fetch(pointer(address, tl.uint16, ALIGN), offs, mask, MASKED).to(tl.uint32) << 16)
    elif CODE == F16:
        return fetch(pointer(address, tl.float16, ALIGN), offs, mask, MASKED).to(tl.float32)
    elif CODE == F32:
        return fetch(pointer(address, tl.float32, ALIGN), offs, mask, MASKED)
    elif CODE == F64:
        return fetch(pointer(address, tl.float64, ALIGN), offs, mask, MASKED).to(tl.float32)
    else:
        return decode(fetch(pointer(address, tl.uint8, ALIGN), offs, mask, MASKED).to(tl.uint32), CODE)


@triton.jit
def bf16_bits(value):
    """fp32 as bf16 to nearest even, one NaN, as uint32."""
    bits = as_u32(value)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & ABSOLUTE) > INFINITY, 0x7FC0, nearest).to(tl.uint32)


@triton.jit
def encode(value, CODE: tl.constexpr):
    """What `store` writes, as uint32: fp32 rounded once, every NaN one pattern. Of F64 the same value in fp32."""
    bits = as_u32(value)
    if CODE == BF16:
        return bf16_bits(value)
    elif CODE == F16:
        return narrow(bits, 10, 15, 0x7C00, 0x7E00, 15)
    elif CODE == E4M3:
        return narrow(bits, 3, 7, 0x7E, 0x7F, 7)
    elif CODE == E5M2:
        return narrow(bits, 2, 15, 0x7C, 0x7F, 7)
    else:
        return tl.where((bits & ABSOLUTE) > INFINITY, NAN, bits).to(tl.uint32)


@triton.jit
def store(address, offs, value, mask, CODE: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """Round fp32 values once, into any dtype; every NaN is stored as one pattern."""
    if CODE == F64:
        quiet = tl.full(value.shape, 0x7FF8000000000000, tl.int64).to(tl.float64, bitcast=True)
        clean = tl.where((as_u32(value) & ABSOLUTE) > INFINITY, quiet, value.to(tl.float64))
        put(pointer(address, tl.float64, ALIGN), offs, clean, mask, MASKED)
    elif CODE == F32:
        put(pointer(address, tl.uint32, ALIGN), offs, encode(value, CODE), mask, MASKED)
    elif CODE == BF16 or CODE == F16:
        put(pointer(address, tl.uint16, ALIGN), offs, encode(value, CODE).to(tl.uint16), mask, MASKED)
    else:
        put(pointer(address, tl.uint8, ALIGN), offs, encode(value, CODE).to(tl.uint8), mask, MASKED)


@triton.jit
def decode(code, CODE: tl.constexpr):
    """The fp32 value of what `encode` gives."""
    if CODE == BF16:
        return as_f32(code << 16)
    elif CODE == F16:
        return code.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == E4M3:
        value = as_f32(((code & 0x80) << 24) | ((code & 0x7F) << 20)) * 2.0**120  # exact, for subnormal numbers too
        return tl.where((code & 0x7F) == 0x7F, as_f32(tl.full(code.shape, NAN, tl.uint32)), value)
    elif CODE == E5M2:  # the upper byte of an F16
        return (code << 8).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return as_f32(code)


@triton.jit
def dithered(value, word, MANTISSA: tl.constexpr, BIAS: tl.constexpr, FINITE: tl.constexpr):
    """numerics.dithered, of fp32 values."""
    bits = as_u32(value)
    size = bits & ABSOLUTE
    BELOW: tl.constexpr = (1 << (23 - MANTISSA)) - 1
    result = (bits + (word >> (9 + MANTISSA))) & (0xFFFFFFFF - BELOW)
    if BIAS < 127:
        LEAST: tl.constexpr = (128 - BIAS) << 23
        STEPS: tl.constexpr = 2.0 ** (BIAS - 1 + MANTISSA)
        steps = as_f32(tl.minimum(size, tl.full(size.shape, LEAST, tl.uint32))) * STEPS
        whole = steps.to(tl.int32)
        part = ((steps - whole.to(tl.float32)) * 2147483648.0).to(tl.int32).to(tl.uint32)
        up = ((part + (word >> 1)) >> 31).to(tl.int32)
        tiny = as_u32((whole + up).to(tl.float32) * (1.0 / STEPS)) | (bits & 0x80000000)
        result = tl.where(size < LEAST, tiny, result)
    LAST: tl.constexpr = (FINITE + ((127 - BIAS) << MANTISSA)) << (23 - MANTISSA)
    return as_f32(tl.where(size > LAST, bits, result).to(tl.uint32))


@triton.jit
def dither(value, word, CODE: tl.constexpr):
    """fp32 values rounded up or down to those of a dtype, by a random word each."""
    if CODE == BF16:
        return dithered(value, word, 7, 127, 0x7F7F)
    elif CODE == F16:
        return dithered(value, word, 10, 15, 0x7BFF)
    elif CODE == E4M3:
        return dithered(value, word, 3, 7, 0x7E)
    elif CODE == E5M2:
        return dithered(value, word, 2, 15, 0x7B)
    else:
        return value


@triton.jit
def raise_peak(address, index, value, ALIGN: tl.constexpr):
    """Take the largest magnitude of a block into the account of one input."""
    tl.atomic_max(pointer(address, tl.int32, ALIGN) + index, peak(value), sem="relaxed")


@triton.jit
def philox(q, seed_low, seed_high, tensor_id, stream):
    """Four words of each counter (q, tensor, stream), q 64 bits: Philox4x32-10 (Salmon et al. 2011)."""
    a, b = q.to(tl.uint32), (q >> 32).to(tl.uint32)
    c = tl.zeros_like(a) + tl.cast(tensor_id, tl.uint32)
    d = tl.zeros_like(a) + tl.cast(stream, tl.uint32)
    k0, k1 = tl.cast(seed_low, tl.uint32), tl.cast(seed_high, tl.uint32)
    m0, m1 = tl.full(a.shape, 0xD2511F53, tl.uint32), tl.full(a.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(10):
        p_high, p_low = tl.umulhi(a, m0), a * m0
        r_high, r_low = tl.umulhi(c, m1), c * m1
        a, b, c, d = r_high ^ b ^ k0, r_low, p_high ^ d ^ k1, p_low
        k0, k1 = k0 + tl.full([], 0x9E3779B9, tl.uint32), k1 + tl.full([], 0xBB67AE85, tl.uint32)
    return a, b, c, d


@triton.jit
def words(first, seed_low, seed_high, tensor_id, stream, BLOCK: tl.constexpr, QUAD: tl.constexpr):
    """One word for each of BLOCK elements from `first` on; QUAD says that first is a multiple of 4."""
    if QUAD:
        q = (first >> 2) + tl.arange(0, BLOCK // 4).to(tl.int64)
        a, b, c, d = philox(q, seed_low, seed_high, tensor_id, stream)
        return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    element = first + tl.arange(0, BLOCK).to(tl.int64)
    a, b, c, d = philox(element >> 2, seed_low, seed_high, tensor_id, stream)
    which = element & 3
    return tl.where(which == 0, a, tl.where(which == 1, b, tl.where(which == 2, c, d)))


LANE_COUNT: tl.constexpr = tl.constexpr(LANES)


@triton.jit
def fold(lanes, ROWS: tl.constexpr):
    """[ROWS, 128] sums to [ROWS]: lane i takes lane i + half, half by half, as numerics.fold does."""
    for step in tl.static_range(7):
        lanes = tl.sum(tl.reshape(lanes, (ROWS, 2, LANE_COUNT >> (step + 1))), 1)
    return tl.reshape(lanes, (ROWS,))


@triton.jit
def lane_words(at, seed_low, seed_high, tensor_id, stream, QUAD: tl.constexpr):
    """`words` for rows of 128 elements that begin at each at[i]: [rows, 128]; QUAD: at multiples of 4."""
    if QUAD:
        q = (at >> 2)[:, None] + tl.arange(0, LANE_COUNT // 4)[None, :]
        a, b, c, d = philox(q, seed_low, seed_high, tensor_id, stream)
        return tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        element = at[:, None] + tl.arange(0, LANE_COUNT)[None, :]
        a, b, c, d = philox(element >> 2, seed_low, seed_high, tensor_id, stream)
        which = element & 3
        return tl.where(which == 0, a, tl.where(which == 1, b, tl.where(which == 2, c, d)))


@triton.jit
def group_of(words, groups):
    """Groups of a random partition, uint32, as numerics.group_of has them."""
    return tl.umulhi(words, tl.zeros_like(words) + tl.cast(groups, tl.uint32))


@triton.jit
def walk(
    STEP: tl.constexpr,
    COUNT: tl.constexpr,
    args,
    first,
    block,
    numel,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    KIND: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """COUNT sums of each of BLOCKS logical blocks from block `first` on, lane by lane: a tuple of [BLOCKS, 128].

    STEP(sums, args, at, inside, CODES, ALIGN, KIND, MASKED) adds one row of 128 elements of each block, which begins
    at element at[i]; `inside` is which of them count. Rows come in order, UNROLL of them under way at once. ALIGN is
    16 only if `block` is a multiple of 8 too (walk_shape): rows are then read 16 bytes at a time wherever blocks end.
    """
    first, block, numel = first.to(tl.int64), tl.cast(block, tl.int64), tl.cast(numel, tl.int64)
    if ALIGN > 1:
        block = block // 8 * 8
    lanes = tl.arange(0, LANE_COUNT)[None, :].to(tl.int64) + tl.zeros((BLOCKS, 1), tl.int64)
    at = (first + tl.arange(0, BLOCKS)) * block
    rows = (block + LANE_COUNT - 1) // LANE_COUNT
    sums = ()
    for _ in tl.static_range(COUNT):
        sums += (tl.zeros((BLOCKS, LANE_COUNT), tl.float64),)
    if (first + BLOCKS) * block <= numel:
        rounds = block // (LANE_COUNT * UNROLL)
        for step in range(0, rounds):
            for row in tl.static_range(UNROLL):
                here = at + (step * UNROLL + row) * LANE_COUNT
                sums = STEP(sums, args, here, None, CODES, ALIGN, KIND, False)
        for row in range(rounds * UNROLL, rows):
            sums = STEP(sums, args, at + row * LANE_COUNT, row * LANE_COUNT + lanes < block, CODES, ALIGN, KIND, True)
    else:
        for row in range(0, rows):
            inside = (row * LANE_COUNT + lanes < block) & (at[:, None] + row * LANE_COUNT + lanes < numel)
            sums = STEP(sums, args, at + row * LANE_COUNT, inside, CODES, ALIGN, KIND, True)
    return sums


def walk_shape(table: dict[int, dict[str, int]], sums: int, block: int, blocks: int, *spans: Span) -> dict[str, Any]:
    """CODES, ALIGN, BLOCKS, UNROLL and num_warps for a kernel that walks. `table` is by how many sums it keeps."""
    size: dict[str, Any] = dict(next(size for most, size in table.items() if sums <= most))
    align = alignment(*spans) if block % 8 == 0 else 1
    if align == 1:  # item by item, each at an address of its own: registers are short
        size["UNROLL"] = 1
    if INTERPRETED:
        size["BLOCKS"] = min(triton.next_power_of_2(max(blocks, 1)), 512)
    return size | {"CODES": codes(*spans), "ALIGN": align}
