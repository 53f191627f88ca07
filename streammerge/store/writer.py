"""Puts bytes at the offsets that the plan fixed, and publishes a folder that is complete or not at all.

    OUT.partial/          unfinished: shards preallocated (a full disk is found at once), journal.jsonl
    OUT.partial/ -> OUT/  renamed last, when shards, index, side files and manifest are written and synced

Shards are written in order, tile after tile, with O_DIRECT where the file system has it: a tile's slot starts at the
tile's place within its page, the bytes of that page which belong to the tile before are carried over, and whole pages
go to the disk from where they were computed. SHA-256 is taken from the same slots, in order, on a thread of its own.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from streammerge.budget import human
from streammerge.errors import MachineError
from streammerge.store import journal
from streammerge.store.publish import into_place, machine
from streammerge.store.ring import PAGE, Ring, Slot
from streammerge.store.shardfile import Shard, ShardFile, allocate, sync_path

__all__ = ["HEADER_PIECE", "MANIFEST", "SYNC_EVERY", "Shard", "Writer"]

MANIFEST = "streammerge.json"
SYNC_EVERY = 256 << 20  # bytes between two journal lines: what a kill can cost
HEADER_PIECE = 1 << 20  # bytes of a header that are put at once


class Writer:
    """Writes the shards of one output folder. All calls come from one thread; the work is done on others."""

    def __init__(self, out: Path, shards: Sequence[Shard], digest: str, ring: Ring) -> None:
        self.partial = out.with_name(out.name + ".partial")
        self._out, self._shards, self.ring = out, shards, ring
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"{self.partial}: cannot be made: {error.strerror}; choose another folder") from error
        self._digest = digest
        self._journal = journal.Journal(self.partial, digest)
        self.hashes: dict[str, str] = {}
        self._done: dict[str, int] = {}
        self._believe(self._journal.found)
        self.bytes_written = 0
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="write")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._open: ShardFile | None = None
        self._notes: list[dict[str, Any]] = []
        self._stopped = False
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        try:
            with machine(self.partial):
                self._preallocate()
        except BaseException:
            self.close()
            if not self._journal.found.digest:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    def _believe(self, found: journal.Progress) -> None:
        """Take the journal's word for the shards that are still as this program left them."""
        for shard in self._shards:
            path = self.partial / shard.name
            if path.is_file() and path.stat().st_size == shard.size:
                if shard.name in found.finished:
                    self.hashes[shard.name] = found.finished[shard.name]
                self._done[shard.name] = found.done.get(shard.name, 0)

    @property
    def is_open(self) -> bool:
        """Whether a shard is being written."""
        return self._open is not None

    @property
    def earlier_notes(self) -> list[dict[str, Any]]:
        """What earlier runs noted about the work that is durable."""
        return list(self._journal.found.notes.values())

    def note(self, what: dict[str, Any]) -> None:
        """Remember something about the bytes put so far; it is in the journal before they are."""
        self._notes.append(what)

    def resume_at(self, shard: int) -> int:
        """Bytes of a shard that need not be written again; its size if it is complete."""
        name = self._shards[shard].name
        return self._shards[shard].size if name in self.hashes else self._done.get(name, 0)

    def _preallocate(self) -> None:
        missing = 0
        for shard in self._shards:
            path = self.partial / shard.name
            missing += shard.size - (path.stat().st_blocks * 512 if path.exists() else 0)
        free = shutil.disk_usage(self.partial).free
        if missing > free:
            raise MachineError(
                f"{self.partial}: the output needs {human(missing)} more, {human(free)} are free on this disk; "
                "make room or write elsewhere"
            )
        for shard in self._shards:
            allocate(self.partial / shard.name, shard.size)
        sync_path(self.partial)

    def begin(self, shard: int, at: int) -> None:
        """Open a shard for writing from byte `at` on, 0 or a place that `resume_at` covers."""
        self.check()
        layout = self._shards[shard]
        with machine(self.partial):
            self._open = stream = ShardFile(self.partial / layout.name, layout, at)
        if at == 0:
            self._put_bytes(layout.header)
        else:
            self._hasher.submit(self._guard, stream.hash_file, at)

    def room(self, size: int) -> tuple[Slot, int]:
        """A slot for the next `size` bytes of the open shard, and the address where they go.

        There may be several rooms before the first is put; they are put in their order.
        """
        assert self._open is not None
        lead = self._open.promised % PAGE
        slot = self.ring.take(lead + size)
        self._open.promised += size
        return slot, slot.address + lead

    def put(self, slot: Slot, size: int) -> None:
        """Write the `size` bytes that `room` made room for; the slot is given back when they are safe."""
        self.check()
        stream = self._open
        assert stream is not None
        lead = len(stream.carry)
        end = lead + size
        whole = end // PAGE * PAGE
        view = self.ring.bytes_of(slot, 0, slot.size)
        view[:lead] = stream.carry
        at, stream.carry = stream.position - lead, bytes(view[whole:end])
        stream.position += size
        self.bytes_written += size
        release = _Countdown(2, lambda: self.ring.give(slot))
        stream.writes.append(self._pool.submit(self._guard, stream.write, view[:whole], at, done=release))
        stream.sent = at + whole
        self._hasher.submit(self._guard, stream.hash.update, view[lead:end], done=release)
        if stream.position - stream.marked >= SYNC_EVERY:
            self._mark(stream)

    def _put_bytes(self, data: bytes) -> None:
        for first in range(0, len(data), HEADER_PIECE):
            piece = data[first : first + HEADER_PIECE]
            slot, _ = self.room(len(piece))
            lead = len(self._open.carry) if self._open else 0
            self.ring.bytes_of(slot, lead, lead + len(piece))[:] = piece
            self.put(slot, len(piece))

    def _mark(self, stream: ShardFile) -> None:
        """Have the journal say how far this shard is durable, once it is; an interrupt may come between any lines."""
        writes, durable, notes = list(stream.writes), stream.sent, list(self._notes)
        stream.marked = stream.position
        self._syncer.submit(self._guard, self._sync, stream, writes, durable, notes)
        stream.writes = stream.writes[len(writes) :]
        self._notes = self._notes[len(notes) :]

    def _sync(self, stream: ShardFile, writes: list[Future[None]], durable: int, notes: list[dict[str, Any]]) -> None:
        for write in writes:
            write.result()
        if self._failure is None:
            stream.sync(durable)
            self._journal.append(*({"note": note} for note in notes), {"shard": stream.layout.name, "done": durable})

    def end(self) -> None:
        """Close the open shard; its last bytes, sync, hash and journal line follow on other threads."""
        stream = self._open
        assert stream is not None
        assert stream.position == stream.layout.size
        self._open = None
        hashed = self._hasher.submit(self._guard, lambda: None)
        notes, self._notes = self._notes, []
        self._syncer.submit(self._guard, self._finish, stream, stream.writes, hashed, notes, done=stream.close)

    def _finish(
        self, stream: ShardFile, writes: list[Future[None]], hashed: Future[None], notes: list[dict[str, Any]]
    ) -> None:
        for write in [*writes, hashed]:
            write.result()
        if self._failure is None:
            stream.finish()
            digest = stream.hash.hexdigest()
            self._journal.append(*({"note": note} for note in notes), {"shard": stream.layout.name, "sha256": digest})
            self.hashes[stream.layout.name] = digest

    def _guard(self, work: Callable[..., Any], *args: Any, done: Callable[[], None] | None = None) -> None:
        """Run work on a thread; the first failure is kept for `check`, and what follows it is skipped."""
        try:
            if self._failure is None:
                work(*args)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self.ring.stop()
        finally:
            if done:
                done()

    def check(self) -> None:
        """Raise what a thread ran into.

        Raises:
            MachineError: the disk is full or failed; what the journal says is kept.
        """
        with machine(self.partial):
            if self._failure is not None:
                raise self._failure

    def drain(self) -> None:
        """Wait until all that was put is written, synced, hashed and in the journal."""
        self._stop()
        self.check()

    def park(self) -> None:
        """Record how far an interrupted run came."""
        if self._open is not None and self._failure is None and not self._stopped:
            self._mark(self._open)
        self._stop()

    def discard(self) -> None:
        """Delete what was written: the inputs were refused."""
        self._stop(cancel=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def _stop(self, cancel: bool = False) -> None:
        self._stopped = True
        for pool in (self._pool, self._hasher, self._syncer):
            pool.shutdown(wait=True, cancel_futures=cancel)

    def publish(self, files: dict[str, bytes], copies: Sequence[Path], manifest: bytes, overwrite: bool) -> None:
        """Complete the folder (small files, copies, manifest last) and rename it into place."""
        held = journal.Journal(self.partial, self._digest)
        try:
            with machine(self.partial):
                self._complete(files, copies, manifest)
                into_place(self.partial, self._out, overwrite)
        finally:
            held.close()

    def _complete(self, files: dict[str, bytes], copies: Sequence[Path], manifest: bytes) -> None:
        for source in copies:
            shutil.copyfile(source, self.partial / source.name)
        for name, data in files.items():
            (self.partial / name).write_bytes(data)
        for name in [*files, *(source.name for source in copies)]:
            sync_path(self.partial / name)
        (self.partial / (MANIFEST + ".new")).write_bytes(manifest)
        sync_path(self.partial / (MANIFEST + ".new"))
        os.replace(self.partial / (MANIFEST + ".new"), self.partial / MANIFEST)
        sync_path(self.partial)
        (self.partial / journal.NAME).unlink()

    def close(self) -> None:
        """End the threads; whatever ended the run, what is on the disk is in the journal."""
        self.park()
        if self._open is not None:
            self._open.close()
        self._journal.close()


class _Countdown:
    """Calls `then` when it has been called `count` times."""

    def __init__(self, count: int, then: Callable[[], None]) -> None:
        self._left, self._then, self._lock = count, then, threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._left -= 1
            if self._left:
                return
        self._then()
