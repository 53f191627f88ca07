"""Linear: the weighted mean of the models.

    merged = sum_k w_k x_k / sum_k w_k          without `normalize`: sum_k w_k x_k
    Wortsman et al. 2022, arXiv:2203.05482

Computed from the first model, x_0 + sum_k w_k (x_k - x_0) / sum_k w_k, so that weights on which all models agree
come out to the bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streammerge import kernel
from streammerge.errors import RecipeError
from streammerge.method import Flags, PerExpert, Tile, TileMethod, param, spread


@dataclass(frozen=True)
class Linear(TileMethod):
    """The mean of the models, weighted."""

    summary = "weighted mean of the models"
    source = "Wortsman et al. 2022, arXiv:2203.05482"
    kernels = ("add_deltas",)
    needs_base = False
    base_is_expert = True

    weight: PerExpert = param(meaning="weight of the model", per_expert=True)
    normalize: bool = param(True, "divide by the sum of the weights")

    def __post_init__(self) -> None:
        total = float(np.sum(self.weight))
        if self.normalize and not abs(total) > 0:
            raise RecipeError(f"linear: the weights sum to {total}; with normalize they must not")

    def keeps_equal(self) -> bool:
        return self.normalize

    def merge(self, tile: Tile, survey: None) -> Flags:
        weights = spread(self.weight, len(tile.experts))
        total = weights.sum()
        scale, anchor = (total, 1.0) if self.normalize else (1.0, total)
        coefs = np.array([[anchor, *(weights[1:] / scale)]], np.float32)
        flags: Flags = kernel.run("add_deltas", tile.out, tile.experts[0], tile.experts[1:], coefs)
        return flags


EXAMPLES = [
    (Linear(weight=(1.0, 3.0)), None, [[2.0, -1.0], [4.0, -1.0]], [3.5, -1.0]),
    (Linear(weight=(1.0, 3.0), normalize=False), None, [[2.0, -1.0], [4.0, -1.0]], [14.0, -4.0]),
]
