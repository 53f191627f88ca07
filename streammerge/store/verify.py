"""Re-hashes a finished folder against its manifest."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streammerge.errors import CheckpointError, MachineError
from streammerge.store.writer import MANIFEST

PIECE = 4 << 20


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a merged folder.

    Raises:
        CheckpointError: there is none, or it is broken.
    """
    path = folder / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        if not isinstance(manifest["shards"], dict):
            raise TypeError
    except (FileNotFoundError, NotADirectoryError):
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder; name one that streammerge wrote") from None
        raise CheckpointError(
            f"{folder}: has no {MANIFEST}; only folders that streammerge wrote can be verified"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise CheckpointError(f"{path}: is damaged; merge again") from None
    except OSError as error:
        raise MachineError(f"{path}: cannot be read: {error.strerror}") from error
    return manifest


def verify(folder: Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Hash every shard and compare.

    Returns:
        {"shards": n, "bytes": n, "bad": [names of shards that are missing or differ]}

    Raises:
        CheckpointError: no usable manifest.
        MachineError: a shard cannot be read.
    """
    shards = read_manifest(folder)["shards"]
    total = sum((folder / name).stat().st_size for name in shards if (folder / name).is_file())
    done, bad = 0, []
    for name, wanted in shards.items():
        path = folder / name
        if not path.is_file():
            bad.append(name)
            continue
        digest = hashlib.sha256()
        try:
            with open(path, "rb", buffering=0) as file:
                while data := file.read(PIECE):
                    digest.update(data)
                    done += len(data)
                    if progress:
                        progress(done, total)
                if hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except OSError as error:
            raise MachineError(f"{path}: cannot be read: {error.strerror}") from error
        if digest.hexdigest() != wanted:
            bad.append(name)
    return {"folder": str(folder), "shards": len(shards), "bytes": total, "bad": bad}
