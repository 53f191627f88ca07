"""Threads that share a matrix by blocks of rows: no barriers, and bits that do not depend on their number.

Rows are cut into blocks of about ROWS, whatever the number of threads, and a block is the work of one thread that
computes alone, with whatever the library would do in one thread. On a GPU all rows are one block.

What a block needs for itself is its thread's room, made once: much of what threads allocate and free in between, the
C library would keep. On a GPU, where a block is a whole matrix, it is made anew and given back.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor

from streammerge.methods._precision import Products

T = TypeVar("T")
ROWS = 192  # with fewer MKL takes a slower path from 1024 columns on; more gain little and occupy fewer cores
MANY = 4  # blocks, from which on they have ROWS rows at least instead of at most
STEP = 16  # blocks have multiples of so many rows
ROOM = 16  # bytes per element of a block that a thread's room has at least
PANEL = 1024  # rows that are widened at once for a product in fp64, where a block has more


class Crew:
    """Threads that share the blocks of a matrix. `whole`: all rows are one block, as on a GPU."""

    def __init__(self, device: torch.device, products: Products | None = None, whole: bool = False) -> None:
        self.products = products
        self._threads = torch.get_num_threads()
        self._device, self._own = device, threading.local()
        self.whole = whole or device.type != "cpu"
        shared = self._threads > 1 and not self.whole
        self._pool = ThreadPoolExecutor(self._threads, thread_name_prefix="rows") if shared else None

    def each(self, work: Callable[[int, int], T], rows: int) -> list[T]:
        """work(first, last) for every block, answers in the order of the blocks."""
        size = max(1, rows) if self.whole else block_rows(rows)
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

    def room(self, count: int, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, ...]:
        """So many matrices, not filled. The next call of this thread gets the same memory."""
        if self.whole:
            return tuple(torch.empty(count, *shape, dtype=dtype, device=self._device))
        numel = math.prod(shape)
        size = count * numel * dtype.itemsize
        flat: Tensor | None = getattr(self._own, "flat", None)
        if flat is None or len(flat) < size:
            self._own.flat = flat = None
            self._own.flat = flat = torch.empty(max(size, ROOM * numel), dtype=torch.uint8, device=self._device)
        return tuple(flat[:size].view(dtype).view(count, *shape))

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()
        self._own = threading.local()


def block_rows(rows: int) -> int:
    """Rows of a block, of all but the last."""
    count = rows // ROWS if rows >= MANY * ROWS else math.ceil(rows / ROWS)
    each = math.ceil(rows / max(1, count))
    return max(1, math.ceil(each / STEP)) * STEP


def norm(crew: Crew, x: Tensor) -> float:
    """The Frobenius norm, summed in fp64."""

    def block(a: int, b: int) -> float:
        (wide,) = crew.room(1, x[a:b].shape, torch.float64)
        return dot(wide.copy_(x[a:b]), wide)

    return math.sqrt(sum(crew.each(block, len(x))))


def dot(x: Tensor, y: Tensor) -> float:
    """Of contiguous matrices."""
    return float(torch.dot(x.view(-1), y.view(-1)))


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


def add_product(crew: Crew, out: Tensor, left: Tensor, right: Tensor, factor: float) -> None:
    """out += factor left @ right for a block of rows: in fp64, a panel of `right` at a time, and rounded once."""
    if out.dtype == torch.float64:
        out.addmm_(left, right, alpha=factor)
        return
    columns = out.shape[1]
    if crew.whole:
        (total,), (panel,) = (crew.room(1, (rows, columns), torch.float64) for rows in (len(out), PANEL))
    else:
        total, panel = crew.room(2, (max(len(out), ROWS), columns), torch.float64)
    total, rows = total[: len(out)].copy_(out), len(panel)
    for at in range(0, len(right), rows):
        end = min(at + rows, len(right))
        total.addmm_(left[:, at:end].double(), panel[: end - at].copy_(right[at:end]), alpha=factor)
    out.copy_(total)
