"""Around products of bfloat16 that come out as bfloat16: operands side by side, and sums in fp32; one pass each.

Rows are [m, n]. Where an address may be 0, the tensor is not there.
"""

from __future__ import annotations

import numba

from streammerge.kernels.numerics import Array, as_f32, as_u32, bf16_bits, compiled, floats, inlined, pointer, u32


@inlined
def _halves(address: int, at: int, m: int) -> Array:
    return numba.carray(pointer(address + 2 * at), (m,), numba.uint16)


@inlined
def _round(x: Array, out: Array, m: int) -> None:
    for i in range(m):
        out[i] = numba.uint16(bf16_bits(as_u32(x[i])))


@inlined
def _round_change(x: Array, minus: Array, out: Array, m: int) -> None:
    for i in range(m):
        out[i] = numba.uint16(bf16_bits(as_u32(x[i] - minus[i])))


@inlined
def _widen(x: Array, out: Array, m: int) -> None:
    for i in range(m):
        out[i] = as_f32(u32(u32(x[i]) << u32(16)))


@inlined
def _widen_plus(x: Array, plus: Array, out: Array, m: int) -> None:
    for i in range(m):
        out[i] = as_f32(u32(u32(x[i]) << u32(16))) + plus[i]


@inlined
def _widen_plus_both(x: Array, plus: Array, more: Array, out: Array, m: int) -> None:
    for i in range(m):
        out[i] = as_f32(u32(u32(x[i]) << u32(16))) + plus[i] + more[i]


@inlined
def _widen_both(x: Array, other: Array, sums: Array, minus: Array, m: int) -> None:
    for i in range(m):
        second = as_f32(u32(u32(other[i]) << u32(16)))
        sums[i] = as_f32(u32(u32(x[i]) << u32(16))) + second
        minus[i] = -second


@compiled(*6 * [numba.int64])
def beside(m: int, n: int, one: int, other: int, minus: int, out: int) -> None:
    """out [m, 2n] = [one | other - minus], rounded; `minus` may be 0."""
    for row in range(m):
        _round(floats(one, row * n, n), _halves(out, 2 * row * n, n), n)
        second, target = floats(other, row * n, n), _halves(out, (2 * row + 1) * n, n)
        if minus:
            _round_change(second, floats(minus, row * n, n), target, n)
        else:
            _round(second, target, n)


@compiled(*6 * [numba.int64])
def sum_up(m: int, n: int, x: int, plus: int, bias: int, out: int) -> None:
    """out = x + plus + bias: x bfloat16, plus [m, n] and bias [n] may be 0."""
    for row in range(m):
        halves, target = _halves(x, row * n, n), floats(out, row * n, n)
        if plus and bias:
            _widen_plus_both(halves, floats(plus, row * n, n), floats(bias, 0, n), target, n)
        elif plus:
            _widen_plus(halves, floats(plus, row * n, n), target, n)
        elif bias:
            _widen_plus(halves, floats(bias, 0, n), target, n)
        else:
            _widen(halves, target, n)


@compiled(*5 * [numba.int64])
def split(m: int, n: int, x: int, sums: int, minus: int) -> None:
    """sums = x[:, :n] + x[:, n:] and minus = -x[:, n:] of bfloat16 x [m, 2n]."""
    for row in range(m):
        first, second = _halves(x, 2 * row * n, n), _halves(x, (2 * row + 1) * n, n)
        _widen_both(first, second, floats(sums, row * n, n), floats(minus, row * n, n), n)
