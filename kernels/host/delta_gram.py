"""Gram matrix of a task vector on the CPU, of its columns or its rows; the task vector exists a panel at a time.

    delta = expert - base           [m, columns], row-major; base None: the expert is the task vector
    out = weight * delta^T delta                     [columns, columns], or with rows
    out = weight * delta delta^T                     [m, m]                 out += ... with accumulate

fp32, by BLAS. Columns: PANEL rows at a time, each panel's product added to `out`; rows: PANEL rows by PANEL rows, each
over all columns. Held at once: two panels of deltas, and as many rows of the result.
"""

from __future__ import annotations

import numba
import numpy as np

from streammerge.kernels.host.gemm import mirror as mirror_upper
from streammerge.kernels.host.gemm import operand, settle
from streammerge.kernels.numerics import CHUNK, Array, Span, compiled, load, subtract, table

PANEL = 512  # rows


@compiled(numba.int64[:, ::1], numba.int64, numba.float32[::1])
def _widen(spans: Array, first: int, out: Array) -> None:
    """Items from `first` on of the first span, minus those of the second if there is one."""
    base = np.empty(CHUNK, np.float32)
    for at in range(0, len(out), CHUNK):
        m = min(CHUNK, len(out) - at)
        load(spans[0], first + at, m, out[at : at + m])
        if len(spans) > 1:
            load(spans[1], first + at, m, base)
            subtract(out[at : at + m], base, m)


def host(
    out: Span,
    base: Span | None,
    expert: Span,
    columns: int,
    weight: float = 1.0,
    rows: bool = False,
    accumulate: bool = False,
    mirror: bool = True,
    precision: str = "tf32x3",
) -> None:
    """Write `out`, all of it or with mirror=False what lies on or above the diagonal; fp32 whatever the precision."""
    spans = (expert,) if base is None else (expert, base)
    m = expert.numel // columns
    side = m if rows else columns
    assert all(span.numel == m * columns for span in spans)
    assert out.numel == side * side
    assert out.dtype == "F32"
    scale = np.float32(weight)

    def panel(first: int) -> Array:
        made = np.empty((min(PANEL, m - first), columns), np.float32)
        _widen(table(*spans), first * columns, made.reshape(-1))
        return operand(made)

    def put(product: Array, row: int, column: int, onto: bool) -> None:
        settle(out.address, out.address if onto else 0, product, side, row, column, True, 1, scale)

    with np.errstate(all="ignore"):
        if rows:
            for row in range(0, m, PANEL):
                left = panel(row)
                for column in range(row, m, PANEL):
                    right = left if column == row else panel(column)
                    put(np.matmul(left, right.T), row, column, accumulate)
        else:
            for first in range(0, m, PANEL) or (0,):
                delta = panel(first)
                for row in range(0, columns, PANEL):
                    put(np.matmul(delta[:, row : row + PANEL].T, delta[:, row:]), row, row, accumulate or first > 0)
    if mirror:
        mirror_upper(out.address, side)
