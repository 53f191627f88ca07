"""The L1 norms that DARE's rescaling compares: of a task vector, and of what a random mask leaves of it.

An element stays if its Philox word lies below density * 2**32. The mask is a function of seed, tensor, expert and
element alone, so sign_elect.py draws the same one again instead of reading it. Sums are taken per logical block of
4,096 elements in the order that numerics.py fixes: parts, machines and devices agree to the bit.

On a GPU a program takes a few blocks, one row of lanes of each at a time; a counter's four words go to four neighbours.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import LANE_COUNT, fold, int32, lane_words, load, pointer, walk, walk_shape
from .numerics import BLOCK, Array, Span, threshold
from .queue import Queue

LAUNCH = {2: {"BLOCKS": 4, "UNROLL": 4, "num_warps": 4}}

CASES = [
    (numel, dtypes, density, start)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for numel, density, start in ((0, 0.5, 0), (1, 0.5, 0), (4097, 0.3, 4096), (9000, 1.0, 0), (9000, 0.0, 1 << 34))
]


@triton.jit
def _step(sums, args, at, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, DRAW: tl.constexpr, MASKED: tl.constexpr):
    """One row more of sum |delta| and sum |kept delta|; without DRAW the second is not looked at."""
    base, expert, start, last, seed_low, seed_high, tensor_id, expert_id = args
    offs = at[:, None] + tl.arange(0, LANE_COUNT)[None, :]
    delta = load(expert, offs, mask, CODES[1], ALIGN, MASKED) - load(base, offs, mask, CODES[0], ALIGN, MASKED)
    size = tl.abs(delta).to(tl.float64)
    kept = sums[1]
    if DRAW:
        words = lane_words(start + at, seed_low, seed_high, tensor_id, expert_id, True)
        kept = tl.where(words <= tl.cast(last, tl.uint32), kept + size, kept)
    return sums[0] + size, kept


@triton.jit(do_not_specialize=["start", "last", "any_kept", "seed_low", "seed_high", "tensor_id", "expert_id", "numel"])
def _norms(
    base,
    expert,
    partials,
    start,
    last,
    any_kept,
    seed_low,
    seed_high,
    tensor_id,
    expert_id,
    numel,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    DRAW: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    args = (base, expert, tl.cast(start, tl.int64), last, seed_low, seed_high, tensor_id, expert_id)
    sums = walk(_step, 2, args, first, BLOCK, numel, CODES, ALIGN, DRAW, BLOCKS, UNROLL)
    whole = fold(sums[0], BLOCKS)
    if DRAW:
        kept = fold(sums[1], BLOCKS)
    else:
        kept = tl.where(any_kept != 0, whole, 0.0)
    place = first + tl.arange(0, BLOCKS)
    target = pointer(partials, tl.float64, 1) + 2 * place
    tl.store(target, whole, mask=place * BLOCK < numel)
    tl.store(target + 1, kept, mask=place * BLOCK < numel)


def launch(
    queue: Queue,
    base: Span,
    expert: Span,
    density: float,
    seed: int,
    tensor_id: int,
    expert_id: int,
    start: int,
    partials: Array,
) -> None:
    assert start % BLOCK == 0
    assert base.numel == expert.numel
    assert partials.shape == (-(-base.numel // BLOCK), 2)
    size = walk_shape(LAUNCH, 2, BLOCK, len(partials), base, expert)
    below = threshold(density)
    queue.submit(
        _norms,
        (triton.cdiv(len(partials), size["BLOCKS"]),),
        base.address,
        expert.address,
        queue.mirror(partials, fresh=True),
        start,
        int32(below - 1),
        int(below > 0),
        int32(seed),
        int32(seed >> 32),
        int32(tensor_id),
        int32(expert_id),
        base.numel,
        DRAW=0 < below < 1 << 32,
        BLOCK=BLOCK,
        **size,
    )


def reference(
    base: Tensor,
    expert: Tensor,
    density: float,
    seed: int,
    tensor_id: int,
    expert_id: int,
    start: int,
    partials: Array,
) -> None:
    delta = expert.float() - base.float()
    words = truth.philox(start, delta.numel(), seed, tensor_id, expert_id, delta.device)
    kept = delta.where(words < threshold(density), 0)
    for column, value in enumerate((delta, kept)):
        partials[:, column] = truth.block_sums(value.abs(), BLOCK).cpu().numpy()


def inputs(
    numel: int, dtypes: tuple[str, ...], density: float, start: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    _, base, expert = truth.tensors(numel, dtypes, 3, device, seed)
    return base, expert, density, 2026 + seed, 0xDEADBEEF, 1, start, np.full((-(-numel // BLOCK), 2), np.nan)


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    return truth.nbytes(base, expert)
