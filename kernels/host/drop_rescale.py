"""The L1 norms that DARE's rescaling compares: of a task vector, and of what a random mask leaves of it.

An element stays if its Philox word lies below density * 2**32. The mask is a function of seed, tensor, expert and
element alone, so sign_elect.py draws the same one again instead of reading it. Sums are taken per logical block of
4,096 elements in the order that numerics.py fixes: parts, machines and devices agree to the bit.
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import (
    BLOCK,
    CHUNK,
    LANES,
    Array,
    Span,
    add_magnitudes,
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
                add_magnitudes(lanes[0], x[low:m], min(LANES, m - low))
            if 0 < below < 1 << 32:
                philox(words, (start + at) >> 2, (m + 3) >> 2, seed, tensor_id, expert_id)
                _keep(x, words, u32(below - 1), m)
            if below > 0:
                for low in range(0, m, LANES):
                    add_magnitudes(lanes[1], x[low:m], min(LANES, m - low))
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
