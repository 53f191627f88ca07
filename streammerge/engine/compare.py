"""What changed between two checkpoints, tensor by tensor, in tiles.

Reads both once. Per tensor: the share of elements whose bytes differ, |b - a| / |a| in the Frobenius norm, and the
largest |b - a|. The differences are taken in fp32, the sums in fp64 over fixed blocks.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from streammerge import kernel
from streammerge.budget import MIB, Budget
from streammerge.engine.feed import Feed, Loaded
from streammerge.formats.dtypes import DTYPES
from streammerge.formats.header import TensorSpec
from streammerge.kernels.numerics import Span
from streammerge.method import BLOCK, build, find
from streammerge.planner.jobs import Job
from streammerge.planner.steps import Cut, PlannedTensor, merge_steps
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.reader import Reader
from streammerge.store.ring import Ring

STEP, RING = 16 * MIB, 64 * MIB


@dataclass
class Change:
    """How one tensor differs; `relative` and `largest` are None where no arithmetic is defined.

    Where an element is NaN so are they; `relative` is infinite where a is zero and b is not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    changed: int = 0
    numel: int = 0
    relative: float | None = None
    largest: float | None = None


def compare(one: Checkpoint, other: Checkpoint) -> Iterator[Change]:
    """Every tensor that both hold with the same dtype and shape, in the first one's order."""
    pairs = [(spec, other.tensors[name]) for name, spec in one.tensors.items() if name in other.tensors]
    pairs = [(a, b) for a, b in pairs if (a.dtype, a.shape) == (b.dtype, b.shape)]
    yield from (Change(a.name, a.dtype, a.shape) for a, _ in pairs if not a.nbytes)
    pairs = [(a, b) for a, b in pairs if a.nbytes]
    if not pairs:
        return
    method: Any = build(find("passthrough"), {})
    tensors = [
        PlannedTensor(Job(a.name, a, (b,), {}, "passthrough", a.dtype, a.shape), method, False, 0, 0, 0)
        for a, b in pairs
    ]
    ring = Ring(Budget(2 * RING), RING, "the ring of tiles")
    reader = Reader(ring)
    reader.choose([(a.file, a.end) for a, _ in pairs])
    feed = Feed(ring, reader, merge_steps(tensors, Cut(STEP, RING)))
    sums: dict[int, _Sums] = {}
    try:
        while (loaded := feed.next()) is not None:
            for piece in loaded.step.pieces:
                a, b = pairs[piece.tensor]
                found = sums.setdefault(piece.tensor, _Sums())
                found.take(
                    _bytes(loaded, piece.offsets[0], a, piece.numel),
                    _bytes(loaded, piece.offsets[1], b, piece.numel),
                    a,
                )
                if piece.start + piece.numel == tensors[piece.tensor].numel:
                    yield sums.pop(piece.tensor).change(a)
            ring.give(loaded.slot)
    finally:
        ring.stop()
        feed.close()
        reader.close()
        ring.close()


class _Sums:
    """What one tensor's tiles add up to."""

    def __init__(self) -> None:
        self.changed = self.numel = 0
        self.squares: list[np.ndarray[Any, Any]] = []
        self.largest = np.uint32(0)  # the bits of |b - a|, which rank as their values do, NaN last

    def take(self, one: np.ndarray[Any, Any], other: np.ndarray[Any, Any], spec: TensorSpec) -> None:
        width = max(1, DTYPES[spec.dtype].bits // 8)
        same = (one == other).reshape(-1, width).all(1)
        self.changed += int(same.size - same.sum())
        self.numel += same.size
        if not DTYPES[spec.dtype].floating:
            return
        a = Span(int(one.ctypes.data), spec.dtype, same.size)
        b = Span(int(other.ctypes.data), spec.dtype, same.size)
        partials = np.empty((-(-same.size // BLOCK), 2))
        for column, (inputs, base) in enumerate((((a,), None), ((b,), a))):
            gram = np.empty((len(partials), 1))
            kernel.run("norms_and_dots", inputs, base, BLOCK, gram)
            partials[:, column] = gram[:, 0]
        self.squares.append(partials)
        keys = np.empty(same.size, np.uint32)
        kernel.call("magnitude_histogram", "keys", a, b, keys)
        self.largest = max(self.largest, keys.max(initial=0))

    def change(self, spec: TensorSpec) -> Change:
        change = Change(spec.name, spec.dtype, spec.shape, self.changed, self.numel)
        if self.squares:
            norm, distance = (math.sqrt(math.fsum(column)) for column in np.concatenate(self.squares).T)
            change.relative = distance / norm if norm else (0.0 if not distance else math.inf)
            change.largest = float(self.largest.view(np.float32))
        return change


def _bytes(loaded: Loaded, offset: int, spec: TensorSpec, numel: int) -> np.ndarray[Any, Any]:
    """An input's bytes in the slot, moved onto their alignment where a file keeps them off it."""
    size = numel * max(1, DTYPES[spec.dtype].bits // 8)
    array = loaded.bytes_at(offset, size)
    return array if array.ctypes.data % max(1, DTYPES[spec.dtype].bits // 8) == 0 else array.copy()
