"""A task vector masked by voted signs, scaled and added to another model: GradFix's update (arXiv 2510.09658).

    tau = expert - base (or expert itself: base None)          s = sign(votes), or -sign(gradient)
    agreement   mask(tau, s) = tau where sign(tau) == s and s != 0, else 0
    force       mask(tau, s) = s * |tau|
    out = target + scale * mask(tau, s)

s is the sign of the step downhill, which is what a task vector (fine-tuned minus pre-trained) is compared with.
fp32, one rounding at the end. Where the mask or the update is 0 the result is the target, to the bit; so it is
everywhere if `scale` is 0. -0.0 has no sign, nor has a NaN: it abstains, in tau as in a gradient, and is counted.
A NaN in the target stays. F64 is rounded to fp32 before it is asked for its sign.

`counts`, four int64 that are added to:
    KEPT   elements where sign(tau) == s != 0 (agreement), or neither is 0 (force)
    TIES   s is 0, tau has a sign
    LOST   kept, but the stored result equals the stored target: the update is less than half a step (-0.0 equals 0.0,
           a NaN equals nothing)
    NANS   NaNs in tau, plus NaNs in the gradient

Votes are of dtype I8, I16 or U8. U8 is packed, four to a byte, in two's complement: element i is bits 2 * (i % 4) and
2 * (i % 4) + 1 of byte i // 4, and 0, 1, 3 mean 0, +1, -1 (2 is not written and counts as -1). `mask`, if asked for,
gets one bit per element, 1 if it is kept: element i is bit i % 8 of byte i // 8. Bits beyond the last element are 0.
A part of a tensor begins at a multiple of 8 elements, or of 4 if no mask is written.
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import (
    CHUNK,
    CODES,
    Array,
    Span,
    compiled,
    f32,
    flags,
    inlined,
    load,
    pointer,
    store,
    subtract,
    table,
    u32,
)

MODES = ("agreement", "force")
KEPT, TIES, LOST, NANS = range(4)
I8, I16, PACKED = 16, 17, 18  # kinds of votes beside the dtype codes of gradients
KINDS = CODES | {"I8": I8, "I16": I16, "U8": PACKED}


def kind(dtype: str, items: int, numel: int) -> int:
    """What votes of a dtype are; there must be one for each of `numel` elements."""
    assert items == (-(-numel // 4) if dtype == "U8" else numel)
    return KINDS[dtype]


def settings(mode: str, scale: float) -> tuple[bool, float]:
    """Whether signs are forced, and the scale in fp32."""
    assert mode in MODES
    assert np.isfinite(scale)
    return mode == "force", float(np.float32(scale))


@inlined
def _copy(source: Array, s: Array, m: int) -> None:
    for i in range(m):
        s[i] = source[i]


@inlined
def _unpack(source: Array, s: Array, m: int) -> None:
    for i in range(m):
        s[i] = numba.int32(u32(u32(source[i >> 2]) << u32(30 - ((i & 3) << 1))) & u32(0xC0000000))


@inlined
def _downhill(gradient: Array, s: Array, m: int) -> int:
    """Signs of the negative gradient, and its NaNs."""
    nans = 0
    for i in range(m):
        s[i] = numba.int32(gradient[i] < f32(0)) - numba.int32(gradient[i] > f32(0))
        nans += gradient[i] != gradient[i]
    return nans


@inlined
def _signs(vote: Array, at: int, m: int, s: Array, x: Array) -> tuple[int, int]:
    """m signs from element `at` on, as any integers; the largest magnitude's bits and the NaNs of a gradient."""
    address, kind = vote[0], vote[1]
    if kind == I8:
        _copy(numba.carray(pointer(address + at), (m,), np.int8), s, m)
    elif kind == I16:
        _copy(numba.carray(pointer(address + 2 * at), (m,), np.int16), s, m)
    elif kind == PACKED:
        _unpack(numba.carray(pointer(address + at // 4), ((m + 3) // 4,), np.uint8), s, m)
    else:
        peak = load(vote, at, m, x)
        return peak, _downhill(x, s, m)
    return u32(0), 0


@inlined
def _masked(target: Array, tau: Array, s: Array, scale: float, force: bool, kept: Array, m: int) -> tuple[int, int]:
    """tau becomes the result; the number of ties and of NaNs."""
    ties, nans = 0, 0
    for i in range(m):
        t, up, down = tau[i], tau[i] > f32(0), tau[i] < f32(0)
        plus, minus = s[i] > 0, s[i] < 0
        keep = ((up | down) & (plus | minus)) if force else ((up & plus) | (down & minus))
        step = (abs(t) if plus else -abs(t)) if force else t
        update = scale * step  # NaN if scale is 0 and tau infinite: no update either
        tau[i] = target[i] + update if keep & ((update > f32(0)) | (update < f32(0))) else target[i]
        kept[i] = keep
        ties += (up | down) & (s[i] == 0)
        nans += t != t
    return ties, nans


@inlined
def _equal(one: Array, two: Array, kept: Array, m: int) -> int:
    count = 0
    for i in range(m):
        count += kept[i] & (one[i] == two[i])
    return count


@inlined
def _write_bits(address: int, at: int, m: int, kept: Array) -> int:
    """The number of kept elements; their bits, if there is an address for them."""
    count = 0
    for i in range(m):
        count += kept[i]
    if address != 0:
        kept[m : (m + 7) // 8 * 8] = 0
        target = numba.carray(pointer(address + at // 8), ((m + 7) // 8,), np.uint8)
        for j in range((m + 7) // 8):
            byte = u32(0)
            for b in range(8):
                byte |= u32(u32(kept[8 * j + b]) << u32(b))
            target[j] = numba.uint8(byte)
    return count


@compiled(
    numba.int64[:, ::1],
    numba.int64[::1],
    numba.int64,
    numba.float32,
    numba.boolean,
    numba.int64,
    numba.uint32[::1],
    numba.int64[::1],
)
def _mask(
    spans: Array,
    vote: Array,
    bits: int,
    scale: float,
    force: bool,
    numel: int,
    peaks: Array,
    counts: Array,
) -> None:
    based = len(spans) == 4
    target, tau, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    s, kept, room = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.uint8), np.empty(CHUNK, np.uint64)
    spare = np.array([room.ctypes.data, spans[0, 1]])
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        peaks[0] = max(peaks[0], load(spans[1], at, m, target))
        peaks[1] = max(peaks[1], load(spans[2], at, m, tau))
        if based:
            peaks[2] = max(peaks[2], load(spans[3], at, m, x))
            subtract(tau, x, m)
        peak, nans = _signs(vote, at, m, s, x)
        peaks[-1] = max(peaks[-1], peak)
        counts[NANS] += nans
        ties, nans = _masked(target, tau, s, scale, force, kept, m)
        counts[TIES] += ties
        counts[NANS] += nans
        store(target, spare, 0, m)  # and both back, as they were rounded
        load(spare, 0, m, target)
        store(tau, spans[0], at, m)
        load(spans[0], at, m, tau)
        counts[LOST] += _equal(tau, target, kept, m)
        counts[KEPT] += _write_bits(bits, at, m, kept)


def host(
    out: Span,
    target: Span,
    expert: Span,
    base: Span | None,
    vote: Span,
    mode: str,
    scale: float,
    counts: Array,
    mask: Span | None = None,
) -> Array:
    """Write `out`, which may be the target; say what target, expert, base and gradient (those there are) hold."""
    floats = [out, target, expert, *([] if base is None else [base])]
    graded = vote.dtype in CODES
    assert all(span.numel == out.numel for span in floats)
    assert mask is None or mask.numel == -(-out.numel // 8)
    force, scale = settings(mode, scale)
    peaks = np.zeros(len(floats), np.uint32)
    votes = np.array([vote.address, kind(vote.dtype, vote.numel, out.numel)])
    bits = 0 if mask is None else mask.address
    _mask(table(*floats), votes, bits, scale, force, out.numel, peaks, counts)
    return flags(peaks if graded else peaks[:-1])


@compiled(numba.int64[::1], numba.int64, numba.int64)
def _pack(vote: Array, address: int, numel: int) -> None:
    s, x = np.empty(CHUNK, np.int32), np.empty(CHUNK, np.float32)
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        _signs(vote, at, m, s, x)
        s[m : (m + 3) // 4 * 4] = 0
        target = numba.carray(pointer(address + at // 4), ((m + 3) // 4,), np.uint8)
        for j in range((m + 3) // 4):
            byte = u32(0)
            for i in range(4):
                v = s[4 * j + i]
                byte |= u32(u32(u32(v != 0) | u32(u32(v < 0) << u32(1))) << u32(2 * i))
            target[j] = numba.uint8(byte)


def pack(out: Span, vote: Span) -> None:
    """Write the signs of votes (or of a gradient's step downhill) into `out`, U8, two bits each."""
    numel = vote.numel
    assert vote.dtype != "U8"
    assert out.dtype == "U8"
    assert out.numel == -(-numel // 4)
    _pack(np.array([vote.address, kind(vote.dtype, numel, numel)]), out.address, numel)
