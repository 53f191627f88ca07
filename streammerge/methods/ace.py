"""ACE: the merge that is best for inputs whose covariances are estimated from the task vectors themselves.

    W_i     = tau_i minus its mean row              S_i = W_i^T W_i             e_i = eps
    gamma   = var(log |tau_i|^2) / mean(log |tau_i|^2)^2: tasks differ in size if it is above `gamma`; then
              S_i and e_i are divided by tr(W_i^T W_i)
    c       = mean row of sum_i S_i; if tasks differ in size, divided by mean |tau_i|^2
    A       = sum_i (S_i + e_i I) + 1 c             merged task vector = (sum_i W_i (S_i + e_i I)) A^-1 = X
    if tasks differ in size, X + s U_k V_k^T, with the k = floor(share r) leading singular vectors of
              X + sum_i tau_i (S_i - sum_j (S_j + e_j I) / T) and s the mean of their singular values

Xu et al. 2026, arXiv:2603.02945. Formulas and constants are those of the authors' code, not of the paper: eps is 1e-2
there for all models, where the paper has 1e-5 to 4e-2. Beware: eps has the units of |tau|^2 and `gamma` changes with
the task vectors' size, so that the result does not scale with its inputs; for small task vectors eps outweighs S_i and
the merge is near the mean. The mean row is lost where tasks are alike, as in the code.

What differs: all of it in fp64; a task vector without covariance (zero, or all rows equal) is left out, where the code
divides by 1e-12; with one expert nothing can differ in size (the code compares with NaN); directions without a singular
value are left out of the last term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from streammerge.errors import RecipeError
from streammerge.method import param
from streammerge.methods._keeping import FP64, Keeper, add_product, gram, matrices_bytes
from streammerge.methods._matrices import MatrixMethod, Solver
from streammerge.methods._spectra import crew_for, leading, leading_bytes, product

if TYPE_CHECKING:
    from torch import Tensor

TINY = 1e-12  # of the authors' code: keeps logarithms and quotients finite
RANKLESS = 1e-20  # of |tau|^2: a smaller trace after centring is rounding


@dataclass(frozen=True)
class Ace(MatrixMethod):
    """Closed form with estimated covariances."""

    summary = "least squares with input covariances estimated from the task vectors"
    source = "Xu et al. 2026, arXiv:2603.02945"

    eps: float = param(1e-2, "ridge on each covariance, in squared units of the task vectors")
    gamma: float = param(0.3, "spread of the log sizes above which tasks are normalised")
    share: float = param(0.3, "share of the directions in the isotropic term")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.eps > 0:
            raise RecipeError(f"eps is {self.eps}; it must be above 0")
        if not 0 <= self.share <= 1:
            raise RecipeError(f"share is {self.share}; it must lie in [0, 1]")

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        return _Solver(experts, self.eps, self.gamma, self.share)

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        square = FP64 * columns * columns
        wide = FP64 * rows * columns
        most = max(3 * square + 4 * wide, leading_bytes(rows, columns, min(rows, columns)) + 3 * wide)
        return matrices_bytes(rows, columns, experts - 1) + most


class _Solver(Keeper):
    """All task vectors; at the end fp64 sums of covariances and of their products."""

    def __init__(self, experts: int, eps: float, gamma: float, share: float) -> None:
        super().__init__(experts)
        self._eps, self._gamma, self._share = eps, gamma, share

    def finish(self) -> Tensor:
        import torch

        (rows, columns), crew = self.deltas[0].shape, crew_for(self.deltas[0])
        sizes = [crew.alone(partial(_sizes, delta)) for delta in self.deltas]
        useful = [i for i, (whole, centred) in enumerate(sizes) if centred > RANKLESS * whole]
        if not useful:
            return torch.zeros(rows, columns, device=self.deltas[0].device)
        differ = self._differ([sizes[i][0] for i in useful])
        covariance = torch.zeros(columns, columns, dtype=torch.float64, device=self.deltas[0].device)
        seen = torch.zeros(rows, columns, dtype=torch.float64, device=covariance.device)  # sum_i W_i S_i
        ridged, means, ridge = torch.zeros_like(seen), seen[:1].clone(), 0.0
        for i in useful:
            factor = 1 / (sizes[i][1] + TINY) if differ else 1.0
            centred, mean = _centred(self.deltas[i])
            own = gram([centred], left=False).mul_(factor)
            add_product(seen, centred, own)
            means += product(crew, mean, own)
            covariance += own
            ridged.add_(centred, alpha=self._eps * factor)
            ridge += self._eps * factor
        del centred, own
        rank_one = covariance.mean(0, keepdim=True)
        if differ:
            rank_one /= np.mean([sizes[i][0] for i in useful]) + TINY
        covariance.diagonal().add_(ridge)
        ridged += seen
        if differ:
            total = sum((self.deltas[i] for i in useful), start=torch.zeros(1, device=covariance.device)).double()
            add_product(seen.add_(means), total, covariance, -1 / len(useful))
            del total
        self.deltas.clear()
        covariance += rank_one
        merged = crew.alone(partial(torch.linalg.solve, covariance, ridged, left=False))
        del covariance, ridged
        return (merged + self._isotropic(seen.add_(merged)) if differ else merged).float()

    def _differ(self, sizes: Sequence[float]) -> bool:
        """Whether the tasks differ in size."""
        if len(sizes) < 2:
            return False
        logs = np.log(np.array(sizes) + TINY)
        return bool(np.var(logs, ddof=1) / (np.mean(logs) ** 2 + TINY) > self._gamma)

    def _isotropic(self, fused: Tensor) -> Tensor | float:
        rank = int(self._share * min(fused.shape))
        if not rank:
            return 0.0
        top = leading(fused, rank)
        return top.values.sum() / rank * product(crew_for(fused), top.left.T, top.right)


def _sizes(delta: Tensor) -> tuple[float, float]:
    """Squared norms, fp64: of the matrix, and of it without its mean row."""
    return float(delta.double().square().sum()), float(_centred(delta)[0].square().sum())


def _centred(delta: Tensor) -> tuple[Tensor, Tensor]:
    """fp64: the matrix without its mean row, and that row [1, n]."""
    wide = delta.double()
    mean = wide.mean(0, keepdim=True)
    return wide - mean, mean


# By hand, eps 1: the mean row is 0, S is diag(2, 0) and c is (1, 0); X [[3 + 1, 0], [1, 1]] = [[3, 0], [-3, 0]].
EXAMPLES = [
    (
        Ace(eps=1.0),
        [[0.0, 1.0], [0.0, 1.0]],
        [[[1.0, 1.0], [-1.0, 1.0]]],
        [[0.75, 1.0], [-0.75, 1.0]],
    ),
]
