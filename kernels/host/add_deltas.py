"""Weighted sum of task vectors on top of a scaled base, one coefficient per group of elements.

    out = c[g, 0] * base + sum_k c[g, k + 1] * (expert_k - base)        g = (element // inner) % groups

fp32, summed in the order of the experts, one rounding at the end. `inner` and `groups` (rows of `coefs`) say along
which axis the coefficients change: groups = 1 for a whole tensor; groups = rows with inner = columns for one
coefficient per row; groups = columns with inner = 1 for one per column (slow: runs of one element). With `split` a
hash of the element decides instead (numerics.Partition), and `inner` says nothing. Exact, to the sign of a zero:
  - an expert with coefficient 0 takes no part, whatever it holds;
  - a sum that is zero leaves c[g, 0] * base, hence the base where c[g, 0] is 1;
  - c[g, 0] = 1, one coefficient 1 and the others 0 give that expert (base + (expert - base) would not).

`rounding` rounds `out` up or down by chance (numerics.Stochastic) instead of to nearest even; exact values stay.
`low` takes what `out` lost: the exact difference value - out, rounded once to its own dtype, and 0 where that is not
finite. Both in BF16 hold a value above 2**-116 to 2**-17 of itself (2**-16 with `rounding`).
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np

from streammerge.kernels.numerics import (
    BF16,
    CHUNK,
    F32,
    INFINITY,
    PARTITION,
    ROUNDING,
    Array,
    Partition,
    Span,
    Stochastic,
    as_f32,
    as_u32,
    bf16_bits,
    compiled,
    dither,
    f32,
    flags,
    group_of,
    inlined,
    key,
    load,
    pointer,
    store,
    table,
    u32,
    words_from,
)

WHOLE = 1 << 62  # `inner` of a tensor with one group


@inlined
def _axpy(total: Array, c: float, x: Array, base: Array, m: int) -> None:
    for i in range(m):
        total[i] += c * (x[i] - base[i])


@inlined
def _axpy_bf16(total: Array, c: float, address: int, start: int, base: Array, m: int) -> int:
    """_axpy straight from memory: the commonest case gains a tenth."""
    source, peak = numba.carray(pointer(address + 2 * start), (m,), np.uint16), u32(0)
    for i in range(m):
        bits = u32(u32(source[i]) << u32(16))
        total[i] += c * (as_f32(bits) - base[i])
        peak = max(peak, u32(bits & u32(0x7FFFFFFF)))
    return peak


@inlined
def _axpy_f32(total: Array, c: float, address: int, start: int, base: Array, m: int) -> int:
    """_axpy straight from memory, in half the time: with several experts copies cost as much as the sums."""
    source, peak = numba.carray(pointer(address + 4 * start), (m,), np.float32), u32(0)
    for i in range(m):
        total[i] += c * (source[i] - base[i])
        peak = max(peak, u32(as_u32(source[i]) & u32(0x7FFFFFFF)))
    return peak


@inlined
def _finish(total: Array, c: float, base: Array, m: int) -> None:
    for i in range(m):
        start = c * base[i]
        total[i] = start if total[i] == f32(0) else start + total[i]


@inlined
def _finish_bf16(total: Array, c: float, base: Array, address: int, at: int, m: int) -> None:
    """_finish straight to memory."""
    out = numba.carray(pointer(address + 2 * at), (m,), np.uint16)
    for i in range(m):
        start = c * base[i]
        value = start if total[i] == f32(0) else start + total[i]
        out[i] = numba.uint16(bf16_bits(as_u32(value)))


@inlined
def _only(c: Array) -> int:
    """The one expert that a group copies; -1 if it must be computed."""
    found = -1
    for k in range(1, len(c)):
        if c[k] != f32(0):
            if found >= 0 or c[k] != f32(1):
                return -1
            found = k - 1
    return found if c[0] == f32(1) else -1


@inlined
def _group(element: int, inner: int, groups: int) -> int:
    return (element // inner) % groups if groups > 1 else 0


@inlined
def _end(at: int, low: int, m: int, inner: int, groups: int) -> int:
    """Where the run of one group ends that begins at `low` in the chunk at element `at`."""
    if groups == 1:
        return m
    return min(m, low + inner - (at + low) % inner)


@inlined
def _take(total: Array, c: Array, only: Array, k: int, x: Array, base: Array, at: int, m: int, inner: int) -> None:
    """Add expert k to a chunk, run by run of one group."""
    low, groups = 0, len(c)
    while low < m:
        high, g = _end(at, low, m, inner, groups), _group(at + low, inner, groups)
        if only[g] == k:
            total[low:high] = x[low:high]
        elif only[g] < 0 and c[g, k + 1] != f32(0):
            _axpy(total[low:high], c[g, k + 1], x[low:high], base[low:high], high - low)
        low = high


@inlined
def _hash(words: Array, groups: int, m: int) -> None:
    """Random words become numbers of groups."""
    for i in range(m):
        words[i] = u32(group_of(words[i], groups))


@inlined
def _gather(values: Array, of_groups: Array, ids: Array, m: int) -> None:
    for i in range(m):
        values[i] = of_groups[ids[i]]


@inlined
def _take_each(total: Array, c: Array, only: Array, k: int, x: Array, base: Array, m: int) -> None:
    """Add expert k to a chunk of which each element has a coefficient of its own."""
    for i in range(m):
        added = total[i] if c[i] == f32(0) else total[i] + c[i] * (x[i] - base[i])
        total[i] = x[i] if only[i] == k else added


@inlined
def _finish_each(total: Array, c: Array, only: Array, base: Array, m: int) -> None:
    for i in range(m):
        start = c[i] * base[i]
        done = start if total[i] == f32(0) else start + total[i]
        total[i] = total[i] if only[i] >= 0 else done


@inlined
def _finish_runs(total: Array, c: Array, only: Array, base: Array, at: int, m: int, inner: int) -> None:
    low, groups = 0, len(c)
    while low < m:
        high, g = _end(at, low, m, inner, groups), _group(at + low, inner, groups)
        if only[g] < 0:
            _finish(total[low:high], c[g, 0], base[low:high], high - low)
        low = high


@inlined
def _lost(value: Array, stored: Array, m: int) -> None:
    """value -= stored; 0 where that is not finite."""
    for i in range(m):
        rest = value[i] - stored[i]
        value[i] = rest if u32(as_u32(rest) & u32(0x7FFFFFFF)) < u32(INFINITY) else f32(0)


@compiled(
    numba.int64[:, ::1],
    numba.int64[:, ::1],
    numba.float32[:, ::1],
    numba.int64,
    numba.int64,
    numba.int64[::1],
    numba.int64[::1],
    numba.int64,
    numba.uint32[::1],
)
def _add(
    spans: Array,
    low: Array,
    c: Array,
    start: int,
    inner: int,
    split: Array,
    rounding: Array,
    numel: int,
    peaks: Array,
) -> None:
    groups, experts = len(c), len(spans) - 2
    base, total, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    words, only = np.empty(CHUNK + 8, np.uint32), np.empty(groups, np.int32)
    columns, weights, alone = c.T.copy(), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.int32)
    for g in range(groups):
        only[g] = _only(c[g])
    alone[:] = -1
    copies, direct = only.max() >= 0, groups == 1 and only[0] < 0
    plain = direct and spans[0, 1] == BF16 and len(rounding) == 0 and len(low) == 0
    for at in range(0, numel, CHUNK):
        m, ids = min(CHUNK, numel - at), words
        peaks[0] = max(peaks[0], load(spans[1], at, m, base))
        total[:m] = f32(0)
        if len(split) > 0:
            ids = words_from(words, start + at, m, split, PARTITION)
            _hash(ids, groups, m)
            if copies:
                _gather(alone, only, ids, m)
        for k in range(experts):
            if direct and spans[k + 2, 1] == BF16 and c[0, k + 1] != f32(0):
                peak = _axpy_bf16(total, c[0, k + 1], spans[k + 2, 0], at, base, m)
            elif direct and spans[k + 2, 1] == F32 and c[0, k + 1] != f32(0):
                peak = _axpy_f32(total, c[0, k + 1], spans[k + 2, 0], at, base, m)
            else:
                peak = load(spans[k + 2], at, m, x)
                if len(split) > 0:
                    _gather(weights, columns[k + 1], ids, m)
                    _take_each(total, weights, alone, k, x, base, m)
                else:
                    _take(total, c, only, k, x, base, start + at, m, inner)
            peaks[k + 1] = max(peaks[k + 1], peak)
        if plain:
            _finish_bf16(total, c[0, 0], base, spans[0, 0], at, m)
            continue
        if len(split) > 0:
            _gather(weights, columns[0], ids, m)
            _finish_each(total, weights, alone, base, m)
        else:
            _finish_runs(total, c, only, base, start + at, m, inner)
        kept = total
        if len(rounding) > 0:
            kept = x
            kept[:m] = total[:m]
            dither(kept, words_from(words, start + at, m, rounding, ROUNDING), spans[0, 1], m)
        store(kept, spans[0], at, m)
        if len(low) > 0:
            load(spans[0], at, m, x)
            _lost(total, x, m)
            store(total, low[0], at, m)


def check(out: Any, base: Any, experts: Sequence[Any], coefs: Array, inner: int, low: Any) -> Array:
    """The coefficients as fp32, once the spans and they fit together."""
    coefs = np.ascontiguousarray(coefs, np.float32)
    assert coefs.ndim == 2
    assert coefs.shape[1] == len(experts) + 1
    assert len(coefs) > 0
    assert inner > 0
    assert all(span.numel == out.numel for span in (base, *experts))
    assert low is None or low.numel == out.numel
    return coefs


def host(
    out: Span,
    base: Span,
    experts: Sequence[Span],
    coefs: Array,
    start: int = 0,
    inner: int = WHOLE,
    split: Partition | None = None,
    rounding: Stochastic | None = None,
    low: Span | None = None,
) -> Array:
    """Write `out`, whose first element is element `start` of the tensor; say per input (base first) what it holds."""
    coefs = check(out, base, experts, coefs, inner, low)
    peaks = np.zeros(len(experts) + 1, np.uint32)
    lost = table() if low is None else table(low)
    hashed = key(split if len(coefs) > 1 else None)
    _add(table(out, base, *experts), lost, coefs, start, inner, hashed, key(rounding), out.numel, peaks)
    return flags(peaks)
