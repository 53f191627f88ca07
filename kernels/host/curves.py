"""First and second derivatives of activations, layer norm and softmax, each in one pass over the memory; fp32.

With u what is pulled back to dx,

    activation    dx = f'(x) dy            to_dy = f'(x) u, to_x = f''(x) dy u
    layer norm    dx = P(dy w), P(h) = r (h - mean h - x^ mean(h x^)) per row, x^ = r (x - mean x)
                  to_dy = w P(u) + x^ dw + db,  to_x = P(q) - x^ r <u, P(dy w)> / n,
                  q = dy dw - r (u mean(dy w x^) + dy w mean(u x^)), dw and db what is pulled back to the gradients of
                  weight and bias
    softmax       dx = Q(dy), Q(h) = y (h - <y, h>) per row;  to_dy = Q(u), to_x = Q(u (dy - <y, dy>) - dy <y, u>)

Composed of elementwise steps, as torch has them, second derivatives take more time than the products between them.
exp is good to 2e-7 of its value, erf (Abramowitz and Stegun 7.1.26) to 2e-7.
"""

# mypy: disable-error-code="no-any-return"
from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import CHUNK, Array, as_f32, compiled, f32, f64, floats, inlined, u32

GELU, GELU_TANH, SILU = range(3)
ROOT = 0.7978845608028654  # sqrt(2 / pi)
CUBIC = 0.044715


@inlined
def _decay(z: float) -> float:
    """exp(z) for z <= 0; 0 from -87 on."""
    z = max(f32(z), f32(-87.0))
    n = np.floor(z * f32(1.4426950408889634) + f32(0.5))
    r = z - n * f32(0.693359375) - n * f32(-2.12194440e-4)
    p = f32(1.9875691500e-4)
    p = p * r + f32(1.3981999507e-3)
    p = p * r + f32(8.3334519073e-3)
    p = p * r + f32(4.1665795894e-2)
    p = p * r + f32(1.6666665459e-1)
    p = p * r + f32(5.0000001201e-1)
    return f32(p * r * r + r + f32(1)) * as_f32(u32(u32(numba.int32(n) + numba.int32(127)) << u32(23)))


@inlined
def _gelu(x: Array, first: Array, second: Array, m: int) -> None:
    for i in range(m):
        v = x[i]
        z = abs(v) * f32(0.7071067811865476)
        e = _decay(-z * z)
        t = f32(1) / (f32(1) + f32(0.3275911) * z)
        tail = t * (
            f32(0.254829592)
            + t * (f32(-0.284496736) + t * (f32(1.421413741) + t * (f32(-1.453152027) + t * f32(1.061405429))))
        )
        half = f32(0.5) * tail * e
        bell = e * f32(0.3989422804014327)
        first[i] = (f32(1) - half if v > f32(0) else half) + v * bell
        second[i] = bell * (f32(2) - v * v)


@inlined
def _gelu_tanh(x: Array, first: Array, second: Array, m: int) -> None:
    for i in range(m):
        v = x[i]
        square = v * v
        u = f32(ROOT) * v * (f32(1) + f32(CUBIC) * square)
        slope = f32(ROOT) * (f32(1) + f32(3 * CUBIC) * square)
        e = _decay(f32(-2) * abs(u))
        t = (f32(1) - e) / (f32(1) + e)
        t = t if u > f32(0) else -t
        rest = f32(4) * e / ((f32(1) + e) * (f32(1) + e))  # 1 - t t
        first[i] = f32(0.5) * (f32(1) + t + v * rest * slope)
        second[i] = rest * (slope + f32(3 * ROOT * CUBIC) * square - v * t * slope * slope)


@inlined
def _silu(x: Array, first: Array, second: Array, m: int) -> None:
    for i in range(m):
        v = x[i]
        e = _decay(-abs(v))
        s = (f32(1) if v > f32(0) else e) / (f32(1) + e)
        both = e / ((f32(1) + e) * (f32(1) + e))
        first[i] = s + v * both
        second[i] = both * (f32(2) + v * (f32(1) - f32(2) * s))


