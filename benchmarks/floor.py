"""What the disk alone would take: every input byte read once, then as many bytes written as the merge writes.

    floor = O_DIRECT reads of the very inputs, 8 MiB requests from 4 threads, a reused aligned buffer each
          + fallocate, O_DIRECT writes of 8 MiB from 2 threads and fsync, the output's size

One after the other, without arithmetic, interpreter start or hashing. A merge that overlaps reading with writing may
come out below it. Disks of virtual machines drift, so each figure is taken between two floors of its own.
"""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

REQUEST = 8 << 20
READERS = 4
WRITERS = 2  # the fastest of 1, 2 and 4 where this was tried
PAGE = 4096


@dataclass(frozen=True)
class Floor:
    read_seconds: float
    write_seconds: float

    @property
    def seconds(self) -> float:
        return self.read_seconds + self.write_seconds


Part = tuple[int, int, int]  # descriptor, offset, bytes
Move = Callable[[int, list[memoryview], int], int]


def _parts(file: int, size: int) -> Iterator[Part]:
    for at in range(0, size, REQUEST):
        yield file, at, min(REQUEST, -(-(size - at) // PAGE) * PAGE)


class _Buffers:
    """One page-aligned buffer per thread, touched before any clock runs."""

    def __init__(self, count: int) -> None:
        noise = np.random.default_rng(0).bytes(REQUEST)
        self.maps = [mmap.mmap(-1, REQUEST, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(count)]
        for each in self.maps:
            each[:] = noise

    def each(self, move: Move, parts: Iterator[Part], pool: ThreadPoolExecutor) -> None:
        """Hand the parts out to the threads, in order."""
        lock = threading.Lock()

        def work(buffer: mmap.mmap) -> None:
            with memoryview(buffer) as view:
                while True:
                    with lock:
                        part = next(parts, None)
                    if part is None:
                        return
                    file, at, size = part
                    with view[:size] as window:
                        move(file, [window], at)

        list(pool.map(work, self.maps))

    def close(self) -> None:
        for each in self.maps:
            each.close()


def read(files: Sequence[Path]) -> float:
    """Seconds to read files around the page cache."""
    buffers = _Buffers(READERS)
    handles = [os.open(path, os.O_RDONLY | os.O_DIRECT) for path in files]
    try:
        with ThreadPoolExecutor(READERS) as pool:
            began = time.perf_counter()
            parts = (part for handle in handles for part in _parts(handle, os.fstat(handle).st_size))
            buffers.each(os.preadv, parts, pool)
            return time.perf_counter() - began
    finally:
        for handle in handles:
            os.close(handle)
        buffers.close()


def write(folder: Path, size: int) -> float:
    """Seconds to write `size` bytes around the page cache until they are durable; the file is removed."""
    buffers = _Buffers(WRITERS)
    path = folder / f"floor.{os.getpid()}"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_DIRECT)
    try:
        with ThreadPoolExecutor(WRITERS) as pool:
            began = time.perf_counter()
            os.posix_fallocate(handle, 0, size)
            buffers.each(os.pwritev, _parts(handle, size), pool)
            os.fsync(handle)
            return time.perf_counter() - began
    finally:
        os.close(handle)
        path.unlink()
        buffers.close()


def measure(files: Sequence[Path], written: int, folder: Path) -> Floor:
    """The floor of a merge that reads `files` and writes `written` bytes into a folder."""
    return Floor(read(files), write(folder, written))
