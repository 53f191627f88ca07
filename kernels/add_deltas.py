"""Weighted sum of task vectors on top of a scaled base, one coefficient per group of elements.

    out = c[g, 0] * base + sum_k c[g, k + 1] * (expert_k - base)        g = (element // inner) % groups

fp32, summed in the order of the experts, one rounding at the end. `inner` and `groups` say along which axis the
coefficients change: groups = 1 for a whole tensor; groups = rows with inner = columns for one coefficient per row;
groups = columns with inner = 1 for one per column (slow: runs of one element). Exact, to the sign of a zero:
  - an expert with coefficient 0 takes no part, whatever it holds;
  - a sum that is zero leaves c[g, 0] * base, hence the base where c[g, 0] is 1;
  - c[g, 0] = 1, one coefficient 1 and the others 0 give that expert (base + (expert - base) would not).

On a GPU each input is read once and the output written once. Tensors of up to SMALL elements wait for the end of the
batch, and all of the same dtypes are done by one launch.
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
from .device import INFINITY, alignment, block_size, codes, load, pointer, raise_peak, store
from .host.add_deltas import WHOLE
from .numerics import Array, Span
from .queue import Queue

LAUNCH = {"BLOCK": 2048, "num_warps": 4}
SMALL = 1 << 15  # elements below which a launch costs more than the work

CASES = [
    (numel, dtypes, experts, groups, inner)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16", "F32"))
    for numel, experts, groups, inner in (
        (0, 1, 1, WHOLE), (1, 1, 1, WHOLE), (1000, 0, 1, WHOLE), (4097, 2, 1, WHOLE), (5000, 5, 10, 500),
        (777, 3, 7, 1),
    )
]  # fmt: skip


@triton.jit
def _block(
    row,
    spans,
    scales,
    only,
    table,
    groups,
    inner,
    first,
    peaks,
    offs,
    mask,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    BUNDLED: tl.constexpr,
    GROUPED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """One block. Addresses (out, base, experts) and coefficients come from arguments or from a row of a table."""
    COUNT: tl.constexpr = len(CODES)
    if GROUPED:  # the row's first element decides by 64 bits, the rest by 32
        place = (first % inner).to(tl.uint32) + tl.arange(0, offs.shape[0]).to(tl.uint32)
        g = ((first // inner % groups).to(tl.uint32) + place // inner.to(tl.uint32)) % groups.to(tl.uint32)
        c_base = tl.load(pointer(table, tl.float32, 1) + g * COUNT)
        only = tl.load(pointer(table, tl.int32, 1) + g * COUNT + (COUNT - 1))
    elif BUNDLED:
        c_base = tl.load(pointer(table, tl.float32, 1))
        only = tl.load(pointer(table, tl.int32, 1) + (COUNT - 1))
    else:
        c_base = scales[0]
    address = tl.load(row + 1) if BUNDLED else spans[1]
    base = load(address, offs, mask, CODES[1], ALIGN, MASKED)
    highest = base.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    total, copied = tl.zeros_like(base), tl.zeros_like(base)
    for k in tl.static_range(2, COUNT):
        address = tl.load(row + k) if BUNDLED else spans[k]
        x = load(address, offs, mask, CODES[k], ALIGN, MASKED)
        if GROUPED:
            c = tl.load(pointer(table, tl.float32, 1) + g * COUNT + (k - 1))
        elif BUNDLED:
            c = tl.load(pointer(table, tl.float32, 1) + (k - 1))
        else:
            c = scales[k - 1]
        total = tl.where(c == 0, total, total + c * (x - base))
        copied = tl.where(only == k - 2, x, copied)
        highest = tl.maximum(highest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
    start = c_base * base
    result = tl.where(only >= 0, copied, tl.where(total == 0, start, start + total))
    address = tl.load(row) if BUNDLED else spans[0]
    store(address, offs, result, mask, CODES[0], ALIGN, MASKED)
    if tl.max(highest, 0) >= INFINITY:  # rare: say which input it was
        for k in tl.static_range(1, COUNT):
            address = tl.load(row + k) if BUNDLED else spans[k]
            raise_peak(peaks, k - 1, load(address, offs, mask, CODES[k], ALIGN, MASKED), 1)


@triton.jit(do_not_specialize=["numel", "start", "only", "groups", "inner"])
def _add(
    spans,
    scales,
    only,
    table,
    groups,
    inner,
    start,
    numel,
    peaks,
    CODES: tl.constexpr,
    ALIGN: tl.constexpr,
    GROUPED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * BLOCK
    offs = at + tl.arange(0, BLOCK)
    first, groups, inner = at + start, tl.cast(groups, tl.int64), tl.cast(inner, tl.int64)
    if at + BLOCK <= numel:
        _block(
            table,
            spans,
            scales,
            only,
            table,
            groups,
            inner,
            first,
            peaks,
            offs,
            offs,
            CODES,
            ALIGN,
            False,
            GROUPED,
            False,
        )
    else:
        mask = offs < numel
        _block(
            table,
            spans,
            scales,
            only,
            table,
            groups,
            inner,
            first,
            peaks,
            offs,
            mask,
            CODES,
            ALIGN,
            False,
            GROUPED,
            True,
        )


@triton.jit
def _add_bundle(rows, scales, places, CODES: tl.constexpr, ALIGN: tl.constexpr, BLOCK: tl.constexpr):
    """`places` says which row a program belongs to and which of its blocks it is."""
    COUNT: tl.constexpr = len(CODES)
    place = pointer(places, tl.int32, 1) + 2 * tl.program_id(0)
    which, block = tl.load(place).to(tl.int64), tl.load(place + 1).to(tl.int64)
    row = pointer(rows, tl.int64, 1) + which * (COUNT + 2)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < tl.load(row + COUNT)
    table, peaks = scales + which * (4 * COUNT), tl.load(row + COUNT + 1)
    _block(row, 0, 0, 0, table, 0, 0, 0, peaks, offs, mask, CODES, ALIGN, True, False, True)


def launch(
    queue: Queue,
    out: Span,
    base: Span,
    experts: Sequence[Span],
    coefs: Array,
    start: int = 0,
    inner: int = WHOLE,
) -> Array:
    coefs = np.ascontiguousarray(coefs, np.float32)
    assert coefs.ndim == 2
    assert coefs.shape[1] == len(experts) + 1
    spans = (out, base, *experts)
    assert all(span.numel == out.numel for span in spans)
    if len(coefs) == 1 and out.numel <= SMALL:
        peaks, found = queue.peaks(len(experts) + 1)
        queue.bundle(("add_deltas", codes(*spans)), _launch_bundle, (spans, coefs[0], peaks))
        return found
    peaks, found = queue.peaks(len(experts) + 1)
    block = block_size(LAUNCH["BLOCK"])
    only = _only(coefs)
    grouped = len(coefs) > 1
    table = queue.constant(np.hstack([coefs, only[:, None].view(np.float32)])) if grouped else 0
    queue.submit(
        _add,
        (triton.cdiv(out.numel, block),),
        tuple(span.address for span in spans),
        tuple(float(c) for c in coefs[0]),
        int(only[0]),
        table,
        len(coefs),
        inner,
        start,
        out.numel,
        peaks,
        CODES=codes(*spans),
        ALIGN=alignment(*spans),
        GROUPED=grouped,
        BLOCK=block,
        num_warps=LAUNCH["num_warps"],
    )
    return found


def _launch_bundle(queue: Queue, items: list[Any]) -> None:
    """One launch for many small tensors of the same dtypes."""
    block = block_size(1024)
    rows = np.array([(*(s.address for s in spans), spans[0].numel, peaks) for spans, _, peaks in items], np.int64)
    coefs = np.stack([c for _, c, _ in items])
    scales = np.hstack([coefs, _only(coefs)[:, None].view(np.float32)])
    counts = [-(-spans[0].numel // block) for spans, _, _ in items]
    places = np.array([(which, at) for which, count in enumerate(counts) for at in range(count)], np.int32)
    spans = [span for item in items for span in item[0]]
    queue.submit(
        _add_bundle,
        (len(places),),
        queue.constant(rows),
        queue.constant(scales),
        queue.constant(places),
        CODES=codes(*items[0][0]),
        ALIGN=alignment(*spans),
        BLOCK=block,
        num_warps=4,
    )


def _only(coefs: Array) -> Array:
    """Per group the one expert that it copies; -1 if it must be computed."""
    used = coefs[:, 1:] != 0
    alone = (coefs[:, 0] == 1) & (used.sum(1) == 1) & ((coefs[:, 1:] == 1) == used).all(1)
    return np.where(alone, used.argmax(1) if coefs.shape[1] > 1 else -1, -1).astype(np.int32)


def reference(
    out: Tensor, base: Tensor, experts: Sequence[Tensor], coefs: Array, start: int = 0, inner: int = WHOLE
) -> Array:
    """The same in torch, element by element."""
    element = torch.arange(start, start + out.numel(), device=out.device)
    group = element // inner % len(coefs)
    c = torch.from_numpy(np.asarray(coefs, np.float32)).to(out.device)
    b, total = base.float(), torch.zeros(out.numel(), device=out.device)
    alone = (c[:, 0] == 1) & ((c[:, 1:] != 0).sum(1) == 1)
    copy = torch.full_like(total, torch.nan)
    copied = torch.zeros_like(group, dtype=torch.bool)
    for k, expert in enumerate(experts):
        weight = c[group, k + 1]
        total = torch.where(weight == 0, total, total + weight * (expert.float() - b))
        mine = alone[group] & (weight == 1)
        copy, copied = torch.where(mine, expert.float(), copy), copied | mine
    scaled = c[group, 0] * b
    truth.write(out, torch.where(copied, copy, torch.where(total == 0, scaled, scaled + total)))
    return truth.flags(base, *experts)


def inputs(
    numel: int,
    dtypes: Sequence[str],
    experts: int,
    groups: int,
    inner: int,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    out, base, *others = truth.tensors(numel, dtypes, experts + 2, device, seed)
    coefs = np.random.default_rng(seed).normal(size=(groups, experts + 1)).astype(np.float32)
    coefs[:, 0] = 1
    return out, base, others, coefs, 0, inner


def bytes_moved(out: Any, base: Any, experts: Sequence[Any], *rest: Any) -> int:
    return truth.nbytes(out, base, *experts)
