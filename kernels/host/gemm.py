"""Matrix products on the CPU: numpy's BLAS for the product, compiled loops for what comes before and after it."""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import ctypes

import numba
import numpy as np

from streammerge.kernels.numerics import (
    INFINITY,
    NAN,
    Array,
    Span,
    as_f32,
    as_u32,
    compiled,
    f32,
    inlined,
    pointer,
    u32,
)

SQUARE = 64  # side of what is mirrored at a time: two such squares stay in the first-level cache


def matrix(span: Span, columns: int) -> Array:
    """An fp32 span as rows of `columns`, without a copy."""
    assert span.dtype == "F32"
    assert span.numel % columns == 0
    room = (ctypes.c_float * span.numel).from_address(span.address)
    whole: Array = np.ctypeslib.as_array(room)
    return whole.reshape(-1, columns)


def operand(x: Array) -> Array:
    """x as a product takes it: with NaN for its infinities, as gemm.py has it. A copy, but only if there are any."""
    found = np.zeros(1, np.uint32)
    _peak(x.ctypes.data, x.size, found)
    return np.where(np.isinf(x), np.float32(np.nan), x) if found[0] >= INFINITY else x


@compiled(numba.int64, numba.int64, numba.uint32[::1])
def _peak(address: int, numel: int, found: Array) -> None:
    words, peak = numba.carray(pointer(address), (numel,), np.uint32), u32(0)
    for i in range(numel):
        peak = max(peak, u32(words[i] & u32(0x7FFFFFFF)))
    found[0] = peak


@inlined
def _one_nan(value: float) -> float:
    bits = as_u32(f32(value))
    return as_f32(u32(NAN)) if u32(bits & u32(0x7FFFFFFF)) > u32(INFINITY) else f32(value)


@inlined
def _scale(out: Array, product: Array, weight: float, m: int) -> None:
    for i in range(m):
        out[i] = _one_nan(weight * (product[i] + f32(0)))


@inlined
def _add(out: Array, other: Array, product: Array, alpha: float, weight: float, m: int) -> None:
    for i in range(m):
        out[i] = _one_nan(alpha * other[i] + weight * (product[i] + f32(0)))


@compiled(
    numba.int64,
    numba.int64,
    numba.float32[:, ::1],
    numba.int64,
    numba.int64,
    numba.int64,
    numba.boolean,
    numba.float32,
    numba.float32,
)
def settle(
    out: int, other: int, product: Array, stride: int, row: int, column: int, upper: bool, alpha: float, weight: float
) -> None:
    """out[row:, column:] = alpha * other + weight * product, or of that what lies on or above out's diagonal.

    out and other are addresses of matrices with rows of `stride`; other may be 0 (none). product may be part of out. A
    sum that is zero counts as +0, whatever the BLAS made of it.
    """
    for r in range(product.shape[0]):
        low = max(row + r - column, 0) if upper else 0
        m = product.shape[1] - low
        if m <= 0:
            break
        place = 4 * ((row + r) * stride + column + low)
        target = numba.carray(pointer(out + place), (m,), np.float32)
        if other == 0:
            _scale(target, product[r, low:], weight, m)
        else:
            source = numba.carray(pointer(other + place), (m,), np.float32)
            _add(target, source, product[r, low:], alpha, weight, m)


@compiled(numba.int64, numba.int64)
def mirror(address: int, side: int) -> None:
    """Copy what lies above the diagonal of a square matrix to below it."""
    x = numba.carray(pointer(address), (side, side), np.uint32)
    for row in range(0, side, SQUARE):
        for column in range(row, side, SQUARE):
            for r in range(row, min(row + SQUARE, side)):
                for c in range(max(column, r + 1), min(column + SQUARE, side)):
                    x[c, r] = x[r, c]
