"""A task vector masked by voted signs, scaled and added to another model: GradFix's update (arXiv 2510.09658).

    tau = expert - base (or expert itself: base None)          s = sign(votes), or -sign(gradient)
    agreement   mask(tau, s) = tau where sign(tau) == s and s != 0, else 0
    force       mask(tau, s) = s * |tau|
    out = target + scale * mask(tau, s)

s is the sign of the step downhill, which is what a task vector (fine-tuned minus pre-trained) is compared with.
fp32, one rounding at the end. What is counted, how votes are packed and what stays exact: host/sign_mask.py.

On a GPU each input is read once and the output written once. `masked` and `count` are vote_gemm.py's too.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import (
    ABSOLUTE,
    BF16,
    E4M3,
    E5M2,
    F16,
    alignment,
    as_f32,
    as_u32,
    block_size,
    codes,
    encode,
    fetch,
    load,
    pointer,
    put,
    raise_peak,
    store,
    widen,
)
from .host.sign_mask import I8 as KIND_I8
from .host.sign_mask import I16 as KIND_I16
from .host.sign_mask import KEPT, LOST, NANS, TIES, kind, settings
from .host.sign_mask import PACKED as KIND_PACKED
from .numerics import CODES, Array, Span
from .queue import Queue

LAUNCH = {"BLOCK": 2048, "num_warps": 8}
LARGEST = 1 << 14  # elements of a program: two counts share 32 bits
I8: tl.constexpr = tl.constexpr(KIND_I8)
I16: tl.constexpr = tl.constexpr(KIND_I16)
PACKED: tl.constexpr = tl.constexpr(KIND_PACKED)
SIGN: tl.constexpr = tl.constexpr(0x80000000)

CASES = [
    (numel, dtypes, vote, mode, based, bits)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16", "F32"))
    for numel, vote, mode, based, bits in (
        (0, "I8", "agreement", True, True), (1, "U8", "force", True, True), (4097, "BF16", "agreement", True, False),
        (5001, "U8", "agreement", True, True), (777, "I16", "force", False, True), (3000, "F32", "force", False, False),
    )
]  # fmt: skip


@triton.jit
def as_i32(value):
    return value.to(tl.int32, bitcast=True)


@triton.jit
def stored(value, CODE: tl.constexpr):
    """fp32 values as they are read back after a store."""
    code = encode(value, CODE)
    if CODE == BF16:
        return as_f32(code << 16)
    elif CODE == F16:
        return code.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    elif CODE == E4M3:
        return as_f32(widen(code & 0x7F, 3, 7, 0x7E, 0x7E) | ((code & 0x80) << 24))
    elif CODE == E5M2:
        return as_f32(widen(code & 0x7F, 2, 15, 0x7B, 0x7C) | ((code & 0x80) << 24))
    else:
        return as_f32(code)


@triton.jit
def has_sign(value):
    """Neither 0 nor NaN."""
    return (value > 0) | (value < 0)


@triton.jit
def masked(target, tau, s, scale, OUT: tl.constexpr, TARGET: tl.constexpr, FORCE: tl.constexpr):
    """The result, and per element what counts: 1 if kept, 1 << 8 if tied, 1 << 16 if lost.

    s is int32 and has the sign of the vote; OUT and TARGET are dtypes in memory.
    """
    free = has_sign(tau)
    voted = free & (s != 0)
    if FORCE:
        kept = voted
        step = as_f32((as_u32(tau) & ABSOLUTE) | (as_u32(s) & SIGN))
    else:
        kept = voted & ((as_i32(tau) ^ s) >= 0)
        step = tau
    update = scale * tl.where(kept, step, 0.0)  # NaN if scale is 0 and tau infinite: no update either
    result = tl.where(has_sign(update), target + update, target)
    alone = target if OUT == TARGET else stored(target, OUT)
    lost = kept & (stored(result, OUT) == alone)
    ties = tl.where(voted, 0, tl.where(free, 1 << 8, 0))
    return result, kept, tl.where(kept, tl.where(lost, 1 + (1 << 16), 1), ties)


@triton.jit
def signs_of(gradient):
    """int32 with the signs of the negative gradient."""
    return as_i32(tl.where(has_sign(gradient), as_u32(gradient) ^ SIGN, 0).to(tl.uint32))


@triton.jit
def tally(counts, high, low):
    """Add kept and tied elements (the halves of `high`) and lost ones (lower half of `low`) to memory, all at once."""
    lane = tl.arange(0, 4)
    value = tl.where(lane == 0, high & 0xFFFF, tl.where(lane == 1, high >> 16, tl.where(lane == 2, low & 0xFFFF, 0)))
    tl.atomic_add(pointer(counts, tl.int64, 1) + lane, value.to(tl.int64), sem="relaxed")


@triton.jit
def count_nans(counts, value):
    nans = tl.sum((value != value).to(tl.int32)).to(tl.int64)
    tl.atomic_add(pointer(counts, tl.int64, 1) + 3, nans, sem="relaxed")


@triton.jit
def _signs(vote, at, numel, offs, mask, KIND: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """int32 with the signs of a block's votes, or of its gradient, and the gradient (or zeros)."""
    gradient = tl.zeros(offs.shape, tl.float32)
    if KIND == I8:
        s = as_i32(fetch(pointer(vote, tl.uint8, ALIGN), offs, mask, MASKED).to(tl.uint32) << 24)
    elif KIND == I16:
        s = as_i32(fetch(pointer(vote, tl.uint16, ALIGN), offs, mask, MASKED).to(tl.uint32) << 16)
    elif KIND == PACKED:
        four = at // 4 + tl.arange(0, offs.shape[0] // 4)
        byte = fetch(pointer(vote, tl.uint8, ALIGN), four, four * 4 < numel, MASKED).to(tl.uint32)
        even, odd = tl.interleave(byte << 30, byte << 26), tl.interleave(byte << 28, byte << 24)
        s = as_i32(tl.interleave(even, odd) & 0xC0000000)
    else:
        gradient = load(vote, offs, mask, KIND, ALIGN, MASKED)
        s = signs_of(gradient)
    return s, gradient


