"""How far a gradient points along a task vector, and its turn towards it: one pass over the memory each, on one thread.

Products and their sums over LANES lanes of 4,096 elements are fp32, sums of blocks fp64.
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.numerics import BLOCK, LANES, Array, compiled, f32, f64, floats, inlined


@inlined
def _add(g: Array, t: Array, dots: Array, squares: Array, m: int) -> None:
    for i in range(m):
        dots[i] += g[i] * t[i]
        squares[i] += g[i] * g[i]


@compiled(numba.int64, numba.int64, numba.int64, numba.float64[::1])
def dots(g: int, t: int, numel: int, found: Array) -> None:
    """<g, t> and <g, g> into `found`; g and t are addresses of fp32."""
    one, two = np.empty(LANES + 16, np.float32), np.empty(LANES, np.float32)
    found[:] = 0.0
    for block in range(0, numel, BLOCK):
        one[:], two[:] = f32(0), f32(0)
        for at in range(block, min(block + BLOCK, numel), LANES):
            m = min(LANES, numel - at)
            _add(floats(g, at, m), floats(t, at, m), one, two, m)
        for i in range(LANES):
            found[0] += f64(one[i])
            found[1] += f64(two[i])


@inlined
def _turn(g: Array, t: Array, a: float, b: float, m: int) -> None:
    for i in range(m):
        g[i] = a * g[i] + b * t[i]


@compiled(numba.int64, numba.int64, numba.int64, numba.float32, numba.float32)
def turn(g: int, t: int, numel: int, a: float, b: float) -> None:
    """g = a g + b t."""
    for at in range(0, numel, BLOCK):
        m = min(BLOCK, numel - at)
        _turn(floats(g, at, m), floats(t, at, m), a, b, m)
