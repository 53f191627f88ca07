"""Iso-CTS: leading directions of the sum, leading directions of each expert beside them, all equally strong.

    sum_i tau_i ~ U_c S_c V_c^T              the k_c leading triplets, k_c = min(m, n) - T k_t
    (1 - U_c U_c^T) tau_i ~ U_i S_i V_i^T    the k_t leading triplets, T k_t about (1 - common_fraction) min(m, n)
    merged = base + scale mean(S) P([U_1 ... U_T U_c]) P([V_1 ... V_T V_c])^T

Marczak et al. 2025, arXiv:2502.04959, with their common_fraction. P is the polar factor (_polar.py), the mean is over
all values. They choose the scale on validation sets, about 1.4 for many; 1 here. What is left of an expert is looked
for after the sum is known: every expert is read twice. Directions below 1e-6 of the largest are rounding and stay out
(of a remainder, below 1e-6 of its expert's norm); those that experts share (to 1e-5) are kept once.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from streammerge.errors import RecipeError
from streammerge.method import Survey, param, spread
from streammerge.methods import _polar as polars
from streammerge.methods import _spectra as spectra
from streammerge.methods._matrices import FP32, MatrixSurvey, PreciseMethod, Solver
from streammerge.methods._precision import Products

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IsoCts(PreciseMethod):
    """Common and task-specific directions, equally strong."""

    summary = "common directions of the sum and each expert's own, all singular values set to their mean"
    source = "Marczak et al. 2025, arXiv:2502.04959"
    product = "polar_step"

    common_fraction: float = param(0.8, "share of the directions that is taken from the sum")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.common_fraction <= 1:
            raise RecipeError(f"iso_cts: common_fraction is {self.common_fraction}, it must lie in [0, 1]")

    def rounds(self, experts: int) -> int:
        return 2 * experts

    def reads(self, number: int, experts: int) -> tuple[int, ...] | None:
        return super().reads(number % experts if number < 2 * experts else experts, experts)

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey | None:
        if super().survey(shape, experts) is None:
            return None
        rows, columns = shape
        solver, weights = self.solver(rows, columns, experts), spread(self.weight, experts)
        return _Twice(solver, shape, weights, self.scale, self.norm_guard or math.inf)

    def ranks(self, rows: int, columns: int, experts: int) -> tuple[int, int]:
        """Directions of the sum, and of each expert: the authors' rounding, so that the experts' share is equal."""
        small = min(rows, columns)
        own = min(round((small - int(small * self.common_fraction)) / experts), small // experts)
        return small - experts * own, own

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        return _Both(experts, *self.ranks(rows, columns, experts), self.precision)

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        small, large = sorted((rows, columns))
        common, own = self.ranks(rows, columns, experts)
        bases = FP32 * small * (rows + columns)
        return max(
            FP32 * rows * columns + spectra.leading_bytes(rows, columns, common),
            bases + spectra.FP64 * common * (rows + columns),
            bases + max(FP32 * common * columns, spectra.leading_bytes(rows, columns, own)),
            bases + polars.polar_bytes(small, large),
        )


class _Twice(MatrixSurvey):
    """Every task vector twice, in order."""

    def __init__(
        self, solver: Solver, shape: tuple[int, ...], weights: npt.NDArray[np.float64], scale: float, cap: float
    ) -> None:
        super().__init__(solver, shape, np.tile(weights, 2), scale, cap)
        self.flags = self.flags[: len(weights) + 1]


class _Both(Solver):
    """The sum first, then its leading directions as rows and the experts' below them."""

    def __init__(self, experts: int, common: int, own: int, precision: str) -> None:
        self.routes: list[str] = []
        self._experts, self._common, self._own, self._precision = experts, common, own, precision
        self._sum: Tensor | None = None
        self._bases: list[Tensor] = []
        self._sizes: list[int] = []
        self._total = 0.0  # of singular values

    def take(self, expert: int, delta: Tensor) -> None:
        if expert < self._experts:
            self._sum = delta.clone() if self._sum is None else self._sum.add_(delta)
            return
        if self._sum is not None:
            total, self._sum = self._sum, None
            self._bases = [delta.new_empty(min(delta.shape), length) for length in delta.shape]
            self._add(spectra.leading(total, self._common))
            del total
        self._add(self._remainder(delta))

    def _remainder(self, delta: Tensor) -> spectra.Leading:
        """Leading directions of what an expert has beside the sum's."""
        crew, shared = spectra.crew_for(delta), self._bases[0][: self._sizes[0]]
        floor = spectra.DROP * crew.alone(lambda: float(delta.norm()))
        part = spectra.product(crew, shared, delta)
        crew.each(lambda a, b: delta[a:b].addmm_(shared[:, a:b].T, part, alpha=-1), len(delta))
        return spectra.leading(delta, self._own, floor)

    def _add(self, found: spectra.Leading) -> None:
        at, size = sum(self._sizes), len(found.values)
        for basis, part in zip(self._bases, (found.left, found.right), strict=True):
            basis[at : at + size] = part
        self._sizes.append(size)
        self._total += float(found.values.sum())

    def finish(self) -> Tensor:
        left, right = (basis[: sum(self._sizes)] for basis in self._bases)
        small, common = len(self._bases[0]), self._sizes[0]  # orthogonal to the experts' on the left as they are
        polar = partial(polars.polar, products=Products.on(self.queue, self._precision))
        own, found = polar(left[common:], self._sizes[1:]), polar(right, self._sizes)
        self.routes = [own.route, found.route]
        left[common:] = own.factor
        left *= self._total / small
        return spectra.product(spectra.crew_for(left), left.T, found.factor)


# By hand: the sum diag(5, 1) is all common at common_fraction 1: diag(3, 3). At 0 each expert gives one direction,
# those of 4 and 2, with the mean 3.
EXAMPLES = [
    (
        IsoCts(common_fraction=1.0),
        [[0.0, 1.0], [1.0, 0.0]],
        [[[4.0, 1.0], [1.0, 0.0]], [[1.0, 1.0], [1.0, 1.0]]],
        [[3.0, 1.0], [1.0, 3.0]],
    ),
    (
        IsoCts(common_fraction=0.0, scale=2.0),
        [[0.0, 0.0], [0.0, 0.0]],
        [[[4.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [0.0, -2.0]]],
        [[6.0, 0.0], [0.0, -6.0]],
    ),
]
