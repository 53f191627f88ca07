"""What methods on whole matrices share: task vectors one expert at a time, and the answer row by row.

    task vector i   tau_i = expert_i - base, fp32, [m, n]
    merged          base + scale * delta, added in fp32, rounded once

One expert's task vector is in memory at a time; what a solver keeps of it (Gram matrices, subspaces) it says in
`bytes_kept`. The difference is formed in fp32 from the stored weights and never rounded again. Solvers see whole
matrices, so neither the budget nor the cut into tiles can change a bit.

On a GPU task vectors are formed, solved and added to the base where the tiles lie, all of it on one stream. Libraries
round differently there, so that a merge differs from the CPU's by what the solvers' own bounds say.

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
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.errors import CheckpointError, RecipeError
from streammerge.method import Flags, PerExpert, Survey, TensorMethod, Tile, TileMethod, is_vocabulary, param, spread
from streammerge.methods._memory import give_back
from streammerge.methods._precision import PRECISIONS, exact_products, span
from streammerge.methods.task_arithmetic import TaskArithmetic

if TYPE_CHECKING:
    from torch import Tensor

FP32, FP64 = 4, 8
ADD = np.array([[0.0, 1.0]], np.float32)  # of add_deltas: the task vector alone
LIBRARY = 44 << 20  # what matrix libraries keep for themselves, thread by thread
GPU_LIBRARY = 160 << 20  # 32 MiB each for cuBLAS and cublasLt on Hopper; the rest for torch's partly filled segments
GAPS = 8  # one part in so many is allowed for what torch's allocator leaves unused between matrices; not measured
EIGH = 2  # square fp64 matrices that cuSOLVER's syevd is allowed beyond LAPACK's two; its documents give no formula
PIECE = 1 << 20  # elements that are summed at once


class Solver(ABC):
    """The work on one matrix: every expert's task vector in turn, then the merged one.

    Tensors are fp32, [m, n] row-major. A solver may change what `take` gets; it is not used again.
    """

    queue: Any = None  # of the GPU that the task vectors lie on: torch's current stream is its own; None: the CPU
    figures: Mapping[str, float] = MappingProxyType({})  # how it went, once finished: for a report

    @abstractmethod
    def take(self, expert: int, delta: Tensor) -> None:
        """One expert's task vector, already multiplied by its weight."""

    def take_factors(self, expert: int, b: Tensor, a: Tensor) -> None:
        """The same of an adapter, b a with b [m, r] and a [r, n]: solvers on subspaces need not multiply it out."""
        self.take(expert, (b.double() @ a.double()).float())

    @abstractmethod
    def finish(self) -> Tensor:
        """The merged task vector, fp32 [m, n], without the scale."""


@dataclass(frozen=True)
class MatrixMethod(TensorMethod):
    """Base of the methods that decompose task vectors."""

    kernels = ("add_deltas", "apply_delta")
    shared_bytes = LIBRARY

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

    def bytes_kept_there(self, rows: int, columns: int, experts: int) -> int:
        """The same on a GPU."""
        return self.bytes_kept(rows, columns, experts) + EIGH * FP64 * min(rows, columns) ** 2

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

    def solver_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        if len(shape) != 2:
            return 0
        rows, columns = shape
        matrices = FP32 * rows * columns + self.bytes_kept_there(rows, columns, experts)
        return matrices + matrices // GAPS + GPU_LIBRARY

    def merge(self, tile: Tile, survey: MatrixSurvey) -> Flags:
        assert tile.out is not None
        assert survey.delta is not None
        delta = span(survey.delta, tile.out.queue, tile.start, tile.start + tile.numel)
        kernel.run("apply_delta", tile.out, tile.base, delta, self.scale)
        return survey.flags


@dataclass(frozen=True)
class PreciseMethod(MatrixMethod):
    """Base of those with a kernel for their large products."""

    product: ClassVar[str]  # that kernel

    precision: str = param("fp32", "of the steps' products: fp32; on a GPU also tf32x3 or bf16x3, which are faster")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.precision not in PRECISIONS:
            raise RecipeError(f"precision is {self.precision!r}; one of {', '.join(PRECISIONS)}")

    def uses(self) -> tuple[str, ...]:
        return self.kernels if self.precision == "fp32" else (*self.kernels, self.product)

    def refusal(self, device: str) -> str:
        if device == "cpu" and self.precision != "fp32":
            return f"with precision {self.precision} needs a GPU; give precision fp32"
        return ""

    def solver_name(self, shape: tuple[int, ...], experts: int) -> str:
        return super().solver_name(shape, experts) + ("" if self.precision == "fp32" else f" {self.precision}")


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
        self._queue: Any = None
        self._values: Tensor | None = None
        self.flags = np.zeros(len(weights) + 1, np.uint8)
        self.delta: Tensor | None = None  # flat

    def look(self, tile: Tile) -> tuple[str, Flags]:
        assert tile.base is not None
        if self._values is None:
            self._values = self._room(tile.base.queue)
        target = span(self._values, self._queue, tile.start, tile.start + tile.numel)
        return tile.name, kernel.run("add_deltas", target, tile.base, tile.experts, ADD)

    def _room(self, queue: Any) -> Tensor:
        import torch

        give_back()
        self._queue = self._solver.queue = queue
        with self._working():
            return torch.empty(math.prod(self._shape), device="cpu" if queue is None else queue.device)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Torch's operations go where tiles are looked at, in turn with that, and products are exact."""
        with exact_products(), nullcontext() if self._queue is None else self._queue.current():
            yield

    def settle(self, partials: Sequence[tuple[str, Flags]]) -> bool:
        for name, flags in partials:
            refuse_nonfinite(name, flags, self._expert)
        with self._working():
            self._take()
            if self._expert < len(self._weights):
                return False
            self._finish()
        return True

    def _take(self) -> None:
        assert self._values is not None
        self._norms.append(norm(self._values))
        delta = self._values.view(self._shape)
        if self._weights[self._expert] != 1:
            delta *= float(self._weights[self._expert])
        self._solver.take(self._expert, delta)
        self._expert += 1

    def _finish(self) -> None:
        self._values = None
        self.delta = delta = self._solver.finish().contiguous().view(-1)
        moved, limit = self._scale * norm(delta), self._cap * max(self._norms)
        norms = {f"norm_{i}": each for i, each in enumerate(self._norms[: len(self.flags) - 1], 1)}
        self.figures = {**self._solver.figures, **norms, "displacement": min(moved, limit)}
        del self._solver
        if moved > limit:
            delta *= limit / moved

    def release(self) -> None:
        self.delta = None


def refuse_nonfinite(name: str, flags: Flags, expert: int) -> None:
    """Raise CheckpointError if a matrix's base or this expert holds what is not finite."""
    if flags.any():
        who = "the base" if flags[0] else f"expert {expert + 1}"
        raise CheckpointError(
            f"tensor {name!r} of {who} holds a NaN or an infinity; such a matrix cannot be decomposed, "
            "mend it or leave the model out"
        )


def _name(method: MatrixMethod) -> str:
    return type(method).__module__.rpartition(".")[2]


def norm(values: Tensor | npt.NDArray[np.float32]) -> float:
    """Euclidean norm, summed in fp64 piece by piece: on the CPU the same on any number of threads."""
    import torch

    pieces = torch.as_tensor(values).view(-1).split(PIECE)
    if pieces[0].is_cuda:
        squares = torch.stack([piece.double().square_().sum() for piece in pieces]).tolist()
    else:
        squares = [float(np.square(piece.numpy(), dtype=np.float64).sum()) for piece in pieces]
    return math.sqrt(math.fsum(squares))
