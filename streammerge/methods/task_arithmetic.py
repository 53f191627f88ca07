"""Task arithmetic: the base plus the weighted sum of the task vectors.

    merged = base + lambda sum_k w_k (expert_k - base)          Ilharco et al. 2023, arXiv:2212.04089

With `normalize` the sum is divided by the sum of the weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streammerge import kernel
from streammerge.method import Flags, PerExpert, Tile, param, spread
from streammerge.methods._task_vectors import TaskVectors


@dataclass(frozen=True)
class TaskArithmetic(TaskVectors):
    """Task vectors added up."""

    summary = "base plus the weighted sum of the task vectors"
    source = "Ilharco et al. 2023, arXiv:2212.04089"
    kernels = ("add_deltas",)

    density: PerExpert = param(1.0, "no effect here; accepted because recipes carry it", per_expert=True)

    rescale: bool = param(False, "no effect here; accepted because recipes carry it")

    def merge(self, tile: Tile, survey: None) -> Flags:
        weights = spread(self.weight, len(tile.experts))
        scale = self.lambda_ / self.divisor(weights)
        coefs = np.array([[1.0, *(scale * weights)]], np.float32)
        flags: Flags = kernel.run("add_deltas", tile.out, tile.base, tile.experts, coefs)
        return flags


EXAMPLES = [
    (TaskArithmetic(weight=(1.0, 1.0)), [1.0], [[2.0], [4.0]], [5.0]),
    (TaskArithmetic(weight=(0.5, 0.25), lambda_=2.0), [1.0], [[2.0], [5.0]], [4.0]),
    (TaskArithmetic(weight=(1.0, 3.0), normalize=True), [1.0], [[2.0], [5.0]], [4.25]),
]
