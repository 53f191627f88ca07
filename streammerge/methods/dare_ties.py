"""DARE with TIES' election: random drop and rescale, then only what agrees with the elected sign is summed.

Yu et al. 2024, arXiv:2311.03099; Yadav et al. 2023, arXiv:2306.01708
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods._task_vectors import Dropped


@dataclass(frozen=True)
class DareTies(Dropped):
    """Random drop, elected signs."""

    summary = "task vectors with elements dropped at random, then a sign is elected"
    source = "Yu et al. 2024, arXiv:2311.03099"
    elects = True


EXAMPLES = [
    (DareTies(weight=(1.0, 1.0), density=(1.0, 1.0)), [1.0, 1.0], [[4.0, 0.0], [2.0, 5.0]], [5.0, 5.0]),
]
