"""Slerp: along the great circle from the base to the other model, each tensor as one vector.

    c = cos angle = <a, b> / (|a| |b|),  theta = arccos c
    merged = sin((1 - t) theta) / sin theta  a  +  sin(t theta) / sin theta  b          Shoemake 1985

a is the base. Where |c| > 0.9995 the two are mixed linearly. Norms below 1e-8 count as 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from streammerge import kernel
from streammerge.method import Flags, Survey, Tile, TileMethod, param
from streammerge.methods._sums import DotSurvey

LINEAR_ABOVE = 0.9995


@dataclass(frozen=True)
class Slerp(TileMethod):
    """Spherical interpolation between two models."""

    summary = "along the arc between two models"
    source = "Shoemake 1985, doi:10.1145/325165.325242"
    kernels = ("norms_and_dots", "add_deltas")
    max_experts = 1

    t: float = param(meaning="0 gives the base, 1 the other model", kind=float)

    def keeps_equal(self) -> bool:
        return False  # equal elements of two different tensors are not kept; equal tensors are, by the linear case

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey:
        return DotSurvey()

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        return DotSurvey.bytes_kept(int(np.prod(shape, dtype=np.int64)), 2)

    def merge(self, tile: Tile, survey: DotSurvey) -> Flags:
        aa, ab, bb = survey.sums[0]
        a, b = self.coefficients(float(aa), float(ab), float(bb))
        coefs = np.array([[a + b, b]], np.float32)
        flags: Flags = kernel.run("add_deltas", tile.out, tile.base, tile.experts, coefs)
        return flags

    def coefficients(self, aa: float, ab: float, bb: float) -> tuple[float, float]:
        """The factors on the base and on the other model, from the three dot products."""
        norms = [norm if norm > 1e-8 else 1.0 for norm in (math.sqrt(aa), math.sqrt(bb))]
        cosine = float(np.clip(ab / (norms[0] * norms[1]), -1.0, 1.0))
        if abs(cosine) > LINEAR_ABOVE:
            return 1 - self.t, self.t
        theta = np.arccos(cosine)
        return float(np.sin((1 - self.t) * theta) / np.sin(theta)), float(np.sin(self.t * theta) / np.sin(theta))


# By hand: halfway between two axes of unit length lies (sqrt 1/2, sqrt 1/2); a parallel pair is mixed linearly.
EXAMPLES = [
    (Slerp(t=0.5), [1.0, 0.0], [[0.0, 1.0]], [0.5**0.5, 0.5**0.5]),
    (Slerp(t=0.25), [1.0, 1.0], [[3.0, 3.0]], [1.5, 1.5]),
]
