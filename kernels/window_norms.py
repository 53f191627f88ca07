"""The L1 norms that rescaling after a trim compares: of a task vector, and of what lies strictly between two keys.

Elements that tie at a bound share one magnitude, so their part of the norm is a count times a value; what remains is
this sum. Taken per logical block of 4,096 elements in the order that numerics.py fixes.

On a GPU a program takes a few blocks, one row of lanes of each at a time.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import LANE_COUNT, fold, load, magnitude, pointer, walk, walk_shape
from .numerics import BLOCK, Array, Span
from .queue import Queue

LAUNCH = {2: {"BLOCKS": 8, "UNROLL": 4, "num_warps": 4}}

CASES = [
    (numel, dtypes, low, high)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for numel, low, high in ((0, 0, 9), (1, -1, 1 << 31), (4097, 0x3D000000, 0x3E000000), (9000, 0x3D4CCCCD, 1 << 31))
]


@triton.jit
def _step(sums, args, at, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr):
    """One row more of sum |delta| and of its part between the bounds."""
    base, expert, low, high = args
    offs = at[:, None] + tl.arange(0, LANE_COUNT)[None, :]
    delta = load(expert, offs, mask, CODES[1], ALIGN, MASKED) - load(base, offs, mask, CODES[0], ALIGN, MASKED)
    size = tl.abs(delta).to(tl.float64)
    key = magnitude(delta).to(tl.int32)
    return sums[0] + size, tl.where((key > low) & (key < high), sums[1] + size, sums[1])


@triton.jit(do_not_specialize=["low", "high", "numel"])
def _norms(
    base,
    expert,
    partials,
    low,
    high,
    numel,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    args = (base, expert, low, high)
    sums = walk(_step, 2, args, first, BLOCK, numel, CODES, ALIGN, 0, BLOCKS, UNROLL)
    place = first + tl.arange(0, BLOCKS)
    target = pointer(partials, tl.float64, 1) + 2 * place
    for which in tl.static_range(2):
        tl.store(target + which, fold(sums[which], BLOCKS), mask=place * BLOCK < numel)


def launch(queue: Queue, base: Span, expert: Span, low: int, high: int, partials: Array) -> None:
    assert base.numel == expert.numel
    assert partials.shape == (-(-base.numel // BLOCK), 2)
    size = walk_shape(LAUNCH, 2, BLOCK, len(partials), base, expert)
    bounds = [min(max(bound, -1), 0x7FFFFFFF) for bound in (low, high)]  # keys are 0 ... 0x7FC00000
    queue.submit(
        _norms,
        (triton.cdiv(len(partials), size["BLOCKS"]),),
        base.address,
        expert.address,
        queue.mirror(partials, fresh=True),
        *bounds,
        base.numel,
        BLOCK=BLOCK,
        **size,
    )


def reference(base: Tensor, expert: Tensor, low: int, high: int, partials: Array) -> None:
    delta = expert.float() - base.float()
    key = truth.magnitude(delta)
    kept = delta.where((key > low) & (key < high), 0)
    for column, value in enumerate((delta, kept)):
        partials[:, column] = truth.block_sums(value.abs(), BLOCK).cpu().numpy()


def inputs(
    numel: int, dtypes: tuple[str, ...], low: int, high: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    _, base, expert = truth.tensors(numel, dtypes, 3, device, seed)
    return base, expert, low, high, np.full((-(-numel // BLOCK), 2), np.nan)


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    return truth.nbytes(base, expert)
