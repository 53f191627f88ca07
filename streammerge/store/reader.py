"""Reads byte ranges of shards into slots of a ring, several at a time, around the page cache where it can.

    cached     bytes that the page cache already holds are taken from it, whatever the mode (nothing is evicted)
    direct     O_DIRECT into page-aligned slots: a tenth of the CPU of a buffered read and no page-cache growth
    buffered   positional reads; the pages they brought in are dropped behind
    mmap       a read-only map of the range with sequential advice, copied and dropped behind

`auto` is direct, unless the file system refuses it or a short probe finds buffered reads clearly faster (network
file systems turn the ranking round). The mode never changes a byte of the result.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from streammerge.errors import CheckpointError, MachineError, RecipeError
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
        self._files: OrderedDict[tuple[str, bool], int] = OrderedDict()
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
        if sum(size for _, size in files) >= PROBE_WORTH and size >= 4 * PROBE:
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
        """Whether the page cache held all of it; a miss costs one system call and reads nothing."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        file, got = self._open(name, False), 0
        while got < len(view):
            try:
                step = os.preadv(file, [view[got : got + _LIMIT]], begin + got, os.RWF_NOWAIT)
            except (BlockingIOError, OSError):
                return False
            if step == 0:
                return False
            got += step
        return True

    def _direct(self, name: str, view: memoryview, begin: int, wanted: int) -> int:
        file, got = self._open(name, True), 0
        while got < wanted:
            step = os.preadv(file, [view[got : got + _LIMIT]], begin + got)
            got += step
            if step % PAGE or step == 0:  # only the end of a file comes short
                break
        return got

    def _buffered(self, name: str, view: memoryview, begin: int, wanted: int) -> int:
        file, got = self._open(name, False), 0
        while got < wanted:
            step = os.preadv(file, [view[got : min(got + _LIMIT, wanted)]], begin + got)
            if step == 0:
                break
            got += step
        _drop(file, begin, got)
        return got

    def _mapped(self, name: str, view: memoryview, begin: int, wanted: int) -> int:
        file = self._open(name, False)
        length = min(wanted, os.fstat(file).st_size - begin)
        if length <= 0:
            return 0
        with mmap.mmap(file, length, access=mmap.ACCESS_READ, offset=begin) as window:
            if hasattr(mmap, "MADV_SEQUENTIAL"):
                window.madvise(mmap.MADV_SEQUENTIAL)
            source = np.frombuffer(window, np.uint8)
            np.copyto(
                np.frombuffer(view, np.uint8)[:length], source
            )  # releases the interpreter while it copies
            del source
        _drop(file, begin, length)
        return length

    def _open(self, name: str, direct: bool) -> int:
        with self._lock:
            key = (name, direct)
            if key in self._files:
                self._files.move_to_end(key)
                return self._files[key]
            try:
                file = os.open(name, os.O_RDONLY | (os.O_DIRECT if direct else 0))
            except FileNotFoundError:
                raise CheckpointError(f"{name}: gone since the merge was planned") from None
            self._files[key] = file
            if len(self._files) > OPEN_FILES:  # an idle one: requests in flight are far fewer than files kept
                os.close(self._files.popitem(last=False)[1])
            return file

    def close(self) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)
        for file in self._files.values():
            os.close(file)
        self._files.clear()


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
