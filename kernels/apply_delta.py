"""A merged task vector on top of the base, for methods that make one of whole matrices.

    out = base + scale * delta          where scale * delta is zero: base, to the sign of a zero

fp32, one rounding at the end. On a GPU each input is read once and each output written once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import reference as truth
from .device import ABSOLUTE, INFINITY, alignment, as_u32, block_size, codes, load, raise_peak, store
from .numerics import Array, Span
from .queue import Queue

LAUNCH = {"BLOCK": 1024, "num_warps": 4}

CASES = [
    (numel, dtypes, scale)
    for dtypes in (("BF16", "BF16", "F32"), ("F32",), ("F16", "F8_E4M3", "F32"))
    for numel, scale in ((0, 1.0), (1, 0.7), (4099, 1.3), (40_000, 1.0))
] + [(5000, ("F64", "F64", "F32"), -0.5), (5000, ("BF16", "F32", "F32"), 0.0), (5000, ("F8_E5M2", "BF16"), 1.0)]


@triton.jit
def _block(
    spans, scale, at, numel, peaks, CODES: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr
):
    offs = at + tl.arange(0, BLOCK)
    mask = offs < numel
    base = load(spans[1], offs, mask, CODES[1], ALIGN, MASKED)
    delta = load(spans[2], offs, mask, CODES[2], ALIGN, MASKED)
    highest = tl.maximum((as_u32(base) & ABSOLUTE).to(tl.int32), (as_u32(delta) & ABSOLUTE).to(tl.int32))
    if tl.max(highest, 0) >= INFINITY:  # rare
        raise_peak(peaks, 0, base, 1)
        raise_peak(peaks, 1, delta, 1)
    step = scale * delta
    store(spans[0], offs, tl.where(step == 0, base, base + step), mask, CODES[0], ALIGN, MASKED)


@triton.jit(do_not_specialize=["numel"])
def _apply(spans, scale, numel, peaks, CODES: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    if at + BLOCK <= numel:
        _block(spans, scale, at, numel, peaks, CODES, ALIGN, BLOCK, False)
    else:
        _block(spans, scale, at, numel, peaks, CODES, ALIGN, BLOCK, True)


def launch(queue: Queue, out: Span, base: Span, delta: Span, scale: float) -> Array:
    assert out.numel == base.numel == delta.numel
    spans, block = (out, base, delta), block_size(LAUNCH["BLOCK"])
    peaks, found = queue.peaks(2)
    queue.submit(
        _apply,
        (triton.cdiv(out.numel, block),),
        tuple(span.address for span in spans),
        float(np.float32(scale)),
        out.numel,
        peaks,
        CODES=codes(*spans),
        ALIGN=alignment(*spans),
        BLOCK=block,
        num_warps=LAUNCH["num_warps"],
    )
    return found


def reference(out: Tensor, base: Tensor, delta: Tensor, scale: float) -> Array:
    """The same in torch."""
    inputs = truth.flags(base, delta)  # before `out` is written: it may be one of them
    step = float(np.float32(scale)) * delta.float()
    truth.write(out, torch.where(step == 0, base.float(), base.float() + step))
    return inputs


def inputs(numel: int, dtypes: Sequence[str], scale: float, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
    """One element of delta in eight is zero, of either sign."""
    out, base, near = truth.tensors(numel, dtypes, 3, device, seed)
    return out, base, truth.rounded(near.float() - base.float(), near.dtype), scale


def bytes_moved(out: Any, base: Any, delta: Any, *rest: Any) -> int:
    return truth.nbytes(out, base, delta)
