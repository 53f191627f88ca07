"""The L1 norms that DARE's rescaling compares: of a task vector, and of what a random mask leaves of it.

An element stays if its Philox word lies below density * 2**32. The mask is a function of seed, tensor, expert and
element alone, so sign_elect.py draws the same one again instead of reading it. Sums are taken per logical block of
4,096 elements in the order that numerics.py fixes: parts, machines and devices agree to the bit.
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
    philox,
    subtract,
    table,
    threshold,
    u32,
)

if TYPE_CHECKING:
    from torch import Tensor

CASES = [
    (numel, dtypes, density, start)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16"))
    for numel, density, start in ((0, 0.5, 0), (1, 0.5, 0), (4097, 0.3, 4096), (9000, 1.0, 0), (9000, 0.0, 1 << 34))
]


@inlined
def _add_lanes(lanes: Array, x: Array, m: int) -> None:
    for i in range(m):
        lanes[i] += abs(x[i])


@inlined
def _keep(x: Array, words: Array, last: int, m: int) -> None:
    for i in range(m):
        x[i] = x[i] if words[i] <= last else f32(0)


@compiled(
    numba.int64[:, ::1],
    numba.int64,
    numba.int64,
    numba.int64,
    numba.int64,
    numba.int64,
    numba.int64,
    numba.float64[:, ::1],
)
def _norms(
    spans: Array, below: int, seed: int, tensor_id: int, expert_id: int, start: int, numel: int, partials: Array
) -> None:
    base, x, words = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.uint32)
    lanes = np.empty((2, LANES), np.float64)
    for block in range(len(partials)):
        lanes[:] = 0.0
        for at in range(block * BLOCK, min((block + 1) * BLOCK, numel), CHUNK):
            m = min(CHUNK, numel - at)
            load(spans[0], at, m, base)
            load(spans[1], at, m, x)
            subtract(x, base, m)
            for low in range(0, m, LANES):
                _add_lanes(lanes[0], x[low:m], min(LANES, m - low))
            if 0 < below < 1 << 32:
                philox(words, (start + at) >> 2, (m + 3) >> 2, seed, tensor_id, expert_id)
                _keep(x, words, u32(below - 1), m)
            if below > 0:
                for low in range(0, m, LANES):
                    _add_lanes(lanes[1], x[low:m], min(LANES, m - low))
        partials[block, 0], partials[block, 1] = fold(lanes[0]), fold(lanes[1])


def host(
    base: Span,
    expert: Span,
    density: float,
    seed: int,
    tensor_id: int,
    expert_id: int,
    start: int,
    partials: Array,
) -> None:
    """Write (sum |delta|, sum |kept delta|) of each block; the part begins at element `start`, a block's first."""
    assert start % BLOCK == 0
    assert base.numel == expert.numel
    assert partials.shape == (-(-base.numel // BLOCK), 2)
    seed = seed - (1 << 64) if seed >= 1 << 63 else seed
    _norms(table(base, expert), threshold(density), seed, tensor_id, expert_id, start, base.numel, partials)


def reference(
    base: Tensor,
    expert: Tensor,
    density: float,
    seed: int,
    tensor_id: int,
    expert_id: int,
    start: int,
    partials: Array,
) -> None:
    from . import reference as truth

    delta = expert.float() - base.float()
    words = truth.philox(start, delta.numel(), seed, tensor_id, expert_id, delta.device)
    kept = delta.where(words < threshold(density), 0)
    for column, value in enumerate((delta, kept)):
        partials[:, column] = truth.block_sums(value.abs(), BLOCK).cpu().numpy()


def inputs(
    numel: int, dtypes: tuple[str, ...], density: float, start: int, device: str = "cpu", seed: int = 0
) -> tuple[Any, ...]:
    from . import reference as truth

    _, base, expert = truth.tensors(numel, dtypes, 3, device, seed)
    return base, expert, density, 2026 + seed, 0xDEADBEEF, 1, start, np.full((-(-numel // BLOCK), 2), np.nan)


def bytes_moved(base: Any, expert: Any, *rest: Any) -> int:
    from . import reference as truth

    return truth.nbytes(base, expert)
