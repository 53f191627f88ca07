"""Votes of per-sample weight gradients of a linear layer, or the update that they allow, without storing a gradient.

    dW_s = G_s^T X_s                                  G_s, X_s: the rows of G and X that belong to sample s
    votes = sum_s -sign(dW_s)                         one per sample; 0 and NaN abstain
    out = votes, or target + scale * mask(tau, votes) as in sign_mask.py

What the arguments are, how exact a vote is and what is counted: host/vote_gemm.py.

On a GPU one launch does all samples. A program owns a tile of the weight: the products of a sample add up in registers,
leave their signs in the votes, and start again from 0; so a weight's traffic does not depend on the number of samples.
All samples are one loop over steps of up to BK tokens, listed beforehand, so that loading runs ahead across samples.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from . import sign_mask
from .device import BF16, F32, INTERPRETED, alignment, codes, fetch, load, pointer, put, raise_peak, store
from .host.sign_mask import NANS, settings
from .host.vote_gemm import MOST, PRECISIONS, segments, shape
from .numerics import ITEMSIZE, Array, Span
from .queue import Queue
from .sign_mask import count_nans, masked, tally

FUSED = True  # 'ieee' products are fused multiply-adds; the rest is not
LAUNCH = {
    "16": {"BM": 128, "BN": 128, "BK": 64, "num_warps": 8, "num_stages": 7},  # stages: 2 for the steps, 4 buffers
    "16, odd": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 2},  # read item by item
    "ieee": {"BM": 64, "BN": 64, "BK": 16, "num_warps": 8, "num_stages": 5},
    "tf32x3": {"BM": 64, "BN": 64, "BK": 32, "num_warps": 8, "num_stages": 4},
}
WIDTH = 128 if INTERPRETED else 32  # columns of a tile that are merged at a time: more would not fit in registers
GROUP = 8  # tiles of a column that run side by side: they read the same inputs

CASES = [
    ((0, 0), 1, 16, 16, ("BF16",), "I8", "", False, "ieee"),
    ((1,), 1, 1, 1, ("F32",), "I8", "", False, "ieee"),
    ((33, 100, 0, 7), 1, 144, 144, ("BF16",), ("BF16",), "agreement, bits", True, "ieee"),
    ((70, 0, 1, 129), 1, 130, 97, ("BF16",), "I8", "", False, "ieee"),
    ((64, 64, 3), 1, 128, 128, ("F16",), "I16", "mean", False, "ieee"),
    ((2, 1), 20, 65, 40, ("F16",), ("F16", "BF16", "F32"), "force, bits", False, "ieee"),
    ((40, 17, 1), 1, 64, 128, ("F32",), ("F32",), "agreement", True, "ieee"),
    ((40, 17, 1), 1, 63, 72, ("F32", "BF16"), ("BF16",), "force, mean, bits", True, "ieee"),
    ((40, 17, 1), 1, 80, 64, ("F32",), ("BF16",), "agreement", True, "tf32x3"),
]


@triton.jit
def _panel(
    address,
    first,
    number,
    at,
    width,
    CODE: tl.constexpr,
    NATIVE: tl.constexpr,
    ALIGN: tl.constexpr,
    BK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """[BK, BLOCK] items of a [tokens, width] matrix from token `first` and column `at` on; 0 behind `number` tokens."""
    k, c = tl.arange(0, BK), tl.arange(0, BLOCK)
    offs = k[:, None] * width.to(tl.int32) + c[None, :]
    mask = (k[:, None] < number) & (at + c < width)[None, :]
    SIZE: tl.constexpr = 4 if CODE == F32 else 2
    start = address + SIZE * (first * width + at)
    if NATIVE:
        KIND: tl.constexpr = tl.bfloat16 if CODE == BF16 else tl.float16
        return fetch(pointer(start, KIND, ALIGN), offs, mask, True)
    else:
        return load(start, offs, mask, CODE, ALIGN, True)


@triton.jit
def _merge(
    votes,
    spans,
    scale,
    bits,
    peaks,
    counts,
    row,
    col,
    rows,
    cols,
    CODES: tl.constexpr,
    SIZES: tl.constexpr,
    FORCE: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Target, expert and base of a tile to its result, WIDTH columns at a time; counts as `tally` wants them."""
    COUNT: tl.constexpr = len(CODES)
    BM: tl.constexpr = votes.shape[0]
    BN: tl.constexpr = votes.shape[1]
    if BN > WIDTH:
        HALF: tl.constexpr = BN // 2
        one, two = tl.split(tl.permute(tl.reshape(votes, (BM, 2, HALF)), (0, 2, 1)))
        a = _merge(
            one, spans, scale, bits, peaks, counts, row, col, rows, cols, CODES, SIZES, FORCE, BITS, ALIGN, WIDTH
        )
        b = _merge(
            two, spans, scale, bits, peaks, counts, row, col + HALF, rows, cols, CODES, SIZES, FORCE, BITS, ALIGN, WIDTH
        )
        high, low = a[0] + b[0], a[1] + b[1]
    else:
        m, n = tl.arange(0, BM), tl.arange(0, BN)
        offs = m[:, None] * cols.to(tl.int32) + n[None, :]
        mask = (row + m < rows)[:, None] & (col + n < cols)[None, :]
        start = row * cols + col
        target = load(spans[1] + SIZES[1] * start, offs, mask, CODES[1], ALIGN, True)
        tau = load(spans[2] + SIZES[2] * start, offs, mask, CODES[2], ALIGN, True)
        if COUNT == 4:
            tau = tau - load(spans[3] + SIZES[3] * start, offs, mask, CODES[3], ALIGN, True)
        result, kept, counted = masked(target, tau, votes, scale, CODES[0], CODES[1], FORCE)
        store(spans[0] + SIZES[0] * start, offs, result, mask, CODES[0], ALIGN, True)
        if BITS:
            grid = tl.reshape(kept.to(tl.int32), (BM, BN // 8, 8)) << tl.arange(0, 8)[None, None, :]
            eight = tl.arange(0, BN // 8)
            places = m[:, None] * (cols // 8).to(tl.int32) + eight[None, :]
            inside = (row + m < rows)[:, None] & (col + 8 * eight < cols)[None, :]
            put(pointer(bits + start // 8, tl.uint8, 1), places, tl.sum(grid, 2).to(tl.uint8), inside, True)
        odd = ((tl.abs(target - tau) < float("inf")) == 0).to(tl.int32)
        odd = tl.max(tl.reshape(odd, (BM, BN // 8, 8)), 2)
        eights = tl.sum(tl.reshape(counted, (BM, BN // 8, 8)), 2)
        high = tl.sum((eights & 0xFF) | ((eights & 0xFF00) << 8))
        low = tl.sum((eights >> 16) | (odd << 16))
        if low > 0xFFFF:
            count_nans(counts, tau)
            raise_peak(peaks, 0, tl.reshape(target, (BM * BN,)), 1)  # from registers: out may be the target
            for k in tl.static_range(2, COUNT):
                value = load(spans[k] + SIZES[k] * start, offs, mask, CODES[k], ALIGN, True)
                raise_peak(peaks, k - 1, tl.reshape(value, (BM * BN,)), 1)
        low = low & 0xFFFF
    return high, low


@triton.jit
def _votes(
    g,
    x,
    steps,
    count,
    row,
    col,
    rows,
    cols,
    CODES: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """int32: votes in the lower half, NaNs in the upper."""
    votes = tl.zeros((BM, BN), tl.int32)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in range(count):
        step = tl.load(pointer(steps, tl.int64, 1) + i)
        first, number = step >> 8, ((step >> 1) & 127).to(tl.int32)
        one = _panel(g, first, number, row, rows, CODES[0], NATIVE, ALIGN, BK, BM)
        two = _panel(x, first, number, col, cols, CODES[1], NATIVE, ALIGN, BK, BN)
        acc = tl.dot(tl.trans(one), two, acc, input_precision=PRECISION)
        if (step & 1) != 0:
            votes += tl.where(acc < 0, 1, tl.where(acc > 0, -1, tl.where(acc == 0, 0, 1 << 16)))
            acc = tl.zeros((BM, BN), tl.float32)
    return votes


@triton.jit(do_not_specialize=["count"])
def _vote(
    spans,
    g,
    x,
    steps,
    count,
    rows,
    cols,
    scale,
    bits,
    peaks,
    counts,
    CODES: tl.constexpr,
    SIZES: tl.constexpr,
    PANELS: tl.constexpr,
    NATIVE: tl.constexpr,
    PRECISION: tl.constexpr,
    FORCE: tl.constexpr,
    BITS: tl.constexpr,
    ALIGN: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
):
    rows, cols = tl.cast(rows, tl.int64), tl.cast(cols, tl.int64)
    down, across = tl.cdiv(rows, BM), tl.cdiv(cols, BN)
    pid = tl.program_id(0).to(tl.int64)
    band = pid // (GROUP * across) * GROUP
    height = tl.minimum(down - band, GROUP)
    row = (band + pid % (GROUP * across) % height) * BM
    col = pid % (GROUP * across) // height * BN
    votes = _votes(g, x, steps, count, row, col, rows, cols, PANELS, NATIVE, PRECISION, ALIGN, BM, BN, BK)
    signed = (votes << 16) >> 16
    inside = (row + tl.arange(0, BM) < rows)[:, None] & (col + tl.arange(0, BN) < cols)[None, :]
    nans = tl.sum(tl.where(inside, (votes - signed) >> 16, 0))  # outside, 0 times an infinity
    if nans > 0:
        tl.atomic_add(pointer(counts, tl.int64, 1) + 3, nans.to(tl.int64), sem="relaxed")
    if len(CODES) == 1:
        m, n = tl.arange(0, BM), tl.arange(0, BN)
        offs = m[:, None] * cols.to(tl.int32) + n[None, :]
        start = spans[0] + SIZES[0] * (row * cols + col)
        if SIZES[0] == 1:
            put(pointer(start, tl.int8, ALIGN), offs, signed.to(tl.int8), inside, True)
        else:
            put(pointer(start, tl.int16, ALIGN), offs, signed.to(tl.int16), inside, True)
    else:
        high, low = _merge(
            signed, spans, scale, bits, peaks, counts, row, col, rows, cols, CODES, SIZES, FORCE, BITS, ALIGN, WIDTH
        )
        tally(counts, high, low)


def _steps(samples: Array, size: int) -> Array:
    """The loop of a program: first token << 8 | tokens (at most 64) << 1 | whether the sample ends."""
    lengths = samples[:, 1] - samples[:, 0]
    each = -(-lengths // size)
    sample = np.repeat(np.arange(len(samples)), each)
    within = np.arange(len(sample)) - np.repeat(np.cumsum(each) - each, each)
    left = lengths[sample] - within * size
    return (samples[sample, 0] + within * size) << 8 | np.minimum(left, size) << 1 | (left <= size)


def launch(
    queue: Queue,
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
    tokens, cols = shape(out.numel, g.numel, x.numel, rows)
    samples = segments(offsets, tokens, mean)
    assert precision in PRECISIONS
    assert len(samples) <= MOST.get(out.dtype, len(samples))
    assert mask is None or (cols % 8 == 0 and mask.numel == out.numel // 8)
    spans: tuple[Span, ...] = (out,)
    peaks, found, force = 0, None, False
    if target is None or expert is None:
        assert out.dtype in MOST
    else:
        spans = (out, target, expert) if base is None else (out, target, expert, base)
        assert all(span.numel == out.numel for span in spans)
        force, scale = settings(mode, scale)
        peaks, found = queue.peaks(len(spans) - 1)
    align = alignment(*spans, g, x) if rows % 16 == cols % 16 == 0 else 1
    narrow = g.dtype == x.dtype and g.dtype != "F32"
    tile = LAUNCH[precision if not narrow else "16" if align == 16 or INTERPRETED else "16, odd"]
    steps = _steps(samples, tile["BK"])
    queue.submit(
        _vote,
        (triton.cdiv(rows, tile["BM"]) * triton.cdiv(cols, tile["BN"]),),
        tuple(span.address for span in spans),
        g.address,
        x.address,
        queue.constant(steps),
        len(steps),
        rows,
        cols,
        scale,
        0 if mask is None else mask.address,
        peaks,
        queue.mirror(counts),
        CODES=codes(*spans) if found is not None else (-1,),
        SIZES=tuple(ITEMSIZE[span.dtype] for span in spans),
        PANELS=codes(g, x),
        NATIVE=narrow and not INTERPRETED,
        PRECISION=precision,
        FORCE=force,
        BITS=mask is not None,
        ALIGN=align,
        WIDTH=WIDTH,
        GROUP=GROUP,
        **tile,
    )
    return found


def reference(
    out: Tensor,
    g: Tensor,
    x: Tensor,
    offsets: Array,
    rows: int,
    mean: bool,
    counts: Array,
    target: Tensor | None = None,
    expert: Tensor | None = None,
    base: Tensor | None = None,
    mask: Tensor | None = None,
    mode: str = "agreement",
    scale: float = 1.0,
    precision: str = "ieee",
) -> Array | None:
    """The same in torch, with sums in fp64."""
    left, right = g.view(-1, rows).double(), x.view(-1, max(out.numel() // rows, 1)).double()
    votes = torch.zeros(rows, right.shape[1], dtype=torch.int64, device=out.device)
    for first, stop in segments(offsets, len(left), mean):
        gradient = left[first:stop].T @ right[first:stop]
        votes += (gradient < 0).long() - (gradient > 0).long()
        counts[NANS] += int(gradient.isnan().sum())
    if target is None or expert is None:
        out.copy_(votes.flatten())
        return None
    votes = votes.flatten().to(torch.int16)
    return sign_mask.reference(out, target, expert, base, votes, mode, scale, counts, mask)


def inputs(
    lengths: tuple[int, ...],
    times: int,
    rows: int,
    cols: int,
    panels: tuple[str, ...],
    result: str | tuple[str, ...],
    how: str,
    based: bool,
    precision: str,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    """G and X hold small integers: sums are exact, and ties are common."""
    random, tokens = np.random.default_rng(seed), sum(lengths) * times
    g, x = (
        torch.from_numpy(random.integers(-3, 4, tokens * width).astype(np.float32)).to(truth.DTYPES[name])
        for width, name in ((rows, panels[0]), (cols, panels[-1]))
    )
    offsets = np.cumsum((0, *lengths * times)).astype(np.int32)
    given = g.to(device), x.to(device), offsets, rows, "mean" in how, np.arange(4, dtype=np.int64)
    if isinstance(result, str):
        out = torch.full((rows * cols,), 99, dtype=truth.INTEGERS[result], device=device)
        return out, *given, None, None, None, None, "agreement", 1.0, precision
    out, base, expert, target = truth.tensors(rows * cols, result, 4, device, seed)
    tau = expert if based else truth.rounded(expert.float() - base.float(), expert.dtype)
    mask = torch.full((rows * cols // 8,), 0xA5, dtype=torch.uint8, device=device) if "bits" in how else None
    mode = how.partition(",")[0]
    return out, *given, target, tau, base if based else None, mask, mode, 0.3, precision


def bytes_moved(out: Any, g: Any, x: Any, offsets: Array, rows: int, mean: bool, counts: Array, *rest: Any) -> int:
    return truth.nbytes(out, g, x, *(t for t in rest[:4] if t is not None))
