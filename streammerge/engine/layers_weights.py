"""Brings what a visit needs into memory, ahead of the arithmetic.

    disk -> ring -> a unit's block, converted to the dtype that is computed in

Blocks are used again and again: touching fresh memory costs several times the read that fills it. On a GPU blocks lie
there, the ring is pinned and copies have a stream of their own: the arithmetic waits for the copies of its visit, a
block is written again after its last use (layers_device.py).
"""

from __future__ import annotations

import math
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from streammerge.engine.layers_device import Host
from streammerge.engine.layers_hooks import Loaded
from streammerge.engine.layers_order import Read, Unit, Visit, fresh
from streammerge.formats.dtypes import DTYPES
from streammerge.models.stack import Stack
from streammerge.store.reader import Extent, Reader
from streammerge.store.ring import PAGE, Closed, Ring, Slot, round_up

if TYPE_CHECKING:
    from torch import Tensor

SLOT = 4 << 20  # bytes that are read, then converted, at a time
SLOTS = 4  # of the ring: two being read, one being converted, and what the ring skips at its end
AHEAD = 2


def ring_bytes(visits: Sequence[Visit]) -> int:
    """A few slots; less if no visit has so much to read."""
    most = max((sum(round_up(r.spec.nbytes) + 2 * PAGE for u in v.units for r in u.reads) for v in visits), default=0)
    return SLOTS * min(SLOT, round_up(max(most, PAGE)))


