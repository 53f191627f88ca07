"""Writes tensors of a shard in any order, for work that does not follow the file: layers come last to first.

A tensor comes in pieces, each with its place. Whole pages go out with O_DIRECT, the rest of a page that tensors share
through the page cache, so that no page is written both ways. `seal` has the journal say which tensors are durable, once
they are; a run that goes on keeps them. When all tensors of a shard are sealed its hash is taken by reading it back.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from streammerge.store import journal
from streammerge.store.publish import machine
from streammerge.store.ring import PAGE, Ring, Slot
from streammerge.store.shardfile import Shard, ShardFile
from streammerge.store.writer import Writer

Member = tuple[int, str]  # a shard's number, and the name of a tensor of it


class Pages(ShardFile):
    """A shard that is written at any place."""

    def __init__(self, path: Path, layout: Shard) -> None:
        super().__init__(path, layout, 0)
        self._cached = os.open(path, os.O_RDWR)
        try:
            self._through_cache_at(memoryview(layout.header), 0)
        except BaseException:
            self.close()
            raise

    def write_at(self, view: memoryview, begin: int) -> None:
        """Bytes at any place; the memory of whole pages lies as the file does."""
        first = min(-begin % PAGE, len(view))
        whole = first + (len(view) - first) // PAGE * PAGE
        self._through_cache_at(view[:first], begin)
        self.write(view[first:whole], begin + first)
        self._through_cache_at(view[whole:], begin + whole)

    def _through_cache_at(self, view: memoryview, at: int) -> None:
        done = 0
        while done < len(view):
            done += os.pwrite(self._cached, view[done:], at + done)

    def close(self) -> None:
        super().close()
        if self._cached >= 0:
            os.close(self._cached)
            self._cached = -1


class ScatterWriter(Writer):
    """A Writer of which some shards are written in any order; `members` are those, with the names of their tensors."""

    def __init__(
        self, out: Path, shards: Sequence[Shard], digest: str, ring: Ring, members: Mapping[int, Iterable[str]]
    ) -> None:
        self._members = {shard: set(names) for shard, names in members.items()}
        self._sealed: dict[int, set[str]] = {shard: set() for shard in members}
        self._files: dict[int, Pages] = {}
        self._opening = threading.Lock()
        self._writes: list[Future[None]] = []
        self._touched: dict[int, None] = {}
        self._leaving = False
        super().__init__(out, shards, digest, ring)
        for shard in self._members:
            self._syncer.submit(self._guard, self._close_if_complete, shard)

    def _believe(self, found: journal.Progress) -> None:
        super()._believe(found)
        for shard in self._members:
            layout = self._shards[shard]
            path = self.partial / layout.name
            if layout.name in self.hashes:
                self._sealed[shard] = set(self._members[shard])
            elif path.is_file() and path.stat().st_size == layout.size:
                self._sealed[shard] = found.tensors.get(layout.name, set()) & self._members[shard]

    def sealed(self, shard: int) -> frozenset[str]:
        """Tensors of a shard that are durable and need not be written again."""
        return frozenset(self._sealed[shard])

    def place(self, begin: int, size: int) -> tuple[Slot, int]:
        """A slot for `size` bytes that belong at byte `begin` of some shard, and the address where they go."""
        self.check()
        slot = self.ring.take(begin % PAGE + size)
        return slot, slot.address + begin % PAGE

    def put_at(self, shard: int, begin: int, slot: Slot, size: int) -> None:
        """Write the bytes of a slot that `place` gave for this `begin`; it is given back when they are on their way."""
        self.check()
        file, lead = self._file(shard), begin % PAGE
        view = self.ring.bytes_of(slot, lead, lead + size)
        self.bytes_written += size
        back = self._pool.submit(self._guard, file.write_at, view, begin, done=lambda: self.ring.give(slot))
        self._writes.append(back)
        self._touched[shard] = None

    def _file(self, shard: int) -> Pages:
        layout = self._shards[shard]
        with self._opening, machine(self.partial):
            if shard not in self._files:
                self._files[shard] = Pages(self.partial / layout.name, layout)
                self.bytes_written += len(layout.header)
            return self._files[shard]

    def seal(self, tensors: Sequence[Member], notes: Sequence[dict[str, Any]] = ()) -> None:
        """These tensors have been put whole: have the journal say so, behind the notes, once they are on the disk."""
        writes, self._writes = self._writes, []
        files, self._touched = [self._files[shard] for shard in self._touched], {}
        self._syncer.submit(self._guard, self._seal, writes, files, tensors, notes)

    def settle(self) -> None:
        """Wait until all that was sealed is in the journal.

        Raises:
            MachineError: writing failed.
        """
        self._syncer.submit(lambda: None).result()
        self.check()

    def _seal(
        self,
        writes: list[Future[None]],
        files: list[Pages],
        tensors: Sequence[Member],
        notes: Sequence[dict[str, Any]],
    ) -> None:
        for write in writes:
            write.result()
        if self._failure is not None:
            return
        for file in files:
            file.sync(file.layout.size)
        lines = [{"shard": self._shards[shard].name, "tensor": name} for shard, name in tensors]
        self._journal.append(*({"note": note} for note in notes), *lines)
        for shard, name in tensors:
            self._sealed[shard].add(name)
        for shard in dict.fromkeys(shard for shard, _ in tensors):
            self._close_if_complete(shard)

    def _close_if_complete(self, shard: int) -> None:
        """Take the hash of a shard that has all its tensors; on the syncer's thread."""
        layout = self._shards[shard]
        if self._sealed[shard] != self._members[shard] or layout.name in self.hashes or self._leaving:
            return
        file = self._file(shard)
        file.finish()
        file.hash_file(layout.size)
        digest = file.hash.hexdigest()
        self._journal.append({"shard": layout.name, "sha256": digest})
        self.hashes[layout.name] = digest

    def park(self) -> None:
        self._leaving = True  # hashes can wait
        super().park()

    def close(self) -> None:
        super().close()
        for file in self._files.values():
            file.close()
