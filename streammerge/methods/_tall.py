"""Matrices with many more rows than columns, a block of rows at a time: no task vector is ever in memory whole.

    rounds    blocks of rows of the task vectors, of one expert or of all, are added up in [n, n] matrices
    merge     the same blocks once more: rows of the merge come from those of all task vectors and the [n, n] matrices

Heads and embeddings are such matrices (`embeddings: matrix`). A matrix is tall by its shape alone: more than LARGE
elements, and RATIO times as many rows as columns at least. A block has ROWS rows whatever the tile, so that neither the
budget nor the cut changes a bit. What comes out differs from the way for other matrices by rounding.

With `norm_guard` all rows are worked out twice, for it must be known how long the merge is before a row is written.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge import kernel
from streammerge.method import Flags, Survey, TensorMethod, Tile, TileMethod, spread
from streammerge.methods._matrices import (
    ADD,
    EIGH,
    FP32,
    FP64,
    GAPS,
    GPU_LIBRARY,
    LIBRARY,
    PreciseMethod,
    norm,
    refuse_nonfinite,
)
from streammerge.methods._memory import give_back
from streammerge.methods._precision import Products, exact_products, span

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streammerge.methods._crew import Crew

ROWS = 1024  # of a block: products of fewer write their square more often than they have work for
LARGE = 1 << 24  # elements; a matrix of no more is held whole in 64 MiB
RATIO = 4  # of rows to columns, from which on squares of columns are small beside the matrix


class RowSolver(ABC):
    """The work on one tall matrix of n columns: rounds over blocks of rows, then the merged rows.

    Blocks of task vectors are fp32, [rows, n] with ROWS rows at most, already multiplied by their weights; a solver may
    change them.
    """

    crew: Crew  # threads, or the GPU; given before the first block

    def __init__(self) -> None:
        self._rooms: dict[int, Tensor] = {}

    def room(self, number: int, like: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
        """As many rows as a block has, not filled: the same memory for every block."""
        if number not in self._rooms:
            self._rooms[number] = like.new_empty(ROWS, columns, dtype=dtype)
        return self._rooms[number][: len(like)]

    @abstractmethod
    def look(self, number: int, taus: Sequence[Tensor]) -> None:
        """A block of the task vectors that round `number` reads; blocks come in order."""

    @abstractmethod
    def settle(self, number: int) -> None:
        """The end of a round."""

    @abstractmethod
    def merged(self, taus: Sequence[Tensor]) -> tuple[Tensor, tuple[float, ...]]:
        """Rows of the merged task vector, fp32, without the scale, from all experts'; and what `figures` adds up.

        The rows are good until the next call.
        """

    def figures(self, sums: Sequence[float]) -> Mapping[str, float]:
        """How it went, from the sums over all blocks."""
        return {}


class One(RowSolver):
    """A single expert's task vector, as it is."""

    def look(self, number: int, taus: Sequence[Tensor]) -> None:
        """Nothing is asked of it."""

    def settle(self, number: int) -> None:
        """Nothing was asked of it."""

    def merged(self, taus: Sequence[Tensor]) -> tuple[Tensor, tuple[float, ...]]:
        return taus[0], ()


