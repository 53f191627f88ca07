"""Inner products of all pairs of inputs (or of inputs minus a base): norms, cosines, Gram matrices.

Values are fp32 (a difference is rounded to fp32), products are fp64 and hence exact, sums are fp64 in a fixed order:
per logical block as numerics.py says, or, in `columns`, one row after the other. Entries are the upper triangle,
i <= j, row by row. A block is 4,096 elements, or a row's length for what is needed per row. Parts that begin at a
multiple of the block give the same bits as the whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from . import reference as truth
from .numerics import BLOCK, Array

CASES = [
    (numel, dtypes, inputs, based, block)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16", "F32"))
    for numel, inputs, based, block in (
        (0, 2, True, BLOCK), (1, 1, False, BLOCK), (9000, 3, True, BLOCK), (1500, 2, True, 5), (3000, 4, False, 1000),
    )
]  # fmt: skip


def _values(inputs: Sequence[Tensor], base: Tensor | None) -> list[Tensor]:
    return [x.float() if base is None else x.float() - base.float() for x in inputs]


def reference(inputs: Sequence[Tensor], base: Tensor | None, block: int, partials: Array) -> None:
    values, pair = _values(inputs, base), 0
    for i, x in enumerate(values):
        for y in values[i:]:
            partials[:, pair] = truth.block_sums(x.double() * y.double(), block).cpu().numpy()
            pair += 1


def reference_columns(inputs: Sequence[Tensor], base: Tensor | None, ncols: int, sums: Array) -> None:
    values, pair = _values(inputs, base), 0
    for i, x in enumerate(values):
        for y in values[i:]:
            for row in (x.double() * y.double()).view(-1, ncols).cpu().numpy():
                sums[:, pair] += row
            pair += 1


def inputs(
    numel: int, dtypes: tuple[str, ...], count: int, based: bool, block: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    _, base, *others = truth.tensors(numel, dtypes, count + 2, device, seed)
    partials = np.full((-(-numel // block), count * (count + 1) // 2), np.nan)
    return others, base if based else None, block, partials


def bytes_moved(inputs: Sequence[Any], base: Any, *rest: Any) -> int:
    return truth.nbytes(*inputs, *(() if base is None else (base,)))
