"""Surveys and merges tiles that lie in memory, split over threads.

A tile is cut into parts at multiples of its method's grain, one for each thread at a time; kernels run outside the
interpreter's lock. Partial answers are put back into tile order, so neither the cut nor the threads can be seen in
the result.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from streammerge.formats.dtypes import DTYPES
from streammerge.kernels.numerics import Span
from streammerge.method import Flags, Survey, Tile, TileMethod

T = TypeVar("T")
PART = 1 << 18  # elements that a thread takes at once, at least: work that outweighs handing it over
ROUNDS = 8  # no survey needs more; one that does is a bug, not a slow tensor


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
        if self._pool is None or tile.numel < 2 * PART:
            return [tile]
        grain = method.grain(tile.shape)
        size = -(-max(PART, -(-tile.numel // (2 * self.threads))) // grain) * grain
        edges = [*range(0, tile.numel, size), tile.numel]
        return [tile.part(lo, hi) for lo, hi in zip(edges, edges[1:], strict=False)]

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
        survey.sample(_sample(method, tiles))
    for _ in range(ROUNDS):
        if survey.settle(list(look(crew, method, survey, tiles))):
            return
    raise AssertionError(f"{type(survey).__name__} did not settle in {ROUNDS} rounds")


def _sample(method: TileMethod, tiles: Sequence[Tile]) -> list[Tile]:
    """Slices spread evenly over resident tiles: all of a small tensor, about a million elements of a large one."""
    total = sum(tile.numel for tile in tiles)
    if total <= 1 << 20:
        return list(tiles)
    share = (1 << 20) / total
    picked = []
    for tile in tiles:
        pieces = max(1, round(16 / len(tiles)))
        size = max(1, int(tile.numel * share / pieces))
        for piece in range(pieces):
            first = piece * (tile.numel - size) // max(1, pieces - 1) if pieces > 1 else 0
            picked.append(tile.part(first, first + size))
    return picked


class Merger:
    """Merges one tensor's tiles in order: counts ranks where the survey has them, watches for equal inputs."""

    def __init__(self, crew: Crew, method: TileMethod, survey: Survey | None) -> None:
        self._crew, self._method, self._survey = crew, method, survey
        self._ranks: npt.NDArray[np.int64] | None = None
        self.equal = method.keeps_equal()  # whether every tile so far was the same bytes in all inputs
        self.flags: Flags | None = None

    def merge(self, tile: Tile) -> None:
        """Write one tile's result to `tile.out`. Tiles of a tensor come in order."""
        if self.equal and _copy_equal(tile):
            self._note(np.zeros(len(tile.experts) + (tile.base is not None), np.uint8))
            self._count([tile])
            return
        self.equal = False
        parts = self._crew.cut(self._method, tile)
        self._count(parts)
        for flags in self._crew.each(lambda part: self._method.merge(part, self._survey), parts):
            self._note(flags)

    def _count(self, parts: Sequence[Tile]) -> None:
        """Give every part the ranks of what lies before it."""
        if self._survey is None:
            return
        for part, found in zip(parts, self._crew.each(self._survey.ranks, parts), strict=True):
            if found is not None:
                self._ranks = np.zeros_like(found) if self._ranks is None else self._ranks
                part.ranks, self._ranks = self._ranks, self._ranks + found

    def _note(self, flags: Flags) -> None:
        self.flags = flags if self.flags is None else np.maximum(self.flags, flags)


def _copy_equal(tile: Tile) -> bool:
    """Copy a tile whose inputs are all the same bytes in the output's dtype; False if they are not."""
    inputs = (*(() if tile.base is None else (tile.base,)), *tile.experts)
    assert tile.out is not None
    size = tile.numel * DTYPES[tile.out.dtype].bits // 8
    if any(span.dtype != tile.out.dtype for span in inputs):
        return False
    first = as_bytes(inputs[0], size)
    if any(
        span.address != inputs[0].address and not _equal(first, as_bytes(span, size)) for span in inputs[1:]
    ):
        return False
    ctypes.memmove(tile.out.address, inputs[0].address, size)
    return True


def _equal(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> bool:
    """Compares piece by piece: different tensors differ at once."""
    step = 1 << 20
    return all(np.array_equal(one[at : at + step], other[at : at + step]) for at in range(0, one.size, step))


def as_bytes(span: Span, size: int) -> npt.NDArray[np.uint8]:
    """A span's memory as an array of bytes."""
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(span.address))
