"""What is durably done, one JSON line each, so that a killed run goes on where it was.

    {"digest": "...", "version": 1}                  the plan this work belongs to; first line
    {"shard": "model-1.safetensors", "done": 4096}   bytes [0, done) of the shard are on the disk
    {"shard": "model-1.safetensors", "sha256": ".."} the shard is complete, and this is its hash

A line is appended only after the bytes it speaks of were synced. A line cut short by a kill is ignored.
"""

from __future__ import annotations

import json
import os
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


def read(folder: Path) -> Progress:
    """The progress recorded in a folder; empty if there is no journal."""
    progress = Progress()
    path = folder / NAME
    if not path.exists():
        return progress
    for line in path.read_bytes().split(b"\n"):
        try:
            entry: dict[str, Any] = json.loads(line)
        except ValueError:
            continue  # the kill came in the middle of this line
        if "digest" in entry:
            progress.digest = entry["digest"]
        elif "sha256" in entry:
            progress.finished[entry["shard"]] = entry["sha256"]
        elif "done" in entry:
            progress.done[entry["shard"]] = entry["done"]
    return progress


class Journal:
    """Appends to a folder's journal; holding it open is the lock on the folder."""

    def __init__(self, folder: Path, digest: str) -> None:
        path = folder / NAME
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
            _lock(self._file, folder)
            if os.fstat(self._file).st_size == 0:
                self.append({"digest": digest, "version": 1})
            else:
                os.write(self._file, b"\n")  # ends a line that a kill cut short
        except OSError as error:
            raise MachineError(f"{path}: cannot write the journal: {error.strerror}") from error

    def append(self, entry: dict[str, Any]) -> None:
        """One line, on the disk when this returns."""
        os.write(self._file, json.dumps(entry).encode() + b"\n")
        os.fdatasync(self._file) if hasattr(os, "fdatasync") else os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)


def _lock(file: int, folder: Path) -> None:
    try:
        import fcntl
    except ImportError:
        return  # no advisory locks on this system
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise OutputExists(
            f"{folder}: another run is writing here; wait for it or choose another folder"
        ) from None