@inlined
def _slopes(kind: int, x: Array, first: Array, second: Array, m: int) -> None:
    if kind == GELU:
        _gelu(x, first, second, m)
    elif kind == GELU_TANH:
        _gelu_tanh(x, first, second, m)
    else:
        _silu(x, first, second, m)


@inlined
def _times(a: Array, b: Array, out: Array, m: int) -> None:
    for i in range(m):
        out[i] = a[i] * b[i]


@compiled(*6 * [numba.int64])
def bend(rows: int, n: int, kind: int, x: int, dy: int, dx: int) -> None:
    """dx = f'(x) dy; addresses of fp32 [rows, n]."""
    both = np.empty((2, CHUNK + 16), np.float32)
    numel = rows * n
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        _slopes(kind, floats(x, at, m), both[0], both[1], m)
        _times(both[0], floats(dy, at, m), floats(dx, at, m), m)


@compiled(*6 * [numba.int64])
def slopes(rows: int, n: int, kind: int, x: int, first: int, second: int) -> None:
    """f'(x) and f''(x)."""
    numel = rows * n
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        _slopes(kind, floats(x, at, m), floats(first, at, m), floats(second, at, m), m)


@inlined
def _times_twice(first: Array, second: Array, dy: Array, u: Array, to_dy: Array, to_x: Array, m: int) -> None:
    for i in range(m):
        to_dy[i] = first[i] * u[i]
        to_x[i] = second[i] * dy[i] * u[i]


@compiled(*8 * [numba.int64])
def bend_twice(rows: int, n: int, first: int, second: int, dy: int, u: int, to_dy: int, to_x: int) -> None:
    """to_dy = f'(x) u, to_x = f''(x) dy u, from `slopes`."""
    numel = rows * n
    for at in range(0, numel, CHUNK):
        m = min(CHUNK, numel - at)
        given = floats(first, at, m), floats(second, at, m), floats(dy, at, m), floats(u, at, m)
        _times_twice(*given, floats(to_dy, at, m), floats(to_x, at, m), m)


@inlined
def _dot(a: Array, b: Array, lanes: Array, n: int) -> float:
    lanes[:] = f32(0)
    width = len(lanes)
    for low in range(0, n, width):
        m = min(width, n - low)
        left, right = a[low : low + m], b[low : low + m]
        for i in range(m):
            lanes[i] += left[i] * right[i]
    total = f64(0)
    for i in range(width):
        total += lanes[i]
    return total


@inlined
def _center(x: Array, mean: float, r: float, hat: Array, n: int) -> None:
    for i in range(n):
        hat[i] = (x[i] - mean) * r


@inlined
def _project(h: Array, hat: Array, mean: float, share: float, r: float, out: Array, n: int) -> None:
    for i in range(n):
        out[i] = r * (h[i] - mean - hat[i] * share)


@inlined
def _mix(u: Array, h: Array, dy: Array, dw: Array, c: float, s: float, out: Array, n: int) -> None:
    for i in range(n):
        out[i] = dy[i] * dw[i] - (u[i] * c + h[i] * s)


@inlined
def _finish(out: Array, scale: Array, hat: Array, by: Array, plus: Array, n: int) -> None:
    for i in range(n):
        out[i] = out[i] * scale[i] + hat[i] * by[i] + plus[i]


@inlined
def _subtract(out: Array, hat: Array, by: float, n: int) -> None:
    for i in range(n):
        out[i] -= hat[i] * by


