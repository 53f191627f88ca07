"""Weighted sum of task vectors on top of a scaled base, one coefficient per group of elements.

    out = c[g, 0] * base + sum_k c[g, k + 1] * (expert_k - base)        g = (element // inner) % groups

fp32, summed in the order of the experts, one rounding at the end. `inner` and `groups` (rows of `coefs`) say along
which axis the coefficients change: groups = 1 for a whole tensor; groups = rows with inner = columns for one
coefficient per row; groups = columns with inner = 1 for one per column (slow: runs of one element). With `split` a
hash of the element decides instead (numerics.Partition), and `inner` says nothing. Exact, to the sign of a zero:
  - an expert with coefficient 0 takes no part, whatever it holds;
  - a sum that is zero leaves c[g, 0] * base, hence the base where c[g, 0] is 1;
  - c[g, 0] = 1, one coefficient 1 and the others 0 give that expert (base + (expert - base) would not).

`rounding` rounds `out` up or down by chance (numerics.Stochastic) instead of to nearest even; exact values stay.
`low` takes what `out` lost: the exact difference value - out, rounded once to its own dtype, and 0 where that is not
finite. Both in BF16 hold a value above 2**-116 to 2**-17 of itself (2**-16 with `rounding`).

On a GPU each input is read once and each output written once. Tensors of up to SMALL elements with one group wait for
the end of the batch, and all that have the same dtypes are done by one launch.
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
from .device import (
    ABSOLUTE,
    INFINITY,
    alignment,
    as_u32,
    block_size,
    codes,
    decode,
    dither,
    encode,
    group_of,
    int32,
    load,
    pointer,
    raise_peak,
    store,
    words,
)
from .host.add_deltas import WHOLE, check
from .numerics import PARTITION, ROUNDING, Array, Partition, Span, Stochastic
from .queue import Queue

LAUNCH = {"BLOCK": 1024, "num_warps": 4}
FEW = 4  # experts whose items fit the registers of a program
SMALL = 1 << 15  # elements below which a launch costs more than the work
LONG: tl.constexpr = tl.constexpr(1 << 31)
HASH: tl.constexpr = tl.constexpr(PARTITION)
NOISE: tl.constexpr = tl.constexpr(ROUNDING)

CASES = [
    (numel, dtypes, experts, groups, inner)
    for dtypes in (("BF16",), ("F32",), ("F16", "BF16", "F32"))
    for numel, experts, groups, inner in (
        (0, 1, 1, WHOLE), (1, 1, 1, WHOLE), (1000, 0, 1, WHOLE), (4097, 2, 1, WHOLE), (5000, 5, 10, 500),
        (777, 3, 7, 1),
    )
] + [
    (40_001, dtypes, experts, 1, WHOLE)
    for dtypes, counts in (
        (("BF16",), (0, 1, 2, 3, 4, 16)), (("F8_E4M3",), (2, 16)), (("BF16", "F8_E5M2", "F8_E4M3", "F64"), (3,)),
    )
    for experts in counts
] + [
    (numel, dtypes, experts, groups, inner, start, *extras)
    for dtypes in (("BF16",), ("F16", "F8_E4M3", "BF16"))
    for numel, experts, groups, inner, start, *extras in (
        (6000, 2, 3, 4000, 5), (40_000, 3, 8, WHOLE, 0, "split"), (4099, 2, 5, WHOLE, (1 << 33) + 2, "split"),
        (40_003, 2, 1, WHOLE, 8, "rounding"), (3000, 2, 1, WHOLE, 3, "rounding"), (40_001, 2, 1, WHOLE, 0, "low"),
        (3000, 1, 1, WHOLE, 0, "low"), (9000, 2, 6, WHOLE, 1 << 32, "split", "rounding", "low"),
    )
]  # fmt: skip


@triton.jit
def _numbers(address, KIND: tl.constexpr, COUNT: tl.constexpr):
    """COUNT numbers from memory, as the tuple that a launch would be given."""
    found = ()
    for k in tl.static_range(COUNT):
        found += (tl.load(pointer(address, KIND, 1) + k),)  # type: ignore[assignment]
    return found


@triton.jit
def _coefficient(scales, k, EACH: tl.constexpr):
    """Number k of a tuple, or for each element of a row of its own, by the rows' addresses."""
    if EACH:
        return tl.load(pointer(scales, tl.float32, 1) + k)
    else:
        return scales[k]


