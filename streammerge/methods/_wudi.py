"""What WUDI computes with: sums over experts, and Adam.

    C = sum_i w_i tau_i^T tau_i    D = sum_i w_i tau_i tau_i^T tau_i    w_i = 1 / |tau_i|^2    M_0 = sum_i tau_i

Row r of M C - D needs row r of M and of D, and all of C: a block of rows goes through all steps on one core, with its
state in the cache. What moves is X = M - M_0, and R = D - M_0 C takes D's place: X begins at zero, so that its fp32 is
finer than M's, and the gradient 2 (X C - R) is no difference of large numbers.

C, D and M_0 are kept in fp32. The products tau_i (tau_i^T tau_i) and M_0 C are taken in fp64 and rounded, for what
they leave in R is a small difference of them; all others are fp32. Relative to the merged matrix, 300 steps of Adam on
three task vectors of 192 x 768 with a standard deviation of 1e-4 are then 2e-5 to 6e-5 from fp64, and were 1.7e-4 with
products in fp32; sums of fp32 products in fp64 gained nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor

from streammerge.methods._crew import PANEL, ROOM, ROWS, Crew, add_product, block_rows, dot, gram, mirror, norm
from streammerge.methods._matrices import Solver
from streammerge.methods._precision import Products

TINY = 1e-12  # a task vector whose squared norm is below is taken out

Sums: TypeAlias = tuple[float, ...]  # |R|^2 before and after, |X|^2, L(M_0) without its constant, L(M) - L(M_0)
WIDE = ("inverse", "ridge")  # ways in fp64: what divides by small eigenvalues needs it
Move: TypeAlias = Callable[[Tensor], tuple[Tensor, Tensor]]  # rows of R to those of X and X C - R, in the room
Way: TypeAlias = Callable[[Crew, Tensor, float], Move]  # from C, which it may use up, and C's mean eigenvalue
RATES = (0.9, 0.999, 1e-8)  # of Adam: beta1, beta2, eps


class Gram(Solver):
    """Adds up C, D and M_0 expert by expert, then goes a way. `balanced` are the experts' weights, to balance norms."""

    def __init__(
        self, experts: int, way: Way, wide: bool, balanced: Sequence[float] | None, precision: str = "fp32"
    ) -> None:
        self.figures: dict[str, float] = {}
        self._experts, self._way, self._balanced, self._precision = experts, way, balanced, precision
        self._dtype = torch.float64 if wide else torch.float32
        self._norms: list[float] = []  # of the task vectors without their weights, as far as they count
        self._constant = 0.0  # of the loss: sum_i w_i |tau_i tau_i^T|^2
        self._crew: Crew | None = None
        self._start = torch.empty(0)

    def take(self, expert: int, delta: Tensor) -> None:
        if self._experts == 1:
            self._start = delta
            return
        products = Products.on(self.queue, self._precision)
        self._crew = crew = self._crew or Crew(delta.device, products, whole=self.queue is not None)
        size = norm(crew, delta)
        if not self._norms:
            self._start = torch.zeros_like(delta)
        if size * size < TINY:
            return
        self._norms.append(size / abs(self._balanced[expert]) if self._balanced else size)
        pull = self._norms[0] / self._norms[-1] if self._balanced else 1.0
        self._add(crew, delta.to(self._dtype), 1 / (size * size), pull)

    def _add(self, crew: Crew, x: Tensor, weight: float, pull: float) -> None:
        """One task vector; `pull` is the factor on it in M_0 and D."""
        rows, columns = x.shape
        short = _short(rows, columns)
        if len(self._norms) == 1:
            self._start = x.clone()
            self._target = torch.zeros_like(x)
            self._gram = x.new_zeros(columns, columns)
            self._scratch = x.new_empty(rows, rows) if short else x.new_empty(columns, columns)
        scratch = self._scratch
        left, right = (scratch, x) if short else (x, scratch)
        gram(crew, scratch, x.T if short else x)
        mirror(crew, scratch)
        self._constant += pull * pull * weight * norm(crew, scratch) ** 2

        def block(a: int, b: int) -> None:
            add_product(crew, self._target[a:b], left[a:b], right, weight * pull)
            if len(self._norms) > 1:
                self._start[a:b].add_(x[a:b], alpha=pull)

        crew.each(block, rows)
        if short:
            gram(crew, self._gram, x, weight, onto=1.0)
        else:
            crew.each(lambda a, b: self._gram[a:b, a:].add_(scratch[a:b, a:], alpha=weight), columns)

    def finish(self) -> Tensor:
        if self._crew is not None:
            if len(self._norms) > 1:
                self._solve(self._crew)
            self._crew.close()
        return self._start.float()

    def _solve(self, crew: Crew) -> None:
        del self._scratch
        mirror(crew, self._gram)
        if self._balanced:
            mean = sum(self._norms) / len(self._norms) / self._norms[0]
            self._start *= mean
            self._target *= mean
            self._constant *= mean * mean
        eigenvalue = len(self._norms) / len(self._gram)  # the mean: the trace of C is the number of experts
        start, target, rows = self._start, self._target, len(self._start)
        losses = dict(crew.each(lambda a, b: (a, begin(crew, start[a:b], self._gram, target[a:b])), rows))
        move = self._way(crew, self._gram, eigenvalue)
        parts = crew.each(lambda a, b: end(start[a:b], target[a:b], *move(target[a:b]), losses[a]), rows)
        del self._gram, self._target
        before, after, moved, loss, change = (sum(column) for column in zip(*parts, strict=True))
        self.figures = {
            "residual": math.sqrt(after / before) if before > 0 else 0.0,
            "travelled": math.sqrt(moved),
            "loss_before": loss + self._constant,
            "loss": loss + self._constant + change,
        }


