"""The base plus task vectors with coefficients of their own, one for each expert, or one for each group of elements.

    merged[e] = base[e] + sum_k c[k, q(e)] (expert_k[e] - base[e])        q(e): the group that a hash gives element e

and the inner products that are the coefficients' gradients: dL/dc[k, q] = sum over e in group q of
dL/dmerged[e] (expert_k[e] - base[e]). The hash is of seed, tensor and element (numerics.Partition): groups take no
memory. A coefficient of 0 leaves its expert out, to the bit; all 0 gives the base, and 1 beside 0 gives the expert.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.kernels.numerics import Partition
from streammerge.method import BLOCK, Cost, Flags, Survey, Tile, TileMethod
from streammerge.methods._rounding import Rounding

NO_AXIS = 1 << 62  # add_deltas: the hash says which group, no axis of the tensor does
FEW = 32  # groups with blocks of BLOCK elements: there are 128 lanes to fold for every block, expert and group


@dataclass(frozen=True)
class Composed(TileMethod):
    """One tensor with its coefficients; `origin` is the tensor's number in the hash."""

    kernels = ("add_deltas", "norms_and_dots")

    coefficients: tuple[tuple[float, ...], ...]  # [experts][groups]
    origin: int
    seed: int
    watched: bool = False  # whether to look at what rounding leaves of the task vectors

    @property
    def groups(self) -> int:
        return len(self.coefficients[0]) if self.coefficients else 1

    @property
    def split(self) -> Partition | None:
        return Partition(self.seed, self.origin) if self.groups > 1 else None

    def grain(self, shape: tuple[int, ...]) -> int:
        return BLOCK << max(0, math.ceil(math.log2(self.groups / FEW)))

    def tally(self, shape: tuple[int, ...]) -> Rounding | None:
        return Rounding(math.prod(shape)) if self.watched else None

    def merge(self, tile: Tile, survey: Any) -> Flags:
        coefs = np.ones((self.groups, 1 + len(self.coefficients)), np.float32)
        coefs[:, 1:] = np.array(self.coefficients, np.float64).reshape(-1, self.groups).T

        def compose(part: Tile) -> Flags:
            where = (part.start, NO_AXIS, self.split)
            flags: Flags = kernel.run("add_deltas", part.out, part.base, part.experts, coefs, *where)
            return flags

        flags = compose(tile)
        if isinstance(survey, Rounding):
            survey.take(tile, compose)
        return flags

    def dots(self, shape: tuple[int, ...]) -> Dots:
        """What finds the gradients of this tensor's coefficients."""
        return Dots(len(self.coefficients), self.groups, self.grain(shape), self.split)

    def dots_bytes(self, numel: int) -> int:
        """What that holds at most: partial sums, and once more while they are added up."""
        return -(-numel // self.grain((numel,))) * max(1, len(self.coefficients)) * self.groups * 8 * 2

    def cost(self, numel: int, experts: int, device: str) -> Cost:
        return Cost(8 * self.groups * (experts + 1) + 2 * 4 * BLOCK)


class Dots(Survey):
    """<gradient, expert_k - base>, whole or by groups; a tile's experts are the gradient, then the experts.

    Sums are taken per logical block and added exactly, so that tiles and threads cannot be seen in them.
    """

    def __init__(self, experts: int, groups: int, block: int, split: Partition | None) -> None:
        self._shape, self._block, self._split = (experts, groups), block, split
        self.sums: npt.NDArray[np.float64] = np.zeros(self._shape)

    def look(self, tile: Tile) -> npt.NDArray[np.float64]:
        experts, groups = self._shape
        blocks = -(-tile.numel // self._block)
        partials = np.empty((blocks, experts) if self._split is None else (blocks, experts, groups))
        gradient, *others = tile.experts
        kernel.run("multi_dot", gradient, tile.base, others, self._block, partials, tile.start, self._split)
        return partials

    def settle(self, partials: Sequence[npt.NDArray[np.float64]]) -> bool:
        rows = np.concatenate([part.reshape(len(part), -1) for part in partials])
        self.sums = np.array([math.fsum(column) for column in rows.T]).reshape(self._shape)
        return True
