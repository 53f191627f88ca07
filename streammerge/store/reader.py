"""Reads byte ranges of shards into slots of a ring, several at a time, around the page cache where it can.

    cached     bytes that the page cache already holds are taken from it, whatever the mode (nothing is evicted)
    direct     O_DIRECT into page-aligned slots: a tenth of the CPU of a buffered read and no page-cache growth
    buffered   positional reads; the pages they brought in are dropped behind
    mmap       a read-only map of the range, fetched whole, copied and dropped behind

`auto` is direct on a disk of this machine. Elsewhere a short probe decides: network file systems may turn the ranking
round. Where a file system refuses O_DIRECT, `auto` is buffered. The mode never changes a byte of the result.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from streammerge.errors import CheckpointError, MachineError, RecipeError
from streammerge.store.mounts import is_local
from streammerge.store.ring import PAGE, Ring, Slot, round_up

Mode = Literal["auto", "direct", "buffered", "mmap"]
MODES = ("auto", "direct", "buffered", "mmap")
PROBE = 8 << 20  # bytes read each way by the probe
PROBE_WORTH = 1 << 30  # inputs smaller than this are read before a probe would pay
OPEN_FILES = 64  # descriptors kept, least recently used dropped; a checkpoint may have hundreds of shards
_LIMIT = 1 << 30  # one system call moves less than 2 GiB


@dataclass(frozen=True, slots=True)
class Extent:
    """Bytes [begin, end) of a file, to be put at `offset` of a slot; `offset` and `begin` agree modulo a page."""

    file: str
    begin: int
    end: int
    offset: int


class Reader:
    """A pool of threads that fill slots. One reader serves one run; `bytes_read` counts what it asked disks for."""

    def __init__(self, ring: Ring, mode: Mode = "auto", threads: int = 4) -> None:
        if mode not in MODES:
            raise RecipeError(f"unknown reader {mode!r}; one of {', '.join(MODES)}")
        self._ring = ring
        self.mode: Mode = mode
        self._files = _Files()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="read")
        self.bytes_read = 0

    def choose(self, files: Sequence[tuple[str, int]]) -> None:
        """Settle `auto` for these (file, size) pairs by what their file system does."""
        if self.mode != "auto" or not files:
            return
        if not hasattr(os, "O_DIRECT"):
            self.mode = "buffered"
            return
        name, size = max(files, key=lambda item: item[1])
        try:
            os.close(os.open(name, os.O_RDONLY | os.O_DIRECT))
        except OSError:
            self.mode = "buffered"  # this file system has no direct I/O
            return
        self.mode = "direct"
        if not is_local(name) and sum(size for _, size in files) >= PROBE_WORTH and size >= 4 * PROBE:
            self.mode = self._probe(name, size)

    def _probe(self, name: str, size: int) -> Mode:
        slot = self._ring.take(min(PROBE, self._ring.size // 2))
        rate: dict[str, float] = {}
        try:
            for mode, at in (("direct", size // 3), ("buffered", 2 * size // 3)):
                begin = at // PAGE * PAGE
                view = self._ring.bytes_of(slot, 0, slot.size)
                if self._from_cache(name, view, begin):
                    return "direct"  # cached here: the probe would time memory, not the disk
                started = time.perf_counter()
                (self._direct if mode == "direct" else self._buffered)(name, view, begin, len(view))
                rate[mode] = slot.size / (time.perf_counter() - started)
        except OSError:
            return "direct"  # the read that needs these bytes will say what is wrong
        finally:
            self._ring.give(slot)
        return "buffered" if rate["buffered"] > 1.5 * rate["direct"] else "direct"

    def fill(self, slot: Slot, extents: Sequence[Extent]) -> list[Future[None]]:
        """Start reading every extent into the slot; the slot is theirs until all futures are done."""
        return [self._pool.submit(self._read, slot, extent) for extent in extents]

    def _read(self, slot: Slot, extent: Extent) -> None:
        lead = extent.begin % PAGE
        begin = extent.begin - lead
        wanted = extent.end - begin
        first = extent.offset - lead
        view = self._ring.bytes_of(slot, first, min(first + round_up(wanted), slot.size))
        try:
            if self._from_cache(extent.file, view[:wanted], begin):
                got = wanted
            elif self.mode == "direct":
                got = self._direct(extent.file, view, begin, wanted)
            elif self.mode == "mmap":
                got = self._mapped(extent.file, view, begin, wanted)
            else:
                got = self._buffered(extent.file, view, begin, wanted)
        except OSError as error:
            raise MachineError(
                f"{extent.file}: cannot read bytes {extent.begin}-{extent.end}: {error.strerror}"
            ) from error
        if got < wanted:
            raise CheckpointError(
                f"{extent.file}: ended at byte {begin + got} while bytes up to {extent.end} were expected; "
                "it changed while it was read: run again when nothing writes to it"
            )
        with self._lock:
            self.bytes_read += extent.end - extent.begin

    def _from_cache(self, name: str, view: memoryview, begin: int) -> bool:
        """Whether the page cache held all of it. Asked first: a read that misses, even RWF_NOWAIT, starts readahead."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        with self._files.use(name, False) as file:
            got = 0
            try:
                if not _cached(file, begin, len(view)):
                    return False
                while got < len(view):
                    step = os.preadv(file, [view[got : got + _LIMIT]], begin + got, os.RWF_NOWAIT)
                    if step == 0:
                        return False
                    got += step
            except OSError:
                return False
        return True

    def _direct(self, name: str, view: memoryview, begin: int, wanted: int) -> int:
        """Around the page cache; what direct I/O refuses, or stops short of, is read buffered."""
        got = 0
        try:
            with self._files.use(name, True) as file:
                while got < wanted:
                    step = os.preadv(file, [view[got : got + _LIMIT]], begin + got)
                    got += step
                    if step % PAGE or step == 0:
                        break
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
        if got < wanted:
            got -= got % PAGE
            got += self._buffered(name, view[got:], begin + got, wanted - got)
        return got

    def _buffered(self, name: str, view: memoryview, begin: int, wanted: int) -> int:
        with self._files.use(name, False) as file:
            got = 0
            while got < wanted:
                step = os.preadv(file, [view[got : min(got + _LIMIT, wanted)]], begin + got)
                if step == 0:
                    break
                got += step
            _drop(file, begin, got)
        return got

    def _mapped(self, name: str, view: memoryview, begin: int, wanted: int) -> int:
        with self._files.use(name, False) as file:
            length = min(wanted, os.fstat(file).st_size - begin)
            if length <= 0:
                return 0
            lead = begin % mmap.ALLOCATIONGRANULARITY
            with mmap.mmap(file, lead + length, access=mmap.ACCESS_READ, offset=begin - lead) as window:
                if hasattr(mmap, "MADV_WILLNEED"):
                    window.madvise(mmap.MADV_WILLNEED)  # all of it, and nothing beyond
                    window.madvise(mmap.MADV_RANDOM)
                source = np.frombuffer(window, np.uint8)[lead:]
                np.copyto(np.frombuffer(view, np.uint8)[:length], source)  # releases the interpreter while it copies
                del source
            _drop(file, begin, length)
        return length

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._files.close()


