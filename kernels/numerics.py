"""What every kernel shares on the CPU: spans, dtype conversion, Philox, and sums in a fixed order.

Arithmetic is fp32; inputs are widened exactly (F64 is rounded to fp32), results are rounded once, to nearest even, by
integer operations, so that a CPU, a GPU and Triton's interpreter agree to the bit. Subnormals are kept. A result
that is not a number is stored as one pattern (0x7FC0 in BF16, 0x7E00 in F16, 0x7F in both F8 types, 0x7FC00000 in F32),
because sign and payload of a NaN differ between processors and even between the body and the tail of a torch
loop. F8_E4M3 saturates at 448, infinities included. An F64 output holds the fp32 result, widened.

How to write a loop that LLVM vectorises (checked in fn.inspect_asm(); the difference is a factor of four):
  - the index runs over range(m) of a view that starts at the chunk: `view[i]`. `whole[start + i]` with signed
    operands keeps numba's test for negative indices in the loop, and the loop stays scalar;
  - one small function per loop with arrays as arguments, branches on the dtype outside it;
  - every intermediate of a 32-bit computation is cast back with u32(): numba widens integer results to 64 bits;
  - error_model="numpy": a division that may raise is a branch;
  - chunks of 512: all rows of a kernel stay in the first-level cache. Larger ones lose a tenth, prefetch gains nothing.
  - rows that one loop reads and writes do not lie 4 KiB apart (neighbours in allocation): addresses that agree in
    their last 12 bits delay loads behind stores.
No fastmath anywhere: LLVM may then neither reorder a sum nor contract a*b + c.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numba
import numpy as np
import numpy.typing as npt
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

Array = npt.NDArray[Any]
F = TypeVar("F", bound=Callable[..., Any])

CHUNK = 512  # elements that a kernel holds at a time; a multiple of LANES
LANES = 128  # partial sums of a block, folded by halves
BLOCK = 4096  # elements of a logical block where no row length is given
CODES = {"F32": 0, "BF16": 1, "F16": 2, "F64": 3, "F8_E4M3": 4, "F8_E5M2": 5}
ITEMSIZE = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1, "I16": 2}
F32, BF16, F16, F64, E4M3, E5M2 = range(6)
INFINITY = 0x7F800000  # fp32 bits of infinity: a larger magnitude is NaN
NAN = 0x7FC00000
STAMP = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
u32, u64, f32, f64 = numba.uint32, numba.uint64, numba.float32, numba.float64


class Span(NamedTuple):
    """Contiguous memory, aligned to its items; whoever made it keeps it alive. `queue` is the way to a GPU's."""

    address: int
    dtype: str
    numel: int
    queue: Any = None


def table(*spans: Span) -> Array:
    """Addresses and dtype codes, one row per span: what a compiled loop gets instead of the spans."""
    return np.array([(s.address, CODES[s.dtype]) for s in spans], np.int64).reshape(len(spans), 2)


def flags(peaks: Array) -> Array:
    """Per input 0 (finite), 1 (has an infinity) or 2 (has a NaN), from the largest magnitudes that were loaded."""
    return (peaks >= INFINITY).astype(np.uint8) + (peaks > INFINITY)


def inlined(function: F) -> F:
    """A helper of compiled loops. Those shared between files live in this one: see `compiled`."""
    jit: Callable[[F], F] = numba.njit(nogil=True, error_model="numpy", boundscheck=False)
    return jit(function)


def compiled(*signature: Any) -> Callable[[F], F]:
    """Compile once, when the module is imported, for one signature; the next process loads the machine code.

    numba's disk cache watches the file of the loop alone. The name of its entry therefore carries STAMP, the digest
    of this file: an edit here makes all entries stale. Where no folder can be written, nothing is cached.
    """

    def build(function: F) -> F:
        function.__qualname__ += f"_{STAMP}"
        options = {"nogil": True, "error_model": "numpy", "boundscheck": False}
        try:
            loop: F = numba.njit(types.void(*signature), cache=True, **options)(function)
        except (RuntimeError, OSError):
            loop = numba.njit(types.void(*signature), **options)(function)
        return loop

    return build


emitted: Callable[[Any], Any] = intrinsic  # a function whose LLVM code is given


@emitted
def pointer(context: Any, address: Any) -> Any:
    """An integer as an address, for numba.carray."""
    return types.voidptr(types.int64), lambda c, b, s, args: b.inttoptr(args[0], cgutils.voidptr_t)


@emitted
def as_f32(context: Any, bits: Any) -> Any:
    return types.float32(types.uint32), lambda c, b, s, args: b.bitcast(args[0], ir.FloatType())


