"""KnOTS: the task vectors in one shared basis, merged there by TIES.

    [tau_1 ... tau_T] = U S [V_1^T ... V_T^T]       thin SVD, singular values above `tolerance` stay
    B_i = S V_i^T = U^T tau_i                       keeps its largest floor(density r n) elements
    merged = base + scale U B                       B: mean of the B_i that agree with the sign of their sum

Stoica et al. 2024, arXiv:2410.19735, made for adapters: task vectors of low rank. U comes from the fp64 eigenvectors of
sum_i tau_i tau_i^T, [m, m], and B_i from the product, so that no V is ever formed. It is not unique where singular
values are equal: some basis is taken then. What differs: the authors trim over all layers at once, here each matrix
is trimmed alone, as `ties` does; elements that tie at the threshold all stay; a sum of zero elects plus.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from streammerge.errors import RecipeError
from streammerge.method import PerExpert, param, spread
from streammerge.methods import _spectra as spectra
from streammerge.methods._keeping import NOISE, Keeper, directions, matrices_bytes, ordered, spectrum_bytes
from streammerge.methods._matrices import FP32, MatrixMethod, Solver

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Knots(MatrixMethod):
    """TIES in a shared basis."""

    summary = "task vectors in one shared singular basis, merged there by TIES"
    source = "Stoica et al. 2024, arXiv:2410.19735"

    density: PerExpert = param(0.2, "share of the task's coefficients that is kept, largest first", per_expert=True)
    tolerance: float = param(1e-4, "singular values up to this are dropped")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not all(0 < share <= 1 for share in np.ravel(self.density)):
            raise RecipeError(f"density is {self.density}; it must lie in (0, 1]")

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        return _Solver(spread(self.density, experts).tolist(), self.tolerance)

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        basis = FP32 * rows * rows
        spectrum = spectrum_bytes(rows, columns, side=rows)
        return matrices_bytes(rows, columns, experts - 1) + max(spectrum, basis + matrices_bytes(rows, columns, 7))


class _Solver(Keeper):
    """All task vectors, replaced by their coefficients."""

    def __init__(self, densities: list[float], tolerance: float) -> None:
        super().__init__(len(densities))
        self._densities, self._tolerance = densities, tolerance

    def finish(self) -> Tensor:
        import torch

        values, vectors = directions(self.deltas, left=True)
        rank = int((values > max(self._tolerance, NOISE * float(values[0]))).sum())
        if not rank:
            return torch.zeros_like(self.deltas[0])
        basis = vectors[:, :rank].float().contiguous()
        del vectors
        kept: list[Tensor] = []
        crew = spectra.crew_for(basis)
        for density in self._densities:
            kept.append(trimmed(spectra.product(crew, basis.T, self.deltas.pop(0)), density))
        return spectra.product(crew, basis, agreeing_mean(kept))


def trimmed(block: Tensor, density: float) -> Tensor:
    """The block with zeros for all but its largest elements."""
    sizes = block.abs()
    count = max(1, int(density * block.numel()))
    return block.masked_fill_(sizes < ordered(sizes, block.numel() - count), 0)


def agreeing_mean(blocks: list[Tensor]) -> Tensor:
    """Per element, the mean of the nonzero values whose sign is that of the sum."""
    import torch

    sign = torch.where(sum(blocks[1:], start=blocks[0]) >= 0, 1.0, -1.0)
    total, count = torch.zeros_like(sign), torch.zeros_like(sign)
    for block in blocks:
        agrees = block * sign > 0
        count += agrees
        total += block.mul_(agrees)
    return total.div_(count.clamp_(min=1))


# By hand: rows are orthogonal, so the basis is the rows' own. 4 and -1 sum to plus, 1 and 3 agree.
EXAMPLES = [
    (
        Knots(density=1.0),
        [[1.0, 0.0], [0.0, 0.0]],
        [[[5.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 3.0]]],
        [[5.0, 0.0], [0.0, 2.0]],
    ),
    (Knots(density=0.5), [[0.0, 0.0], [0.0, 0.0]], [[[4.0, 0.0], [0.0, 1.0]]], [[4.0, 0.0], [0.0, 1.0]]),
]
