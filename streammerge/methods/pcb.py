"""PCB: parameter competition balancing. Elements compete within their task and with the other tasks.

    a_i     = |tau_i| clipped to its 1e-4 and 1 - 1e-4 quantiles
    score_i = exp(T minmax(a_i)^2) tanh(tau_i sum_k tau_k)
    mask_i  = minmax of score_i over its largest `ratio`, 0 elsewhere
    merged  = base + scale sum_i mask_i sign(tau_i) a_i / sum_i mask_i          Du et al. 2024, arXiv:2410.02396

Ratio 0.05 and scale 1.2 are those of the authors' script, which then tunes one scale per task by evolution on
validation sets. What differs: the authors take quantiles and extremes over the whole model as one vector, here each
matrix has its own; where all scores (or magnitudes) are equal their 0 / 0 is a mask of 0. A task vector of zeros
takes no part.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.method import param
from streammerge.methods._keeping import Keeper, matrices_bytes, ordered
from streammerge.methods._matrices import MatrixMethod, Solver

if TYPE_CHECKING:
    from torch import Tensor

OUTLIERS = 1e-4  # share of the magnitudes that is clipped at each end


@dataclass(frozen=True)
class Pcb(MatrixMethod):
    """Elements that win."""

    summary = "mean of the elements that win within their task and among tasks"
    source = "Du et al. 2024, arXiv:2410.02396"

    scale: float = param(1.2, "factor on the merged task vector")
    ratio: float = param(0.05, "share of each task's elements that takes part")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.ratio <= 1:
            raise RecipeError(f"ratio is {self.ratio}; it must lie in (0, 1]")

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        return _Solver(experts, self.ratio)

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        return matrices_bytes(rows, columns, experts + 8)  # two of them of a selection's 8-byte indices


class _Solver(Keeper):
    """All task vectors, their sum, the masked sum and the sum of masks."""

    def __init__(self, experts: int, ratio: float) -> None:
        super().__init__(experts)
        self._ratio = ratio

    def finish(self) -> Tensor:
        import torch

        total = sum(self.deltas[1:], start=self.deltas[0])
        merged, masks = torch.zeros_like(total), torch.zeros_like(total)
        for delta in self.deltas:
            sizes = clipped(delta)
            mask = self._mask(delta, sizes, total)
            masks += mask
            mask *= sizes
            mask *= delta.sign()
            merged += mask
        merged /= masks.clamp_(min=1e-12)
        return merged

    def _mask(self, delta: Tensor, sizes: Tensor, total: Tensor) -> Tensor:
        score = sizes - sizes.min()
        score /= score.max().clamp(min=1e-38)
        score.square_().mul_(self._experts).exp_()
        score *= (delta * total).tanh_()
        low = ordered(score, int(score.numel() * (1 - self._ratio)))
        score.clamp_(min=low).sub_(low)
        score /= score.max().clamp(min=1e-38)
        return score


def clipped(delta: Tensor) -> Tensor:
    """Magnitudes without their outliers."""
    sizes, count = delta.abs(), delta.numel()
    low = ordered(sizes, int(count * OUTLIERS))
    return sizes.clamp_(low, ordered(sizes, max(0, int(count * (1 - OUTLIERS) - 1))))


# By hand: of 10, 20, 30, 40 the last is clipped to 30; squares of the minmax are 0, 1/4, 1, 1 and all tanh are 1. The
# upper three quarters of the scores begin at exp(2 / 4), so the masks are 0, 0, 1, 1. The second expert takes no part.
EXAMPLES = [
    (
        Pcb(ratio=0.75),
        [[0.0, 0.0], [0.0, 0.0]],
        [[[10.0, -20.0], [-30.0, 40.0]], [[0.0, 0.0], [0.0, 0.0]]],
        [[0.0, 0.0], [-36.0, 36.0]],
    ),
]