@triton.jit
def _block(
    spans,
    vote,
    bits,
    scale,
    numel,
    peaks,
    counts,
    at,
    offs,
    mask,
    CODES: tl.constexpr,
    KIND: tl.constexpr,
    FORCE: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
):
    COUNT: tl.constexpr = len(CODES)
    EIGHTH: tl.constexpr = offs.shape[0] // 8
    target = load(spans[1], offs, mask, CODES[1], ALIGN, MASKED)
    tau = load(spans[2], offs, mask, CODES[2], ALIGN, MASKED)
    if COUNT == 4:
        tau = tau - load(spans[3], offs, mask, CODES[3], ALIGN, MASKED)
    s, gradient = _signs(vote, at, numel, offs, mask, KIND, ALIGN, MASKED)
    result, kept, counted = masked(target, tau, s, scale, CODES[0], CODES[1], FORCE)
    store(spans[0], offs, result, mask, CODES[0], ALIGN, MASKED)
    if BITS:
        eight = at // 8 + tl.arange(0, EIGHTH)
        grid = tl.reshape(kept.to(tl.int32), (EIGHTH, 8)) << tl.arange(0, 8)[None, :]
        put(pointer(bits, tl.uint8, ALIGN), eight, tl.sum(grid, 1).to(tl.uint8), eight * 8 < numel, MASKED)
    # not finite wherever any of them is not: their own magnitudes are looked at only then
    odd = ((tl.abs(target - tau + gradient) < float("inf")) == 0).to(tl.int32)
    odd = tl.max(tl.reshape(odd, (EIGHTH, 8)), 1)
    eights = tl.sum(tl.reshape(counted, (EIGHTH, 8)), 1)
    high = tl.sum((eights & 0xFF) | ((eights & 0xFF00) << 8), 0)
    low = tl.sum((eights >> 16) | (odd << 16), 0)
    tally(counts, high, low)
    if low > 0xFFFF:
        count_nans(counts, tau)
        raise_peak(peaks, 0, target, 1)  # from registers: out may be the target
        for k in tl.static_range(2, COUNT):
            raise_peak(peaks, k - 1, load(spans[k], offs, mask, CODES[k], ALIGN, MASKED), 1)
        if KIND < I8:
            count_nans(counts, gradient)
            raise_peak(peaks, COUNT - 1, gradient, 1)