@compiled(*12 * [numba.int64])
def norm_twice(
    rows: int,
    n: int,
    at_dy: int,
    at_x: int,
    at_u: int,
    at_to_dy: int,
    at_to_x: int,
    at_weight: int,
    at_dw: int,
    at_db: int,
    at_mean: int,
    at_r: int,
) -> None:
    """Addresses of dy, x, u, to_dy, to_x [rows, n], weight, dw, db [n], mean and r [rows]; fp32."""
    work = np.empty((4, n + 16), np.float32)
    hat, h, q, ones = work[0], work[1], work[2], work[3]
    ones[:] = f32(1)
    lanes = np.empty(64, np.float32)
    weight, dw, db = floats(at_weight, 0, n), floats(at_dw, 0, n), floats(at_db, 0, n)
    means, scales = floats(at_mean, 0, rows), floats(at_r, 0, rows)
    for row in range(rows):
        dy, x, u = floats(at_dy, row * n, n), floats(at_x, row * n, n), floats(at_u, row * n, n)
        to_dy, to_x = floats(at_to_dy, row * n, n), floats(at_to_x, row * n, n)
        r = scales[row]
        _center(x, means[row], r, hat, n)
        _times(dy, weight, h, n)
        c, s = f32(_dot(h, hat, lanes, n) / n), f32(_dot(u, hat, lanes, n) / n)
        _project(h, hat, f32(_dot(h, ones, lanes, n) / n), c, r, q, n)
        pulled = _dot(u, q, lanes, n)
        _mix(u, h, dy, dw, r * c, r * s, q, n)
        _project(q, hat, f32(_dot(q, ones, lanes, n) / n), f32(_dot(q, hat, lanes, n) / n), r, to_x, n)
        _subtract(to_x, hat, f32(pulled * r / n), n)
        _project(u, hat, f32(_dot(u, ones, lanes, n) / n), s, r, to_dy, n)
        _finish(to_dy, weight, hat, dw, db, n)


@inlined
def _softmax(x: Array, y: Array, n: int) -> None:
    peak = x[0]
    for i in range(n):
        peak = max(peak, x[i])
    total = f32(0)
    for i in range(n):
        y[i] = _decay(x[i] - peak) if x[i] > f32(-np.inf) else f32(0)
        total += y[i]
    for i in range(n):
        y[i] /= total


@inlined
def _short_dot(a: Array, b: Array, n: int) -> float:
    total = f32(0)
    for i in range(n):
        total += a[i] * b[i]
    return total


@inlined
def _weigh(y: Array, h: Array, mean: float, out: Array, n: int) -> None:
    for i in range(n):
        out[i] = y[i] * (h[i] - mean)


@compiled(numba.int64, numba.int64, numba.int64, numba.int64)
def softmax(rows: int, n: int, x: int, y: int) -> None:
    """y [rows, n] of x; -inf is 0."""
    for row in range(rows):
        _softmax(floats(x, row * n, n), floats(y, row * n, n), n)


@compiled(*5 * [numba.int64])
def softmax_back(rows: int, n: int, y: int, dy: int, dx: int) -> None:
    """dx = Q(dy)."""
    for row in range(rows):
        share, pulled = floats(y, row * n, n), floats(dy, row * n, n)
        _weigh(share, pulled, _short_dot(share, pulled, n), floats(dx, row * n, n), n)


@compiled(*7 * [numba.int64])
def softmax_twice(rows: int, n: int, y: int, dy: int, u: int, to_dy: int, to_x: int) -> None:
    """to_dy = Q(u), to_x = Q(u (dy - <y, dy>) - dy <y, u>)."""
    q = np.empty(n, np.float32)
    for row in range(rows):
        share, first, second = floats(y, row * n, n), floats(dy, row * n, n), floats(u, row * n, n)
        mean, other = _short_dot(share, first, n), _short_dot(share, second, n)
        for i in range(n):
            q[i] = second[i] * (first[i] - mean) - first[i] * other
        _weigh(share, second, other, floats(to_dy, row * n, n), n)
        _weigh(share, q, _short_dot(share, q, n), floats(to_x, row * n, n), n)
