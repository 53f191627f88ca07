"""The L1 norms that rescaling after a trim compares: of a task vector, and of what lies strictly between two keys.

Elements that tie at a bound share one magnitude, so their part of the norm is a count times a value; what remains is
this sum. Taken per logical block of 4,096 elements in the order that numerics.py fixes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numba
import numpy as np

from .numerics import (
    BLOCK,
    CHUNK,
    LANES,
    Array,
    Span,
    compiled,
    f32,
    fold,
    inlined,
    load,
    magnitude,
    subtract,
    table,
)

if TYPE_CHECKING:
    from torch import Tensor

CASES = [
    (numel, dtypes, low, high)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for numel, low, high in ((0, 0, 9), (1, -1, 1 << 31), (4097, 0x3D000000, 0x3E000000), (9000, 0x3D4CCCCD, 1 << 31))
]


@inlined
def _add_lanes(lanes: Array, x: Array, m: int) -> None:
    for i in range(m):
        lanes[i] += abs(x[i])


@inlined
def _between(x: Array, low: int, high: int, m: int) -> None:
    for i in range(m):
        key = numba.int64(magnitude(x[i]))
        x[i] = x[i] if low < key < high else f32(0)


@compiled(numba.int64[:, ::1], numba.int64, numba.int64, numba.int64, numba.float64[:, ::1])
def _norms(spans: Array, low: int, high: int, numel: int, partials: Array) -> None:
    base, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    lanes = np.empty((2, LANES), np.float64)
    for block in range(len(partials)):
        lanes[:] = 0.0
        for at in range(block * BLOCK, min((block + 1) * BLOCK, numel), CHUNK):
            m = min(CHUNK, numel - at)
            load(spans[0], at, m, base)
            load(spans[1], at, m, x)
            subtract(x, base, m)
            for first in range(0, m, LANES):
                _add_lanes(lanes[0], x[first:m], min(LANES, m - first))
            _between(x, low, high, m)
            for first in range(0, m, LANES):
                _add_lanes(lanes[1], x[first:m], min(LANES, m - first))
        partials[block, 0], partials[block, 1] = fold(lanes[0]), fold(lanes[1])


def host(base: Span, expert: Span, low: int, high: int, partials: Array) -> None:
    """Write (sum |delta|, sum |delta| over low < key < high) of each block."""
    assert base.numel == expert.numel
    assert partials.shape == (-(-base.numel // BLOCK), 2)
    _norms(table(base, expert), low, high, base.numel, partials)


def reference(base: Tensor, expert: Tensor, low: int, high: int, partials: Array) -> None:
    from . import reference as truth

    delta = expert.float() - base.float()
    key = truth.magnitude(delta)
    kept = delta.where((key > low) & (key < high), 0)
    for column, value in enumerate((delta, kept)):
        partials[:, column] = truth.block_sums(value.abs(), BLOCK).cpu().numpy()


def inputs(
    numel: int, dtypes: tuple[str, ...], low: int, high: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    from . import reference as truth

    _, base, expert = truth.tensors(numel, dtypes, 3, device, seed)
    return base, expert, low, high, np.full((-(-numel // BLOCK), 2), np.nan)


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    from . import reference as truth

    return truth.nbytes(base, expert)
