"""Weighted sum of task vectors on top of a scaled base, one coefficient per group of elements.

    out = c[g, 0] * base + sum_k c[g, k + 1] * (expert_k - base)        g = (element // inner) % groups

fp32, summed in the order of the experts, one rounding at the end. `inner` and `groups` say along which axis the
coefficients change: groups = 1 for a whole tensor; groups = rows with inner = columns for one coefficient per row;
groups = columns with inner = 1 for one per column (slow: runs of one element). Exact, to the sign of a zero:
  - an expert with coefficient 0 takes no part, whatever it holds;
  - a sum that is zero leaves c[g, 0] * base, hence the base where c[g, 0] is 1;
  - c[g, 0] = 1, one coefficient 1 and the others 0 give that expert (base + (expert - base) would not).
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np

from streammerge.kernels.numerics import (
    BF16,
    CHUNK,
    Array,
    Span,
    as_f32,
    as_u32,
    bf16_bits,
    compiled,
    f32,
    flags,
    inlined,
    load,
    pointer,
    store,
    table,
    u32,
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


@compiled(numba.int64[:, ::1], numba.float32[:, ::1], numba.int64, numba.int64, numba.int64, numba.uint32[::1])
def _add(spans: Array, c: Array, start: int, inner: int, numel: int, peaks: Array) -> None:
    groups, experts = len(c), len(spans) - 2
    base, total, x = np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32), np.empty(CHUNK, np.float32)
    only = np.empty(groups, np.int64)
    for g in range(groups):
        only[g] = _only(c[g])
    direct = groups == 1 and only[0] < 0
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        peaks[0] = max(peaks[0], load(spans[1], at, m, base))
        total[:m] = f32(0)
        for k in range(experts):
            if direct and spans[k + 2, 1] == BF16 and c[0, k + 1] != f32(0):
                peak = _axpy_bf16(total, c[0, k + 1], spans[k + 2, 0], at, base, m)
            else:
                peak = load(spans[k + 2], at, m, x)
                _take(total, c, only, k, x, base, start + at, m, inner)
            peaks[k + 1] = max(peaks[k + 1], peak)
        if direct and spans[0, 1] == BF16:
            _finish_bf16(total, c[0, 0], base, spans[0, 0], at, m)
            continue
        low = 0
        while low < m:
            high, g = _end(start + at, low, m, inner, groups), _group(start + at + low, inner, groups)
            if only[g] < 0:
                _finish(total[low:high], c[g, 0], base[low:high], high - low)
            low = high
        store(total, spans[0], at, m)


def host(out: Span, base: Span, experts: Sequence[Span], coefs: Array, start: int = 0, inner: int = WHOLE) -> Array:
    """Write `out`, whose first element is element `start` of the tensor; say per input (base first) what it holds."""
    coefs = np.ascontiguousarray(coefs, np.float32)
    assert coefs.ndim == 2
    assert coefs.shape[1] == len(experts) + 1
    assert len(coefs) > 0
    assert inner > 0
    assert all(span.numel == out.numel for span in (base, *experts))
    peaks = np.zeros(len(experts) + 1, np.uint32)
    _add(table(out, base, *experts), coefs, start, inner, out.numel, peaks)
    return flags(peaks)
