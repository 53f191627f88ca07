"""One output shard on the disk: room for it, whole pages at their places, the unfinished last page, its hash.

Pages go out with O_DIRECT where the file system has it; what it refuses is written through the page cache.
"""

from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

from streammerge.budget import human
from streammerge.errors import MachineError
from streammerge.store.ring import PAGE

PIECE = 1 << 20  # bytes of a file that is hashed again, read at once


@dataclass(frozen=True)
class Shard:
    """One output file: its header, already padded to whole pages, and its size in all."""

    name: str
    header: bytes
    size: int


class ShardFile:
    """The shard being written: file, place, the bytes of an unfinished page, and the hash so far."""

    def __init__(self, path: Path, layout: Shard, at: int) -> None:
        self.path, self.layout, self.position, self.marked = path, layout, at, at
        self.promised = at  # the place behind all rooms that were given out
        lead = at % PAGE
        self.sent = at - lead  # every byte before it is on the disk or in `writes`
        self.writes: list[Future[None]] = []
        self.carry = _read_exactly(path, self.sent, lead)
        self.hash = hashlib.sha256()
        self.direct = hasattr(os, "O_DIRECT")
        try:
            self.file = os.open(path, os.O_RDWR | (os.O_DIRECT if self.direct else 0))
        except OSError:
            self.direct = False
            self.file = os.open(path, os.O_RDWR)

    def write(self, view: memoryview, at: int) -> None:
        """Write whole pages at byte `at`; a write may be cut short by a signal, a limit, or at 2 GiB."""
        done = 0
        while done < len(view):
            direct = self.direct
            try:
                step = os.pwrite(self.file, view[done:], at + done)
            except OSError as error:
                if not direct or error.errno != errno.EINVAL:
                    raise
                step = 0
            done += step
            if direct and done < len(view) and (not step or step % PAGE):
                self._through_cache()

    def _through_cache(self) -> None:
        import fcntl

        self.direct = False
        fcntl.fcntl(self.file, fcntl.F_SETFL, fcntl.fcntl(self.file, fcntl.F_GETFL) & ~os.O_DIRECT)

    def hash_file(self, end: int) -> None:
        """Take in bytes [0, end) that an earlier run left."""
        with open(self.path, "rb", buffering=0) as file:
            left = end
            while left:
                data = file.read(min(PIECE, left))
                if not data:
                    raise OSError(errno.EIO, f"{self.path.name} is shorter than the journal says")
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
        if self.carry:
            with open(self.path, "r+b", buffering=0) as file:
                file.seek(self.layout.size - len(self.carry))
                if file.write(self.carry) != len(self.carry):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                os.fsync(file.fileno())
        os.ftruncate(self.file, self.layout.size)
        os.fsync(self.file)

    def close(self) -> None:
        if self.file >= 0:
            os.close(self.file)
            self.file = -1


def allocate(path: Path, size: int) -> None:
    """Make the file with room for all of it, so that a full disk is found at once.

    Raises:
        MachineError: there is no room.
    """
    file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file, 0, size)
        else:
            os.ftruncate(file, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise MachineError(
                f"{path}: no room for {human(size)}: {error.strerror}; make room or write elsewhere"
            ) from error
        os.ftruncate(file, size)  # the file system cannot promise room
    finally:
        os.close(file)


def sync_path(path: Path) -> None:
    """Have a file or a folder on the disk when this returns."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _read_exactly(path: Path, begin: int, size: int) -> bytes:
    with open(path, "rb", buffering=0) as file:
        file.seek(begin)
        return file.read(size)
