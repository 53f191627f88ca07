"""Iso-C: the sum of the task vectors with all singular values replaced by their mean.

    sum_i tau_i = U S V^T      merged = base + scale mean(S) U V^T          Marczak et al. 2025, arXiv:2502.04959

U V^T is the polar factor of the sum (_spectra.py); mean(S) = <sum, U V^T> / min(m, n), so that nothing is decomposed.
The authors choose the scale on validation sets, 0.8 to 1.5 for most; 1 here. Directions with singular values below
1e-6 of the largest are rounding and stay out, where the authors' decomposition completes them with arbitrary ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from streammerge.methods import _spectra as spectra
from streammerge.methods._matrices import FP32, MatrixMethod, Solver

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class IsoC(MatrixMethod):
    """One singular value for all."""

    summary = "sum of task vectors, all singular values set to their mean"
    source = "Marczak et al. 2025, arXiv:2502.04959"

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        return _Sum()

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        return FP32 * rows * columns + spectra.polar_bytes(min(rows, columns), max(rows, columns))


class _Sum(Solver):
    """The sum, then its polar factor."""

    def __init__(self) -> None:
        self.route = ""
        self._sum: Tensor | None = None

    def take(self, expert: int, delta: Tensor) -> None:
        self._sum = delta.clone() if self._sum is None else self._sum.add_(delta)

    def finish(self) -> Tensor:
        assert self._sum is not None
        flat = self._sum.shape[0] <= self._sum.shape[1]
        (found,) = spectra.each([partial(spectra.polar, self._sum if flat else self._sum.T)], self._sum.numel())
        self.route = found.route
        factor = found.factor if flat else found.factor.T
        factor *= spectra.inner(self._sum, factor) / min(self._sum.shape)
        return factor


# By hand: the sum is diag(3, -1) with singular values 3 and 1, so diag(2, -2).
EXAMPLES = [
    (
        IsoC(),
        [[0.0, 1.0], [1.0, 0.0]],
        [[[2.0, 1.0], [1.0, -2.0]], [[1.0, 1.0], [1.0, 1.0]]],
        [[2.0, 1.0], [1.0, -2.0]],
    ),
]