@triton.jit(do_not_specialize=["numel"])
def _mask(
    spans,
    vote,
    bits,
    scale,
    numel,
    peaks,
    counts,
    CODES: tl.constexpr,
    KIND: tl.constexpr,
    FORCE: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    offs = at + tl.arange(0, BLOCK)
    if at + BLOCK <= numel:
        _block(spans, vote, bits, scale, numel, peaks, counts, at, offs, offs, CODES, KIND, FORCE, BITS, ALIGN, False)
    else:
        mask = offs < numel
        _block(spans, vote, bits, scale, numel, peaks, counts, at, offs, mask, CODES, KIND, FORCE, BITS, ALIGN, True)


def launch(
    queue: Queue,
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
    spans = (out, target, expert) if base is None else (out, target, expert, base)
    assert all(span.numel == out.numel for span in spans)
    assert mask is None or mask.numel == -(-out.numel // 8)
    assert counts.shape == (4,)
    assert counts.dtype == np.int64
    force, scale = settings(mode, scale)
    peaks, found = queue.peaks(len(spans) - 1 + (vote.dtype in CODES))
    block = min(block_size(LAUNCH["BLOCK"]), LARGEST)
    queue.submit(
        _mask,
        (triton.cdiv(out.numel, block),),
        tuple(span.address for span in spans),
        vote.address,
        0 if mask is None else mask.address,
        scale,
        out.numel,
        peaks,
        queue.mirror(counts),
        CODES=codes(*spans),
        KIND=kind(vote.dtype, vote.numel, out.numel),
        FORCE=force,
        BITS=mask is not None,
        ALIGN=alignment(*spans, vote, *(() if mask is None else (mask,))),
        BLOCK=block,
        num_warps=LAUNCH["num_warps"],
    )
    return found


@triton.jit
def _pack_block(out, vote, numel, at, offs, mask, KIND: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    s, _ = _signs(vote, at, numel, offs, mask, KIND, ALIGN, MASKED)
    pair = (s != 0).to(tl.int32) | ((s < 0).to(tl.int32) << 1)  # two's complement
    quarter: tl.constexpr = offs.shape[0] // 4
    four = at // 4 + tl.arange(0, quarter)
    grid = tl.reshape(pair, (quarter, 4)) << (2 * tl.arange(0, 4))[None, :]
    put(pointer(out, tl.uint8, ALIGN), four, tl.sum(grid, 1).to(tl.uint8), four * 4 < numel, MASKED)


@triton.jit(do_not_specialize=["numel"])
def _pack(out, vote, numel, KIND: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    offs = at + tl.arange(0, BLOCK)
    if at + BLOCK <= numel:
        _pack_block(out, vote, numel, at, offs, offs, KIND, ALIGN, False)
    else:
        _pack_block(out, vote, numel, at, offs, offs < numel, KIND, ALIGN, True)


def launch_pack(queue: Queue, out: Span, vote: Span) -> None:
    assert vote.dtype != "U8"
    assert out.dtype == "U8"
    assert out.numel == -(-vote.numel // 4)
    block = block_size(LAUNCH["BLOCK"])
    queue.submit(
        _pack,
        (triton.cdiv(vote.numel, block),),
        out.address,
        vote.address,
        vote.numel,
        KIND=kind(vote.dtype, vote.numel, vote.numel),
        ALIGN=alignment(out, vote),
        BLOCK=block,
        num_warps=LAUNCH["num_warps"],
    )


def signs(vote: Tensor, numel: int) -> Tensor:
    """What votes of any kind say, as int64 -1, 0, 1."""
    if vote.dtype == torch.uint8:
        pairs = ((vote[:, None].long() >> torch.arange(0, 8, 2, device=vote.device)) & 3).flatten()[:numel]
        return torch.tensor([0, 1, -1, -1], device=vote.device)[pairs]
    if vote.dtype.is_floating_point:
        gradient = vote.float()
        return (gradient < 0).long() - (gradient > 0).long()
    return vote.long().sign()


def bits_of(kept: Tensor) -> Tensor:
    """Eight to a byte, the first in bit 0."""
    padded = torch.nn.functional.pad(kept.long(), (0, -kept.numel() % 8)).view(-1, 8)
    return (padded << torch.arange(8, device=kept.device)).sum(1).to(torch.uint8)


def reference(
    out: Tensor,
    target: Tensor,
    expert: Tensor,
    base: Tensor | None,
    vote: Tensor,
    mode: str,
    scale: float,
    counts: Array,
    mask: Tensor | None = None,
) -> Array:
    """The same in torch."""
    force, scale = settings(mode, scale)
    s, before = signs(vote, out.numel()), target.float()
    tau = expert.float() if base is None else expert.float() - base.float()
    sign = (tau > 0).long() - (tau < 0).long()
    kept = (sign != 0) & (s != 0) & (force | (sign == s))
    update = scale * torch.where(kept, s * tau.abs(), 0)
    alone = truth.rounded(before, out.dtype)
    found = truth.flags(
        target, expert, *([] if base is None else [base]), *([vote] if vote.is_floating_point() else [])
    )
    truth.write(out, torch.where((update == 0) | (scale == 0), before, before + update))
    counts[KEPT] += int(kept.sum())
    counts[TIES] += int(((sign != 0) & (s == 0)).sum())
    counts[LOST] += int((kept & (out.float() == alone.float())).sum())
    counts[NANS] += int(tau.isnan().sum()) + (int(vote.isnan().sum()) if vote.is_floating_point() else 0)
    if mask is not None:
        mask.copy_(bits_of(kept))
    return found


def reference_pack(out: Tensor, vote: Tensor) -> None:
    s = signs(vote, vote.numel())
    pairs = torch.nn.functional.pad((s != 0).long() | ((s < 0).long() << 1), (0, -s.numel() % 4)).view(-1, 4)
    out.copy_((pairs << torch.arange(0, 8, 2, device=s.device)).sum(1))


def inputs(
    numel: int,
    dtypes: tuple[str, ...],
    vote: str,
    mode: str,
    based: bool,
    bits: bool,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    out, base, expert, target, gradient = truth.tensors(numel, dtypes, 5, device, seed)
    random = np.random.default_rng(seed)
    if vote in CODES:
        votes = truth.rounded((gradient.float() - base.float()).cpu(), truth.DTYPES[vote])
    else:
        votes = torch.from_numpy(random.integers(-3, 4, numel).astype(np.int16 if vote == "I16" else np.int8))
        if vote == "U8":
            wide, votes = votes, torch.empty(-(-numel // 4), dtype=torch.uint8)
            reference_pack(votes, wide)
    expert = expert if based else truth.rounded(expert.float() - base.float(), expert.dtype)
    mask = torch.full((-(-numel // 8),), 0xA5, dtype=torch.uint8, device=device) if bits else None
    counts = np.arange(4, dtype=np.int64)
    return out, target, expert, base if based else None, votes.to(device), mode, 0.3, counts, mask


def bytes_moved(out: Any, target: Any, expert: Any, base: Any, vote: Any, *rest: Any) -> int:
    return truth.nbytes(out, target, expert, vote, *(t for t in (base, rest[-1]) if t is not None))