@emitted
def as_u32(context: Any, value: Any) -> Any:
    return types.uint32(types.float32), lambda c, b, s, args: b.bitcast(args[0], ir.IntType(32))


@inlined
def floats(address: int, at: int, m: int) -> Array:
    """m fp32 values from element `at` on, where they lie."""
    return numba.carray(pointer(address + 4 * at), (m,), np.float32)


@inlined
def magnitude(value: float) -> int:
    """Bits of |value|: integers in the order of the magnitudes; every NaN becomes one key above infinity."""
    bits = u32(as_u32(f32(value)) & u32(0x7FFFFFFF))
    return u32(NAN) if bits > u32(INFINITY) else bits


# --- narrow formats: F16 (10 bits of mantissa, bias 15), F8_E4M3 (3, 7), F8_E5M2 (2, 15) ---


@inlined
def widen(code: int, mantissa: int, bias: int, finite: int, infinity: int) -> int:
    """fp32 bits of a magnitude; `finite` is the largest finite code, `infinity` == `finite` where there is none."""
    bits = u32(u32(code) << u32(23 - mantissa))
    least = u32((128 - bias) << 23)  # the smallest normal number
    tiny = as_u32(f32(as_f32(u32(bits + least)) - as_f32(least)))
    normal = u32(bits + u32((127 - bias) << 23))
    special = u32(INFINITY) if u32(code) == u32(infinity) else u32(NAN)
    result = tiny if u32(code) < u32(1 << mantissa) else normal
    return special if u32(code) > u32(finite) else result


@inlined
def narrow(bits: int, mantissa: int, bias: int, top: int, nan: int) -> int:
    """The nearest code to an fp32 pattern, without the sign; `top` is what overflow gives."""
    size = u32(bits & u32(0x7FFFFFFF))
    shift = u32(23 - mantissa)
    odd = u32(u32(size >> shift) & u32(1))
    up = u32(u32((1 << (22 - mantissa)) - 1) + odd)
    normal = u32(u32(u32(size - u32((127 - bias) << 23)) + up) >> shift)
    magic = u32((151 - bias - mantissa) << 23)  # its last bit is the subnormal step: the addition rounds
    tiny = u32(as_u32(f32(as_f32(size) + as_f32(magic))) - magic)
    result = tiny if size < u32((128 - bias) << 23) else min(normal, u32(top))
    return u32(nan) if size > u32(INFINITY) else result


@inlined
def signed(bits: int, code: int, nan: int, shift: int) -> int:
    """`code` with the sign of an fp32 pattern; NaN has none."""
    sign = u32(u32(u32(bits) >> u32(31)) << u32(shift))
    return u32(code) if u32(code) == u32(nan) else u32(u32(code) | sign)


@inlined
def bf16_bits(bits: int) -> int:
    nearest = u32(u32(bits + u32(u32(0x7FFF) + u32(u32(bits >> u32(16)) & u32(1)))) >> u32(16))
    return u32(0x7FC0) if u32(bits & u32(0x7FFFFFFF)) > u32(INFINITY) else nearest


@inlined
def dithered(bits: int, word: int, mantissa: int, bias: int, finite: int) -> int:
    """An fp32 pattern rounded to a neighbour in a narrow format: up if what it has below the last bit there and the
    random word, as fractions, make 1 or more; of a subnormal result 31 bits of both count. What lies beyond `finite`,
    the largest finite code, stays as it is: storing it rounds to nearest."""
    size, sign = u32(bits & u32(0x7FFFFFFF)), u32(bits & u32(0x80000000))
    below = u32((1 << (23 - mantissa)) - 1)
    normal = u32(u32(bits + u32(u32(word) >> u32(9 + mantissa))) & u32(~below))
    least = u32(0 if bias == 127 else (128 - bias) << 23)  # the smallest normal number; BF16 has fp32's
    steps = f32(as_f32(min(size, least)) * as_f32(u32((126 + bias + mantissa) << 23)))
    whole = np.int32(steps)
    part = u32(np.int32(f32(f32(steps - f32(whole)) * f32(2147483648.0))))
    up = u32(u32(part + u32(u32(word) >> u32(1))) >> u32(31))
    tiny = as_u32(f32(f32(u32(u32(whole) + up)) * as_f32(u32((128 - bias - mantissa) << 23))))
    result = u32(tiny | sign) if size < least else normal
    return bits if size > u32((finite + ((127 - bias) << mantissa)) << (23 - mantissa)) else result


