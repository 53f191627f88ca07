"""What methods on whole matrices share: task vectors one expert at a time, and the answer row by row.

    task vector i   tau_i = expert_i - base, fp32, [m, n]
    merged          base + scale * delta, added in fp32, rounded once

One expert's task vector is in memory at a time; what a solver keeps of it (Gram matrices, subspaces) it says in
`bytes_kept`. The difference is formed in fp32 from the stored weights and never rounded again. Solvers see whole
matrices, so neither the budget nor the cut into tiles can change a bit.

Which tensors count as matrices: those with two dimensions, both above 1, without embeddings and head (one row per
token: `embeddings` says what becomes of them). All others, norms and biases, get the mean of the task vectors, or stay
the base's (`other`).

Spectral merges can move a matrix further than any of its experts did, which decoders do not bear well. The report has
both norms, matrix by matrix; `norm_guard` c shortens the displacement, |merged - base|, to c max_i |expert_i - base|
where it is longer.
"""

from __future__ import annotations

import importlib
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.errors import CheckpointError, RecipeError
from streammerge.kernels.numerics import Span
from streammerge.method import Flags, PerExpert, Survey, TensorMethod, Tile, TileMethod, is_vocabulary, param, spread
from streammerge.methods.task_arithmetic import TaskArithmetic

if TYPE_CHECKING:
    from torch import Tensor

FP32 = 4
ADD = np.array([[0.0, 1.0]], np.float32)  # of add_deltas: the task vector alone
COPY = np.ones((1, 1), np.float32)
LIBRARY = 64 << 20  # what matrix libraries keep for themselves, thread by thread
PIECE = 1 << 20  # elements that are added to the base at once


class Solver(ABC):
    """The work on one matrix: every expert's task vector in turn, then the merged one.

    Tensors are fp32 on the CPU, [m, n] row-major. A solver may change what `take` gets; it is not used again.
    """

    figures: Mapping[str, float] = MappingProxyType({})  # how it went, once finished: for a report

    @abstractmethod
    def take(self, expert: int, delta: Tensor) -> None:
        """One expert's task vector, already multiplied by its weight."""

    @abstractmethod
    def finish(self) -> Tensor:
        """The merged task vector, fp32 [m, n], without the scale."""


@dataclass(frozen=True)
class MatrixMethod(TensorMethod):
    """Base of the methods that decompose task vectors."""

    kernels = ("add_deltas",)

    weight: PerExpert = param(1.0, "factor on the expert's task vector", per_expert=True, kind=float)
    scale: float = param(1.0, "factor on the merged task vector")
    other: str = param("mean", "vectors and what is no matrix: mean of the task vectors, or base")
    embeddings: str = param("mean", "embeddings and head: mean, base, or matrix (the method's name also says so)")
    norm_guard: float = param(0.0, "cap on a matrix's displacement, in norms of its longest task vector; 0: none")

    def __post_init__(self) -> None:
        for name, value, known in (
            ("other", self.other, ("mean", "base")),
            ("embeddings", self.embeddings, ("mean", "base", "matrix", _name(self))),
        ):
            if value not in known:
                raise RecipeError(f"{name} is {value!r}; one of {', '.join(known)}")
        if self.norm_guard < 0:
            raise RecipeError(f"norm_guard is {self.norm_guard}; it must be 0 or more")

    @abstractmethod
    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        """The work on a matrix of this shape."""

    @abstractmethod
    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        """What the solver holds at most beside the task vector that it is given, the merged one included."""

    def solver_name(self, shape: tuple[int, ...], experts: int) -> str:
        return " ".join(dict.fromkeys((_name(self), str(getattr(self, "solver_", _name(self))))))

    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> TileMethod:
        what = self.embeddings if is_vocabulary(name) else self.other
        if len(shape) == 2 and min(shape) > 1 and (not is_vocabulary(name) or what not in ("mean", "base")):
            importlib.import_module("torch")  # now, so that the plan counts what it takes
            return self
        kept = 0.0 if what == "base" else self.scale
        weights = tuple(float(w) / experts for w in spread(self.weight, experts))
        return TaskArithmetic(weight=weights, lambda_=kept)

    def keeps_equal(self) -> bool:
        return True

    def rounds(self, experts: int) -> int:
        return experts

    def reads(self, number: int, experts: int) -> tuple[int, ...] | None:
        return (0, number + 1) if number < experts else (0,)

    def grain(self, shape: tuple[int, ...]) -> int:
        return shape[-1]

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey | None:
        if len(shape) != 2 or min(shape) < 2:
            return None
        solver, weights = self.solver(*shape, experts), spread(self.weight, experts)
        return MatrixSurvey(solver, shape, weights, self.scale, self.norm_guard or math.inf)

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        if len(shape) != 2:
            return 0
        rows, columns = shape
        return FP32 * rows * columns + self.bytes_kept(rows, columns, experts) + LIBRARY

    def merge(self, tile: Tile, survey: MatrixSurvey) -> Flags:
        assert tile.base is not None
        assert tile.out is not None
        row = np.empty(min(PIECE, tile.numel), np.float32)
        for at in range(0, tile.numel, PIECE):
            part = tile.part(at, min(at + PIECE, tile.numel))
            assert part.base is not None
            assert part.out is not None
            values = row[: part.numel]
            kernel.run("add_deltas", _span(values), part.base, (), COPY)
            step = np.float32(self.scale) * survey.delta[part.start : part.start + part.numel]
            np.add(values, step, out=values, where=step != 0)  # where nothing moves, the base's bits
            kernel.run("add_deltas", part.out, _span(values), (), COPY)
        return survey.flags


