"""What is left of a merged task vector when the result is rounded to a narrow dtype: the dead zone of 16 bits.

    slope = < stored - base, meant > / < meant, meant >      1 if rounding takes nothing away, on the whole
    noise = | stored - base - meant | / | meant |            meant: the merge in fp32, minus the base

A base that is stored in bfloat16 lies on its grid: a step of less than half a unit in the last place comes back to it,
one a little larger becomes a whole unit. Task vectors of 0.3 % of the weights have a slope of 0.16 with a coefficient
of 0.1. At most twice SAMPLED blocks of a tensor are looked at, evenly spaced, while they are merged: nothing is read
for it. The sums are the same whatever the tiles and threads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from streammerge import kernel
from streammerge.kernels.numerics import Span
from streammerge.method import BLOCK, Flags, Survey, Tile

SAMPLED = 64


class Rounding(Survey):
    """Adds up, over some blocks of a tensor of `numel` elements, what was stored beside what was meant."""

    section = "atlas"

    def __init__(self, numel: int) -> None:
        self._blocks = -(-numel // BLOCK)
        self._every = max(1, self._blocks // SAMPLED)
        self._sums: dict[int, tuple[float, ...]] = {}  # by block: <s, s>, <s, m>, <m, m>

    def look(self, tile: Tile) -> Any:
        raise NotImplementedError

    def settle(self, partials: Sequence[Any]) -> bool:
        raise NotImplementedError

    def take(self, tile: Tile, compose: Callable[[Tile], Flags]) -> None:
        """Look at the sampled blocks of a tile that is merged; `compose` merges a part of it to any dtype."""
        assert tile.out is not None
        assert tile.start % BLOCK == 0
        exact, sums = np.empty(BLOCK, np.float32), np.empty((1, 3))
        first = -(-tile.start // (BLOCK * self._every)) * self._every
        for block in range(first, -(-(tile.start + tile.numel) // BLOCK), self._every):
            at = block * BLOCK - tile.start
            part = tile.part(at, min(at + BLOCK, tile.numel))
            stored, part.out = part.out, Span(exact.ctypes.data, "F32", part.numel)
            compose(part)
            kernel.run("norms_and_dots", (stored, part.out), part.base, BLOCK, sums)
            self._sums[block] = tuple(sums[0].tolist())

    @property
    def figures(self) -> Mapping[str, float]:  # type: ignore[override]  # settled when the tensor is merged
        """Sums over the tensor, as far as the sample tells: of meant^2, stored * meant, (stored - meant)^2."""
        rows = [self._sums[block] for block in sorted(self._sums)]
        share = self._blocks / max(1, len(rows))
        stored, both, meant = (share * math.fsum(column) for column in zip(*rows, strict=True)) if rows else (0, 0, 0)
        if not (math.isfinite(stored + both + meant) and meant > 0):
            return {}
        return {"meant": meant, "along": both, "missed": max(0.0, stored - 2 * both + meant)}