# --- loads: m elements from item `start` on, as fp32; the result is the largest magnitude's bits ---


@inlined
def load_f32(address: int, start: int, m: int, row: Array) -> int:
    source, peak = numba.carray(pointer(address + 4 * start), (m,), np.float32), u32(0)
    for i in range(m):
        row[i] = source[i]
        peak = max(peak, u32(as_u32(source[i]) & u32(0x7FFFFFFF)))
    return peak


@inlined
def load_bf16(address: int, start: int, m: int, row: Array) -> int:
    source, peak = numba.carray(pointer(address + 2 * start), (m,), np.uint16), u32(0)
    for i in range(m):
        bits = u32(u32(source[i]) << u32(16))
        row[i] = as_f32(bits)
        peak = max(peak, u32(bits & u32(0x7FFFFFFF)))
    return peak


@inlined
def load_f16(address: int, start: int, m: int, row: Array) -> int:
    source, peak = numba.carray(pointer(address + 2 * start), (m,), np.uint16), u32(0)
    for i in range(m):
        bits = u32(widen(u32(source[i]) & u32(0x7FFF), 10, 15, 0x7BFF, 0x7C00))
        row[i] = as_f32(u32(bits | u32(u32(u32(source[i]) & u32(0x8000)) << u32(16))))
        peak = max(peak, bits)
    return peak


@inlined
def load_f64(address: int, start: int, m: int, row: Array) -> int:
    source, peak = numba.carray(pointer(address + 8 * start), (m,), np.float64), u32(0)
    for i in range(m):
        value = f32(source[i])
        row[i] = value
        peak = max(peak, u32(as_u32(value) & u32(0x7FFFFFFF)))
    return peak


@inlined
def load_e4m3(address: int, start: int, m: int, row: Array) -> int:
    source, peak = numba.carray(pointer(address + start), (m,), np.uint8), u32(0)
    for i in range(m):
        bits = u32(widen(u32(source[i]) & u32(0x7F), 3, 7, 0x7E, 0x7E))
        row[i] = as_f32(u32(bits | u32(u32(u32(source[i]) & u32(0x80)) << u32(24))))
        peak = max(peak, bits)
    return peak


@inlined
def load_e5m2(address: int, start: int, m: int, row: Array) -> int:
    source, peak = numba.carray(pointer(address + start), (m,), np.uint8), u32(0)
    for i in range(m):
        bits = u32(widen(u32(source[i]) & u32(0x7F), 2, 15, 0x7B, 0x7C))
        row[i] = as_f32(u32(bits | u32(u32(u32(source[i]) & u32(0x80)) << u32(24))))
        peak = max(peak, bits)
    return peak


@inlined
def load(source: Array, start: int, m: int, row: Array) -> int:
    """Any dtype; `source` is a row of `table`."""
    address, code = source[0], source[1]
    if code == F32:
        return load_f32(address, start, m, row)
    if code == BF16:
        return load_bf16(address, start, m, row)
    if code == F16:
        return load_f16(address, start, m, row)
    if code == F64:
        return load_f64(address, start, m, row)
    if code == E4M3:
        return load_e4m3(address, start, m, row)
    return load_e5m2(address, start, m, row)


@inlined
def store(row: Array, target: Array, start: int, m: int) -> None:
    """Round m fp32 values once, into any dtype; `target` is a row of `table`."""
    address, code = target[0], target[1]
    if code == F32:
        words = numba.carray(pointer(address + 4 * start), (m,), np.uint32)
        for i in range(m):
            bits = as_u32(row[i])
            words[i] = u32(NAN) if u32(bits & u32(0x7FFFFFFF)) > u32(INFINITY) else bits
    elif code == BF16:
        halves = numba.carray(pointer(address + 2 * start), (m,), np.uint16)
        for i in range(m):
            halves[i] = numba.uint16(bf16_bits(as_u32(row[i])))
    elif code == F16:
        halves = numba.carray(pointer(address + 2 * start), (m,), np.uint16)
        for i in range(m):
            bits = as_u32(row[i])
            halves[i] = numba.uint16(signed(bits, narrow(bits, 10, 15, 0x7C00, 0x7E00), 0x7E00, 15))
    elif code == F64:
        doubles = numba.carray(pointer(address + 8 * start), (m,), np.float64)
        for i in range(m):
            doubles[i] = f64(np.nan) if row[i] != row[i] else f64(row[i])
    else:
        store_f8(row, address + start, code, m)


