"""Scratch: tensors that outlive the layer that made them: hidden states, their gradients, anchors, votes.

Each is kept on the device while the device's share has room, then in host memory, then in a file. Room is leased from
the budgets as tensors come and go. Floating tensors may be kept in another dtype than they came in: bfloat16 takes
half of fp32 and rounds once. Files are in a folder that `close` removes; what the page cache keeps of them is the
kernel's to drop.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Hashable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.budget import Budget
from streammerge.errors import BudgetTooSmall, MachineError

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(slots=True)
class _Entry:
    came: torch.dtype
    kept: torch.dtype
    shape: tuple[int, ...]
    size: int  # bytes, as kept
    level: str  # "device", "host" or "disk"
    tensor: Tensor | None
    version: int = 0
    path: Path | None = None


class Scratch:
    """Tensors by key. `held` and `peak` are bytes by level: "device", "host", "disk"."""

    def __init__(
        self,
        host: Budget,
        share: int,
        *,
        device: Budget | None = None,
        device_share: int = 0,
        folder: str | Path | None = None,
        dtype: torch.dtype | None = None,
        poison: bool = False,
    ) -> None:
        """Lease up to `share` bytes of `host` and `device_share` of `device` (tensors that are on one stay there).

        Files are made below `folder`, by default where the system keeps temporary files. `dtype`: what floating
        tensors are kept in, None for what they come in. `poison` overwrites what is dropped with NaN, so that whoever
        still holds it is found out.
        """
        self._budgets = {"device": (device, device_share), "host": (host, share)}
        self._root = folder
        self._folder: Path | None = None
        self._dtype, self._poison = dtype, poison
        self._entries: dict[Hashable, _Entry] = {}
        self._files = 0
        self.held = {"device": 0, "host": 0, "disk": 0}
        self.peak = dict(self.held)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._entries

    def clear(self) -> None:
        """Forget everything."""
        for key in list(self._entries):
            self.drop(key)

    def put(self, key: Hashable, tensor: Tensor) -> None:
        """Keep a tensor, which nobody may change afterwards: it is copied only where it has to be.

        Raises:
            MachineError: the disk is full or failed.
        """
        assert key not in self._entries, f"{key} is kept already"
        tensor = tensor.detach()
        kept = tensor.dtype if self._dtype is None or not tensor.is_floating_point() else self._dtype
        size = tensor.numel() * kept.itemsize
        level = self._level(tensor, size)
        entry = _Entry(tensor.dtype, kept, tuple(tensor.shape), size, level, None)
        if level == "disk":
            entry.path = self._write(tensor.to("cpu", kept).contiguous())
        else:
            own = tensor.to(tensor.device if level == "device" else "cpu", kept).contiguous()
            if own.untyped_storage().nbytes() != size:
                own = own.clone()
            entry.tensor, entry.version = own, own._version
        self._entries[key] = entry
        self.held[level] += size
        self.peak[level] = max(self.peak[level], self.held[level])

    def get(self, key: Hashable, device: torch.device | None = None) -> Tensor:
        """A tensor in the dtype it came in; not to be changed, nor used after it was dropped.

        Raises:
            MachineError: the disk failed.
        """
        entry = self._entries[key]
        tensor = self._read(entry) if entry.tensor is None else entry.tensor
        assert entry.tensor is None or entry.tensor._version == entry.version, f"{key} was changed while it was kept"
        return tensor.to(device or tensor.device, entry.came)

    def drop(self, key: Hashable) -> None:
        """Forget a tensor and give its room back."""
        entry = self._entries.pop(key)
        self.held[entry.level] -= entry.size
        if entry.path is not None:
            entry.path.unlink()
        else:
            budget, _ = self._budgets[entry.level]
            assert budget is not None
            budget.give(entry.size)
            if self._poison and entry.tensor is not None and entry.tensor.is_floating_point():
                entry.tensor.fill_(float("nan"))

    def close(self) -> None:
        """Forget everything and remove the files."""
        self.clear()
        if self._folder is not None:
            shutil.rmtree(self._folder)
            self._folder = None

    def _level(self, tensor: Tensor, size: int) -> str:
        """The nearest level with room; that room is leased."""
        for level, (budget, share) in self._budgets.items():
            if budget is None or (level == "device" and tensor.device.type == "cpu"):
                continue
            if self.held[level] + size <= share:
                try:
                    budget.take(size, "what is kept between layers")
                except BudgetTooSmall:
                    continue  # others hold what this share could have been: the next level has room
                return level
        return "disk"

    def _write(self, tensor: Tensor) -> Path:
        import torch

        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="streammerge-", dir=self._root))
        path: Path = self._folder / str(self._files)
        self._files += 1
        view = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())
        try:
            with open(path, "wb", buffering=0) as file:
                if hasattr(os, "posix_fallocate") and len(view):
                    os.posix_fallocate(file.fileno(), 0, len(view))  # a full disk is found before anything is written
                written = 0
                while written < len(view):
                    written += file.write(view[written:])
        except OSError as error:
            path.unlink(missing_ok=True)
            what = "the disk is full" if error.errno == errno.ENOSPC else error.strerror
            raise MachineError(
                f"{path}: cannot keep {len(view)} bytes between layers ({what}); free space, or give more --ram"
            ) from error
        return path

    def _read(self, entry: _Entry) -> Tensor:
        import torch

        assert entry.path is not None
        tensor = torch.empty(entry.size, dtype=torch.uint8)
        try:
            with open(entry.path, "rb") as file:
                got = file.readinto(memoryview(tensor.numpy()))
        except OSError as error:
            raise MachineError(f"{entry.path}: cannot be read back: {error.strerror}") from error
        if got < entry.size:
            raise MachineError(f"{entry.path}: ended at byte {got} of {entry.size}; something changed it")
        return tensor.view(entry.kept).view(entry.shape)
