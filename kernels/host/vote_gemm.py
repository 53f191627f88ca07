"""Votes of per-sample weight gradients of a linear layer, or the update that they allow, without storing a gradient.

    dW_s = G_s^T X_s                                  G_s, X_s: the rows of G and X that belong to sample s
    votes = sum_s -sign(dW_s)                         one per sample; 0 and NaN abstain
    out = votes, or target + scale * mask(tau, votes) as in sign_mask.py

G [tokens, rows] holds the gradients of the layer's outputs, X [tokens, cols] its inputs, each BF16, F16 or F32. Sample
s is the tokens from offsets[s] up to offsets[s + 1]; samples may be of any length, and empty. `mean`: all tokens are
one sample, so that the vote is the sign of the summed gradient, which is GradFix's other estimator.

Sums are fp32. A vote may differ from the sign of the exact sum only where
    |sum_t g x| <= (2 * T + 8) * 2**-23 * sum_t |g x| + T * 2**-126           T tokens, sum_t |g x| < 2**127
in whatever order a processor adds, truncating tensor cores and 'tf32x3' included. (Where sums round to nearest, none
of up to 1,400 tokens differed above 2**-23 * sum_t |g x|.) Where all partial sums are exact in fp32, results are the
same bits everywhere. A power of two as a sample's factor changes no vote, short of underflow.

`counts`, four int64 that are added to, as in sign_mask.py; NANS counts each sample's NaN gradients, and with votes as
the result the others stay. `precision` is for F32 on a GPU: 'ieee' multiplies on the plain cores, 'tf32x3' in three
products on the tensor cores.
"""

from __future__ import annotations

import ctypes

import numba
import numpy as np

from streammerge.kernels.host import sign_mask
from streammerge.kernels.host.sign_mask import NANS
from streammerge.kernels.numerics import ITEMSIZE, Array, Span, compiled, f32, load, table

ROWS, COLS, TOKENS = 512, 1024, 512  # of one product: a few MB, whatever the layer's size
STRIP = 1 << 24  # votes held at a time
MOST = {"I8": 127, "I16": 32767}  # samples that a vote can count
PRECISIONS = ("ieee", "tf32x3")


def segments(offsets: Array, tokens: int, mean: bool) -> Array:
    """[first, stop) of each sample that has tokens, as int64[n, 2]."""
    offsets = np.asarray(offsets, np.int64)
    assert offsets.ndim == 1
    assert len(offsets) > 0
    assert (np.diff(offsets) >= 0).all()
    assert offsets[0] >= 0
    assert offsets[-1] <= tokens
    ends = offsets[[0, -1]] if mean else offsets
    pairs = np.stack([ends[:-1], ends[1:]], 1)
    pairs = pairs[pairs[:, 0] < pairs[:, 1]]
    assert len(pairs) <= MOST["I16"]
    return pairs


def shape(out: int, g: int, x: int, rows: int) -> tuple[int, int]:
    """Tokens and columns, from numbers of elements."""
    assert rows > 0
    tokens, cols = g // rows, out // rows
    assert (tokens * rows, rows * cols, tokens * cols) == (g, out, x)
    return tokens, cols


@compiled(numba.int64[::1], numba.int64, numba.int64, numba.int64, numba.float32[:, ::1])
def _read(source: Array, width: int, first: int, at: int, panel: Array) -> None:
    """fp32 items of a [tokens, width] matrix, from token `first` and column `at` on."""
    for t in range(len(panel)):
        load(source, (first + t) * width + at, panel.shape[1], panel[t])


@compiled(numba.float32[:, ::1], numba.int16[:, ::1], numba.int64, numba.int64[::1])
def _count(total: Array, votes: Array, at: int, counts: Array) -> None:
    """Subtract the signs of the sums from the votes, of which they are the columns from `at` on."""
    n, nans = total.shape[1], 0
    for i in range(len(total)):
        row, vote = total[i], votes[i, at : at + n]
        for j in range(n):
            vote[j] += numba.int16(row[j] < f32(0)) - numba.int16(row[j] > f32(0))
            nans += row[j] != row[j]
    counts[NANS] += nans