def _short(rows: int, columns: int) -> bool:
    """Whether D is cheaper from tau tau^T; then tau^T tau is not needed by itself."""
    return 3 * rows < 2 * columns


def bytes_kept(rows: int, columns: int, way: str) -> int:
    """The peak of a solver: adding up the experts, or going its way; the threads' rooms included."""
    longer = max(rows, columns)
    block = max(ROWS, block_rows(longer))
    blocks = min(torch.get_num_threads(), -(-longer // block))
    return int(max(_phases(rows, columns, way)) + blocks * max(ROOM, 3 * _size(way)) * block * longer)


def bytes_kept_there(rows: int, columns: int, way: str, work_space: int) -> int:
    """The same on a GPU, where all rows are a block; `work_space` matrices are what the library takes of C's size."""
    adding, going = _phases(rows, columns, way)
    matrix, panel = rows * columns, min(PANEL, max(rows, columns))
    scratch = rows * rows if _short(rows, columns) else columns * columns
    product = 8 * (matrix + PANEL * columns + rows * panel)  # in fp64
    room = {"adam": 4 * matrix, "doubling": max(columns * columns, 2 * matrix)}.get(way, 3 * matrix)
    library = 0 if way in ("adam", "doubling") else work_space * columns * columns
    adding += max(8 * max(matrix, scratch), product)
    return int(max(adding, going + max(_size(way) * (room + library), product)))


def _size(way: str) -> int:
    return 8 if way in WIDE else 4


def _phases(rows: int, columns: int, way: str) -> tuple[int, int]:
    """Bytes of the matrices that are held: while experts are added up, and on the way."""
    matrix, square = _size(way) * rows * columns, _size(way) * columns * columns
    scratch = _size(way) * rows * rows if _short(rows, columns) else square
    adding = 2 * matrix + square + scratch + (matrix if way in WIDE else 0)  # the last: the task vector in fp64
    return adding, 2 * matrix + (square if way == "adam" else 4 * square)


def begin(crew: Crew, start: Tensor, gram: Tensor, target: Tensor) -> float:
    """Make R of a block of D; the loss of its rows in M_0, up to the constant."""
    loss = -dot(start, target)
    add_product(crew, target, start, gram, -1.0)
    return loss - dot(start, target)


def end(start: Tensor, rest: Tensor, moved: Tensor, gradient: Tensor, loss: float) -> Sums:
    """Add X to M_0; `gradient` is X C - R."""
    start += moved
    change = dot(moved, gradient) - dot(moved, rest)
    return dot(rest, rest), dot(gradient, gradient), dot(moved, moved), loss, change


def adam(crew: Crew, gram: Tensor, mean: float, *, iterations: int, lr: float) -> Move:
    """Steps of torch.optim.Adam, one product each."""

    def move(rest: Tensor) -> tuple[Tensor, Tensor]:
        room = tuple(each.zero_() for each in crew.room(4, rest.shape, rest.dtype))
        moved, g = (_adam if crew.products is None else _adam_by_kernel)(crew, room, gram, rest, iterations, lr)
        return moved, torch.addmm(rest, moved, gram, beta=-1, out=g)

    return move


def _adam(
    crew: Crew, room: Sequence[Tensor], gram: Tensor, rest: Tensor, iterations: int, lr: float
) -> tuple[Tensor, Tensor]:
    """X, and a matrix to write on; `room` is both, zero, and Adam's moments."""
    settings = {"lr": lr, **dict(zip(("beta1", "beta2", "eps"), RATES, strict=True)), "weight_decay": 0.0}
    moved, first, second, g = room
    step = torch.zeros((), device=rest.device)
    for _ in range(iterations):
        torch.addmm(rest, moved, gram, beta=-2, alpha=2, out=g)
        step += 1
        torch._fused_adam_([moved], [g], [first], [second], [], [step], **settings, amsgrad=False, maximize=False)
    return moved, g


def _adam_by_kernel(
    crew: Crew, room: Sequence[Tensor], gram: Tensor, rest: Tensor, iterations: int, lr: float
) -> tuple[Tensor, Tensor]:
    """The same, product and update in one."""
    assert crew.products is not None
    moved, first, second, g = room
    for step in range(1, iterations + 1):
        crew.products.adam_step((g, moved, gram, rest, first, second), step, lr, *RATES)
        moved, g = g, moved
    return moved, g