@triton.jit
def _words(first, seed, tensor_id, stream, BLOCK: tl.constexpr, QUAD: tl.constexpr):
    seed = tl.cast(seed, tl.int64)
    return words(first, seed.to(tl.uint32), (seed >> 32).to(tl.uint32), tensor_id, stream, BLOCK, QUAD)


@triton.jit
def _block(
    spans, scales, noise, start, at, numel, peaks,
    CODES: tl.constexpr, LOW: tl.constexpr, ALIGN: tl.constexpr, EACH: tl.constexpr, COPIES: tl.constexpr,
    QUAD: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """One block. `scales` are the coefficients, and the expert that is copied: see _coefficient."""
    COUNT: tl.constexpr = len(CODES) - LOW  # output, base and experts
    offs = at + tl.arange(0, BLOCK)
    mask = offs < numel
    base = load(spans[1], offs, mask, CODES[1], ALIGN, MASKED)
    highest = (as_u32(base) & ABSOLUTE).to(tl.int32)
    total, copied = tl.zeros_like(base), tl.zeros_like(base)
    if COPIES:
        only = _coefficient(scales, COUNT - 1, EACH)
    for k in tl.static_range(2, COUNT):
        x = load(spans[k], offs, mask, CODES[k], ALIGN, MASKED)
        c = _coefficient(scales, k - 1, EACH)
        total = tl.where(c == 0, total, total + c * (x - base))
        if COPIES:
            copied = tl.where(only == k - 2, x, copied)
        highest = tl.maximum(highest, (as_u32(x) & ABSOLUTE).to(tl.int32))
    result = _coefficient(scales, 0, EACH) * base
    if COUNT > 2:
        result = tl.where(total == 0, result, result + total)
    if COPIES:
        result = tl.where(only >= 0, copied, result)
    if tl.max(highest, 0) >= INFINITY:  # rare: say which input it was, before `out` is written: it may be one
        for k in tl.static_range(1, COUNT):
            raise_peak(peaks, k - 1, load(spans[k], offs, mask, CODES[k], ALIGN, MASKED), 1)
    kept = result
    if len(noise) > 0:
        kept = dither(result, _words(at + start, noise[0], noise[1], NOISE, BLOCK, QUAD), CODES[0])
    store(spans[0], offs, kept, mask, CODES[0], ALIGN, MASKED)
    if LOW:
        rest = result - decode(encode(kept, CODES[0]), CODES[0])
        rest = tl.where((as_u32(rest) & ABSOLUTE) < INFINITY, rest, 0.0)
        store(spans[COUNT], offs, rest, mask, CODES[COUNT], ALIGN, MASKED)


@triton.jit
def _blocks(
    spans, scales, noise, start, at, numel, peaks,
    CODES: tl.constexpr, LOW: tl.constexpr, ALIGN: tl.constexpr, EACH: tl.constexpr, COPIES: tl.constexpr,
    QUAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """_block with a mask only where it ends behind the tensor: whole ones are read 16 bytes at a time."""
    if at + BLOCK <= numel:
        _block(spans, scales, noise, start, at, numel, peaks, CODES, LOW, ALIGN, EACH, COPIES, QUAD, BLOCK, False)
    else:
        _block(spans, scales, noise, start, at, numel, peaks, CODES, LOW, ALIGN, EACH, COPIES, QUAD, BLOCK, True)


VARYING = ["groups", "inner", "start", "numel", "hash_seed", "hash_tensor", "noise_seed", "noise_tensor"]


@triton.jit(do_not_specialize=VARYING)
def _add(
    spans, scales, table, groups, inner, start, numel, peaks, hash_seed, hash_tensor, noise_seed, noise_tensor,
    CODES: tl.constexpr, LOW: tl.constexpr, ALIGN: tl.constexpr, GROUPED: tl.constexpr, COPIES: tl.constexpr,
    NOISY: tl.constexpr, QUAD: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """GROUPED: 0 one group, whose coefficients are `scales`; 1 runs of `inner` elements; 2 a hash."""
    COUNT: tl.constexpr = len(CODES) - LOW
    at = tl.program_id(0).to(tl.int64) * BLOCK
    noise = (noise_seed, noise_tensor) if NOISY else ()
    if GROUPED == 1:
        inner, groups = tl.cast(inner, tl.int64), tl.cast(groups, tl.int64)
        place, run = (at + start) % inner, (at + start) // inner
        if place + BLOCK <= inner:  # the whole block is of one group
            own = _numbers(table + run % groups * (4 * COUNT), tl.float32, COUNT)
            _blocks(spans, own, noise, start, at, numel, peaks, CODES, LOW, ALIGN, False, COPIES, QUAD, BLOCK)
        else:  # 32 bits do: in a longer run, the block is near its end; with a mask, registers are saved
            short = tl.minimum(inner, LONG)
            places = (place - (inner - short)).to(tl.uint32) + tl.arange(0, BLOCK).to(tl.uint32)
            g = ((run % groups).to(tl.uint32) + places // short.to(tl.uint32)) % groups.to(tl.uint32)
            rows = table + g.to(tl.int64) * (4 * COUNT)
            _block(spans, rows, noise, start, at, numel, peaks, CODES, LOW, ALIGN, True, COPIES, QUAD, BLOCK, True)
    elif GROUPED == 2:
        g = group_of(_words(at + start, hash_seed, hash_tensor, HASH, BLOCK, QUAD), groups)
        rows = table + g.to(tl.int64) * (4 * COUNT)
        _blocks(spans, rows, noise, start, at, numel, peaks, CODES, LOW, ALIGN, True, COPIES, QUAD, BLOCK)
    else:
        _blocks(spans, scales, noise, start, at, numel, peaks, CODES, LOW, ALIGN, False, COPIES, QUAD, BLOCK)


@triton.jit
def _add_bundle(
    rows,
    table,
    places,
    CODES: tl.constexpr,
    LOW: tl.constexpr,
    ALIGN: tl.constexpr,
    COPIES: tl.constexpr,
    NOISY: tl.constexpr,
    QUAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`places` says which row a program belongs to and which of its blocks it is; _launch_bundle makes the rows."""
    SPANS: tl.constexpr = len(CODES)
    COUNT: tl.constexpr = SPANS - LOW
    place = pointer(places, tl.int32, 1) + 2 * tl.program_id(0)
    which, at = tl.load(place).to(tl.int64), tl.load(place + 1).to(tl.int64) * BLOCK
    row = _numbers(rows + which * (8 * (SPANS + 5)), tl.int64, SPANS + 5)
    numel, peaks, start = row[SPANS], row[SPANS + 1], row[SPANS + 2]
    scales = _numbers(table + which * (4 * COUNT), tl.float32, COUNT)
    noise = (row[SPANS + 3], row[SPANS + 4]) if NOISY else ()
    _blocks(row, scales, noise, start, at, numel, peaks, CODES, LOW, ALIGN, False, COPIES, QUAD, BLOCK)


def launch(
    queue: Queue,
    out: Span,
    base: Span,
    experts: Sequence[Span],
    coefs: Array,
    start: int = 0,
    inner: int = WHOLE,
    split: Partition | None = None,
    rounding: Stochastic | None = None,
    low: Span | None = None,
) -> Array:
    coefs = check(out, base, experts, coefs, inner, low)
    split = split if len(coefs) > 1 else None
    spans = (out, base, *experts) if low is None else (out, base, *experts, low)
    addresses = tuple(span.address for span in spans)
    peaks, found = queue.peaks(len(experts) + 1)
    variant = {
        "CODES": codes(*spans),
        "LOW": int(low is not None),
        "NOISY": rounding is not None,
        "QUAD": start % 4 == 0 or (split is None and rounding is None),
    }
    if len(coefs) == 1 and out.numel <= SMALL:
        row = (*addresses, out.numel, peaks, start, *_key(rounding))
        queue.bundle(("add_deltas", *variant.values()), _launch_bundle, (variant, row, coefs[0], alignment(*spans)))
        return found
    table = _table(coefs)
    grouped = 0 if len(coefs) == 1 else 1 if split is None else 2
    block = _block_of(variant)
    queue.submit(
        _add,
        (triton.cdiv(out.numel, block),),
        addresses,
        tuple(table[0].tolist()),
        queue.constant(table) if grouped else 0,
        len(coefs),
        inner,
        start,
        out.numel,
        peaks,
        *_key(split),
        *_key(rounding),
        **variant,
        ALIGN=alignment(*spans),
        GROUPED=grouped,
        COPIES=_copies(table),
        BLOCK=block,
        num_warps=LAUNCH["num_warps"],
    )
    return found


def _launch_bundle(queue: Queue, items: list[Any]) -> None:
    """One launch for many small tensors of the same dtypes."""
    variants, rows, coefs, alignments = zip(*items, strict=True)
    spans, scales, block = np.array(rows, np.int64), _table(np.stack(coefs)), _block_of(variants[0])
    counts = -(-spans[:, -5] // block)
    places = np.array([(which, at) for which, count in enumerate(counts) for at in range(count)], np.int32)
    queue.submit(
        _add_bundle,
        (len(places),),
        queue.constant(spans),
        queue.constant(scales),
        queue.constant(places),
        **variants[0],
        ALIGN=min(alignments),
        COPIES=_copies(scales),
        BLOCK=block,
        num_warps=LAUNCH["num_warps"],
    )


def _block_of(variant: dict[str, Any]) -> int:
    """Half of the usual where registers would not do: many inputs, or random words one by one."""
    usual = len(variant["CODES"]) <= FEW + 2 + variant["LOW"] and variant["QUAD"]
    return block_size(LAUNCH["BLOCK"] if usual else LAUNCH["BLOCK"] // 2)


def _table(coefs: Array) -> Array:
    """A row per group: its coefficients, then the one expert that it copies; -1 if it must be computed."""
    used = coefs[:, 1:] != 0
    alone = (coefs[:, 0] == 1) & (used.sum(1) == 1) & ((coefs[:, 1:] == 1) == used).all(1)
    only = np.where(alone, used.argmax(1) if coefs.shape[1] > 1 else -1, -1)
    return np.hstack([coefs, only[:, None].astype(np.float32)])


def _key(given: Partition | Stochastic | None) -> tuple[int, int]:
    """Seed and tensor as arguments."""
    seed, tensor_id = given or (0, 0)
    return seed - (seed >> 63 << 64), int32(tensor_id)


def _copies(table: Array) -> bool:
    return bool((table[:, -1] >= 0).any())


def reference(
    out: Tensor,
    base: Tensor,
    experts: Sequence[Tensor],
    coefs: Array,
    start: int = 0,
    inner: int = WHOLE,
    split: Partition | None = None,
    rounding: Stochastic | None = None,
    low: Tensor | None = None,
) -> Array:
    """The same in torch, element by element."""
    if split is None:
        group = torch.arange(start, start + out.numel(), device=out.device) // inner % len(coefs)
    else:
        group = truth.partition(start, out.numel(), len(coefs), split, out.device)
    c = torch.from_numpy(np.asarray(coefs, np.float32)).to(out.device)
    b, total = base.float(), torch.zeros(out.numel(), device=out.device)
    alone = (c[:, 0] == 1) & ((c[:, 1:] != 0).sum(1) == 1)
    copy = torch.full_like(total, torch.nan)
    copied = torch.zeros_like(group, dtype=torch.bool)
    inputs = truth.flags(base, *experts)  # before `out` is written: it may be one of them
    for k, expert in enumerate(experts):
        weight = c[group, k + 1]
        total = torch.where(weight == 0, total, total + weight * (expert.float() - b))
        mine = alone[group] & (weight == 1)
        copy, copied = torch.where(mine, expert.float(), copy), copied | mine
    scaled = c[group, 0] * b
    value = torch.where(copied, copy, torch.where(total == 0, scaled, scaled + total))
    truth.write(out, value, start, rounding)
    if low is not None:
        rest = value - out.float()
        truth.write(low, rest.where(rest.isfinite(), 0))
    return inputs


def inputs(
    numel: int,
    dtypes: Sequence[str],
    experts: int,
    groups: int,
    inner: int,
    start: int = 0,
    *extras: str,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    """`extras` names further arguments: split, rounding, low. Of several groups one in three copies an expert."""
    out, base, *others = truth.tensors(numel, dtypes, experts + 2, device, seed)
    coefs = np.random.default_rng(seed).normal(size=(groups, experts + 1)).astype(np.float32)
    coefs[:, 0] = 1
    if groups > 1:
        coefs[1::3, 1:], coefs[1::3, 1] = 0, 1
    split = Partition(2026 + seed, 7) if "split" in extras else None
    rounding = Stochastic((1 << 63) + seed, 0xDEADBEEF) if "rounding" in extras else None
    low = truth.tensors(numel, ("BF16",), 1, device, seed)[0] if "low" in extras else None
    return out, base, others, coefs, start, inner, split, rounding, low


def bytes_moved(out: Any, base: Any, experts: Sequence[Any], *rest: Any) -> int:
    low = rest[5:6] if len(rest) > 5 and rest[5] is not None else ()
    return truth.nbytes(out, base, *experts, *low)
