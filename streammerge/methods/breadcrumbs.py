"""Model breadcrumbs: drop the largest elements of each task vector as outliers, and the smallest.

    m_k keeps floor(density n) elements, the largest that are left without the floor(gamma n) outliers
    merged = base + lambda sum_k v_k          Davari and Belilovsky 2023, arXiv:2312.06795

If too few elements would be left, fewer outliers are dropped. Ties in magnitude go by index.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.method import PerExpert, param, spread
from streammerge.methods._task_vectors import Trimmed
from streammerge.methods._trims import Window


@dataclass(frozen=True)
class Breadcrumbs(Trimmed):
    """Trimmed at both ends."""

    summary = "task vectors without their outliers and their smallest elements"
    source = "Davari and Belilovsky 2023, arXiv:2312.06795"

    gamma: PerExpert = param(0.01, "fraction of the largest elements that is dropped", per_expert=True)

    def windows(self, numel: int, experts: int) -> list[Window]:
        gammas = spread(self.gamma, experts)
        pairs = zip(self.kept(experts), gammas, strict=True)
        return [Window.between(numel, float(density), float(gamma)) for density, gamma in pairs]


# By hand: of (9, 1, -3, 2) the largest quarter goes, then the smallest until half is left: -3 and 2 stay.
EXAMPLES = [
    (
        Breadcrumbs(weight=(1.0,), density=(0.5,), gamma=(0.25,)),
        [1.0] * 4,
        [[10.0, 2.0, -2.0, 3.0]],
        [1.0, 1.0, -2.0, 3.0],
    ),
]
