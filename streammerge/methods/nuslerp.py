"""NuSLERP: spherical interpolation with one weight for each of two models, of tensors or of task vectors.

    t = w_1 / (w_0 + w_1),  theta = angle between u and v
    merged = [base +]  sin((1 - t) theta) / sin theta  u  +  sin(t theta) / sin theta  v

u and v are the models, or with a base model their task vectors. `nuslerp_flatten` takes a tensor as one vector;
without it each row (the last dimension) is one, or with `nuslerp_row_wise` each column (the first dimension).
Defined by mergekit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.method import Flags, PerExpert, Survey, Tile, TileMethod, param, spread
from streammerge.methods._sums import ColumnSurvey, DotSurvey, row_grain


@dataclass(frozen=True)
class Nuslerp(TileMethod):
    """Spherical interpolation by weights."""

    summary = "along the arc between two models or two task vectors, by their weights"
    source = "mergekit"
    kernels = ("norms_and_dots", "add_deltas")
    needs_base = False
    min_experts = 2
    max_experts = 2

    weight: PerExpert = param(meaning="weight of the model", per_expert=True)
    nuslerp_flatten: bool = param(True, "take each tensor as one vector")
    nuslerp_row_wise: bool = param(False, "without flatten: columns instead of rows")

    def keeps_equal(self) -> bool:
        return False

    def _rows(self, shape: tuple[int, ...]) -> int:
        """Elements of a row where rows are vectors, else 0."""
        if self.nuslerp_flatten or len(shape) < 2 or self.nuslerp_row_wise:
            return 0
        return shape[-1]

    def _columns(self, shape: tuple[int, ...]) -> int:
        """Columns, where these are the vectors, else 0."""
        if self.nuslerp_flatten or len(shape) < 2 or not self.nuslerp_row_wise:
            return 0
        return int(np.prod(shape[1:], dtype=np.int64))

    def grain(self, shape: tuple[int, ...]) -> int:
        return row_grain(self._rows(shape) or self._columns(shape))

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey:
        if self._columns(shape):
            return ColumnSurvey(self._columns(shape))
        return DotSurvey(self._rows(shape))

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        if self._columns(shape):
            return self._columns(shape) * 3 * 8 * 3
        return DotSurvey.bytes_kept(int(np.prod(shape, dtype=np.int64)), 2, self._rows(shape))

    def merge(self, tile: Tile, survey: DotSurvey | ColumnSurvey) -> Flags:
        pairs = self.coefficients(survey.sums)
        rows, columns = self._rows(tile.shape), self._columns(tile.shape)
        inner = rows or (1 if columns else 1 << 62)
        a, b = pairs[:, 0], pairs[:, 1]
        if tile.base is not None:
            coefs = np.stack([np.ones_like(a), a, b], 1).astype(np.float32)
            shifted: Flags = kernel.run("add_deltas", tile.out, tile.base, tile.experts, coefs, tile.start, inner)
            return shifted
        coefs = np.stack([a + b, b], 1).astype(np.float32)
        flags: Flags = kernel.run("add_deltas", tile.out, tile.experts[0], tile.experts[1:], coefs, tile.start, inner)
        return flags

    def coefficients(self, sums: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
        """[groups, 2] factors on u and v from their dot products [groups, 3]."""
        first, second = spread(self.weight, 2)
        t = 0.5 if abs(first + second) < 1e-6 else second / (first + second)
        norms = np.maximum(np.sqrt(sums[:, [0, 2]]), 1e-7)
        with np.errstate(invalid="ignore"):  # rows with NaN or infinities in them have no angle
            cosine = np.clip(sums[:, 1] / (norms[:, 0] * norms[:, 1]), -1.0, 1.0)
            straight = ~(1 - cosine**2 > 1e-16)
        theta = np.arccos(np.where(straight, 0.0, cosine))
        sine = np.where(straight, 1.0, np.sin(theta))
        a = np.where(straight, 1 - t, np.sin((1 - t) * theta) / sine)
        b = np.where(straight, t, np.sin(t * theta) / sine)
        return np.stack([a, b], 1)


EXAMPLES = [
    (Nuslerp(weight=(1.0, 1.0)), None, [[1.0, 0.0], [0.0, 1.0]], [0.5**0.5, 0.5**0.5]),
    (Nuslerp(weight=(1.0, 1.0)), [1.0, 1.0], [[2.0, 1.0], [1.0, 2.0]], [1 + 0.5**0.5, 1 + 0.5**0.5]),
    (Nuslerp(weight=(3.0, 1.0)), None, [[1.0, 1.0], [3.0, 3.0]], [1.5, 1.5]),
]
