"""Surveys and merges tiles that lie in memory, split over threads.

A tile is cut into parts at multiples of its method's grain, one for each thread at a time; kernels run outside the
interpreter's lock. Partial answers are put back into tile order, so neither the cut nor the threads can be seen in
the result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.formats.dtypes import DTYPES
from streammerge.kernels.numerics import Span
from streammerge.method import Flags, Survey, Tile, TileMethod

T = TypeVar("T")
PART = 1 << 18  # elements of two experts that a thread takes at once, at least: work that outweighs handing it over
RESIDENT_SAMPLE, RESIDENT_SLICES = 1 << 17, 16  # elements and slices of a sample of resident tiles
ROUNDS = 8  # no survey needs so many more than planned; one that does is a bug, not a slow tensor


class Crew:
    """Threads that share the parts of a tile."""

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="merge") if threads > 1 else None

    def each(self, work: Callable[[Tile], T], parts: Sequence[Tile]) -> list[T]:
        """work(part) for every part, answers in the order of the parts."""
        if self._pool is None or len(parts) == 1:
            return [work(part) for part in parts]
        return list(self._pool.map(work, parts))

    def cut(self, method: TileMethod, tile: Tile) -> list[Tile]:
        """Parts of a tile, at multiples of the method's grain counted from the tensor's start."""
        least = PART // max(1, len(tile.experts) - 1)
        if self._pool is None or tile.numel < 2 * least:
            return [tile]
        grain = method.grain(tile.shape)
        size = -(-max(least, -(-tile.numel // (2 * self.threads))) // grain) * grain
        edges = [*range(0, tile.numel, size), tile.numel]
        return [tile.part(lo, hi) for lo, hi in pairwise(edges)]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def look(crew: Crew, method: TileMethod, survey: Survey, tiles: Iterable[Tile]) -> Iterator[Any]:
    """The partial answers of one round, in tile order."""
    for tile in tiles:
        yield from crew.each(survey.look, [tile] if survey.in_order else crew.cut(method, tile))


def settle_in_memory(crew: Crew, method: TileMethod, survey: Survey, tiles: Sequence[Tile]) -> None:
    """Settle a survey of a tensor that is resident whole."""
    if survey.wants_sample:
        survey.sample(_sample(tiles), resident=True)
    experts = len(tiles[0].experts)
    rounds = method.rounds(experts)
    for number in range(rounds + ROUNDS):
        seen = [tile.only(method.reads(min(number, rounds - 1), experts)) for tile in tiles]
        if survey.settle(list(look(crew, method, survey, seen))):
            return
    raise AssertionError(f"{type(survey).__name__} did not settle in {ROUNDS} rounds")


def _sample(tiles: Sequence[Tile]) -> list[Tile]:
    """Slices spread evenly over resident tiles."""
    total = sum(tile.numel for tile in tiles)
    return [part for tile in tiles for part in sample_of(tile, total)]


def sample_of(tile: Tile, total: int) -> list[Tile]:
    """One tile's share of a sample of a resident tensor of `total` elements; all of a small one.

    A second look is cheap where tiles are resident, sorting is not.
    """
    if total <= RESIDENT_SAMPLE:
        return [tile]
    slices = max(2, RESIDENT_SLICES * tile.numel // total)
    size = min(tile.numel, RESIDENT_SAMPLE * tile.numel // total) // slices
    starts = (at * (tile.numel - size) // (slices - 1) for at in range(slices))
    return [tile.part(start, start + size) for start in starts]


class Merger:
    """Merges one tensor's tiles in order: counts ranks where the survey has them, watches for equal inputs."""

    def __init__(self, crew: Crew, method: TileMethod, survey: Survey | None) -> None:
        self._crew, self._method, self._survey = crew, method, survey
        self._ranks: npt.NDArray[np.int64] | None = None
        self.equal = can_copy(method)  # whether every tile so far was the same bytes in all inputs
        self.flags: Flags | None = None

    def merge(self, tile: Tile) -> None:
        """Write one tile's result to `tile.out`. Tiles of a tensor come in order."""
        if not tile.numel:
            return
        if self.equal and are_equal(tile):
            self._copy(tile)
            self._rank([tile, tile.part(0, 0)])
            return
        self.equal = False
        parts = self._crew.cut(self._method, tile)
        self._rank(parts)
        for flags in self._crew.each(lambda part: self._method.merge(part, self._survey), parts):
            self._note(flags)
        if parts[-1].ranks is not None:
            self._ranks = parts[-1].ranks  # moved to the tile's end by the merge

    def _copy(self, tile: Tile) -> None:
        """Copy one input's bytes, and look at them once for NaN and infinities."""
        assert tile.out is not None
        inputs = len(tile.experts) + (tile.base is not None)
        if DTYPES[tile.out.dtype].floating:
            identity = np.ones((1, 1), np.float32)
            for flag in self._crew.each(
                lambda part: kernel.run("add_deltas", part.out, part.anchor, (), identity),
                self._crew.cut(self._method, tile),
            ):
                self._note(np.repeat(flag, inputs))
        ctypes.memmove(tile.out.address, tile.anchor.address, tile.numel * DTYPES[tile.out.dtype].bits // 8)

    def _rank(self, parts: Sequence[Tile]) -> None:
        """Give every part the ranks of what lies before it; the last part's own elements need not be counted."""
        survey = self._survey
        before = self._ranks if self._ranks is not None or survey is None else survey.first_ranks()
        if survey is None or before is None:
            return
        seen = before
        counts = self._crew.each(lambda part: survey.ranks(part, seen), parts[:-1])
        for part, moved in zip(parts, [*counts, np.zeros_like(before)], strict=True):
            part.ranks = before.copy()
            before = before + moved
        self._ranks = before

    def _note(self, flags: Flags) -> None:
        self.flags = flags if self.flags is None else np.maximum(self.flags, flags)


def can_copy(method: TileMethod) -> bool:
    """Whether a merge sees all inputs, and gives their bytes where they are the same."""
    return method.keeps_equal() and method.reads(method.rounds(1), 1) is None


def are_equal(tile: Tile) -> bool:
    """Whether all inputs of a tile are the same bytes, in the output's dtype."""
    inputs = (*(() if tile.base is None else (tile.base,)), *tile.experts)
    assert tile.out is not None
    if any(span.dtype != tile.out.dtype for span in inputs):
        return False
    size = tile.numel * DTYPES[tile.out.dtype].bits // 8
    first = as_bytes(inputs[0], size)
    return all(span.address == inputs[0].address or _equal(first, as_bytes(span, size)) for span in inputs[1:])


def _equal(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Compares piece by piece: different tensors differ at once."""
    step = 1 << 16
    return all(np.array_equal(one[at : at + step], other[at : at + step]) for at in range(0, one.size, step))


def as_bytes(span: Span, size: int) -> npt.NDArray[np.uint8]:
    """A span's memory as an array of bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(span.address))
