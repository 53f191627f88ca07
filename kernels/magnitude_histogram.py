"""Counts of the magnitudes of a task vector, for finding the k-th largest without sorting or keeping it.

The key of an element is the bit pattern of |expert - base| in fp32: 31 bits, in the order of the magnitudes, all NaNs
one key above infinity. Counts are integers, so parts of a tensor add up to the same in any order, on any number of
machines. Two passes with 65,536 and 32,768 brackets find any rank exactly: see select_threshold.py.

On a GPU elements below and above the brackets, and those with the guessed key, are only compared: a program counts
them over STEPS blocks and adds each count once. The rest goes to memory by atomics, one for each element, as long as
a block has FEW of them. Where it has more, many share a bin (zeros and powers of two are most of a 16-bit task
vector), and atomics on one address wait for each other. Such a block takes out bins whole: the bin of its first
element, counted by a sum over the block, added once; then that of the first one left; until FEW are left or MISSES
bins held fewer than they cost. So a bin that every block is full of gets one addition per block, and one that holds
a share p of the elements gets at most (1 - p)**MISSES of them one by one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import alignment, block_size, codes, int32, load, magnitude, pointer, put
from .host.magnitude_histogram import check
from .numerics import Array, Span
from .queue import Queue

LAUNCH = {"BLOCK": 1024, "STEPS": 16, "num_warps": 4}
FEW: tl.constexpr = tl.constexpr(64)  # elements of a block that are added one by one
MISSES: tl.constexpr = tl.constexpr(8)
NONE: tl.constexpr = tl.constexpr(0xFFFFFFFF)  # above every distance between keys

CASES = [
    (numel, dtypes, low, shift, bins)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for numel, low, shift, bins in (
        (0, 0, 15, 1 << 16), (1, 0, 15, 1 << 16), (5001, 0, 15, 1 << 16), (5001, 0x3DCC0000, 8, 256), (5001, 0, 0, 4),
        (70001, 0x3D000000, 29, 2), (70001, 0x3C800000, 15, 512),
    )
]  # fmt: skip


@triton.jit
def _add_bins(far, left, low, shift, counts, ends, ENDS: tl.constexpr, BLOCK: tl.constexpr):
    """Bin after bin, all that lie in it at once, until few are left or bins hold few; gives back what is left."""
    lane = tl.arange(0, BLOCK)
    misses = 0
    while (left > FEW) & (misses < MISSES):
        first = tl.min(tl.where(far == NONE, BLOCK, lane), 0)
        bin = tl.max(tl.where(lane == first, far, 0), 0) >> shift
        same = (far != NONE) & (far >> shift == bin)
        several = tl.sum(same.to(tl.int32), 0)
        tl.atomic_add(counts + 1 + bin, several.to(tl.int64), sem="relaxed")
        if ENDS:
            tl.atomic_min(ends + 2 * bin, tl.min(tl.where(same, far, NONE), 0) + low, sem="relaxed")
            tl.atomic_max(ends + 2 * bin + 1, tl.max(tl.where(same, far, 0), 0) + low, sem="relaxed")
        far = tl.where(same, NONE, far)
        left -= several
        misses += (several < BLOCK // 256).to(tl.int32)
    return far


@triton.jit
def _add_each(far, low, shift, counts, ends, ENDS: tl.constexpr):
    """One by one."""
    rest, bin = far != NONE, far >> shift
    tl.atomic_add(counts + 1 + bin, tl.full(far.shape, 1, tl.int64), mask=rest, sem="relaxed")
    if ENDS:
        tl.atomic_min(ends + 2 * bin, far + low, mask=rest, sem="relaxed")
        tl.atomic_max(ends + 2 * bin + 1, far + low, mask=rest, sem="relaxed")


@triton.jit
def _keys(base, expert, offs, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    return magnitude(
        load(expert, offs, mask, CODES[1], ALIGN, MASKED) - load(base, offs, mask, CODES[0], ALIGN, MASKED)
    )


@triton.jit
def _step(
    found, mask, low, width, shift, guess, counts, ends, ENDS: tl.constexpr, MASKED: tl.constexpr, BLOCK: tl.constexpr
):
    """One block; the answer counts keys below the brackets (from bit 0), on the guess (bit 21), the others (bit 42)."""
    far = found - low  # wraps below
    inside = far < width
    kind = tl.where(found == guess, 1 << 10, tl.where(inside, 1 << 20, (found < low).to(tl.int32)))
    if MASKED:
        kind = tl.where(mask, kind, 0)
    few = tl.sum(tl.reshape(kind, (BLOCK // 8, 8)), 1).to(tl.int64)  # of one thread, as it loads them
    tally = tl.sum((few & 1023) | ((few & (1023 << 10)) << 11) | ((few >> 20) << 42), 0)
    left = (tally >> 42).to(tl.int32)
    if left > 0:
        far = tl.where(kind == 1 << 20, far, NONE)
        if left > FEW:
            far = _add_bins(far, left, low, shift, counts, ends, ENDS, BLOCK)
        _add_each(far, low, shift, counts, ends, ENDS)
    return tally


@triton.jit(do_not_specialize=["low", "width", "shift", "guess", "above", "numel"])
def _histogram(
    base,
    expert,
    low,
    width,
    shift,
    guess,
    above,
    numel,
    counts,
    ends,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    ENDS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`guess` is a key inside the brackets or none at all; `above` is the place of the last count."""
    tl.static_assert(STEPS * BLOCK < 1 << 21)
    low, width = tl.cast(low, tl.uint32), tl.cast(width, tl.uint32)
    shift, guess = tl.cast(shift, tl.uint32), tl.cast(guess, tl.uint32)
    counts, ends = pointer(counts, tl.int64, 16), pointer(ends, tl.uint32, 16)
    begin = tl.program_id(0).to(tl.int64) * (STEPS * BLOCK)
    lane = tl.arange(0, BLOCK)
    tally = tl.full((), 0, tl.int64)
    if begin + STEPS * BLOCK <= numel:
        for step in range(STEPS):
            offs = begin + step * BLOCK + lane
            found = _keys(base, expert, offs, offs, CODES, ALIGN, False)
            tally += _step(found, offs, low, width, shift, guess, counts, ends, ENDS, False, BLOCK)
    else:
        for step in range(STEPS):
            offs = begin + step * BLOCK + lane
            found = _keys(base, expert, offs, offs < numel, CODES, ALIGN, True)
            tally += _step(found, offs < numel, low, width, shift, guess, counts, ends, ENDS, True, BLOCK)
    under, known = tally & 0x1FFFFF, (tally >> 21) & 0x1FFFFF
    over = tl.minimum(numel - begin, STEPS * BLOCK) - under - known - (tally >> 42)
    if under > 0:
        tl.atomic_add(counts, under, sem="relaxed")
    if over > 0:
        tl.atomic_add(counts + above, over, sem="relaxed")
    if known > 0:
        place = ((guess - low) >> shift).to(tl.int64)
        tl.atomic_add(counts + 1 + place, known, sem="relaxed")
        if ENDS:
            tl.atomic_min(ends + 2 * place, guess, sem="relaxed")
            tl.atomic_max(ends + 2 * place + 1, guess, sem="relaxed")


