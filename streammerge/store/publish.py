"""The last step of a merge, and what the machine may refuse on the way to it."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from streammerge.errors import MachineError, OutputExists
from streammerge.store.shardfile import sync_path


@contextmanager
def machine(partial: Path) -> Iterator[None]:
    """What the operating system refuses in this block is the machine's fault, said in one line."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        fault = "the disk is full; make room" if full else f"{error.strerror}; mend it"
        raise MachineError(f"{partial}: {fault} and run the same command again to go on with what is done") from error


def into_place(partial: Path, out: Path, overwrite: bool) -> None:
    """Rename a complete folder to its final name; an old one goes only when the new one is there."""
    old = out.with_name(out.name + ".replaced")
    if out.exists():
        if not overwrite:
            raise OutputExists(f"{out}: exists; --overwrite replaces it")
        _remove(old)
        os.rename(out, old)
    os.rename(partial, out)
    sync_path(out.parent)
    _remove(old)


def _remove(folder: Path) -> None:
    """Delete a folder if it is there; of a link to one, the link."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)
