"""Ranks of |expert - base| inside each row, and the norms that DELLA's rescaling compares.

The rank of an element is the number of smaller magnitudes in its row, and of equal ones before it: what a stable sort
gives. Magnitudes are compared by their keys, as in magnitude_histogram.py: every NaN lies above infinity. What the
ranks are for, and how they become probabilities: host/row_ranks.py.

On a GPU a program sorts up to WIDTH elements, (key, index) as one integer of 64 bits, so that no two are equal. Longer
rows are sorted in such pieces; each element then looks up how many of every other piece lie before it, by bisection:
equal ones count in earlier pieces only. That is row / WIDTH * log2(WIDTH) loads from the cache for each element,
instead of `row` comparisons.
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
    INTERPRETED,
    LANE_COUNT,
    codes,
    fetch,
    fold,
    int32,
    lane_words,
    load,
    magnitude,
    pointer,
    walk,
    walk_shape,
)
from .host.row_ranks import block_of, chances
from .numerics import Array, Span
from .queue import Queue

LAUNCH = {2: {"BLOCKS": 4, "UNROLL": 1, "num_warps": 4}}
WIDTH = 1024 if INTERPRETED else 2048  # elements that a program sorts, at most
COMPARE = INTERPRETED  # each with each instead, where nothing is parallel: a sort takes the interpreter seconds
FULL: tl.constexpr = tl.constexpr(0x7FFFFFFF)  # a key above all

CASES = [
    (row, rows, dtypes)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for row, rows in ((5, 0), (1, 1), (1, 37), (129, 20), (48, 5), (2048, 2), (2049, 2), (7001, 2))
]


@triton.jit
def _keys(base, expert, offs, mask, CODES: tl.constexpr):
    return magnitude(load(expert, offs, mask, CODES[1], 1, True) - load(base, offs, mask, CODES[0], 1, True))


@triton.jit(do_not_specialize=["row", "pieces", "count"])
def _sort(
    base,
    expert,
    ranks,
    ordered,
    row,
    pieces,
    count,
    CODES: tl.constexpr,
    MANY: tl.constexpr,
    COMPARE: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Ranks in ROWS rows, or in one of MANY pieces of a row: then its keys in order too, filled up with FULL."""
    which = tl.program_id(0).to(tl.int64) // pieces * ROWS + tl.arange(0, ROWS)[:, None]
    low = (tl.program_id(0) % pieces).to(tl.int64) * WIDTH
    lane = tl.arange(0, WIDTH)[None, :].to(tl.int64) + tl.zeros((ROWS, 1), tl.int64)
    inside, at = (which < count) & (low + lane < row), which * row
    key = tl.where(inside, _keys(base, expert, at + low + lane, inside, CODES), FULL)
    item = (key.to(tl.int64) << 32) | lane
    if COMPARE:
        rank, place = tl.sum((item[:, None, :] < item[:, :, None]).to(tl.int64), 2), low + lane
    else:
        item = tl.sort(item)
        rank, place = lane, low + (item & 0xFFFFFFFF)
    tl.store(pointer(ranks, tl.uint32, 16) + at + place, rank.to(tl.uint32), mask=(which < count) & (place < row))
    if MANY:
        out = pointer(ordered, tl.uint32, 16) + tl.program_id(0).to(tl.int64) * WIDTH
        tl.store(out + rank, (item >> 32).to(tl.uint32))


@triton.jit(do_not_specialize=["row", "pieces"])
def _add_pieces(
    base, expert, ranks, ordered, row, pieces, CODES: tl.constexpr, WIDTH: tl.constexpr, STEPS: tl.constexpr
):
    """Adds, to the ranks within a piece, how many of each other piece of the row come before."""
    which, mine = tl.program_id(0).to(tl.int64) // pieces, tl.program_id(0) % pieces
    place = mine.to(tl.int64) * WIDTH + tl.arange(0, WIDTH)
    inside, offs = place < row, which * row + place
    key = _keys(base, expert, offs, inside, CODES)
    rank = tl.load(pointer(ranks, tl.uint32, 16) + offs, mask=inside, other=0)
    for piece in range(0, pieces):
        if piece != mine:
            other = pointer(ordered, tl.uint32, 16) + (which * pieces + piece) * WIDTH
            wanted = key + (piece < mine).to(tl.uint32)  # equal ones come before mine if their piece does
            before = tl.zeros((WIDTH,), tl.uint32)
            for step in tl.static_range(STEPS):
                less = tl.load(other + before + ((WIDTH >> (step + 1)) - 1)) < wanted
                before += tl.where(less, WIDTH >> (step + 1), 0).to(tl.uint32)
            rank += before + (tl.load(other + before) < wanted).to(tl.uint32)
    tl.store(pointer(ranks, tl.uint32, 16) + offs, rank, mask=inside)


@triton.jit
def _step(sums, args, at, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, QUAD: tl.constexpr, MASKED: tl.constexpr):
    """One row of lanes more of sum |delta| and sum |kept delta|."""
    base, expert, ranks, start, low, slope, seed_low, seed_high, tensor_id, expert_id = args
    offs = at[:, None] + tl.arange(0, LANE_COUNT)[None, :]
    delta = load(expert, offs, mask, CODES[1], ALIGN, MASKED) - load(base, offs, mask, CODES[0], ALIGN, MASKED)
    size = tl.abs(delta).to(tl.float64)
    rank = fetch(pointer(ranks, tl.uint32, ALIGN), offs, mask, MASKED)
    word = lane_words(start + at, seed_low, seed_high, tensor_id, expert_id, QUAD)
    return sums[0] + size, tl.where(stays(word, rank, low, slope), sums[1] + size, sums[1])


