"""Consensus task arithmetic: the sum of the task vectors, where enough tasks care for it.

    m_i = |tau_i| > threshold_i |sum_k tau_k - tau_i|
    merged = base + lambda [sum_i m_i >= agree] sum_i tau_i         Wang et al. 2024, arXiv:2405.07813 (TALL masks)

The authors choose threshold_i in 0.2 ... 0.6, and lambda, on validation sets; the defaults here are the middle and 1.
With fewer experts than `agree`, all of them must care (their code would keep nothing); one expert keeps its all.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streammerge.errors import RecipeError
from streammerge.method import PerExpert, param, spread
from streammerge.methods._elementwise import Elementwise


@dataclass(frozen=True)
class ConsensusTa(Elementwise):
    """Drop what few tasks use."""

    summary = "sum of the task vectors where at least two tasks need it"
    source = "Wang et al. 2024, arXiv:2405.07813"

    threshold: PerExpert = param(0.4, "share of the others' sum that a task's element must exceed", per_expert=True)
    agree: int = param(2, "how many tasks must need an element")

    def __post_init__(self) -> None:
        if self.agree < 0:
            raise RecipeError(f"agree is {self.agree}; it must be 0 or more")

    def combine(self, deltas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        total: npt.NDArray[np.float32] = deltas[0].copy()
        for delta in deltas[1:]:
            total += delta
        votes = np.zeros(total.size, np.int16)
        for delta, share in zip(deltas, spread(self.threshold, len(deltas)), strict=True):
            rest = np.abs(total - delta)
            rest *= np.float32(share)
            votes += np.abs(delta) > rest
        total[votes < min(self.agree, len(deltas))] = 0
        return total


# By hand, threshold 0.4: 3 > 0.4 and 1 is not > 1.2; 2 > 1.2 and 3 > 0.8; nobody moves; 1 > 0.4 twice.
EXAMPLES = [
    (
        ConsensusTa(),
        [1.0, 1.0, 1.0, 1.0],
        [[4.0, 3.0, 1.0, 2.0], [2.0, 4.0, 1.0, 0.0]],
        [1.0, 6.0, 1.0, 1.0],
    ),
    (ConsensusTa(agree=1, lambda_=0.5), [1.0], [[4.0], [2.0]], [3.0]),
    (ConsensusTa(), [1.0], [[4.0]], [4.0]),
]
