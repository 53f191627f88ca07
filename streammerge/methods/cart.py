"""CART: the experts' mean, plus the leading singular directions of each expert's distance from it.

    mean   = (1/T) sum_i tau_i
    merged = base + scale (mean + lambda sum_i SVD_k(tau_i - mean))      k = max(1, floor(rho min(m, n)))

Choi et al. 2024, arXiv:2412.12153. The authors choose lambda on validation sets; the default here is 1. rho is theirs.
SVD_k is exact (fp64 Gram matrix and its eigenvectors); it is not defined where singular values k and k + 1 are equal:
some leading directions are taken then. One expert, or equal ones, give their mean, and so do two: they lie
opposite to each other around it, and what is kept of them cancels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.method import param
from streammerge.methods._keeping import Keeper, add_product, matrices_bytes
from streammerge.methods._matrices import FP32, MatrixMethod, Solver
from streammerge.methods._spectra import leading, leading_bytes

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Cart(MatrixMethod):
    """Low-rank task vectors around the mean."""

    summary = "mean of the experts plus each one's leading directions around it"
    source = "Choi et al. 2024, arXiv:2412.12153"

    rho: float = param(0.08, "share of the singular directions that is kept of each expert")
    lambda_: float = param(1.0, "factor on the low-rank parts")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.rho <= 1:
            raise RecipeError(f"rho is {self.rho}; it must lie in (0, 1]")

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        return _Solver(experts, self.rank(rows, columns), self.lambda_)

    def rank(self, rows: int, columns: int) -> int:
        """Directions kept of each expert."""
        return max(1, int(self.rho * min(rows, columns)))

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        rank = self.rank(rows, columns)
        low = leading_bytes(rows, columns, rank) + FP32 * rank * (rows + columns)
        return matrices_bytes(rows, columns, experts) + low


class _Solver(Keeper):
    """All task vectors, and the merged one."""

    def __init__(self, experts: int, rank: int, factor: float) -> None:
        super().__init__(experts)
        self._rank, self._factor = rank, factor

    def finish(self) -> Tensor:
        merged = self.deltas[0].clone()
        for delta in self.deltas[1:]:
            merged += delta
        merged /= len(self.deltas)
        for delta in self.deltas:
            delta -= merged
        while self.deltas:
            low = leading(self.deltas.pop(0), self._rank)
            low.left.mul_(low.values[:, None])
            add_product(merged, low.left.float().T, low.right.float(), self._factor)
        return merged


# By hand: the mean is diag(2, 3); around it lie diag(4, -3), diag(-2, 6), diag(-2, -3), whose leading directions are
# diag(4, 0), diag(0, 6), diag(0, -3), together diag(4, 3).
EXAMPLES = [
    (
        Cart(),
        [[1.0, 0.0], [0.0, 0.0]],
        [[[7.0, 0.0], [0.0, 0.0]], [[1.0, 0.0], [0.0, 9.0]], [[1.0, 0.0], [0.0, 0.0]]],
        [[7.0, 0.0], [0.0, 6.0]],
    ),
]