@dataclass(frozen=True)
class RowsMethod(PreciseMethod):
    """Base of the methods on matrices that have a way for tall ones."""

    def by_rows(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix is merged a block of rows at a time."""
        return shape[0] >= RATIO * shape[1] and shape[0] * shape[1] > LARGE

    @abstractmethod
    def row_rounds(self, experts: int) -> tuple[int, int]:
        """Rounds that read one expert each, in order, and those behind them that read all."""

    @abstractmethod
    def row_solver(self, columns: int, experts: int) -> RowSolver:
        """The work on a tall matrix."""

    @abstractmethod
    def row_bytes(self, columns: int, experts: int) -> int:
        """What its solver holds at most beside a block of each task vector."""

    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> TileMethod:
        found = super().for_tensor(name, shape, experts)
        return Tall(self) if found is self and self.by_rows(shape) else found


@dataclass(frozen=True)
class Tall(TensorMethod):
    """A method on one tall matrix."""

    of: RowsMethod

    def uses(self) -> tuple[str, ...]:
        return self.of.uses()

    def refusal(self, device: str) -> str:
        return self.of.refusal(device)

    def solver_name(self, shape: tuple[int, ...], experts: int) -> str:
        return f"{self.of.solver_name(shape, experts)} by rows"

    def fills_cores(self, shape: tuple[int, ...]) -> bool:
        return True  # a crew shares every product

    def rounds(self, experts: int) -> int:
        return sum(self.of.row_rounds(experts)) + bool(self.of.norm_guard)

    def reads(self, number: int, experts: int) -> tuple[int, ...] | None:
        return (0, number + 1) if number < self.of.row_rounds(experts)[0] else None

    def grain(self, shape: tuple[int, ...]) -> int:
        return ROWS * shape[1]

    def survey(self, shape: tuple[int, ...], experts: int) -> RowsSurvey:
        return RowsSurvey(self.of, shape[1], experts, self.of.row_rounds(experts)[0], self.rounds(experts))

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        return self._bytes(shape[1], experts) + LIBRARY

    def solver_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        matrices = self._bytes(shape[1], experts) + EIGH * FP64 * shape[1] ** 2
        return matrices + matrices // GAPS + GPU_LIBRARY

    def _bytes(self, columns: int, experts: int) -> int:
        """With a block of each task vector and of the merge."""
        return FP32 * (experts + 1) * ROWS * columns + self.of.row_bytes(columns, experts)

    def merge(self, tile: Tile, survey: RowsSurvey) -> Flags:
        return survey.merge(tile)


class RowsSurvey(Survey):
    """Forms blocks of task vectors, shows them to the solver round by round, and has it merge them.

    Solvers use all threads: what the engine merges side by side takes turns.
    """

    in_order = True

    def __init__(self, of: RowsMethod, columns: int, experts: int, alone: int, rounds: int) -> None:
        self._of, self._solver, self._columns = of, of.row_solver(columns, experts), columns
        self._alone, self._rounds, self._number = alone, rounds, 0
        self._weights = spread(of.weight, experts)
        self._turn = threading.Lock()
        self._queue: Any = None
        self._taus: Tensor | None = None  # room for a block of each
        self._squares: list[list[float]] = [[] for _ in range(experts)]  # of each task vector, block by block
        self._merged: list[tuple[float, ...]] = []  # square of the merge, then the solver's, block by block
        self._factor = 1.0
        self.figures: Mapping[str, float] = {}  # as MatrixSurvey's
        self.flags: Flags = np.zeros(experts + 1, np.uint8)

    @property
    def _guarded(self) -> bool:
        """Whether this round is the last, which measures the merge."""
        return bool(self._of.norm_guard) and self._number == self._rounds - 1

    def look(self, tile: Tile) -> list[tuple[str, list[Flags]]]:
        if self._taus is None:
            self._begin(tile)
        with self._working():
            return [(tile.name, self._look(part)) for part in self._blocks(tile)]

    def _begin(self, tile: Tile) -> None:
        import torch

        from streammerge.methods._crew import Crew

        assert tile.base is not None
        give_back()
        self._queue = queue = tile.base.queue
        device = torch.device("cpu") if queue is None else queue.device
        with self._working():
            self._taus = torch.empty(len(self._weights), ROWS, self._columns, device=device)
        self._solver.crew = Crew(device, Products.on(queue, self._of.precision), whole=queue is not None)

    @contextmanager
    def _working(self) -> Iterator[None]:
        with exact_products(), nullcontext() if self._queue is None else self._queue.current():
            yield

    def _blocks(self, tile: Tile) -> Iterator[Tile]:
        size = ROWS * self._columns
        return (tile.part(at, min(at + size, tile.numel)) for at in range(0, tile.numel, size))

    def _look(self, part: Tile) -> list[Flags]:
        experts = [self._number] if self._number < self._alone else list(range(len(self._weights)))
        taus, flags = self._form(part, experts, self._number in (0, experts[0]))
        if self._guarded:
            rows, _ = self._solver.merged(taus)
            self._merged.append((norm(rows) ** 2,))
        else:
            self._solver.look(self._number, taus)
        return flags

    def _form(self, part: Tile, experts: Sequence[int], new: bool) -> tuple[list[Tensor], list[Flags]]:
        """The task vectors' rows; their squares are added up when they are new."""
        assert self._taus is not None
        taus, flags = [], []
        for i, expert in zip(experts, part.experts, strict=True):
            tau = self._taus[i, : part.numel // self._columns]
            flags.append(kernel.run("add_deltas", span(tau, self._queue), part.base, (expert,), ADD))
            if new:
                self._squares[i].append(norm(tau) ** 2)
            if self._weights[i] != 1:
                tau *= float(self._weights[i])
            taus.append(tau)
        return taus, flags

    def settle(self, partials: Sequence[list[tuple[str, list[Flags]]]]) -> bool:
        for name, found in (block for tile in partials for block in tile):
            for i, flags in enumerate(found):
                refuse_nonfinite(name, flags, i + (self._number if self._number < self._alone else 0))
        if self._guarded:
            moved, limit = self._lengths()
            self._factor = limit / moved if moved > limit else 1.0
            self._merged.clear()
        else:
            with self._working():
                self._solver.settle(self._number)
        self._number += 1
        return self._number == self._rounds

    def merge(self, tile: Tile) -> Flags:
        """Write the merged rows of a tile."""
        with self._turn, self._working():
            for part in self._blocks(tile):
                taus, _ = self._form(part, range(len(self._weights)), False)
                rows, sums = self._solver.merged(taus)
                self._merged.append((norm(rows) ** 2, *sums))
                if self._factor != 1:
                    rows *= self._factor
                kernel.run("apply_delta", part.out, part.base, span(rows, self._queue), self._of.scale)
            sums = tuple(math.fsum(column) for column in zip(*self._merged, strict=True))
            moved, _ = self._lengths()
            norms = {f"norm_{i}": each for i, each in enumerate(self._norms(), 1)}
            self.figures = {**self._solver.figures(sums[1:]), **norms, "displacement": moved * self._factor}
        return self.flags

    def _norms(self) -> list[float]:
        return [math.sqrt(math.fsum(squares)) for squares in self._squares]

    def _lengths(self) -> tuple[float, float]:
        """The displacement of the base by the rows so far, and its limit."""
        moved = abs(self._of.scale) * math.sqrt(math.fsum(square for square, *_ in self._merged))
        return moved, (self._of.norm_guard or math.inf) * max(self._norms())

    def release(self) -> None:
        self._solver.crew.close()
        del self._solver, self._taus
