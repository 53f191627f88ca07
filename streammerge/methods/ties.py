"""TIES: trim each task vector to its largest elements, elect a sign, average what agrees with it.

    m_k keeps the max(1, floor(density n)) elements of largest magnitude in each tensor
    merged = base + lambda sum_agreeing v_k / sum_agreeing w_k          Yadav et al. 2023, arXiv:2306.01708

The threshold is exact over the whole tensor; elements that tie at it are kept in index order.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.method import param
from streammerge.methods._task_vectors import Trimmed
from streammerge.methods._trims import Window


@dataclass(frozen=True)
class Ties(Trimmed):
    """Trim, elect, average."""

    summary = "trim by magnitude, elect a sign, average what agrees"
    source = "Yadav et al. 2023, arXiv:2306.01708"
    elects = True

    normalize: bool = param(True, "divide by the sum of the weights that took part")

    def windows(self, numel: int, experts: int) -> list[Window]:
        return [Window.largest(numel, float(density)) for density in self.kept(experts)]


# By hand: of (3, 1, -2) and (-1, 4, 2) the two largest stay: (3, 0, -2) and (0, 4, 2); at the third element the sum
# is zero, plus is elected, and the second expert's 2 is alone.
EXAMPLES = [
    (
        Ties(weight=(1.0, 1.0), density=(0.67, 0.67)),
        [0.0] * 3,
        [[3.0, 1.0, -2.0], [-1.0, 4.0, 2.0]],
        [3.0, 4.0, 2.0],
    ),
    (Ties(weight=(1.0,), density=(0.5,)), [1.0] * 4, [[3.0, -1.0, 3.0, 2.0]], [3.0, -1.0, 1.0, 1.0]),
]