@triton.jit(do_not_specialize=["numel"])
def _write_keys(base, expert, out, numel, CODES: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < numel
    found = _keys(base, expert, offs, mask, CODES, ALIGN, True)
    put(pointer(out, tl.uint32, 16), offs, found, mask, True)


def launch(
    queue: Queue,
    base: Span,
    expert: Span,
    low: int,
    shift: int,
    counts: Array,
    ends: Array | None = None,
    guess: int = -1,
) -> None:
    check(low, shift, counts, ends)
    assert base.numel == expert.numel
    bins = len(counts) - 2
    width = min(bins << shift, (1 << 31) - low)
    block, added = block_size(LAUNCH["BLOCK"]), queue.mirror(counts)
    queue.submit(
        _histogram,
        (triton.cdiv(base.numel, LAUNCH["STEPS"] * block),),
        base.address,
        expert.address,
        low,
        int32(width),
        shift,
        guess if low <= guess < low + width else -1,
        bins + 1,
        base.numel,
        added,
        added if ends is None else queue.mirror(ends),
        CODES=codes(base, expert),
        ALIGN=alignment(base, expert),
        ENDS=ends is not None,
        STEPS=LAUNCH["STEPS"],
        BLOCK=block,
        num_warps=LAUNCH["num_warps"],
    )


def launch_keys(queue: Queue, base: Span, expert: Span, out: Array) -> None:
    """The keys themselves into a mirrored array, as uint32."""
    assert base.numel == expert.numel == len(out)
    assert out.dtype == np.uint32
    block = block_size(1024)
    queue.submit(
        _write_keys,
        (triton.cdiv(base.numel, block),),
        base.address,
        expert.address,
        queue.mirror(out, fresh=True),
        base.numel,
        CODES=codes(base, expert),
        ALIGN=alignment(base, expert),
        BLOCK=block,
        num_warps=4,
    )


def reference(
    base: Tensor, expert: Tensor, low: int, shift: int, counts: Array, ends: Array | None = None, guess: int = -1
) -> None:
    bins = len(counts) - 2
    key = truth.magnitude(expert.float() - base.float())
    place = torch.where(key < low, 0, (1 + ((key - low) >> shift)).clamp(max=bins + 1))
    counts += torch.bincount(place, minlength=bins + 2).cpu().numpy()
    if ends is not None:
        where = place.cpu().numpy() - 1
        inside = (where >= 0) & (where < bins)
        found = key.cpu().numpy()[inside].astype(np.uint32)
        np.minimum.at(ends[:, 0], where[inside], found)
        np.maximum.at(ends[:, 1], where[inside], found)


def inputs(
    numel: int, dtypes: tuple[str, ...], low: int, shift: int, bins: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    _, base, expert = truth.tensors(numel, dtypes, 3, device, seed)
    ends = np.tile(np.array([[1 << 31, 0]], np.uint32), (bins, 1)) if shift % 2 else None
    guess = low + (1 << shift) // 2 if shift % 2 else -1
    return base, expert, low, shift, np.zeros(bins + 2, np.int64), ends, guess


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    return truth.nbytes(base, expert)
