"""Puts bytes at the offsets that the plan fixed, and publishes a folder that is complete or not at all.

    OUT.partial/          unfinished: shards preallocated (a full disk is found at once), journal.jsonl
    OUT.partial/ -> OUT/  renamed last, when shards, index, side files and manifest are written and synced

Shards are written in order, tile after tile, with O_DIRECT where the file system has it: a tile's slot starts at the
tile's place within its page, the bytes of that page which belong to the tile before are carried over, and whole pages
go to the disk from where they were computed. SHA-256 is taken from the same slots, in order, on a thread of its own.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.budget import human
from streammerge.errors import MachineError, OutputExists
from streammerge.store import journal
from streammerge.store.ring import PAGE, Ring, Slot

MANIFEST = "streammerge.json"
SYNC_EVERY = 256 << 20  # bytes between two journal lines: what a kill can cost
HEADER_PIECE = 1 << 20  # bytes of a header, and of a file that is hashed again, handled at once


@dataclass(frozen=True)
class Shard:
    """One output file: its header, already padded to whole pages, and its size in all."""

    name: str
    header: bytes
    size: int


class Writer:
    """Writes the shards of one output folder. All calls come from one thread; the work is done on others."""

    def __init__(self, out: Path, shards: Sequence[Shard], digest: str, ring: Ring) -> None:
        self.partial = out.with_name(out.name + ".partial")
        self._out, self._shards, self._ring = out, shards, ring
        self._progress = journal.read(self.partial)
        fresh = not self._progress.digest
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MachineError(f"{self.partial}: cannot be made: {error.strerror}") from error
        self._journal = journal.Journal(self.partial, digest)
        self.hashes: dict[str, str] = dict(self._progress.finished)
        self.bytes_written = 0
        self._pool = ThreadPoolExecutor(2, thread_name_prefix="write")
        self._hasher = ThreadPoolExecutor(1, thread_name_prefix="hash")
        self._syncer = ThreadPoolExecutor(1, thread_name_prefix="sync")
        self._open: _Stream | None = None
        self._failure: BaseException | None = None
        self._lock = threading.Lock()
        try:
            self._preallocate()
        except BaseException:
            self.close()
            if fresh:
                shutil.rmtree(self.partial, ignore_errors=True)
            raise

    @property
    def is_open(self) -> bool:
        """Whether a shard is being written."""
        return self._open is not None

    def resume_at(self, shard: int) -> int:
        """Bytes of a shard that need not be written again; its size if it is complete."""
        name = self._shards[shard].name
        return self._shards[shard].size if name in self.hashes else self._progress.done.get(name, 0)

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
            file = os.open(self.partial / shard.name, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                _allocate(file, shard, self.partial)
            finally:
                os.close(file)
        _sync_folder(self.partial)

    def begin(self, shard: int, at: int) -> None:
        """Open a shard for writing from byte `at` on, 0 or a place that `resume_at` covers."""
        self.check()
        layout = self._shards[shard]
        self._open = stream = _Stream(self.partial / layout.name, layout, at)
        if at == 0:
            self._put_bytes(layout.header)
        else:
            self._hasher.submit(self._guard, stream.hash_file, at)

    def room(self, size: int) -> tuple[Slot, int]:
        """A slot for the next `size` bytes of the open shard, and the address where they go."""
        assert self._open is not None
        lead = self._open.position % PAGE
        slot = self._ring.take(lead + size)
        return slot, slot.address + lead

    def put(self, slot: Slot, size: int) -> None:
        """Write the `size` bytes that `room` made room for; the slot is given back when they are safe."""
        self.check()
        stream = self._open
        assert stream is not None
        lead = len(stream.carry)
        end = lead + size
        whole = end // PAGE * PAGE
        view = self._ring.bytes_of(slot, 0, slot.size)
        view[:lead] = stream.carry
        at, stream.carry = stream.position - lead, bytes(view[whole:end])
        stream.position += size
        self.bytes_written += size
        release = _Countdown(2, lambda: self._ring.give(slot))
        stream.writes.append(self._pool.submit(self._guard, stream.write, view[:whole], at, done=release))
        self._hasher.submit(self._guard, stream.hash.update, view[lead:end], done=release)
        if stream.position - stream.marked >= SYNC_EVERY:
            self._mark(stream)

    def _put_bytes(self, data: bytes) -> None:
        for first in range(0, len(data), HEADER_PIECE):
            piece = data[first : first + HEADER_PIECE]
            slot, _ = self.room(len(piece))
            lead = len(self._open.carry) if self._open else 0
            self._ring.bytes_of(slot, lead, lead + len(piece))[:] = piece
            self.put(slot, len(piece))

    def _mark(self, stream: _Stream) -> None:
        """Have the journal say how far this shard is durable, once it is."""
        writes, stream.writes = stream.writes, []
        stream.marked = stream.position
        durable = stream.position - len(stream.carry)
        self._syncer.submit(self._guard, self._sync, stream, writes, durable)

    def _sync(self, stream: _Stream, writes: list[Future[None]], durable: int) -> None:
        for write in writes:
            write.result()
        if self._failure is None:
            stream.sync(durable)
            self._journal.append({"shard": stream.layout.name, "done": durable})

    def end(self) -> None:
        """Close the open shard; its last bytes, sync, hash and journal line follow on other threads."""
        stream = self._open
        assert stream is not None
        assert stream.position == stream.layout.size
        self._open = None
        hashed = self._hasher.submit(self._guard, lambda: None)
        self._syncer.submit(self._guard, self._finish, stream, stream.writes, hashed)

    def _finish(self, stream: _Stream, writes: list[Future[None]], hashed: Future[None]) -> None:
        for write in [*writes, hashed]:
            write.result()
        if self._failure is None:
            stream.finish()
            digest = stream.hash.hexdigest()
            self._journal.append({"shard": stream.layout.name, "sha256": digest})
            self.hashes[stream.layout.name] = digest

    def _guard(self, work: Callable[..., Any], *args: Any, done: Callable[[], None] | None = None) -> None:
        """Run work on a thread; the first failure is kept for `check`, and what follows it is skipped."""
        try:
            if self._failure is None:
                work(*args)
        except BaseException as error:
            with self._lock:
                self._failure = self._failure or error
            self._ring.stop()
        finally:
            if done:
                done()

    def check(self) -> None:
        """Raise what a thread ran into.

        Raises:
            MachineError: the disk is full or failed; what the journal says is kept.
        """
        error = self._failure
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
            hint = (
                "the disk is full; make room and run the same command again to go on"
                if full
                else error.strerror
            )
            raise MachineError(f"{self.partial}: {hint}") from error
        if error is not None:
            raise error

    def drain(self) -> None:
        """Wait until all that was put is written, synced, hashed and in the journal."""
        for pool in (self._pool, self._hasher, self._syncer):
            pool.shutdown(wait=True)
        self.check()

    def park(self) -> None:
        """Record how far an interrupted run came."""
        if self._open is not None and self._failure is None:
            self._mark(self._open)
        for pool in (self._pool, self._hasher, self._syncer):
            pool.shutdown(wait=True)

    def discard(self) -> None:
        """Delete what was written: the inputs were refused."""
        for pool in (self._pool, self._hasher, self._syncer):
            pool.shutdown(wait=True, cancel_futures=True)
        shutil.rmtree(self.partial, ignore_errors=True)

    def publish(
        self, files: dict[str, bytes], copies: Sequence[Path], manifest: bytes, overwrite: bool
    ) -> None:
        """Complete the folder (small files, copies, manifest last) and rename it into place."""
        for source in copies:
            shutil.copyfile(source, self.partial / source.name)
        for name, data in files.items():
            (self.partial / name).write_bytes(data)
        for name in [*files, *(source.name for source in copies)]:
            _sync_file(self.partial / name)
        (self.partial / (MANIFEST + ".new")).write_bytes(manifest)
        _sync_file(self.partial / (MANIFEST + ".new"))
        os.replace(self.partial / (MANIFEST + ".new"), self.partial / MANIFEST)
        _sync_folder(self.partial)
        (self.partial / journal.NAME).unlink()
        into_place(self.partial, self._out, overwrite)

    def close(self) -> None:
        for pool in (self._pool, self._hasher, self._syncer):
            pool.shutdown(wait=True, cancel_futures=True)
        self._journal.close()


class _Stream:
    """The shard being written: file, place, the bytes of an unfinished page, and the hash so far."""

    def __init__(self, path: Path, layout: Shard, at: int) -> None:
        self.path, self.layout, self.position, self.marked = path, layout, at, at
        self.direct = hasattr(os, "O_DIRECT")
        try:
            self.file = os.open(path, os.O_RDWR | (os.O_DIRECT if self.direct else 0))
        except OSError:
            self.direct = False
            self.file = os.open(path, os.O_RDWR)
        lead = at % PAGE
        self.carry = _read_exactly(path, at - lead, lead)
        self.hash = hashlib.sha256()
        self.writes: list[Future[None]] = []

    def write(self, view: memoryview, at: int) -> None:
        done = 0
        while done < len(view):  # a write may be cut short by a signal, a limit, or at 2 GiB
            step = os.pwrite(self.file, view[done:], at + done)
            done += step
            if step % PAGE and done < len(view) and self.direct:
                raise OSError(errno.EIO, f"{self.path.name}: a write stopped in the middle of a page")

    def hash_file(self, end: int) -> None:
        """Take in bytes [0, end) that an earlier run left."""
        with open(self.path, "rb", buffering=0) as file:
            left = end
            while left:
                data = file.read(min(HEADER_PIECE, left))
                self.hash.update(data)
                left -= len(data)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file.fileno(), 0, end, os.POSIX_FADV_DONTNEED)

    def sync(self, durable: int) -> None:
        os.fdatasync(self.file) if hasattr(os, "fdatasync") else os.fsync(self.file)
        if not self.direct and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.file, 0, durable, os.POSIX_FADV_DONTNEED)

    def finish(self) -> None:
        """The last, unfinished page; then the file's true end."""
        at = self.layout.size - len(self.carry)
        if self.carry:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(at)
                file.write(self.carry)
                os.fsync(file.fileno())
        os.ftruncate(self.file, self.layout.size)
        os.fsync(self.file)
        os.close(self.file)


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


def into_place(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename a complete folder to its final name; an old one goes only when the new one is there."""
    old = out.with_name(out.name + ".replaced")
    if out.exists():
        if not overwrite:
            raise OutputExists(f"{out}: exists; --overwrite replaces it")
        shutil.rmtree(old, ignore_errors=True)
        os.rename(out, old)
    os.rename(partial, out)
    _sync_folder(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _allocate(file: int, shard: Shard, folder: Path) -> None:
    if not hasattr(os, "posix_fallocate"):
        os.ftruncate(file, shard.size)
        return
    try:
        os.posix_fallocate(file, 0, shard.size)
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.EINVAL):
            os.ftruncate(file, shard.size)  # the file system cannot promise room
            return
        raise MachineError(
            f"{folder / shard.name}: no room for {human(shard.size)}: {error.strerror}; make room or write elsewhere"
        ) from error


def _read_exactly(path: Path, begin: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        return file.read(size)


def _sync_file(path: Path) -> None:
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


_sync_folder = _sync_file