class Blocks:
    """Memory for units, within what `allow` allows. What is given back is kept for the next unit of that size."""

    def __init__(self, place: Host, poison: bool = False) -> None:
        self._place, self._poison = place, poison
        self._idle: list[tuple[Tensor, Any]] = []  # with the arithmetic that used it last
        self._held = self._limit = 0
        self._lock = threading.Lock()

    def allow(self, limit: int) -> None:
        """Hold at most so many bytes from now on."""
        with self._lock:
            self._limit = limit
            while self._idle and self._held > limit:
                self._drop()

    def take(self, size: int) -> Tensor:
        """A flat uint8 tensor of `size` bytes; copies into it wait for its last use."""
        import torch

        with self._lock:
            for number, (block, used) in enumerate(self._idle):
                if block.numel() == size:
                    del self._idle[number]
                    self._place.after(used)
                    return block
            while self._idle and self._held + size > self._limit:
                self._drop()
            assert self._held + size <= self._limit, f"{self._held} + {size} bytes of weights, planned {self._limit}"
            self._held += size
            return self._place.allocate(size) if size else torch.empty(0, dtype=torch.uint8)

    def give(self, block: Tensor) -> None:
        if self._poison:
            block.fill_(0xFF)  # NaN in every floating dtype: whoever still reads it is found out
        with self._lock:
            self._idle.append((block, self._place.used()))

    def _drop(self) -> None:
        block, _ = self._idle.pop(0)
        self._held -= block.numel()

    def close(self) -> None:
        self.allow(0)
        assert not self._held, "weights are still in use"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Consecutive elements of a read: where they come in a slot, and where in the tensor they belong."""

    read: Read
    extent: Extent
    first: int  # byte of the tensor, as stored


def _pieces(reads: Sequence[Read], slot: int) -> Iterator[list[_Piece]]:
    """All bytes of the reads, packed into slots of at most `slot` bytes."""
    found: list[_Piece] = []
    at = 0
    for read in sorted(reads, key=lambda read: (read.spec.file, read.spec.begin)):
        spec, width = read.spec, DTYPES[read.spec.dtype].bits // 8
        begin = spec.begin
        while begin < spec.end:
            lead = begin % PAGE
            room = slot - at - lead
            size = min(spec.end - begin, max(room, 0) // width * width)
            if size < min(spec.end - begin, PAGE):
                yield found
                found, at = [], 0
                continue
            found.append(_Piece(read, Extent(spec.file, begin, begin + size, at + lead), begin - spec.begin))
            begin += size
            at = round_up(at + lead + size)
    if found:
        yield found


@dataclass
class Ready:
    """A visit whose stages are in memory. `new` are those whose parameters were loaded for it."""

    visit: Visit
    loaded: dict[int, Loaded]
    new: frozenset[int]
    mark: Any


class Feed:
    """A thread that loads the units of visits in their order, up to `prefetch` visits ahead."""

    def __init__(
        self,
        stack: Stack,
        visits: Sequence[Visit],
        prefetch: int,
        room: Sequence[int],
        blocks: Blocks,
        ring: Ring,
        reader: Reader,
        place: Host,
    ) -> None:
        """`room[i]` is what units may take while visit i runs."""
        self._stack, self._visits, self._prefetch, self._room = stack, visits, prefetch, room
        self._blocks, self._ring, self._reader, self._place = blocks, ring, reader, place
        self._held: dict[Unit, tuple[Tensor, dict[str, Tensor]]] = {}
        self._queue: queue.SimpleQueue[Ready | BaseException] = queue.SimpleQueue()
        self._changed = threading.Condition()
        self._current, self._stopped = -1, False
        blocks.allow(room[0])
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def next(self) -> Ready:
        """Give back the visit before, as far as no near one needs it, and wait for the next."""
        self._release(self._current)
        self._blocks.allow(self._room[self._current + 1])
        with self._changed:
            self._current += 1
            self._changed.notify()
        ready = self._queue.get()
        if isinstance(ready, BaseException):
            raise ready
        self._place.wait(ready.mark)
        return ready

    def _release(self, index: int) -> None:
        if index < 0:
            return
        near = {unit for visit in self._visits[index + 1 : index + 2 + self._prefetch] for unit in visit.units}
        for unit in self._visits[index].units:
            if unit not in near:
                self._blocks.give(self._held.pop(unit)[0])

    def _run(self) -> None:
        try:
            for index, (visit, units) in enumerate(zip(self._visits, fresh(self._visits, self._prefetch), strict=True)):
                with self._changed:
                    self._changed.wait_for(partial(self._may_load, index))
                if self._stopped:
                    return
                for unit in units:
                    self._allocate(unit)
                for unit in units:
                    self._load(unit)
                self._queue.put(self._ready(visit, frozenset(unit.stage for unit in units if unit.source < 0)))
        except Closed:
            return
        except BaseException as error:
            self._queue.put(error)

    def _may_load(self, index: int) -> bool:
        return self._stopped or index <= self._current + self._prefetch

    def _allocate(self, unit: Unit) -> None:
        block = self._blocks.take(unit.size)
        tensors = {}
        for place in unit.places:
            size = math.prod(place.shape) * place.dtype.itemsize
            tensors[place.name] = block[place.offset : place.offset + size].view(place.dtype).view(place.shape)
        self._held[unit] = block, tensors

    def _load(self, unit: Unit) -> None:
        block = self._held[unit][0]
        waiting: deque[tuple[Slot, list[Future[None]], list[_Piece]]] = deque()
        for pieces in _pieces(unit.reads, self._ring.size // SLOTS):
            if len(waiting) == AHEAD:
                self._finish(block, *waiting.popleft())
            slot = self._ring.take(pieces[-1].extent.offset + pieces[-1].extent.end - pieces[-1].extent.begin)
            waiting.append((slot, self._reader.fill(slot, [piece.extent for piece in pieces]), pieces))
        while waiting:
            self._finish(block, *waiting.popleft())

    def _finish(self, block: Tensor, slot: Slot, reads: list[Future[None]], pieces: list[_Piece]) -> None:
        from streammerge.engine.layers_device import torch_dtype

        for read in reads:
            read.result()
        for piece in pieces:
            dtype = torch_dtype(piece.read.dtype)
            width = DTYPES[piece.read.spec.dtype].bits // 8
            size = piece.extent.end - piece.extent.begin
            first = piece.read.offset + piece.first // width * dtype.itemsize
            out = block[first : first + size // width * dtype.itemsize].view(dtype)
            self._place.copy(out, slot.address + piece.extent.offset, piece.read.spec.dtype, size)
        self._place.landed()
        self._ring.give(slot)

    def _ready(self, visit: Visit, new: frozenset[int]) -> Ready:
        parameters: dict[str, Tensor] = {}
        loaded: dict[int, Loaded] = {}
        for unit in visit.units:
            stage, tensors = self._stack.stages[unit.stage], self._held[unit][1]
            if unit.source < 0:
                parameters |= tensors
                own = {name: parameters[name] for name in stage.parameters}
                fresh_names = tuple(name for name, part in stage.parts.items() if part.parameter in tensors)
                loaded[unit.stage] = Loaded(stage, own, stage.views(own), fresh_names)
            else:
                loaded[unit.stage].raw[unit.source] = tensors
        return Ready(visit, loaded, new, self._place.mark())

    def close(self) -> None:
        """Stop loading and give everything back. Nobody may use what was loaded."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        for block, _ in self._held.values():
            self._blocks.give(block)
        self._held.clear()
