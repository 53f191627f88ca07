"""Iso-C: the sum of the task vectors with all singular values replaced by their mean.

    sum_i tau_i = U S V^T      merged = base + scale mean(S) U V^T          Marczak et al. 2025, arXiv:2502.04959

U V^T is the polar factor of the sum (_polar.py); mean(S) = <sum, U V^T> / min(m, n), so that nothing is decomposed.
The authors choose the scale on validation sets, 0.8 to 1.5 for most; 1 here. Directions with singular values below
1e-6 of the largest are rounding and stay out, where the authors' decomposition completes them with arbitrary ones.

Tall matrices (_tall.py): with G = M^T M of the sum M, fp64, U V^T = M G^(-1/2) and mean(S) = tr(G^(1/2)) / n. Every
expert is read twice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.methods import _polar as polars
from streammerge.methods import _spectra as spectra
from streammerge.methods._matrices import FP32, Solver
from streammerge.methods._precision import Products
from streammerge.methods._tall import ROWS, RowsMethod, RowSolver

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IsoC(RowsMethod):
    """One singular value for all."""

    summary = "sum of task vectors, all singular values set to their mean"
    source = "Marczak et al. 2025, arXiv:2502.04959"
    product = "polar_step"

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        return _Sum(self.precision)

    def fills_cores(self, shape: tuple[int, ...]) -> bool:
        return math.prod(shape) > spectra.SMALL

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        return FP32 * rows * columns + polars.polar_bytes(min(rows, columns), max(rows, columns))

    def row_rounds(self, experts: int) -> tuple[int, int]:
        return 0, 1

    def row_solver(self, columns: int, experts: int) -> RowSolver:
        return _RowSum()

    def row_bytes(self, columns: int, experts: int) -> int:
        return spectra.FP64 * (4 * columns * columns + 2 * ROWS * columns)


class _Sum(Solver):
    """The sum, then its polar factor."""

    def __init__(self, precision: str) -> None:
        self.route = ""
        self._precision = precision
        self._sum: Tensor | None = None

    def take(self, expert: int, delta: Tensor) -> None:
        self._sum = delta.clone() if self._sum is None else self._sum.add_(delta)

    def finish(self) -> Tensor:
        assert self._sum is not None
        flat = self._sum.shape[0] <= self._sum.shape[1]
        products = Products.on(self.queue, self._precision)
        found = polars.polar(self._sum if flat else self._sum.T, products=products)
        self.route = found.route
        factor = found.factor if flat else found.factor.T
        factor *= spectra.inner(self._sum, factor) / min(self._sum.shape)
        return factor


class _RowSum(RowSolver):
    """G, then mean(S) G^(-1/2)."""

    def __init__(self) -> None:
        super().__init__()
        self._square: Tensor | None = None

    def look(self, number: int, taus: Sequence[Tensor]) -> None:
        from streammerge.methods import _crew

        total = self._sum(taus)
        if self._square is None:
            self._square = total.new_zeros(total.shape[1], total.shape[1])
        _crew.gram(self.crew, self._square, total, onto=1.0)

    def _sum(self, taus: Sequence[Tensor]) -> Tensor:
        """Rows of M, fp64."""
        import torch

        total = self.room(0, taus[0], taus[0].shape[1], torch.float64).copy_(taus[0])
        for tau in taus[1:]:
            total += tau
        return total

    def settle(self, number: int) -> None:
        from streammerge.methods import _crew

        assert self._square is not None
        square, self._square = _crew.mirror(self.crew, self._square), None
        root = polars.root_of(square, spectra.DROP)
        self._square = root.mul_(float((square * root).sum()) / len(square))  # tr(G G^(-1/2))

    def merged(self, taus: Sequence[Tensor]) -> tuple[Tensor, tuple[float, ...]]:
        assert self._square is not None
        total = self._sum(taus)
        rows = self.room(1, total, total.shape[1], total.dtype)
        return taus[0].copy_(spectra.product(self.crew, total, self._square, rows)), ()


# By hand: the sum is diag(3, -1) with singular values 3 and 1, so diag(2, -2).
EXAMPLES = [
    (
        IsoC(),
        [[0.0, 1.0], [1.0, 0.0]],
        [[[2.0, 1.0], [1.0, -2.0]], [[1.0, 1.0], [1.0, 1.0]]],
        [[2.0, 1.0], [1.0, -2.0]],
    ),
]
