"""Passthrough: the tensor as it is, for stacks of layers taken from different models; or scaled.

merged = scale x
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from streammerge import kernel
from streammerge.method import Flags, PerExpert, Tile, TileMethod, param


@dataclass(frozen=True)
class Passthrough(TileMethod):
    """One model's tensor, copied."""

    summary = "one model's tensors as they are: stacks of layers"
    source = "mergekit"
    kernels = ("add_deltas",)
    needs_base = False
    base_is_expert = True
    max_experts = 1

    scale: PerExpert = param(1.0, "factor on every weight", per_expert=True, kind=float)

    def keeps_equal(self) -> bool:
        return bool(np.all(np.asarray(self.scale) == 1))

    def merge(self, tile: Tile, survey: None) -> Flags:
        coefs = np.array([[np.asarray(self.scale, float).reshape(-1)[0]]], np.float32)
        flags: Flags = kernel.run("add_deltas", tile.out, tile.experts[0], (), coefs)
        return flags


EXAMPLES = [
    (Passthrough(), None, [[2.0, -0.0]], [2.0, -0.0]),
    (Passthrough(scale=0.5), None, [[2.0, -3.0]], [1.0, -1.5]),
]
