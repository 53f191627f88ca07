"""A ring of bytes: the one place where tiles live between disk and arithmetic.

Tiles are read, merged and written in one order, so their memory is taken and given back in that order: a ring, one
mapping made once, page aligned (O_DIRECT asks for it), its pages touched once and used again and again. A fresh
destination page costs several times the read that fills it. Taking waits while the ring is full: this is the
back-pressure between reading, merging and writing.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass

from streammerge.budget import Budget

PAGE = 4096


def round_up(size: int, unit: int = PAGE) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True, slots=True)
class Slot:
    """`size` bytes of the ring from `offset` on; `address` is where they lie in memory."""

    offset: int
    size: int
    address: int


class Closed(Exception):
    """The ring was closed while somebody waited for room: the run is ending."""


class Ring:
    """Page-aligned slots, taken and given back in the same order, out of one private mapping."""

    def __init__(self, budget: Budget, size: int, what: str) -> None:
        self.size = round_up(max(size, PAGE))
        self._budget = budget
        budget.take(self.size, what)
        private = {} if not hasattr(mmap, "MAP_PRIVATE") else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
        self._map = mmap.mmap(-1, self.size, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel may be built without them
                self._map.madvise(mmap.MADV_HUGEPAGE)  # a direct read into large pages takes half the time here
        self.view = memoryview(self._map)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        self._slots: deque[tuple[Slot, int]] = deque()  # slots in use, oldest first, with the bytes skipped before each
        self._given: set[int] = set()  # offsets of slots given back before an older one
        self._head = 0  # where the next slot starts
        self._used = 0  # bytes between the oldest slot and the head, skipped ones included
        self._closed = False
        self._changed = threading.Condition()

    def take(self, size: int) -> Slot:
        """The next `size` bytes (rounded up to pages), waiting until they are free.

        Raises:
            Closed: the ring was closed.
        """
        size = round_up(max(size, 1))
        assert size <= self.size, f"a slot of {size} bytes in a ring of {self.size}"
        with self._changed:
            while True:
                if self._closed:
                    raise Closed
                skip = self.size - self._head if self._head + size > self.size else 0
                if not self._slots:
                    self._head = self._used = skip = 0
                if self._used + skip + size <= self.size:
                    break
                self._changed.wait()
            offset = (self._head + skip) % self.size
            slot = Slot(offset, size, self.address + offset)
            self._slots.append((slot, skip))
            self._used += skip + size
            self._head = offset + size
            return slot

    def give(self, slot: Slot) -> None:
        """Give a slot back; its room is free again once all older slots are back too."""
        with self._changed:
            self._given.add(slot.offset)
            while self._slots and self._slots[0][0].offset in self._given:
                oldest, skip = self._slots.popleft()
                self._given.discard(oldest.offset)
                self._used -= skip + oldest.size
            self._changed.notify_all()

    def bytes_of(self, slot: Slot, first: int, last: int) -> memoryview:
        """Bytes [first, last) of a slot."""
        return self.view[slot.offset + first : slot.offset + last]

    def stop(self) -> None:
        """Wake whoever waits for room; they see `Closed`."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def close(self) -> None:
        """Unmap the ring and enter its bytes as free. Nobody may hold a slot."""
        self.stop()
        self.view.release()
        with suppress(BufferError):  # a reader that died mid-way still holds a view; the mapping goes with it
            self._map.close()
        self._budget.give(self.size)
