"""Inner products of one vector with many task vectors, in one pass: gradients of their coefficients.

    dot[b, k] = sum over block b of g * (expert_k - base)                  (base None: of g * expert_k)
    dot[b, k, q] = the same over those of the block's elements that are in group q

Values are fp32; the difference is taken before the product: <g, expert> - <g, base> would cancel. Products are fp64 and
hence exact, sums are fp64 in the order that numerics.py fixes, per logical block: 4,096 elements, or a row's length for
one sum per row. Parts that begin at a multiple of the block give the same bits as the whole. Groups are those of
a random partition (numerics.Partition); an element outside a group leaves its sums alone, NaN or not, so a group's sum
has the bits of one over a copy with zeros elsewhere.

On a GPU every input is read once for up to 10 experts. With groups, a program keeps the sums of at most 8 pairs of an
expert and a group in registers: its blocks are read, and their groups drawn, once for every 8 sums. Programs of
the same blocks run side by side and find them in the cache, but they compare every element with their own groups: about
100 instructions per element and 8 sums. K = 8 with 1,200 groups is 1,200 times that: right for the factors of a
LoRA, slow for a whole model. A program's memory does not grow with the groups, and there are no atomics and no
tables: a sum's order is the same whatever runs beside it.
"""

# mypy: disable-error-code="assignment,misc"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import LANE_COUNT, alignment, fold, group_of, int32, lane_words, load, pointer, walk, walk_shape
from .numerics import BLOCK, PARTITION, Array, Partition, Span
from .queue import Queue

LAUNCH = {  # by how many sums a program keeps at most
    3: {"BLOCKS": 8, "UNROLL": 2, "num_warps": 4},
    8: {"BLOCKS": 4, "UNROLL": 2, "num_warps": 4},
    10: {"BLOCKS": 4, "UNROLL": 1, "num_warps": 4},
}
SPLIT_LAUNCH = {8: {"BLOCKS": 4, "UNROLL": 1, "num_warps": 4}}
MOST = {(16, False): 10, (16, True): 8, (1, False): 6, (1, True): 4}  # sums of a program: by alignment, and if split
STREAM: tl.constexpr = tl.constexpr(PARTITION)
EXACT_FMA = True  # of two fp32, in fp64: a*b + c is rounded once, contracted or not

CASES = [
    (numel, dtypes, experts, based, block, start, groups)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16", "F32"))
    for numel, experts, based, block, start, groups in (
        (0, 1, True, BLOCK, 0, 0), (1, 1, False, BLOCK, 0, 3), (9000, 3, True, BLOCK, 1 << 34, 0),
        (1500, 2, True, 5, 0, 0), (900, 3, True, 100, 300, 7), (500, 2, False, 77, 77, 3), (2100, 5, True, 1000, 0, 0),
    )
] + [(700, ("BF16",), 16, True, 136, 0, 0), (700, ("F32",), 9, True, 129, 2, 5)]  # fmt: skip


@triton.jit
def _step(sums, spans, at, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, BASED: tl.constexpr, MASKED: tl.constexpr):
    """One row more of g * (expert - base) for each expert; spans are g, the base if BASED, the experts."""
    offs = at[:, None] + tl.arange(0, LANE_COUNT)[None, :]
    g = load(spans[0], offs, mask, CODES[0], ALIGN, MASKED).to(tl.float64)
    if BASED:
        base = load(spans[1], offs, mask, CODES[1], ALIGN, MASKED)
    found = ()
    for k in tl.static_range(1 + BASED, len(CODES)):
        x = load(spans[k], offs, mask, CODES[k], ALIGN, MASKED)
        found += (tl.fma(g, (x - base if BASED else x).to(tl.float64), sums[len(found)]),)
    return found


@triton.jit
def _split_step(
    sums, args, at, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr
):
    """The same for KIND[1] groups from `low` on: sums of the first expert's groups, then of the second's."""
    spans, start, seed_low, seed_high, tensor_id, groups, low = args
    BASED: tl.constexpr = KIND[0]
    WIDTH: tl.constexpr = KIND[1]
    QUAD: tl.constexpr = KIND[2]
    offs = at[:, None] + tl.arange(0, LANE_COUNT)[None, :]
    words = lane_words(start + at, seed_low, seed_high, tensor_id, STREAM, QUAD)
    mine = group_of(words, groups).to(tl.int32) - low
    g = load(spans[0], offs, mask, CODES[0], ALIGN, MASKED).to(tl.float64)
    if BASED:
        base = load(spans[1], offs, mask, CODES[1], ALIGN, MASKED)
    found = ()
    for k in tl.static_range(1 + BASED, len(CODES)):
        x = load(spans[k], offs, mask, CODES[k], ALIGN, MASKED)
        wide = (x - base if BASED else x).to(tl.float64)
        for q in tl.static_range(WIDTH):
            found += (tl.where(mine == q, tl.fma(g, wide, sums[len(found)]), sums[len(found)]),)
    return found


