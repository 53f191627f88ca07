"""DELLA with TIES' election: what is dropped at random depends on the rank, then only what agrees in sign is averaged.

Deep et al. 2024, arXiv:2406.11617; Yadav et al. 2023, arXiv:2306.01708
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.method import param
from streammerge.methods.della_linear import DellaLinear


@dataclass(frozen=True)
class Della(DellaLinear):
    """Dropped by rank within rows, elected signs, average."""

    summary = "task vectors with elements dropped at random, small ones more often, then a sign is elected"
    source = "Deep et al. 2024, arXiv:2406.11617"
    elects = True

    normalize: bool = param(True, "divide by the sum of the weights that took part")


EXAMPLES = [
    (Della(weight=(1.0, 1.0), density=(1.0, 1.0)), [1.0, 1.0], [[4.0, 0.0], [2.0, 5.0]], [3.0, 5.0]),
    (Della(weight=(1.0, 1.0), density=(1.0, 0.0)), [1.0, 1.0], [[4.0, 0.0], [2.0, 5.0]], [4.0, 0.0]),
]
