"""Where a run's results go: into the shards of an output folder, or to a caller tensor by tensor."""

from __future__ import annotations

from collections import deque
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from streammerge.planner.plan import Plan
from streammerge.store.ring import Ring, Slot
from streammerge.store.scatter import ScatterWriter
from streammerge.store.writer import Writer

AHEAD = 2  # rooms that may wait to be put: one step's results travel while the next are made


class Sink(Protocol):
    """Where results go. One step's results are contiguous: one `room`, one `put`; AHEAD rooms at most are open."""

    ring: Ring | None  # the memory of all rooms, if it is one ring

    def position(self) -> tuple[int, int]:
        """The shard and byte to start from: work before it is durable already."""

    def room(self, shard: int, begin: int, size: int) -> int:
        """The address for the `size` result bytes that belong at `begin` of a shard.

        All rooms of the shard before have been put.
        """

    def put(self) -> None:
        """The bytes of the oldest room that was not put are there."""

    def note(self, what: dict[str, Any]) -> None:
        """Something noticed about bytes that are put next; a run that goes on where this one ended gets it back."""

    def earlier_notes(self) -> list[dict[str, Any]]:
        """What earlier runs noted about work that is durable."""


class FileSink:
    """Results in plan order into a `Writer`; a shard is opened at its first result and closed after its last."""

    def __init__(self, plan: Plan, writer: Writer) -> None:
        self._plan, self._writer = plan, writer
        self.ring: Ring | None = writer.ring
        self._begun: list[int] = []
        self._rooms: deque[tuple[Slot, int]] = deque()

    def position(self) -> tuple[int, int]:
        """The first shard that is not complete, and its durable bytes."""
        for number, shard in enumerate(self._plan.layout.shards):
            if shard.name not in self._writer.hashes:
                return number, self._writer.resume_at(number)
        return len(self._plan.layout.shards), 0

    def room(self, shard: int, begin: int, size: int) -> int:
        if not self._begun or shard != self._begun[-1]:
            self._end()
            self._begin(shard, begin)
        slot, address = self._writer.room(size)
        self._rooms.append((slot, size))
        return address

    def put(self) -> None:
        self._writer.put(*self._rooms.popleft())

    def note(self, what: dict[str, Any]) -> None:
        self._writer.note(what)

    def earlier_notes(self) -> list[dict[str, Any]]:
        return self._writer.earlier_notes

    def finish(self) -> None:
        """Close the last shard, complete those that have no bytes left to merge, wait until all is on the disk.

        Raises:
            MachineError: writing failed.
        """
        self._end()
        for number, shard in enumerate(self._plan.layout.shards):
            if number not in self._begun and shard.name not in self._writer.hashes:
                self._begin(number, self._writer.resume_at(number))
                self._end()
        self._writer.drain()

    def _begin(self, shard: int, at: int) -> None:
        header = len(self._plan.layout.shards[shard].header)
        self._writer.begin(shard, at if at > header else 0)
        self._begun.append(shard)

    def _end(self) -> None:
        if self._writer.is_open:
            self._writer.end()


class ScatterSink:
    """A run's results at their places, in whatever order the places are; what it notes is kept for its caller."""

    def __init__(self, writer: ScatterWriter) -> None:
        self._writer = writer
        self.ring: Ring | None = writer.ring
        self._rooms: deque[tuple[int, int, Slot, int]] = deque()
        self.notes: list[dict[str, Any]] = []

    def position(self) -> tuple[int, int]:
        return 0, 0

    def room(self, shard: int, begin: int, size: int) -> int:
        slot, address = self._writer.place(begin, size)
        self._rooms.append((shard, begin, slot, size))
        return address

    def put(self) -> None:
        self._writer.put_at(*self._rooms.popleft())

    def note(self, what: dict[str, Any]) -> None:
        self.notes.append(what)

    def earlier_notes(self) -> list[dict[str, Any]]:
        return []


class MemorySink:
    """Results as arrays of bytes, one whole tensor at a time, for whoever wants no files."""

    ring: Ring | None = None

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._scratch = np.empty((AHEAD, plan.out_bytes // AHEAD), np.uint8)  # used in turn
        self._turn = 0
        self._rooms: deque[tuple[int, int]] = deque()
        self._next = 0  # the tensor that the next byte belongs to
        self._filled = 0  # bytes of it that are there
        self._parts: dict[int, npt.NDArray[np.uint8]] = {}

    def position(self) -> tuple[int, int]:
        return 0, 0

    def room(self, shard: int, begin: int, size: int) -> int:
        self._rooms.append((self._turn, size))
        self._turn = (self._turn + 1) % AHEAD
        assert len(self._rooms) <= AHEAD
        assert size <= self._scratch.shape[1]
        return int(self._scratch[self._rooms[-1][0]].ctypes.data)

    def put(self) -> None:
        turn, size = self._rooms.popleft()
        at = 0
        while at < size:
            tensor = self._plan.tensors[self._next]
            nbytes = tensor.end - tensor.begin
            part = self._parts.setdefault(self._next, np.empty(nbytes, np.uint8))
            step = min(nbytes - self._filled, size - at)
            part[self._filled : self._filled + step] = self._scratch[turn, at : at + step]
            at += step
            self._filled += step
            if self._filled == nbytes:
                self._next, self._filled = self._next + 1, 0

    def note(self, what: dict[str, Any]) -> None:
        """Nothing here outlives the run."""

    def earlier_notes(self) -> list[dict[str, Any]]:
        return []

    def take(self, index: int) -> npt.NDArray[np.uint8]:
        """The bytes of a finished tensor; the sink forgets them."""
        return self._parts.pop(index, np.empty(0, np.uint8))
