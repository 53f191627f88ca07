"""Threads that share a matrix by blocks of rows: no barriers, and bits that do not depend on their number.

Rows are cut into blocks of ROWS whatever the number of threads, and a block is the work of one thread that computes
alone, with whatever the library would do in one thread. On a GPU all rows are one block.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
ROWS = 192  # products of fewer lose a tenth at 4096 columns, of more gain nothing up to 1536


class Crew:
    """Threads that share the blocks of a matrix."""

    def __init__(self, device: torch.device) -> None:
        self._threads = torch.get_num_threads()
        self._whole = device.type != "cpu"
        shared = self._threads > 1 and not self._whole
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="rows") if shared else None

    def each(self, work: Callable[[int, int], T], rows: int) -> list[T]:
        """work(first, last) for every block, answers in the order of the blocks."""
        size = max(1, rows) if self._whole else ROWS
        blocks = [(at, min(at + size, rows)) for at in range(0, rows, size)]
        if self._pool is None:
            return [work(*block) for block in blocks]

        def alone(block: tuple[int, int]) -> T:
            torch.set_num_threads(1)  # of this thread; also of threads that torch has yet to meet, until the end
            return work(*block)

        try:
            return list(self._pool.map(alone, blocks))
        finally:
            torch.set_num_threads(self._threads)

    def alone(self, work: Callable[[], T]) -> T:
        """work() on one core: what a library would split over cores, and round differently for it."""
        return self.each(lambda first, last: work(), 1)[0]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def norm(crew: Crew, x: Tensor) -> float:
    """The Frobenius norm, summed in fp64."""
    return math.sqrt(sum(crew.each(lambda a, b: float(x[a:b].double().square().sum()), len(x))))


def symmetric(crew: Crew, x: Tensor, write: Callable[[int, int], Any]) -> Tensor:
    """Have `write` fill blocks x[a:b, a:] of a square matrix, then mirror what lies above them."""
    crew.each(write, len(x))
    return mirror(crew, x)


def mirror(crew: Crew, x: Tensor) -> Tensor:
    def block(a: int, b: int) -> None:
        for at in range(0, a, ROWS):
            end = min(at + ROWS, a)
            x[a:b, at:end] = x[at:end, a:b].T

    crew.each(block, len(x))
    return x


def gram(crew: Crew, out: Tensor, x: Tensor, factor: float = 1.0, onto: float = 0.0) -> None:
    """out = onto out + factor x^T x, on the diagonal and above it."""

    def block(a: int, b: int) -> None:
        out[a:b, a:].addmm_(x[:, a:b].T, x[:, a:], beta=onto, alpha=factor)

    crew.each(block, len(out))