class _Products:
    """fp32 sums of products, block by block of the weight, in memory of its own."""

    def __init__(self, g: Span, x: Span, rows: int, cols: int) -> None:
        self._sources, self._widths = table(g, x), (rows, cols)
        self._panels = np.empty((2, TOKENS * max(ROWS, COLS)), np.float32)
        self._sums = np.empty((2, ROWS * COLS), np.float32)

    def total(self, first: int, stop: int, row: slice, col: slice) -> Array:
        """sum_t g x over the tokens of a sample."""
        shape = row.stop - row.start, col.stop - col.start
        total, more = (memory[: shape[0] * shape[1]].reshape(shape) for memory in self._sums)
        for at in range(first, stop, TOKENS):
            g, x = (self._panel(k, at, min(at + TOKENS, stop), part) for k, part in ((0, row), (1, col)))
            np.matmul(g.T, x, out=total if at == first else more)
            if at != first:
                total += more
        return total

    def _panel(self, which: int, first: int, stop: int, part: slice) -> Array:
        shape = stop - first, part.stop - part.start
        panel: Array = self._panels[which, : shape[0] * shape[1]].reshape(shape)
        _read(self._sources[which], self._widths[which], first, part.start, panel)
        return panel


def _part(span: Span, first: int, stop: int) -> Span:
    return span._replace(address=span.address + ITEMSIZE[span.dtype] * first, numel=stop - first)


def host(
    out: Span,
    g: Span,
    x: Span,
    offsets: Array,
    rows: int,
    mean: bool,
    counts: Array,
    target: Span | None = None,
    expert: Span | None = None,
    base: Span | None = None,
    mask: Span | None = None,
    mode: str = "agreement",
    scale: float = 1.0,
    precision: str = "ieee",
) -> Array | None:
    """Write `out` [rows, cols]: votes (I8 for up to 127 samples, else I16), or the updated target where there is one.
    Then say what target, expert and base hold; `mask`, for `cols` a multiple of 8, gets the bits of sign_mask.py.
    """
    tokens, cols = shape(out.numel, g.numel, x.numel, rows)
    samples = segments(offsets, tokens, mean)
    assert precision in PRECISIONS
    assert len(samples) <= MOST.get(out.dtype, len(samples))
    assert mask is None or (cols % 8 == 0 and mask.numel == out.numel // 8)
    assert all(span.numel == out.numel for span in (target, expert, base) if span is not None)
    products, found = _Products(g, x, rows, cols), None
    height = max(1, min(ROWS, STRIP // max(cols, 1)))
    for top in range(0, rows, height):
        bottom = min(top + height, rows)
        votes = np.zeros((bottom - top, cols), np.int16)
        for at in range(0, cols, COLS):
            for first, last in samples:
                with np.errstate(all="ignore"):
                    total = products.total(first, last, slice(top, bottom), slice(at, min(at + COLS, cols)))
                _count(total, votes, at, counts)
        start, stop = top * cols, bottom * cols
        if target is None or expert is None:
            assert out.dtype in MOST
            kind = ctypes.c_int8 if out.dtype == "I8" else ctypes.c_int16
            items = (kind * (stop - start)).from_address(_part(out, start, stop).address)
            np.ctypeslib.as_array(items)[:] = votes.ravel()
            continue
        flags = sign_mask.host(
            _part(out, start, stop),
            _part(target, start, stop),
            _part(expert, start, stop),
            None if base is None else _part(base, start, stop),
            Span(votes.ctypes.data, "I16", votes.size),
            mode,
            scale,
            counts,
            None if mask is None else _part(mask, start // 8, stop // 8),
        )
        found = flags if found is None else np.maximum(found, flags)
    return found