class MatrixSurvey(Survey):
    """Collects one expert's task vector per round, row by row, and hands it to the solver."""

    in_order = True

    def __init__(
        self,
        solver: Solver,
        shape: tuple[int, ...],
        weights: npt.NDArray[np.float64],
        scale: float = 1.0,
        cap: float = math.inf,
    ) -> None:
        self._solver, self._shape, self._weights = solver, shape, weights
        self._scale, self._cap = abs(scale), cap
        self._norms: list[float] = []  # of the experts' task vectors, without their weights
        self.figures: Mapping[str, float] = {}  # the solver's, norm_1 ... of the task vectors, displacement of the base
        self._expert = 0
        self._values = np.empty(int(np.prod(shape, dtype=np.int64)), np.float32)
        self.flags = np.zeros(len(weights) + 1, np.uint8)
        self.delta: npt.NDArray[np.float32] = np.empty(0, np.float32)

    def look(self, tile: Tile) -> str:
        target = self._values[tile.start : tile.start + tile.numel]
        flags = kernel.run("add_deltas", _span(target), tile.base, tile.experts, ADD)
        if flags.any():
            who = "the base" if flags[0] else f"expert {self._expert + 1}"
            raise CheckpointError(
                f"tensor {tile.name!r} of {who} holds a NaN or an infinity; such a matrix cannot be decomposed, "
                "mend it or leave the model out"
            )
        return tile.name

    def settle(self, partials: Sequence[Any]) -> bool:
        import torch

        self._norms.append(norm(self._values))
        delta = torch.from_numpy(self._values).view(self._shape)
        if self._weights[self._expert] != 1:
            delta *= float(self._weights[self._expert])
        self._solver.take(self._expert, delta)
        self._expert += 1
        if self._expert < len(self._weights):
            return False
        del delta
        self._values = np.empty(0, np.float32)
        self.delta = self._solver.finish().contiguous().view(-1).numpy()
        moved, limit = self._scale * norm(self.delta), self._cap * max(self._norms)
        norms = {f"norm_{i}": each for i, each in enumerate(self._norms[: len(self.flags) - 1], 1)}
        self.figures = {**self._solver.figures, **norms, "displacement": min(moved, limit)}
        if moved > limit:
            self.delta *= np.float32(limit / moved)
        return True


def _name(method: MatrixMethod) -> str:
    return type(method).__module__.rpartition(".")[2]


def norm(values: npt.NDArray[np.float32]) -> float:
    """Euclidean norm, summed in fp64 piece by piece: the same on any number of threads."""
    pieces = (values[at : at + PIECE] for at in range(0, values.size, PIECE))
    return math.sqrt(math.fsum(float(np.square(piece, dtype=np.float64).sum()) for piece in pieces))


def _span(values: npt.NDArray[np.float32]) -> Span:
    return Span(values.ctypes.data, "F32", values.size)
