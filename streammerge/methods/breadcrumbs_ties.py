"""Model breadcrumbs with TIES' election: trimmed at both ends, then only what agrees with the elected sign is summed.

Davari and Belilovsky 2023, arXiv:2312.06795; Yadav et al. 2023, arXiv:2306.01708
"""

from __future__ import annotations

from dataclasses import dataclass

from streammerge.methods.breadcrumbs import Breadcrumbs


@dataclass(frozen=True)
class BreadcrumbsTies(Breadcrumbs):
    """Trimmed at both ends, signs elected."""

    summary = "breadcrumbs, then a sign is elected"
    source = "Davari and Belilovsky 2023, arXiv:2312.06795"
    elects = True


EXAMPLES = [
    (
        BreadcrumbsTies(weight=(1.0, 1.0), density=(0.5, 0.5), gamma=(0.25, 0.25)),
        [0.0] * 4,
        [[9.0, 1.0, -3.0, 2.0], [9.0, 1.0, 2.0, 3.0]],
        [0.0, 0.0, -3.0, 5.0],
    ),
]
