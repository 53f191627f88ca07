"""DELLA: drop elements of each task vector at random, small ones more often, scale up the rest, add them up.

    p_k    = density - epsilon + 2 epsilon rank / (n - 1)      rank of |delta_k| in its row of n, 0 for the smallest
    m_k    ~ Bernoulli(p_k),  r_k = |delta_k|_1 / |m_k delta_k|_1
    merged = base + lambda sum_k v_k          Deep et al. 2024, arXiv:2406.11617

Rows are the last dimension; a vector is one row, and a row of one element keeps it with probability density. Equal
magnitudes are ranked by index. A density of 1 keeps everything, one of 0 nothing, whatever epsilon is. The paper
divides by p_k; like mergekit we match the L1 norm of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.errors import RecipeError
from streammerge.kernels.host.row_ranks import PIECE
from streammerge.kernels.host.sign_elect import Drop
from streammerge.method import Cost, Flags, PerExpert, Survey, Tile, param, spread
from streammerge.methods._sums import fsums, ratio, row_grain
from streammerge.methods._task_vectors import TaskVectors

RANK = 4  # bytes of a rank
SORTED = 20  # bytes of an element while its row is sorted: its key, and twice (key, index)


class RankSurvey(Survey):
    """L1 norms of each task vector before and after its random mask; `rescale` is their ratio."""

    def __init__(self, row: int, kept: npt.NDArray[np.float64], epsilon: npt.NDArray[np.float64]) -> None:
        self._row, self._kept, self._epsilon = row, kept, epsilon
        self.rescale = np.ones(len(kept))

    def look(self, tile: Tile) -> list[npt.NDArray[np.float64] | None]:
        sums: list[npt.NDArray[np.float64] | None] = []
        for expert, density in enumerate(self._kept):
            partials = np.empty((-(-tile.numel // row_grain(self._row)), 2)) if 0 < density < 1 else None
            if partials is not None:
                chances = self._row, float(density), float(self._epsilon[expert])
                where = tile.seed, tile.tensor_id, expert, tile.start
                kernel.call("row_ranks", "norms", tile.base, tile.experts[expert], *chances, *where, partials)
            sums.append(partials)
        return sums

    def settle(self, partials: Sequence[Any]) -> bool:
        whole, kept = fsums(partials)
        self.rescale = np.array([ratio(w, k) for w, k in zip(whole, kept, strict=True)])
        return True


@dataclass(frozen=True)
class DellaLinear(TaskVectors):
    """Dropped by rank within rows, sum. Masks are keyed as DARE's: by seed, tensor, expert and element."""

    summary = "task vectors with elements dropped at random, small ones more often, rescaled, added up"
    source = "Deep et al. 2024, arXiv:2406.11617"
    kernels = ("row_ranks", "sign_elect")

    epsilon: PerExpert = param(
        0.15, "how far the smallest and the largest of a row differ from density", per_expert=True
    )
    rescale: bool = param(True, "scale what is kept to the L1 norm of the whole task vector")

    def __post_init__(self) -> None:
        densities, reach = np.atleast_1d(self.density).astype(float), np.atleast_1d(self.epsilon).astype(float)
        if not (np.isfinite(densities).all() and np.isfinite(reach).all()):
            raise RecipeError(f"density is {self.density} and epsilon {self.epsilon}; both must be numbers")
        if densities.size != reach.size and 1 not in (densities.size, reach.size):
            raise RecipeError(f"{densities.size} values of density and {reach.size} of epsilon; give one per expert")
        for density, epsilon in zip(*np.broadcast_arrays(densities, reach), strict=True):
            if 0 < density < 1 and not (0 < density - epsilon < 1 and 0 < density + epsilon < 1):
                raise RecipeError(
                    f"density is {density:g} and epsilon {epsilon:g}; density - epsilon and density + epsilon must lie "
                    f"between 0 and 1: epsilon below {min(density, 1 - density):g} would do"
                )

    def grain(self, shape: tuple[int, ...]) -> int:
        return row_grain(_row(shape))

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey | None:
        kept = self.kept(experts)
        if not (self.rescale and np.any((kept > 0) & (kept < 1))):
            return None
        return RankSurvey(_row(shape), kept, spread(self.epsilon, experts))

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        row, numel = _row(shape), int(np.prod(shape, dtype=np.int64))
        beyond = RANK * experts * max(0, row - PIECE)
        return -(-numel // row_grain(row)) * experts * 2 * 8 * 3 + threads * (SORTED * row + beyond)

    def cost(self, numel: int, experts: int, device: str) -> Cost:
        return Cost(host=RANK * experts * min(numel, PIECE), device=3 * RANK * experts * numel)

    def merge(self, tile: Tile, survey: RankSurvey | None) -> Flags:
        experts = len(tile.experts)
        flags: Flags = kernel.run(
            "sign_elect",
            tile.out,
            tile.base,
            tile.experts,
            spread(self.weight, experts).astype(np.float32),
            np.ones(experts) if survey is None else survey.rescale,
            self.lambda_,
            self.normalize,
            self.elects,
            None,
            None,
            Drop(
                self.kept(experts),
                tile.seed,
                tile.tensor_id,
                range(experts),
                tile.start,
                _row(tile.shape),
                spread(self.epsilon, experts),
            ),
        )
        return flags


def _row(shape: tuple[int, ...]) -> int:
    """Elements of a row."""
    return max(1, shape[-1]) if shape else 1


EXAMPLES = [
    (DellaLinear(weight=(0.5, 2.0), density=(1.0, 1.0)), [1.0], [[3.0], [2.0]], [4.0]),
    (DellaLinear(weight=(1.0, 1.0), density=(0.0, 1.0)), [1.0, 2.0], [[3.0, 5.0], [2.0, 2.0]], [2.0, 2.0]),
]