class _Files:
    """Open descriptors by (name, direct), the least recently used closed first, never one that a read is using."""

    def __init__(self) -> None:
        self._open: OrderedDict[tuple[str, bool], int] = OrderedDict()
        self._users: dict[int, int] = {}
        self._lock = threading.Lock()

    @contextmanager
    def use(self, name: str, direct: bool) -> Iterator[int]:
        """A descriptor that stays open while the block runs.

        Raises:
            CheckpointError: the file is gone.
        """
        with self._lock:
            file = self._find(name, direct)
            self._users[file] += 1
        try:
            yield file
        finally:
            with self._lock:
                self._users[file] -= 1

    def _find(self, name: str, direct: bool) -> int:
        key = (name, direct)
        if key not in self._open:
            try:
                file = os.open(name, os.O_RDONLY | (os.O_DIRECT if direct else 0))
            except FileNotFoundError:
                raise CheckpointError(f"{name}: gone since the merge was planned") from None
            if not direct and hasattr(os, "posix_fadvise"):
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # reads are large; ahead of them nothing is kept
            self._open[key], self._users[file] = file, 0
            self._shrink(key)
        self._open.move_to_end(key)
        return self._open[key]

    def _shrink(self, newest: tuple[str, bool]) -> None:
        idle = [key for key, file in self._open.items() if not self._users[file] and key != newest]
        for key in idle[: max(0, len(self._open) - OPEN_FILES)]:
            file = self._open.pop(key)
            del self._users[file]
            os.close(file)

    def close(self) -> None:
        for file in self._open.values():
            os.close(file)
        self._open.clear()
        self._users.clear()


def _cached(file: int, begin: int, length: int) -> bool:
    """Whether the page cache holds these bytes, without touching them; False where the kernel would not tell.

    Raises:
        OSError: the bytes cannot be mapped.
    """
    found = os.fstat(file)
    if not length or begin + length > found.st_size:
        return False
    if found.st_uid != os.geteuid() and not os.access(f"/proc/self/fd/{file}", os.W_OK):
        return False  # mincore calls every page of somebody else's file resident
    lead = begin % mmap.ALLOCATIONGRANULARITY
    with mmap.mmap(file, lead + length, access=mmap.ACCESS_READ, offset=begin - lead) as window:
        pages = np.zeros(-(-(lead + length) // mmap.PAGESIZE), np.uint8)
        source = np.frombuffer(window, np.uint8)
        failed = ctypes.CDLL(None).mincore(
            ctypes.c_void_p(source.ctypes.data), ctypes.c_size_t(source.size), ctypes.c_void_p(pages.ctypes.data)
        )
        del source
    return not failed and bool(pages[lead // mmap.PAGESIZE :].all())


def _drop(file: int, begin: int, length: int) -> None:
    """Let the kernel forget pages that this read brought in."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file, begin, length, os.POSIX_FADV_DONTNEED)


def evict(path: Path) -> None:
    """Drop a file from the page cache (benchmarks and tests of cold reads)."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
        _drop(file, 0, 0)
    finally:
        os.close(file)
