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
        code = fetch(pointer(address, tl.uint8, ALIGN), offs, mask, MASKED).to(tl.uint32)
        if CODE == E4M3:
            bits = widen(code & 0x7F, 3, 7, 0x7E, 0x7E)
        else:
            bits = widen(code & 0x7F, 2, 15, 0x7B, 0x7C)
        return as_f32(bits | ((code & 0x80) << 24))


@triton.jit
def bf16_bits(value):
    """fp32 as bf16 to nearest even, one NaN, as uint32."""
    bits = as_u32(value)
    nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where((bits & ABSOLUTE) > INFINITY, 0x7FC0, nearest).to(tl.uint32)


@triton.jit
def store(address, offs, value, mask, CODE: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """Round fp32 values once, into any dtype; every NaN is stored as one pattern."""
    bits = as_u32(value)
    if CODE == BF16:
        put(pointer(address, tl.uint16, ALIGN), offs, bf16_bits(value).to(tl.uint16), mask, MASKED)
    elif CODE == F32:
        clean = tl.where((bits & ABSOLUTE) > INFINITY, NAN, bits).to(tl.uint32)
        put(pointer(address, tl.uint32, ALIGN), offs, clean, mask, MASKED)
    elif CODE == F64:
        quiet = tl.full(value.shape, 0x7FF8000000000000, tl.int64).to(tl.float64, bitcast=True)
        clean = tl.where((bits & ABSOLUTE) > INFINITY, quiet, value.to(tl.float64))
        put(pointer(address, tl.float64, ALIGN), offs, clean, mask, MASKED)
    elif CODE == F16:
        code = narrow(bits, 10, 15, 0x7C00, 0x7E00, 15)
        put(pointer(address, tl.uint16, ALIGN), offs, code.to(tl.uint16), mask, MASKED)
    elif CODE == E4M3:
        put(pointer(address, tl.uint8, ALIGN), offs, narrow(bits, 3, 7, 0x7E, 0x7F, 7).to(tl.uint8), mask, MASKED)
    else:
        put(pointer(address, tl.uint8, ALIGN), offs, narrow(bits, 2, 15, 0x7C, 0x7F, 7).to(tl.uint8), mask, MASKED)


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
