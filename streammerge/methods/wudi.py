"""WUDI: the sum of task vectors, moved to where they disturb each other least.

    L(M) = sum_i w_i |(M - tau_i) tau_i^T|^2      w_i = 1 / |tau_i|^2, M from sum_i tau_i      Cheng et al. 2025
    gradient = 2 (M C - D)                        C = sum_i w_i tau_i^T tau_i, D = sum_i w_i tau_i tau_i^T tau_i

The rows of a task vector stand for the inputs of its layer. C and D are added up expert by expert, then a step is one
product, however many experts there are. The ways from there:

    adam          `iterations` steps of Adam at `lr`, the authors' way. The rate is absolute, 3e-3 per element at most;
                  neither scale nor rotation of the task vectors cancel out. fp32, within 1e-4 of fp64.
    spectral      gradient flow for a `time`, on the largest `keep` of C's eigenvalues: M_0 - (M_0 C - D) f(C) with
                  f(x) = (1 - exp(-t x)) / x (SWUDI, arXiv:2606.07289). keep = 1 takes products alone, less eigh. fp32.
    closed_form   the stationary point, f(x) = 1 / (x + a); without a ridge D C^+. fp64. Published as the weaker end:
                  stopping early is what regularises.

`time` and `ridge` are in units of C's mean eigenvalue, which is T / n for T experts and n columns: t = 300 of the
papers is time = 300 T / n, that is 3.1 for the eight experts of 768 columns they tuned it on, and less for wider
layers. Task vectors with |tau|^2 < 1e-12 are taken out; one alone is the answer, to the bit. Weights scale task
vectors in M_0 and D; C does not see them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.method import param, spread
from streammerge.methods._matrices import EIGH, Solver
from streammerge.methods._spectra import SMALL
from streammerge.methods._tall import One, RowsMethod, RowSolver

if TYPE_CHECKING:
    from streammerge.methods._wudi import Way

SAFE = 1e-6  # a ridge that Cholesky takes from here; below, eigenvalues that are rounding must be told and left out


@dataclass(frozen=True)
class Wudi(RowsMethod):
    """Moves the sum of task vectors to where they disturb each other least."""

    summary = "sum of task vectors, moved to where they disturb each other least"
    source = "Cheng et al. 2025, arXiv:2503.08099; spectral: arXiv:2606.07289"
    product = "adam_gemm"

    solver_: str = param("adam", "adam, spectral (gradient flow) or closed_form (its end)")
    iterations: int = param(300, "adam: steps")
    lr: float = param(1e-5, "adam: rate, about what an element moves per step")
    time: float = param(3.0, "spectral: how long to flow, in units of 1 / mean eigenvalue")
    keep: float = param(1.0, "spectral: fraction of the eigenvalues that take part, largest first")
    ridge: float = param(0.0, "closed_form: added to the eigenvalues, in units of their mean")
    balance: str = param("none", "norms: task vectors are first scaled to their mean norm; or none")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, value, known in (
            ("solver", self.solver_, ("adam", "spectral", "closed_form")),
            ("balance", self.balance, ("none", "norms")),
        ):
            if value not in known:
                raise RecipeError(f"wudi: {name} is {value!r}; one of {', '.join(known)}")
        for name, fits, wanted in (
            ("iterations", self.iterations >= 0, "0 or more"),
            ("lr", self.lr > 0, "above 0"),
            ("time", self.time > 0, "above 0"),
            ("keep", 0 < self.keep <= 1, "in (0, 1]"),
            ("ridge", self.ridge >= 0, "0 or more"),
        ):
            if not fits:
                raise RecipeError(f"wudi: {name} is {getattr(self, name)}, it must be {wanted}")
        if self.precision != "fp32" and self.solver_ != "adam":
            raise RecipeError(f"wudi: precision {self.precision} is for solver adam; with {self.solver_} leave it out")

    def way(self) -> str:
        """How the merged task vector is found, by its function's name."""
        if self.solver_ == "adam":
            return "adam"
        if self.solver_ == "spectral":
            return "doubling" if self.keep == 1 else "eigen"
        return "ridge" if self.ridge >= SAFE else "inverse"

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        from streammerge.methods import _wudi as sums

        return sums.Gram(experts, *self._chosen(experts), self.precision)

    def _chosen(self, experts: int) -> tuple[Way, bool, list[float] | None]:
        """The way, whether it is fp64, and the weights where they matter by themselves."""
        from streammerge.methods import _wudi as sums
        from streammerge.methods import _wudi_flow as flows

        way = self.way()
        chosen: dict[str, Way] = {
            "adam": partial(sums.adam, iterations=self.iterations, lr=self.lr),
            "doubling": partial(flows.doubling, time=self.time),
            "eigen": partial(flows.eigen, strength=partial(flows.flow, time=self.time, keep=self.keep)),
            "ridge": partial(flows.ridge, amount=self.ridge),
            "inverse": partial(flows.eigen, strength=partial(flows.inverse, amount=self.ridge)),
        }
        weights = list(spread(self.weight, experts)) if self.balance == "norms" else None
        return chosen[way], way in sums.WIDE, weights

    def fills_cores(self, shape: tuple[int, ...]) -> bool:
        return self.way() not in ("eigen", "inverse") and math.prod(shape) > SMALL

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        from streammerge.methods import _wudi as sums

        return sums.bytes_kept(rows, columns, self.way()) if experts > 1 else 0

    def bytes_kept_there(self, rows: int, columns: int, experts: int) -> int:
        from streammerge.methods import _wudi as sums

        return sums.bytes_kept_there(rows, columns, self.way(), EIGH) if experts > 1 else 0

    def row_rounds(self, experts: int) -> tuple[int, int]:
        return experts, 0

    def row_solver(self, columns: int, experts: int) -> RowSolver:
        from streammerge.methods._wudi_rows import Rows

        return Rows(experts, *self._chosen(experts)) if experts > 1 else One()

    def row_bytes(self, columns: int, experts: int) -> int:
        from streammerge.methods._wudi_rows import bytes_kept

        return bytes_kept(columns, experts, self.way()) if experts > 1 else 0


# By hand: rows e1 and e2 share no direction, so the sum is stationary. For (1, 0; 0, 0) twice C is diag(2, 0) and D
# (2, 0; 0, 0): the stationary point is the task vector, not twice of it.
EXAMPLES = [
    (
        Wudi(),
        [[1.0, 1.0], [1.0, 1.0]],
        [[[2.0, 1.0], [1.0, 1.0]], [[1.0, 4.0], [1.0, 1.0]]],
        [[2.0, 4.0], [1.0, 1.0]],
    ),
    (
        Wudi(solver_="closed_form"),
        [[0.0, 0.0], [0.0, 0.0]],
        [[[1.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 0.0]]],
        [[1.0, 0.0], [0.0, 0.0]],
    ),
]