@triton.jit
def stays(word, rank, low, slope):
    """Whether an element of this rank is kept; `slope` are the bits of a step in fp64."""
    step = tl.cast(slope, tl.int64).to(tl.float64, bitcast=True)
    return word.to(tl.int64) < low + (rank.to(tl.float64) * step).to(tl.int64)


@triton.jit(do_not_specialize=["start", "low", "slope", "seed_low", "seed_high", "tensor_id", "expert_id", "numel"])
def _norms(
    base,
    expert,
    ranks,
    partials,
    start,
    low,
    slope,
    seed_low,
    seed_high,
    tensor_id,
    expert_id,
    block,
    numel,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    QUAD: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    low, start = tl.cast(low, tl.int64), tl.cast(start, tl.int64)
    args = (base, expert, ranks, start, low, slope, seed_low, seed_high, tensor_id, expert_id)
    sums = walk(_step, 2, args, first, block, numel, CODES, ALIGN, QUAD, BLOCKS, UNROLL)
    place = first + tl.arange(0, BLOCKS)
    target = pointer(partials, tl.float64, 1) + 2 * place
    tl.store(target, fold(sums[0], BLOCKS), mask=place * block < numel)
    tl.store(target + 1, fold(sums[1], BLOCKS), mask=place * block < numel)


def scratch_bytes(numel: int, row: int) -> int:
    """What `rank_rows` needs beside the ranks: keys in order, where rows have several pieces."""
    return 4 * numel // row * triton.cdiv(row, WIDTH) * WIDTH if row > WIDTH else 0


def rank_rows(queue: Queue, base: Span, expert: Span, row: int, ranks: int, scratch: int) -> None:
    """Ranks into device memory."""
    pieces, count, code = triton.cdiv(row, WIDTH), base.numel // row, codes(base, expert)
    width = WIDTH if pieces > 1 else max(16, triton.next_power_of_2(row))
    rows = 1 if pieces > 1 else (1 << 20) // width**2 if COMPARE else max(1, WIDTH // width)
    where = base.address, expert.address, ranks, scratch, row, pieces
    warps = max(1, min(8, rows * width // 256))
    shape = {"MANY": pieces > 1, "COMPARE": COMPARE, "ROWS": rows, "WIDTH": width}
    queue.submit(_sort, (triton.cdiv(count, rows) * pieces,), *where, count, CODES=code, **shape, num_warps=warps)
    if pieces > 1:
        steps = width.bit_length() - 1
        queue.submit(_add_pieces, (count * pieces,), *where, CODES=code, WIDTH=width, STEPS=steps, num_warps=warps)


def launch(queue: Queue, base: Span, expert: Span, row: int, ranks: Array) -> None:
    assert row > 0
    assert base.numel == expert.numel == len(ranks)
    assert base.numel % row == 0
    assert ranks.dtype == np.uint32
    scratch = queue.scratch(scratch_bytes(base.numel, row))
    rank_rows(queue, base, expert, row, queue.mirror(ranks, fresh=True), scratch)


def launch_norms(
    queue: Queue,
    base: Span,
    expert: Span,
    row: int,
    density: float,
    epsilon: float,
    seed: int,
    tensor_id: int,
    expert_id: int,
    start: int,
    partials: Array,
) -> None:
    """As `norms` on the CPU; a batch needs 4 bytes for each element, and as many again where rows have pieces."""
    block = block_of(row)
    assert start % block == 0
    assert partials.shape == (-(-base.numel // block), 2)
    low, slope = chances(density, epsilon, row)
    ranks = queue.scratch(4 * base.numel)
    rank_rows(queue, base, expert, row, ranks, queue.scratch(scratch_bytes(base.numel, row)))
    size = walk_shape(LAUNCH, 2, block, len(partials), base, expert)
    queue.submit(
        _norms,
        (triton.cdiv(len(partials), size["BLOCKS"]),),
        base.address,
        expert.address,
        ranks,
        queue.mirror(partials, fresh=True),
        start,
        low,
        int(np.float64(slope).view(np.int64)),
        int32(seed),
        int32(seed >> 32),
        int32(tensor_id),
        int32(expert_id),
        block,
        base.numel,
        QUAD=start % 4 == 0 and block % 4 == 0,
        **size,
    )


def reference(base: Tensor, expert: Tensor, row: int, ranks: Array) -> None:
    keys = truth.magnitude(expert.float() - base.float()).view(-1, row)
    order = torch.sort(keys, dim=1, stable=True).indices
    found = torch.empty_like(order).scatter_(1, order, torch.arange(row, device=order.device).expand_as(order))
    ranks[:] = found.flatten().cpu().numpy()


def reference_norms(
    base: Tensor,
    expert: Tensor,
    row: int,
    density: float,
    epsilon: float,
    seed: int,
    tensor_id: int,
    expert_id: int,
    start: int,
    partials: Array,
) -> None:
    """What `norms` and `launch_norms` must give."""
    delta, ranks = expert.float() - base.float(), np.empty(base.numel(), np.uint32)
    reference(base, expert, row, ranks)
    low, step = chances(density, epsilon, row)
    words = truth.philox(start, delta.numel(), seed, tensor_id, expert_id, delta.device)
    below = low + torch.from_numpy((ranks * step).astype(np.int64)).to(delta.device)
    for column, value in enumerate((delta, delta.where(words < below, 0))):
        partials[:, column] = truth.block_sums(value.abs(), block_of(row)).cpu().numpy()


def inputs(row: int, rows: int, dtypes: tuple[str, ...], device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
    _, base, expert = truth.tensors(row * rows, dtypes, 3, device, seed)
    return base, expert, row, np.full(row * rows, 0xFFFFFFFF, np.uint32)


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    return truth.nbytes(base, expert)
