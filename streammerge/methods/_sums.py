"""Sums over whole tensors: norms under a random mask, dot products of tensors, rows and columns.

Sums are taken per logical block in a fixed order and folded exactly (math.fsum), so tiles, threads and devices cannot
be seen in them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.method import BLOCK, Survey, Tile


def row_grain(row: int) -> int:
    """Elements at whose multiples tiles may be cut so that rows stay whole."""
    return row * -(-BLOCK // row) if row else BLOCK


def ratio(whole: float, kept: float) -> float:
    """What brings a kept L1 norm back to the whole one; 1 where either is as good as nothing."""
    return 1.0 if whole < 1e-7 or kept < 1e-7 else whole / kept


def fsums(partials: Sequence[Sequence[npt.NDArray[np.float64] | None]]) -> tuple[list[float], list[float]]:
    """Exact sums over blocks: per tile and expert [blocks, 2], or None for what was not looked at."""
    columns = [[part for part in expert if part is not None] for expert in zip(*partials, strict=True)]
    sums = [[math.fsum(v for part in parts for v in part[:, which]) for parts in columns] for which in (0, 1)]
    return sums[0], sums[1]


class DropSurvey(Survey):
    """L1 norms of each task vector before and after its random mask; `rescale` is their ratio."""

    def __init__(self, kept: npt.NDArray[np.float64]) -> None:
        self._kept = kept
        self.rescale = np.ones(len(kept))

    @staticmethod
    def bytes_kept(numel: int, experts: int) -> int:
        return -(-numel // BLOCK) * experts * 2 * 8 * 3

    def look(self, tile: Tile) -> list[npt.NDArray[np.float64] | None]:
        sums: list[npt.NDArray[np.float64] | None] = []
        for expert, density in enumerate(self._kept):
            partials = np.empty((-(-tile.numel // BLOCK), 2)) if 0 < density < 1 else None
            if partials is not None:
                where = (tile.seed, tile.tensor_id, expert, tile.start)
                kernel.run("drop_rescale", tile.base, tile.experts[expert], float(density), *where, partials)
            sums.append(partials)
        return sums

    def settle(self, partials: Sequence[Any]) -> bool:
        whole, kept = fsums(partials)
        self.rescale = np.array([ratio(w, k) for w, k in zip(whole, kept, strict=True)])
        return True


class DotSurvey(Survey):
    """Gram entries of the inputs, or of the task vectors where there is a base: of the tensor, or of each row.

    `sums` is [groups, K(K+1)/2], the upper triangle row by row; a method whose base is one of two points (slerp) has
    base and expert as its inputs.
    """

    def __init__(self, row: int = 0) -> None:
        self._row = row
        self.sums = np.zeros((0, 0))

    @staticmethod
    def bytes_kept(numel: int, inputs: int, row: int = 0) -> int:
        return -(-numel // (row or BLOCK)) * inputs * (inputs + 1) // 2 * 8 * 3

    def look(self, tile: Tile) -> npt.NDArray[np.float64]:
        inputs, base = _points(tile)
        block = self._row or BLOCK
        partials = np.empty((-(-tile.numel // block), len(inputs) * (len(inputs) + 1) // 2))
        kernel.run("norms_and_dots", inputs, base, block, partials)
        return partials

    def settle(self, partials: Sequence[Any]) -> bool:
        blocks = np.concatenate(list(partials))
        self.sums = blocks if self._row else np.array([[math.fsum(column) for column in blocks.T]])
        return True


class ColumnSurvey(Survey):
    """Gram entries of each column. Rows are added one after the other, so tiles are looked at in order."""

    in_order = True

    def __init__(self, columns: int) -> None:
        self._columns = columns
        self.sums = np.zeros((columns, 3))

    def look(self, tile: Tile) -> None:
        inputs, base = _points(tile)
        kernel.call("norms_and_dots", "columns", inputs, base, self._columns, self.sums)

    def settle(self, partials: Sequence[Any]) -> bool:
        return True


def _points(tile: Tile) -> tuple[tuple[Any, ...], Any]:
    """The vectors whose angles count, and what they are measured from."""
    if tile.base is not None and len(tile.experts) == 1:
        return (tile.base, *tile.experts), None
    return tile.experts, tile.base
