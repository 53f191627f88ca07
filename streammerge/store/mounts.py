"""Which kind of file system a file lies on: disks of this machine, or something beyond it."""

from __future__ import annotations

import os
from pathlib import Path

# File systems on a disk of this machine, where O_DIRECT goes to the device and a timing of it says nothing new.
LOCAL = frozenset(("ext2", "ext3", "ext4", "xfs", "btrfs", "f2fs", "bcachefs", "jfs", "vfat", "exfat", "ntfs3"))


def filesystem(path: str | Path) -> str:
    """The type of the mount that holds a path ("ext4", "nfs4"); empty where the system does not tell."""
    where = os.path.realpath(path)
    best, found = "", ""
    try:
        lines = Path("/proc/self/mounts").read_text().splitlines()
    except OSError:
        return ""
    for line in lines:
        _, folder, kind, *_ = line.split(" ")
        folder = folder.replace("\\040", " ")
        inside = where == folder or where.startswith(folder.rstrip("/") + "/")
        if inside and len(folder) >= len(best):
            best, found = folder, kind
    return found


def is_local(path: str | Path) -> bool:
    """Whether a path lies on a disk of this machine."""
    return filesystem(path) in LOCAL
