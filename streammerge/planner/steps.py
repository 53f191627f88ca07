"""The order of work: which slices are read together, where they lie in their slot, what is done with them.

A step is one slot of the ring: slices of consecutive output tensors that are read at once and merged at once. Large
tensors are cut into tiles at multiples of their method's grain; small ones share a step and, where they are
neighbours in a shard, one read. Pure integers: the same plan gives the same steps, and the result does not depend
on where the cuts fall.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from streammerge.formats.dtypes import DTYPES, SIGNS, bits_of
from streammerge.formats.header import TensorSpec
from streammerge.method import SAMPLE, SLICES, TileMethod
from streammerge.planner.jobs import Job
from streammerge.store.reader import Extent
from streammerge.store.ring import PAGE, round_up

GAP = PAGE  # bytes read and thrown away rather than asking the disk twice; no more than two reads would waste

Kind = Literal["merge", "survey", "sample"]


@dataclass(frozen=True)
class PlannedTensor:
    """One output tensor: what makes it, and where it lies in which output shard (absolute bytes)."""

    job: Job
    method: TileMethod
    surveyed: bool
    shard: int
    begin: int
    end: int

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """Base first, where there is one, then the experts."""
        return (*(() if self.job.base is None else (self.job.base,)), *self.job.experts)

    @property
    def numel(self) -> int:
        """Elements; bytes, where several elements share one."""
        return self.inputs[0].nbytes // itemsize(self.inputs[0])

    @property
    def out_dtype(self) -> str:
        return self.job.dtype if DTYPES[self.job.dtype].bits >= 8 else "U8"

    @property
    def out_itemsize(self) -> int:
        return DTYPES[self.out_dtype].bits // 8

    @property
    def width(self) -> int:
        """Bytes of one element over all inputs."""
        return max(1, sum(itemsize(spec) for spec in self.inputs))


@dataclass(frozen=True, slots=True)
class Piece:
    """Elements [start, start + numel) of one tensor; `offsets` says where each input's lie in the slot.

    `reads` are the inputs that are there, by their places in PlannedTensor.inputs; None: all of them.
    """

    tensor: int
    start: int
    numel: int
    offsets: tuple[int, ...]
    reads: tuple[int, ...] | None = None

    def inputs(self, tensors: Sequence[PlannedTensor]) -> tuple[TensorSpec, ...]:
        """The inputs that are there, in the order of `offsets`."""
        every = tensors[self.tensor].inputs
        return every if self.reads is None else tuple(every[i] for i in self.reads)


@dataclass(frozen=True, slots=True)
class Step:
    """One slot: `size` bytes, filled by `extents`, cut into `pieces`.

    `last` is true on the step that ends its group: tiles of a surveyed tensor wait in the ring for each other.
    """

    kind: Kind
    pieces: tuple[Piece, ...]
    extents: tuple[Extent, ...]
    size: int
    last: bool = True

    @property
    def read_bytes(self) -> int:
        return sum(extent.end - extent.begin for extent in self.extents)


def itemsize(spec: TensorSpec) -> int:
    """Bytes of an element; sub-byte dtypes are handled as whole bytes of their data."""
    return max(1, bits_of(spec.dtype) // 8)


def lay_out(tensors: Sequence[PlannedTensor], pieces: Sequence[Piece]) -> tuple[list[Extent], list[Piece], int]:
    """Give every input of every piece its place in one slot; neighbours in a file become one extent.

    Returns the extents, the pieces with their offsets, and the bytes in all. An input that a piece names twice (the
    same file and place) is read once. Places keep a file's offset modulo a page, as O_DIRECT wants.
    """
    extents: list[Extent] = []
    offsets: list[dict[int, int]] = [{} for _ in pieces]
    size = 0
    for which in range(max((len(piece.inputs(tensors)) for piece in pieces), default=0)):
        newest: Extent | None = None
        for at, piece in enumerate(pieces):
            inputs = piece.inputs(tensors)
            if which >= len(inputs) or piece.numel == 0:
                continue
            begin, end = _range(inputs[which], piece)
            twin = next((i for i in range(which) if _same(inputs[i], inputs[which])), None)
            if twin is not None:
                offsets[at][which] = offsets[at][twin]
            elif newest and _continues(newest, inputs[which], begin):
                newest = replace(newest, end=end)
                extents[-1] = newest
                offsets[at][which] = newest.offset + begin - newest.begin
            else:
                newest = Extent(inputs[which].file, begin, end, size + begin % PAGE)
                extents.append(newest)
                offsets[at][which] = newest.offset
            if newest:
                size = round_up(newest.offset + newest.end - newest.begin)
    placed = [
        replace(piece, offsets=tuple(found.get(i, 0) for i in range(len(piece.inputs(tensors)))))
        for piece, found in zip(pieces, offsets, strict=True)
    ]
    return extents, placed, size


def _range(spec: TensorSpec, piece: Piece) -> tuple[int, int]:
    bits = bits_of(spec.dtype) if spec.dtype == SIGNS else 8 * itemsize(spec)
    return spec.begin + piece.start * bits // 8, spec.begin + -(-(piece.start + piece.numel) * bits // 8)


def _same(one: TensorSpec, other: TensorSpec) -> bool:
    return one.file == other.file and one.begin == other.begin


def _continues(extent: Extent, spec: TensorSpec, begin: int) -> bool:
    aligned = (begin - extent.begin + extent.offset) % itemsize(spec) == 0
    return extent.file == spec.file and 0 <= begin - extent.end <= GAP and aligned


class Packer:
    """Collects pieces until a slot of `cap` bytes is full."""

    def __init__(self, tensors: Sequence[PlannedTensor], cap: int) -> None:
        self._tensors, self._cap = tensors, cap
        self._pieces: list[Piece] = []
        self._bound = 0  # no layout of the pieces is larger

    def fits(self, tensor: PlannedTensor) -> int:
        """Elements of this tensor that still fit."""
        return max(0, self._cap - self._bound - len(tensor.inputs) * 2 * PAGE) // tensor.width

    def add(self, index: int, start: int, numel: int, reads: tuple[int, ...] | None = None) -> None:
        tensor = self._tensors[index]
        self._pieces.append(Piece(index, start, numel, (), reads))
        self._bound += numel * tensor.width + len(tensor.inputs) * 2 * PAGE

    def flush(self, kind: Kind = "merge", last: bool = True) -> Iterator[Step]:
        """The step collected so far, if there is one."""
        if self._pieces:
            extents, pieces, size = lay_out(self._tensors, self._pieces)
            yield Step(kind, tuple(pieces), tuple(extents), max(size, PAGE), last)
            self._pieces, self._bound = [], 0


@dataclass(frozen=True)
class Cut:
    """How a plan's tensors are cut: bytes of a step, and bytes of a ring that may hold one tensor whole.

    On a device it is `slots` that hold a tensor, one for each of its tiles and one to spare; 0: there is no device.
    """

    step: int
    resident: int
    slots: int = 0


def merge_steps(tensors: Sequence[PlannedTensor], cut: Cut, first: int = 0, start: int = 0) -> Iterator[Step]:
    """Every step of a merge, in order, from element `start` of tensor `first` on."""
    packer = Packer(tensors, cut.step)
    for index in range(first, len(tensors)):
        tensor = tensors[index]
        at = start if index == first else 0
        if packer.fits(tensor) >= tensor.numel - at:
            packer.add(index, at, tensor.numel - at)
        elif tensor.surveyed:
            yield from packer.flush()
            yield from surveyed_steps(tensors, index, cut)
        else:
            for lo, hi in tiles(tensor, cut, at, packer.fits(tensor)):
                if packer.fits(tensor) < hi - lo:
                    yield from packer.flush()
                packer.add(index, lo, hi - lo)
        if index + 1 < len(tensors) and tensors[index + 1].shard != tensor.shard:
            yield from packer.flush()
    yield from packer.flush()


def surveyed_steps(tensors: Sequence[PlannedTensor], index: int, cut: Cut) -> Iterator[Step]:
    """Steps of one tensor that must be surveyed before it is merged."""
    tensor = tensors[index]
    if tensor.numel <= Packer(tensors, cut.step).fits(tensor):
        packer = Packer(tensors, cut.step)
        packer.add(index, 0, tensor.numel)
        yield from packer.flush()
    elif is_resident(tensors, index, cut):
        yield from tile_steps(tensors, index, cut, "merge", together=True)
    else:
        yield from sample_step(tensors, index)
        yield from round_steps(tensors, index, cut)


def is_whole(tensors: Sequence[PlannedTensor], index: int, cut: Cut) -> bool:
    """Whether a surveyed tensor is in memory at once, be it in a step of its own or in several."""
    tensor = tensors[index]
    return tensor.surveyed and (
        tensor.numel <= Packer(tensors, cut.step).fits(tensor) or is_resident(tensors, index, cut)
    )


def is_resident(tensors: Sequence[PlannedTensor], index: int, cut: Cut) -> bool:
    """Whether all inputs of a tensor fit the ring at once, wherever it stands: wrapping around wastes part of one."""
    tensor = tensors[index]
    count = sum(1 for _ in tiles(tensor, cut))
    if cut.slots:
        return count < cut.slots
    return tensor.numel * tensor.width + count * len(tensor.inputs) * 2 * PAGE + cut.step <= cut.resident


def round_steps(tensors: Sequence[PlannedTensor], index: int, cut: Cut) -> Iterator[Step]:
    """The rounds of a survey, each a read of what it needs, and the merge."""
    method, experts = tensors[index].method, len(tensors[index].job.experts)
    for number in range(method.rounds(experts)):
        yield from tile_steps(tensors, index, cut, "survey", reads=method.reads(number, experts))
    yield from tile_steps(tensors, index, cut, "merge", reads=method.reads(method.rounds(experts), experts))


def tile_steps(
    tensors: Sequence[PlannedTensor],
    index: int,
    cut: Cut,
    kind: Kind,
    together: bool = False,
    reads: tuple[int, ...] | None = None,
) -> Iterator[Step]:
    """One step per tile of a tensor; `together` if they wait for each other, `reads` which inputs they need."""
    packer = Packer(tensors, cut.step)
    for lo, hi in tiles(tensors[index], cut):
        packer.add(index, lo, hi - lo, reads)
        yield from packer.flush(kind, last=not together or hi == tensors[index].numel)


def sample_step(tensors: Sequence[PlannedTensor], index: int) -> Iterator[Step]:
    """Slices spread evenly over a tensor, in one slot."""
    tensor = tensors[index]
    size = min(SAMPLE, tensor.numel) // SLICES
    grain = tensor.method.grain(tensor.job.shape)
    packer = Packer(tensors, sample_bytes(tensor))
    for at in range(SLICES):
        packer.add(index, at * (tensor.numel - size) // (SLICES - 1) // grain * grain, size)
    yield from packer.flush("sample")


def sample_bytes(tensor: PlannedTensor) -> int:
    """The most that the slot of a tensor's sample takes."""
    return min(SAMPLE, tensor.numel) * tensor.width + SLICES * len(tensor.inputs) * 2 * PAGE


def tiles(tensor: PlannedTensor, cut: Cut, start: int = 0, room: int | None = None) -> Iterator[tuple[int, int]]:
    """[first, last) pairs that cover a tensor from `start` on, cut at multiples of its method's grain.

    The first pair takes `room` elements if it is given and holds at least one grain: what is left of a slot.
    """
    grain = tensor.method.grain(tensor.job.shape)
    whole = (cut.step - len(tensor.inputs) * 2 * PAGE) // tensor.width
    size = max(grain, whole // grain * grain)
    at = start
    if room is not None and room // grain and start < tensor.numel:
        last = min((start + room) // grain * grain, tensor.numel)
        if last > start:
            yield start, last
            at = last
    while at < tensor.numel:
        last = min(at - at % grain + size, tensor.numel)
        yield at, last
        at = last


def smallest_step(tensors: Sequence[PlannedTensor]) -> int:
    """Bytes of the smallest slot in which every tensor can be worked on: one grain of each."""
    return max(
        (min(t.numel, t.method.grain(t.job.shape)) * t.width + len(t.inputs) * 2 * PAGE for t in tensors),
        default=PAGE,
    )
