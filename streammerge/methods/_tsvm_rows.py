"""TSV-Merge on tall matrices: squares of the columns, in fp64, and every expert read three times.

    tau_i^T tau_i             gives V_i and S_i, one expert after the other
    rows of U_i               are those of tau_i times V_i S_i^-1
    W = U^T U                 gives P(U) = U W^(-1/2), without what experts share
    rows of the merge         are rows of U times W^(-1/2) S P(V)^T

W is formed from U's rows as they come in the merge, so that rounding in V and S turns no direction against the others.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from streammerge.methods import _polar as polars
from streammerge.methods import _spectra as spectra
from streammerge.methods._crew import gram, mirror
from streammerge.methods._matrices import FP64
from streammerge.methods._tall import ROWS, RowSolver


class Rows(RowSolver):
    """V and S of one expert after the other, then W, and what rows of U are multiplied with."""

    def __init__(self, experts: int, rank: int) -> None:
        super().__init__()
        self.route = ""  # how the right polar factor was found
        self._experts, self._rank = experts, rank
        self._square: Tensor | None = None  # of this round, on the diagonal and above it
        self._right: Tensor | None = None  # V^T
        self._values: list[Tensor] = []
        self._last: Tensor | None = None  # W^(-1/2) S P(V)^T

    def look(self, number: int, taus: Sequence[Tensor]) -> None:
        block = self._wide(taus[0]) if number < self._experts else self._left(taus)
        if self._square is None:
            self._square = block.new_zeros(block.shape[1], block.shape[1])
        gram(self.crew, self._square, block, onto=1.0)

    def _wide(self, tau: Tensor) -> Tensor:
        """Rows of a task vector, fp64, in the first room."""
        return self.room(0, tau, tau.shape[1], torch.float64).copy_(tau)

    def _left(self, taus: Sequence[Tensor]) -> Tensor:
        """Rows of U, in the second."""
        assert self._right is not None
        rows, at = self.room(1, taus[0], self._directions, torch.float64), 0
        for tau, values in zip(taus, self._values, strict=True):
            part = rows[:, at : at + len(values)]
            spectra.product(self.crew, self._wide(tau), self._right[at : at + len(values)].T, part)
            part /= values
            at += len(values)
        return rows

    @property
    def _directions(self) -> int:
        return sum(len(values) for values in self._values)

    def settle(self, number: int) -> None:
        assert self._square is not None
        mirror(self.crew, self._square)
        if number < self._experts:
            values, right = spectra.directions(self._square, self._rank)
            if self._right is None:
                self._right = right.new_empty(self._experts * self._rank, right.shape[1])
            self._right[self._directions : self._directions + len(values)] = right
            self._values.append(values)
        else:
            self._finish()
        self._square = None

    def _finish(self) -> None:
        assert self._right is not None
        assert self._square is not None
        if not self._directions:
            self._last = self._right[:0]
            return
        sizes = [len(values) for values in self._values]
        found = polars.polar(self._right[: self._directions], sizes, self.crew.products)
        self.route = found.route
        root = polars.root_of(self._square, polars.CUTOFF)
        self._square = None
        root *= torch.cat(self._values)
        self._last = spectra.product(self.crew, root, found.factor.double())

    def merged(self, taus: Sequence[Tensor]) -> tuple[Tensor, tuple[float, ...]]:
        assert self._last is not None
        left = self._left(taus)
        rows = self.room(0, left, self._last.shape[1], torch.float64)
        return taus[0].copy_(spectra.product(self.crew, left, self._last, rows)), ()


def bytes_kept(columns: int, experts: int) -> int:
    """The peak of `Rows`: an eigendecomposition beside V, or V's polar factor beside V and W; two rooms."""
    square = FP64 * columns * columns
    polar = polars.polar_bytes(experts * (columns // experts), columns, experts == 2)
    return max(5 * square, 2 * square + polar) + 2 * FP64 * ROWS * columns