@triton.jit(do_not_specialize=["stride", "column", "block", "numel"])
def _dots(
    spans,
    partials,
    stride,
    column,
    block,
    numel,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    BASED: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    COUNT: tl.constexpr = len(CODES) - 1 - BASED
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    sums = walk(_step, COUNT, spans, first, block, numel, CODES, ALIGN, BASED, BLOCKS, UNROLL)
    place = first + tl.arange(0, BLOCKS)
    target = pointer(partials, tl.float64, 1) + place * stride + column
    for k in tl.static_range(COUNT):
        tl.store(target + k, fold(sums[k], BLOCKS), mask=place * block < numel)


@triton.jit(
    do_not_specialize=[
        "stride", "column", "block", "numel", "start", "seed_low", "seed_high", "tensor_id", "groups", "chunks"
    ]
)  # fmt: skip
def _split_dots(
    spans,
    partials,
    stride,
    column,
    block,
    numel,
    start,
    seed_low,
    seed_high,
    tensor_id,
    groups,
    chunks,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    BASED: tl.constexpr,
    WIDTH: tl.constexpr,
    QUAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    """Neighbouring programs do the same blocks, each WIDTH groups of them."""
    COUNT: tl.constexpr = len(CODES) - 1 - BASED
    KIND: tl.constexpr = (BASED, WIDTH, QUAD)
    program = tl.program_id(0).to(tl.int64)
    first, low = program // chunks * BLOCKS, (program % chunks * WIDTH).to(tl.int32)
    args = (spans, tl.cast(start, tl.int64), seed_low, seed_high, tensor_id, groups, low)
    sums = walk(_split_step, COUNT * WIDTH, args, first, block, numel, CODES, ALIGN, KIND, BLOCKS, UNROLL)
    place = first + tl.arange(0, BLOCKS)
    target = pointer(partials, tl.float64, 1) + (place * stride + column) * groups + low
    for k in tl.static_range(COUNT):
        for q in tl.static_range(WIDTH):
            mask = (place * block < numel) & (tl.zeros_like(place) + low + q < groups)
            tl.store(target + k * groups + q, fold(sums[k * WIDTH + q], BLOCKS), mask=mask)


def launch(
    queue: Queue,
    g: Span,
    base: Span | None,
    experts: Sequence[Span],
    block: int,
    partials: Array,
    start: int = 0,
    split: Partition | None = None,
) -> None:
    based = () if base is None else (base,)
    assert partials.shape[:2] == (-(-g.numel // block), len(experts))
    assert partials.ndim == (2 if split is None else 3)
    assert all(span.numel == g.numel for span in (*based, *experts))
    target = queue.mirror(partials, fresh=True)
    most = MOST[alignment(g, *based, *experts) if block % 8 == 0 else 1, split is not None]
    for low, high in _passes(len(experts), most):
        spans = (g, *based, *experts[low:high])
        args = (tuple(span.address for span in spans), target, len(experts), low, block, g.numel)
        if split is None:
            size = walk_shape(LAUNCH, high - low, block, len(partials), *spans)
            programs = triton.cdiv(len(partials), size["BLOCKS"])
            queue.submit(_dots, (programs,), *args, BASED=len(based), **size)
            continue
        groups = partials.shape[2]
        width = min(triton.next_power_of_2(groups), 1 << (most // (high - low)).bit_length() - 1)
        size, chunks = walk_shape(SPLIT_LAUNCH, most, block, len(partials), *spans), triton.cdiv(groups, width)
        queue.submit(
            _split_dots,
            (triton.cdiv(len(partials), size["BLOCKS"]) * chunks,),
            *args,
            start,
            int32(split.seed),
            int32(split.seed >> 32),
            int32(split.tensor_id),
            groups,
            chunks,
            BASED=len(based),
            WIDTH=width,
            QUAD=start % 4 == 0 and block % 4 == 0,
            **size,
        )


def _passes(experts: int, most: int) -> Iterator[tuple[int, int]]:
    """Which experts each launch does: about as many as the others, at most `most`."""
    count = -(-experts // most)
    return pairwise(experts * i // count for i in range(count + 1)) if count else iter(())


def reference(
    g: Tensor,
    base: Tensor | None,
    experts: Sequence[Tensor],
    block: int,
    partials: Array,
    start: int = 0,
    split: Partition | None = None,
) -> None:
    groups = 1 if split is None else partials.shape[2]
    for k, expert in enumerate(experts):
        delta = expert.float() if base is None else expert.float() - base.float()
        product = g.float().double() * delta.double()
        if split is None:
            partials[:, k] = truth.block_sums(product, block).cpu().numpy()
            continue
        group = truth.partition(start, g.numel(), groups, split, g.device)
        for q in range(groups):
            partials[:, k, q] = truth.block_sums(torch.where(group == q, product, 0), block).cpu().numpy()


def inputs(
    numel: int,
    dtypes: tuple[str, ...],
    experts: int,
    based: bool,
    block: int,
    start: int,
    groups: int,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    _, base, g, *others = truth.tensors(numel, dtypes, experts + 3, device, seed)
    partials = np.full((-(-numel // block), experts, *([groups] if groups else [])), np.nan)
    split = Partition(2026 + seed, 0xDEADBEEF) if groups else None
    return g, base if based else None, others, block, partials, start, split


def bytes_moved(g: Any, base: Any, experts: Sequence[Any], *rest: Any) -> int:
    return truth.nbytes(g, *(() if base is None else (base,)), *experts)
