"""Inner products of one vector with many task vectors, in one pass: gradients of their coefficients.

    dot[b, k] = sum over block b of g * (expert_k - base)                  (base None: of g * expert_k)
    dot[b, k, q] = the same over those of the block's elements that are in group q

Values are fp32; the difference is taken before the product: <g, expert> - <g, base> would cancel. Products are fp64 and
hence exact, sums are fp64 in the order that numerics.py fixes, per logical block: 4,096 elements, or a row's length for
one sum per row. Parts that begin at a multiple of the block give the same bits as the whole. Groups are those of
a random partition (numerics.Partition); an element outside a group leaves its sums alone, NaN or not, so a group's sum
has the bits of one over a copy with zeros elsewhere.

Groups cost: there are 128 lanes to fold for every block, expert and group, against 4,096 products for every block and
expert, so with hundreds of groups a block of 2**16 elements or more is better. Lanes are kept for as many groups at a
time as fit ROOM, and the block is read again for the next ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from streammerge.kernels.numerics import (
    CHUNK,
    F32,
    LANES,
    PARTITION,
    Array,
    Partition,
    Span,
    compiled,
    f32,
    f64,
    fold,
    group_of,
    inlined,
    load,
    philox,
    pointer,
    subtract,
    table,
)

ROOM = 4 << 20  # bytes of lanes: a second-level cache


@inlined
def _add_products(total: Array, x: Array, y: Array, m: int) -> None:
    for i in range(m):
        total[i] += f64(x[i]) * f64(y[i])


@inlined
def _add_shifted(total: Array, g: Array, x: Array, base: Array, m: int) -> None:
    """The same with x - base, rounded to fp32, straight from memory."""
    for i in range(m):
        total[i] += f64(g[i]) * f64(f32(x[i] - base[i]))


@inlined
def _read(spans: Array, k: int, at: int, m: int, base: Array, x: Array) -> None:
    """One chunk of expert k minus the base; spans are g, the base (or address 0), the experts."""
    load(spans[k + 2], at, m, x)
    if spans[1, 0] != 0:
        subtract(x, base, m)


@compiled(numba.int64[:, ::1], numba.int64, numba.int64, numba.float64[:, ::1])
def _dots(spans: Array, block: int, numel: int, partials: Array) -> None:
    experts = partials.shape[1]
    g, base, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    lanes = np.empty((experts, LANES), np.float64)
    for b in range(len(partials)):
        stop = min((b + 1) * block, numel)
        lanes[:] = 0.0
        for at in range(b * block, stop, CHUNK):
            m = min(CHUNK, stop - at)
            load(spans[0], at, m, g)
            if spans[1, 0] != 0:
                load(spans[1], at, m, base)
            for k in range(experts):
                if spans[1, 0] != 0 and spans[k + 2, 1] == F32:
                    source = numba.carray(pointer(spans[k + 2, 0] + 4 * at), (m,), np.float32)
                    for low in range(0, m, LANES):
                        width = min(LANES, m - low)
                        _add_shifted(lanes[k], g[low:m], source[low:m], base[low:m], width)
                    continue
                _read(spans, k, at, m, base, x)
                for low in range(0, m, LANES):
                    _add_products(lanes[k], g[low:m], x[low:m], min(LANES, m - low))
        for k in range(experts):
            partials[b, k] = fold(lanes[k])


@inlined
def _draw(found: Array, words: Array, element: int, m: int, groups: int, seed: int, tensor_id: int) -> None:
    """The groups of m elements."""
    philox(words, element >> 2, (m + 6) >> 2, seed, tensor_id, PARTITION)
    for i in range(m):
        found[i] = group_of(words[(element & 3) + i], groups)


@inlined
def _scatter(lanes: Array, found: Array, first: int, g: Array, x: Array, m: int) -> None:
    """Add products to the lanes of their groups, of which there are len(lanes) from `first` on."""
    for i in range(m):
        q = found[i] - first
        if 0 <= q < len(lanes):
            lanes[q, i % LANES] += f64(g[i]) * f64(x[i])


@compiled(
    numba.int64[:, ::1],
    numba.int64,
    numba.int64,
    numba.int64,
    numba.int64,
    numba.int64,
    numba.float64[:, :, ::1],
)
def _split_dots(spans: Array, block: int, start: int, seed: int, tensor_id: int, numel: int, partials: Array) -> None:
    blocks, experts, groups = partials.shape
    g, base, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    words, found = np.empty(CHUNK + 8, np.uint32), np.empty(CHUNK, np.int64)
    lanes = np.empty((experts, min(groups, max(1, ROOM // (8 * LANES * max(1, experts)))), LANES), np.float64)
    for b in range(blocks):
        stop = min((b + 1) * block, numel)
        for first in range(0, groups, lanes.shape[1]):
            lanes[:] = 0.0
            for at in range(b * block, stop, CHUNK):
                m = min(CHUNK, stop - at)
                load(spans[0], at, m, g)
                if spans[1, 0] != 0:
                    load(spans[1], at, m, base)
                _draw(found, words, start + at, m, groups, seed, tensor_id)
                for k in range(experts):
                    _read(spans, k, at, m, base, x)
                    _scatter(lanes[k], found, first, g, x, m)
            for k in range(experts):
                for q in range(min(lanes.shape[1], groups - first)):
                    partials[b, k, first + q] = fold(lanes[k, q])


def host(
    g: Span,
    base: Span | None,
    experts: Sequence[Span],
    block: int,
    partials: Array,
    start: int = 0,
    split: Partition | None = None,
) -> None:
    """Write partials[blocks, experts], or [blocks, experts, groups] with `split`.

    `start` is the tensor's element that the part begins with: it decides which groups its elements are in.
    """
    assert partials.shape[:2] == (-(-g.numel // block), len(experts))
    assert partials.ndim == (2 if split is None else 3)
    assert all(span.numel == g.numel for span in (*experts, *(() if base is None else (base,))))
    spans = table(g, base or Span(0, "F32", 0), *experts)
    if split is None:
        _dots(spans, block, g.numel, partials)
        return
    seed = split.seed - (1 << 64) if split.seed >= 1 << 63 else split.seed
    _split_dots(spans, block, start, seed, split.tensor_id, g.numel, partials)
