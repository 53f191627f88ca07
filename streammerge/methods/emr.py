"""EMR's unified task vector: at each element the sign of the sum, and the largest magnitude among those that have it.

    s = sign(sum_i tau_i), zero counts as minus        tau_uni = s max{|tau_i| : tau_i s > 0}, 0 if there is none
    merged = base + lambda tau_uni                     Huang et al. 2024, arXiv:2405.17461

The authors give each task its own model, base + lambda_i M_i tau_uni with a mask and a scale per task. Here is one
merged model: the unified vector alone, without masks and scales. Nobody has published a lambda for that; as tau_uni
is at least as long as any one task vector where they agree, values below 1 are worth a try.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streammerge.methods._elementwise import Elementwise


@dataclass(frozen=True)
class Emr(Elementwise):
    """Elect a sign, take the largest."""

    summary = "elected sign, largest magnitude that has it (EMR's unified vector, without its masks)"
    source = "Huang et al. 2024, arXiv:2405.17461"

    def combine(self, deltas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        total = deltas[0].copy()
        for delta in deltas[1:]:
            total += delta
        sign = np.where(total > 0, np.float32(1), np.float32(-1))
        deltas *= sign
        largest: npt.NDArray[np.float32] = np.maximum(deltas.max(0), np.float32(0))
        largest *= sign
        return largest


# By hand: sums 1, -1, 0, 5; the largest that agrees is 3, -2, and at the third (minus is elected) -1.
EXAMPLES = [
    (
        Emr(),
        [1.0, 1.0, 1.0, 1.0],
        [[4.0, 2.0, 2.0, 4.0], [-1.0, -1.0, 0.0, 3.0]],
        [4.0, -1.0, 0.0, 4.0],
    ),
    (Emr(weight=(2.0,), lambda_=0.5), [1.0, 1.0], [[3.0, 0.0]], [3.0, 0.0]),
]
