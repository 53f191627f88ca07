"""DARE: drop elements of each task vector at random, scale up the rest, add them up.

    m_k ~ Bernoulli(density),  r_k = |delta_k|_1 / |m_k delta_k|_1
    merged = base + lambda sum_k v_k          Yu et al. 2024, arXiv:2311.03099

The paper divides by the density; like mergekit we match the L1 norm, which is the same in expectation.
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods._task_vectors import Dropped


@dataclass(frozen=True)
class DareLinear(Dropped):
    """Random drop, sum."""

    summary = "task vectors with elements dropped at random, rescaled, added up"
    source = "Yu et al. 2024, arXiv:2311.03099"


EXAMPLES = [
    (DareLinear(weight=(0.5, 2.0), density=(1.0, 1.0)), [1.0], [[3.0], [2.0]], [4.0]),
    (DareLinear(weight=(1.0, 1.0), density=(0.0, 1.0)), [1.0], [[3.0], [2.0]], [2.0]),
]
