"""Inner products of all pairs of inputs (or of inputs minus a base): norms, cosines, Gram matrices.

Values are fp32 (a difference is rounded to fp32), products are fp64 and hence exact, sums are fp64 in a fixed order:
per logical block as numerics.py says, or, in `columns`, one row after the other. Entries are the upper triangle,
i <= j, row by row. A block is 4,096 elements, or a row's length for what is needed per row. Parts that begin at a
multiple of the block give the same bits as the whole.

On a GPU a program takes a few blocks, one row of lanes of each at a time. Up to five inputs are read once. Of more, the
pairs' sums do not fit a program's registers: they are done by squares of up to 4 by 4 pairs, one launch each,
and every input is read once for each square that it is in (8 inputs: twice; 16 inputs: 4 times). A block that is no
multiple of 8 elements is read item by item: slower. In `columns` a program takes 32 columns; a column's sum is one
chain, so what is under way at once, hence the speed, grows with the number of columns.
"""

# mypy: disable-error-code="assignment,misc"
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import INTERPRETED, LANE_COUNT, alignment, codes, fold, load, pointer, walk, walk_shape
from .numerics import BLOCK, Array, Span
from .queue import Queue

LAUNCH = {  # by how many sums a program keeps at most
    3: {"BLOCKS": 8, "UNROLL": 4, "num_warps": 4},
    10: {"BLOCKS": 4, "UNROLL": 4, "num_warps": 4},
    16: {"BLOCKS": 4, "UNROLL": 1, "num_warps": 4},
}
COLUMNS = {"COLUMNS": 32, "num_warps": 1}
UNDER_WAY = 96  # loads of a thread: rows that `columns` reads at once, times inputs
SIDES = {16: (5, 4), 1: (4, 3)}  # by alignment: most inputs that are done at once, and of either side of a square
EXACT_FMA = True  # of two fp32, in fp64: a*b + c is rounded once, contracted or not

CASES = [
    (numel, dtypes, inputs, based, block)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16", "F32"))
    for numel, inputs, based, block in (
        (0, 2, True, BLOCK), (1, 1, False, BLOCK), (9000, 3, True, BLOCK), (1500, 2, True, 5), (3000, 4, False, 1000),
    )
] + [(700, ("BF16",), 16, True, 136), (700, ("F32",), 8, True, 129)]  # fmt: skip


@triton.jit
def _add(sums, spans, offs, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr):
    """Add the products of all pairs of inputs, or, if KIND[1], of each of the first KIND[1] with each of the others."""
    BASED: tl.constexpr = KIND[0]
    LEFT: tl.constexpr = KIND[1]
    COUNT: tl.constexpr = len(CODES) - BASED
    raw, values, found = (), (), ()
    for i in tl.static_range(BASED + COUNT):
        raw += (load(spans[i], offs, mask, CODES[i], ALIGN, MASKED),)
    for i in tl.static_range(COUNT):
        values += ((raw[i + 1] - raw[0] if BASED else raw[i]).to(tl.float64),)
    for i in tl.static_range(LEFT if LEFT else COUNT):
        for j in tl.static_range(LEFT if LEFT else i, COUNT):
            found += (tl.fma(values[i], values[j], sums[len(found)]),)
    return found


@triton.jit
def _step(sums, spans, at, mask, CODES: tl.constexpr, ALIGN: tl.constexpr, KIND: tl.constexpr, MASKED: tl.constexpr):
    return _add(sums, spans, at[:, None] + tl.arange(0, LANE_COUNT)[None, :], mask, CODES, ALIGN, KIND, MASKED)


