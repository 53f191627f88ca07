"""The derivative of a mean cosine by the base's output, and what is pulled back through it; one pass over memory each.

With a and a + c what base and expert return for an anchor, and per row

    r = s (c - p a),    s = 1 / (A |a| |a + c|),    p = <a, c> / <a, a>,    A anchors

a pull u on r is, with t = <u, c - p a> and q = <u, a> / <a, a>,

    to c    s (u - q a - t (a + c) / |a + c|^2)
    to a    s (-p u + (2 p q - t / <a, a>) a - q c - t (a + c) / |a + c|^2)
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import LANES, Array, compiled, f32, f64, floats, inlined


@inlined
def _add(a: Array, c: Array, one: Array, two: Array, three: Array, m: int) -> None:
    for i in range(m):
        y = a[i] + c[i]
        one[i] += a[i] * a[i]
        two[i] += a[i] * c[i]
        three[i] += y * y


@inlined
def _add_pulls(a: Array, c: Array, u: Array, p: float, one: Array, two: Array, m: int) -> None:
    for i in range(m):
        one[i] += u[i] * a[i]
        two[i] += u[i] * (c[i] - p * a[i])


@inlined
def _mix(a: Array, c: Array, of_a: float, of_c: float, out: Array, m: int) -> None:
    for i in range(m):
        out[i] = of_c * (c[i] + of_a * a[i])


@inlined
def _mix_pulls(a: Array, c: Array, u: Array, by: Array, to_a: Array, to_c: Array, m: int) -> None:
    uc, ac, cc, ua, aa, ca = by[0], by[1], by[2], by[3], by[4], by[5]
    for i in range(m):
        to_c[i] = uc * u[i] + ac * a[i] + cc * c[i]
        to_a[i] = ua * u[i] + aa * a[i] + ca * c[i]


@inlined
def _sum(lanes: Array) -> float:
    total = f64(0)
    for i in range(LANES):
        total += f64(lanes[i])
    return total


@inlined
def _sums(a: Array, c: Array, n: int, lanes: Array, found: Array) -> None:
    """<a, a>, <a, c> and |a + c|^2."""
    lanes[:] = f32(0)
    for at in range(0, n, LANES):
        m = min(LANES, n - at)
        _add(a[at : at + m], c[at : at + m], lanes[0], lanes[1], lanes[2], m)
    for k in range(3):
        found[k] = _sum(lanes[k])


@compiled(*6 * [numba.int64])
def pull(rows: int, n: int, anchors: int, a: int, c: int, r: int) -> None:
    """r [rows, n] of a and c; addresses of fp32."""
    lanes, sums = np.empty((3, LANES + 16), np.float32), np.empty(3)
    for row in range(rows):
        one, two = floats(a, row * n, n), floats(c, row * n, n)
        _sums(one, two, n, lanes, sums)
        s = 1 / (anchors * np.sqrt(sums[0] * sums[2]))
        _mix(one, two, f32(-sums[1] / sums[0]), f32(s), floats(r, row * n, n), n)


@compiled(*8 * [numba.int64])
def pull_twice(rows: int, n: int, anchors: int, a: int, c: int, u: int, to_a: int, to_c: int) -> None:
    """What u pulls back through `pull` to a and c."""
    lanes, sums, by = np.empty((3, LANES + 16), np.float32), np.empty(3), np.empty(6, np.float32)
    for row in range(rows):
        one, two, pulled = floats(a, row * n, n), floats(c, row * n, n), floats(u, row * n, n)
        _sums(one, two, n, lanes, sums)
        square, length = sums[0], sums[2]
        s, p = 1 / (anchors * np.sqrt(square * length)), sums[1] / square
        lanes[:] = f32(0)
        for at in range(0, n, LANES):
            m = min(LANES, n - at)
            _add_pulls(one[at : at + m], two[at : at + m], pulled[at : at + m], f32(p), lanes[0], lanes[1], m)
        q, t = _sum(lanes[0]) / square, _sum(lanes[1])
        by[0], by[1], by[2] = s, -s * (q + t / length), -s * t / length
        by[3], by[4], by[5] = -s * p, s * (2 * p * q - t / square - t / length), -s * (q + t / length)
        _mix_pulls(one, two, pulled, by, floats(to_a, row * n, n), floats(to_c, row * n, n), n)