@inlined
def store_f8(row: Array, address: int, code: int, m: int) -> None:
    codes = numba.carray(pointer(address), (m,), np.uint8)
    if code == E4M3:
        for i in range(m):
            bits = as_u32(row[i])
            codes[i] = numba.uint8(signed(bits, narrow(bits, 3, 7, 0x7E, 0x7F), 0x7F, 7))
    else:
        for i in range(m):
            bits = as_u32(row[i])
            codes[i] = numba.uint8(signed(bits, narrow(bits, 2, 15, 0x7C, 0x7F), 0x7F, 7))


@inlined
def dither(row: Array, words: Array, code: int, m: int) -> None:
    """`dithered` in place, for a dtype; nothing is left to round when it is stored. F32 and F64 hold every value."""
    if code == BF16:
        for i in range(m):
            row[i] = as_f32(dithered(as_u32(row[i]), words[i], 7, 127, 0x7F7F))
    elif code == F16:
        for i in range(m):
            row[i] = as_f32(dithered(as_u32(row[i]), words[i], 10, 15, 0x7BFF))
    elif code == E4M3:
        for i in range(m):
            row[i] = as_f32(dithered(as_u32(row[i]), words[i], 3, 7, 0x7E))
    elif code == E5M2:
        for i in range(m):
            row[i] = as_f32(dithered(as_u32(row[i]), words[i], 2, 15, 0x7B))


@inlined
def subtract(row: Array, base: Array, m: int) -> None:
    """row -= base, in place."""
    for i in range(m):
        row[i] = row[i] - base[i]


# --- random words: Philox4x32-10 (Salmon et al. 2011) of the element's index ---


@inlined
def philox(words: Array, first: int, blocks: int, seed: int, tensor_id: int, stream: int) -> None:
    """Words of elements 4*first to 4*(first + blocks) - 1: word index & 3 of counter (index >> 2, tensor, stream)."""
    low, high = u32(seed & 0xFFFFFFFF), u32((seed >> 32) & 0xFFFFFFFF)
    for j in range(blocks):
        q = u64(u64(first) + u64(j))
        a, b, c, d = u32(q), u32(q >> u64(32)), u32(tensor_id), u32(stream)
        k0, k1 = low, high
        for _ in range(10):
            p, r = u64(u64(0xD2511F53) * u64(a)), u64(u64(0xCD9E8D57) * u64(c))
            a, b = u32(u32(u32(r >> u64(32)) ^ b) ^ k0), u32(r)
            c, d = u32(u32(u32(p >> u64(32)) ^ d) ^ k1), u32(p)
            k0, k1 = u32(k0 + u32(0x9E3779B9)), u32(k1 + u32(0xBB67AE85))
        words[4 * j], words[4 * j + 1], words[4 * j + 2], words[4 * j + 3] = a, b, c, d


def threshold(density: float) -> int:
    """An element stays if its word lies below this: density in units of 2**-32."""
    return min(max(round(density * 2.0**32), 0), 1 << 32)


class Partition(NamedTuple):
    """A tensor's elements dealt out to groups at random, by seed, tensor and element alone: nothing is stored."""

    seed: int
    tensor_id: int


PARTITION = 0xFFFFFFFF  # the stream of its words; masks have the number of an expert there


class Stochastic(NamedTuple):
    """Rounding up or down by chance, right on average: `dithered` by the words of seed, tensor and element."""

    seed: int
    tensor_id: int


ROUNDING = 0xFFFFFFFE  # the stream of its words


def key(given: Partition | Stochastic | None) -> Array:
    """Seed and tensor as compiled loops take them; empty for None."""
    return np.array(given or (), np.uint64).view(np.int64)


@inlined
def words_from(words: Array, element: int, m: int, keys: Array, stream: int) -> Array:
    """Random words of m elements from any `element` on, in room for CHUNK + 8; keys as `key` gives them."""
    philox(words, element >> 2, ((element & 3) + m + 3) >> 2, keys[0], keys[1], stream)
    return words[element & 3 :]


@inlined
def group_of(word: int, groups: int) -> int:
    """The group of an element in a partition: the high 32 bits of word * groups, each as likely to within 2**-32."""
    return numba.int64(u64(u64(word) * u64(groups)) >> u64(32))


# --- sums in a fixed order: lane l of a block takes elements l, l + 128, ... in turn; lanes are folded by halves ---


@inlined
def add_magnitudes(lanes: Array, x: Array, m: int) -> None:
    for i in range(m):
        lanes[i] += abs(x[i])


@inlined
def fold(lanes: Array) -> float:
    half = LANES // 2
    while half > 0:
        for i in range(half):
            lanes[i] += lanes[i + half]
        half //= 2
    return lanes[0]