@triton.jit
def _entries(address, place, left, right, count, SIDES: tl.constexpr):
    """Where a pass has its sums: pointers to the Gram entries of row `place` of [..., pairs], in the order of _add."""
    row = pointer(address, tl.float64, 1) + place * (count * (count + 1) // 2)
    LEFT: tl.constexpr = SIDES[0]
    RIGHT: tl.constexpr = SIDES[1]
    found = ()
    for i in tl.static_range(LEFT):
        for j in tl.static_range(0 if RIGHT else i, RIGHT if RIGHT else LEFT):
            found += (row + ((left + i) * count - (left + i) * (left + i + 1) // 2 + right + j),)
    return found


@triton.jit(do_not_specialize=["block", "numel", "left", "right", "count"])
def _blocks(
    spans,
    partials,
    block,
    numel,
    left,
    right,
    count,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    BASED: tl.constexpr,
    SIDES: tl.constexpr,
    BLOCKS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    first = tl.program_id(0).to(tl.int64) * BLOCKS
    place = first + tl.arange(0, BLOCKS)
    entries = _entries(partials, place, left, right, count, SIDES)
    KIND: tl.constexpr = (BASED, SIDES[0] if SIDES[1] else 0)
    sums = walk(_step, len(entries), spans, first, block, numel, CODES, ALIGN, KIND, BLOCKS, UNROLL)
    for i in tl.static_range(len(entries)):
        tl.store(entries[i], fold(sums[i], BLOCKS), mask=place * block < numel)


@triton.jit(do_not_specialize=["ncols", "nrows", "left", "right", "count"])
def _columns(
    spans,
    sums,
    ncols,
    nrows,
    left,
    right,
    count,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    BASED: tl.constexpr,
    SIDES: tl.constexpr,
    COLUMNS: tl.constexpr,
    UNROLL: tl.constexpr,
):
    ncols, nrows = tl.cast(ncols, tl.int64), tl.cast(nrows, tl.int64)
    place = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = place < ncols
    entries = _entries(sums, place, left, right, count, SIDES)
    KIND: tl.constexpr = (BASED, SIDES[0] if SIDES[1] else 0)
    total = ()
    for i in tl.static_range(len(entries)):
        total += (tl.load(entries[i], mask=mask),)
    rounds = nrows // UNROLL
    for step in range(0, rounds):
        for row in tl.static_range(UNROLL):
            offs = place + (step * UNROLL + row) * ncols
            total = _add(total, spans, offs, mask, CODES, ALIGN, KIND, True)
    for row in range(rounds * UNROLL, nrows):
        total = _add(total, spans, place + row * ncols, mask, CODES, ALIGN, KIND, True)
    for i in tl.static_range(len(entries)):
        tl.store(entries[i], total[i], mask=mask)


def _passes(inputs: Sequence[Span], base: Span | None, align: int) -> Iterator[tuple[tuple[Span, ...], dict[str, Any]]]:
    """The inputs of each launch, and which pairs it does: all of one group of inputs, or one group with another."""
    count, based = len(inputs), () if base is None else (base,)
    once, side = SIDES[align]
    groups = 1 if count <= once else -(-count // side)
    ends = [count * i // groups for i in range(groups + 1)]
    for a in range(groups):
        for b in range(a, groups):
            left, right = inputs[ends[a] : ends[a + 1]], inputs[ends[b] : ends[b + 1]] if b > a else ()
            sides = len(left), len(right)
            where = {"left": ends[a], "right": ends[b], "count": count, "BASED": len(based), "SIDES": sides}
            yield (*based, *left, *right), where


def _sums(left: int, right: int) -> int:
    return left * right if right else left * (left + 1) // 2


def launch(queue: Queue, inputs: Sequence[Span], base: Span | None, block: int, partials: Array) -> None:
    numel, pairs = inputs[0].numel, len(inputs) * (len(inputs) + 1) // 2
    assert partials.shape == (-(-numel // block), pairs)
    target = queue.mirror(partials, fresh=True)
    align = alignment(*inputs, *(() if base is None else (base,))) if block % 8 == 0 else 1
    for spans, where in _passes(inputs, base, align):
        assert all(span.numel == numel for span in spans)
        size = walk_shape(LAUNCH, _sums(*where["SIDES"]), block, len(partials), *spans)
        queue.submit(
            _blocks,
            (triton.cdiv(len(partials), size["BLOCKS"]),),
            tuple(span.address for span in spans),
            target,
            block,
            numel,
            **where,
            **size,
        )


def launch_columns(queue: Queue, inputs: Sequence[Span], base: Span | None, ncols: int, sums: Array) -> None:
    """Add the entries of each column to sums[ncols, pairs], on top of what earlier launches added."""
    numel = inputs[0].numel
    assert sums.shape == (ncols, len(inputs) * (len(inputs) + 1) // 2)
    assert numel % ncols == 0
    target = queue.mirror(sums)
    columns = min(triton.next_power_of_2(ncols), 1 << 16) if INTERPRETED else COLUMNS["COLUMNS"]
    for spans, where in _passes(inputs, base, 16):
        assert all(span.numel == numel for span in spans)
        queue.submit(
            _columns,
            (triton.cdiv(ncols, columns),),
            tuple(span.address for span in spans),
            target,
            ncols,
            numel // ncols,
            CODES=codes(*spans),
            ALIGN=1,
            COLUMNS=columns,
            UNROLL=max(1, UNDER_WAY // len(spans)),
            num_warps=COLUMNS["num_warps"],
            **where,
        )


def _values(inputs: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    return [x.float() if base is None else x.float() - base.float() for x in inputs]


def reference(inputs: Sequence[Tensor], base: Tensor | None, block: int, partials: Array) -> None:
    values, pair = _values(inputs, base), 0
    for i, x in enumerate(values):
        for y in values[i:]:
            partials[:, pair] = truth.block_sums(x.double() * y.double(), block).cpu().numpy()
            pair += 1


def reference_columns(inputs: Sequence[Tensor], base: Tensor | None, ncols: int, sums: Array) -> None:
    values, pair = _values(inputs, base), 0
    for i, x in enumerate(values):
        for y in values[i:]:
            for row in (x.double() * y.double()).view(-1, ncols).cpu().numpy():
                sums[:, pair] += row
            pair += 1


def inputs(
    numel: int, dtypes: tuple[str, ...], count: int, based: bool, block: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    _, base, *others = truth.tensors(numel, dtypes, count + 2, device, seed)
    partials = np.full((-(-numel // block), count * (count + 1) // 2), np.nan)
    return others, base if based else None, block, partials


def bytes_moved(inputs: Sequence[Any], base: Any, *rest: Any) -> int:
    return truth.nbytes(*inputs, *(() if base is None else (base,)))
