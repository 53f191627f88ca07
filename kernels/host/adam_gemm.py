"""WUDI's step on the CPU: a product by BLAS, then one pass over the rest.

    g      = 2 (x gram - target)
    mean   = mean + (1 - beta1) (g - mean)
    square = beta2 square + (1 - beta2) g g
    out    = x - (lr / (1 - beta1^t)) mean / (sqrt(square) / sqrt(1 - beta2^t) + eps)

Everything in fp32, in the order in which torch.optim.Adam does it. `out` holds the product in between: there is no
temporary matrix.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import math

import numba
import numpy as np

from streammerge.kernels.host.gemm import matrix, operand
from streammerge.kernels.numerics import CHUNK, Array, Span, compiled, f32, load, store, table


def constants(step: int, lr: float, beta1: float, beta2: float, eps: float) -> tuple[float, ...]:
    """1 - beta1, beta2, 1 - beta2, the corrected rate, the square's correction and eps, each rounded to fp32 once."""
    assert step >= 1
    unbias = math.sqrt(1 - beta2**step)
    values = (1 - beta1, beta2, 1 - beta2, lr / (1 - beta1**step), unbias, eps)
    return tuple(float(np.float32(value)) for value in values)


def side_of(numel: int) -> int:
    """Rows of a square matrix."""
    side = math.isqrt(numel)
    assert side * side == numel > 0
    return side


@compiled(numba.int64[:, ::1], numba.int64, numba.float32[::1])
def _adam(spans: Array, numel: int, scalars: Array) -> None:
    one, two, rest, rate, unbias, eps = scalars
    rows = np.empty((5, CHUNK + 16), np.float32)
    out, x, target, mean, square = rows[0], rows[1], rows[2], rows[3], rows[4]
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        for i in range(5):
            load(spans[i], at, m, rows[i])
        for i in range(m):
            g = f32(2) * (out[i] + f32(0) - target[i])  # + 0: a BLAS may make -0 of an empty sum
            mean[i] = mean[i] + one * (g - mean[i])
            square[i] = two * square[i] + rest * g * g
            out[i] = x[i] - rate * mean[i] / (np.sqrt(square[i]) / unbias + eps)
        store(out, spans[0], at, m)
        store(mean, spans[3], at, m)
        store(square, spans[4], at, m)


def host(
    out: Span,
    x: Span,
    gram: Span,
    target: Span,
    mean: Span,
    square: Span,
    step: int,
    lr: float = 1e-5,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    precision: str = "tf32x3",
) -> None:
    """Write `out`, and bring mean and square up to date. The precision is fp32 whatever was asked for."""
    columns = side_of(gram.numel)
    assert all(span.numel == out.numel for span in (x, target, mean, square))
    assert {span.dtype for span in (out, x, gram, target, mean, square)} == {"F32"}
    assert out.address != x.address or not x.numel
    with np.errstate(all="ignore"):
        np.matmul(operand(matrix(x, columns)), operand(matrix(gram, columns)).T, out=matrix(out, columns))
    _adam(table(out, x, target, mean, square), out.numel, np.array(constants(step, lr, beta1, beta2, eps), np.float32))
