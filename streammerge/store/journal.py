"""What is durably done, one JSON line each, so that a killed run goes on where it was.

    {"digest": "...", "version": 1}                  the plan this work belongs to; first line
    {"shard": "model-1.safetensors", "done": 4096}   bytes [0, done) of the shard are on the disk
    {"shard": "model-1.safetensors", "tensor": "w"}  this tensor of a shard that is written in any order is
    {"shard": "model-1.safetensors", "sha256": ".."} the shard is complete, and this is its hash
    {"note": {...}}                                  what the run noticed in the bytes that the next line makes durable

A line is appended only after the bytes it speaks of were synced. A line cut short by a kill is ignored.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from streammerge.errors import MachineError, OutputExists

NAME = "journal.jsonl"


@dataclass
class Progress:
    """What the journal says: the plan's digest, finished shards with their hashes, durable bytes of the others."""

    digest: str = ""
    finished: dict[str, str] = field(default_factory=dict)
    done: dict[str, int] = field(default_factory=dict)
    tensors: dict[str, set[str]] = field(default_factory=dict)  # by shard: those that are durable
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)  # by their text: work done twice is noted twice


def read(folder: Path) -> Progress:
    """The progress recorded in a folder; empty if there is no journal."""
    progress = Progress()
    path = folder / NAME
    if not path.exists():
        return progress
    for line in path.read_bytes().split(b"\n"):
        try:
            entry: dict[str, Any] = json.loads(line)
            if "digest" in entry:
                progress.digest = entry["digest"]
            elif "sha256" in entry:
                progress.finished[entry["shard"]] = entry["sha256"]
            elif "done" in entry:
                progress.done[entry["shard"]] = entry["done"]
            elif "tensor" in entry:
                progress.tensors.setdefault(entry["shard"], set()).add(entry["tensor"])
            elif isinstance(entry["note"], dict):
                progress.notes[json.dumps(entry["note"])] = entry["note"]
        except (ValueError, KeyError, TypeError):
            continue  # the kill came in the middle of this line
    return progress


def is_blank(folder: Path) -> bool:
    """Whether a folder holds no work: the kill came before the journal's first line was whole."""
    return not read(folder).digest and {entry.name for entry in folder.iterdir()} <= {NAME}


def discard(folder: Path) -> None:
    """Delete unfinished work.

    Raises:
        OutputExists: another run is writing it.
    """
    try:
        file = os.open(folder / NAME, os.O_RDWR)
    except FileNotFoundError:
        shutil.rmtree(folder)
        return
    try:
        _lock(file, folder)
        shutil.rmtree(folder)
    finally:
        os.close(file)


class Journal:
    """Appends to a folder's journal; holding it open is the lock on the folder. `found` is what it said before.

    Raises:
        OutputExists: another run holds it, or it speaks of another plan.
        MachineError: it cannot be written.
    """

    def __init__(self, folder: Path, digest: str) -> None:
        path = folder / NAME
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise _unwritable(path, error) from error
        try:
            _lock(self._file, folder)
            self.found = read(folder)
            if self.found.digest not in ("", digest):
                raise OutputExists(f"{folder}: holds unfinished work of another plan; --no-resume discards it")
            if os.fstat(self._file).st_size:
                self._put(b"\n")  # ends a line that a kill cut short
            if not self.found.digest:
                self.append({"digest": digest, "version": 1})
        except OSError as error:
            os.close(self._file)
            raise _unwritable(path, error) from error
        except BaseException:
            os.close(self._file)
            raise

    def append(self, *entries: dict[str, Any]) -> None:
        """A line for each, on the disk when this returns."""
        self._put(b"".join(json.dumps(entry).encode() + b"\n" for entry in entries))
        os.fdatasync(self._file) if hasattr(os, "fdatasync") else os.fsync(self._file)

    def _put(self, data: bytes) -> None:
        if os.write(self._file, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        os.close(self._file)


def _unwritable(path: Path, error: OSError) -> MachineError:
    return MachineError(f"{path}: cannot write the journal: {error.strerror}; make room or write elsewhere")


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return  # no advisory locks on this system
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputExists(f"{folder}: another run is writing here; wait for it or choose another folder") from None
    except OSError:
        return  # no advisory locks on this file system
