"""Model Stock: from the mean of the experts towards the base, as far as their angles suggest.

    c = mean over pairs of cos(expert_i - base, expert_j - base),  t = N c / (1 + (N - 1) c)
    merged = t mean_k expert_k + (1 - t) base          Jang et al. 2024, arXiv:2403.19522, eq. 7

Per tensor; with `filter_wise` per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.method import Flags, Survey, Tile, TileMethod, param
from streammerge.methods._sums import DotSurvey, row_grain


@dataclass(frozen=True)
class ModelStock(TileMethod):
    """The experts' mean, drawn towards the base."""

    summary = "the experts' mean, drawn towards the base as far as their angles suggest"
    source = "Jang et al. 2024, arXiv:2403.19522, eq. 7"
    kernels = ("norms_and_dots", "add_deltas")
    min_experts = 2

    filter_wise: bool = param(False, "one angle for each row instead of each tensor")

    def _rows(self, shape: tuple[int, ...]) -> int:
        return shape[-1] if self.filter_wise and len(shape) > 1 else 0

    def grain(self, shape: tuple[int, ...]) -> int:
        return row_grain(self._rows(shape))

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey:
        return DotSurvey(self._rows(shape))

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        return DotSurvey.bytes_kept(int(np.prod(shape, dtype=np.int64)), experts, self._rows(shape))

    def merge(self, tile: Tile, survey: DotSurvey) -> Flags:
        experts = len(tile.experts)
        share = self.ratios(survey.sums, experts)[:, None] / experts
        coefs = np.hstack([np.ones_like(share), np.repeat(share, experts, 1)]).astype(np.float32)
        inner = self._rows(tile.shape) or 1 << 62
        flags: Flags = kernel.run("add_deltas", tile.out, tile.base, tile.experts, coefs, tile.start, inner)
        return flags

    def ratios(self, sums: npt.NDArray[np.float64], experts: int) -> npt.NDArray[np.float64]:
        """[groups] interpolation ratios t from the Gram entries [groups, K(K+1)/2] of the task vectors."""
        rows, columns = np.triu_indices(experts)
        gram = np.zeros((len(sums), experts, experts))
        gram[:, rows, columns] = sums
        norms = np.sqrt(np.einsum("gkk->gk", gram))
        i, j = np.triu_indices(experts, 1)
        with np.errstate(invalid="ignore"):  # rows with NaN or infinities in them have no angle
            cosines = np.clip(gram[:, i, j] / np.maximum(norms[:, i] * norms[:, j], 1e-6), -1.0, 1.0)
        cosine = cosines.mean(1)
        below = 1 + (experts - 1) * cosine
        singular = np.abs(below) < 1e-6
        ratio: npt.NDArray[np.float64] = np.where(singular, 0.0, experts * cosine / np.where(singular, 1.0, below))
        return ratio


# By hand: task vectors (1, 0) and (1, 1) stand at 45 degrees: t = 2 c / (1 + c) with c = sqrt 1/2.
_T = 2 * 0.5**0.5 / (1 + 0.5**0.5)
EXAMPLES = [
    (ModelStock(), [0.0, 0.0], [[1.0, 0.0], [1.0, 1.0]], [_T, _T / 2]),
    (ModelStock(), [1.0, 1.0], [[3.0, 1.0], [1.0, 2.0]], [1.0, 1.0]),
]
