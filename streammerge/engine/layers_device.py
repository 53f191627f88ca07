"""Where a sweep computes: how bytes get from the ring into a block there, and what must wait for what."""

from __future__ import annotations

import ctypes
import math
import mmap
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from streammerge import kernel
from streammerge.errors import MachineError
from streammerge.formats.dtypes import DTYPES
from streammerge.kernels.numerics import Span
from streammerge.store.ring import Ring

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def torch_dtype(name: str) -> torch.dtype:
    """A header's dtype as torch's."""
    import torch

    found: torch.dtype = getattr(torch, DTYPES[name].torch or "")
    return found


class Host:
    """The CPU: everything is done when the call returns."""

    def __init__(self, ring: Ring) -> None:
        import torch

        self.device = torch.device("cpu")

    def copy(self, out: Tensor, address: int, dtype: str, size: int) -> None:
        """`size` bytes of `dtype` at `address` into `out`, a flat tensor of as many elements, rounded at most once."""
        wanted = DTYPES[dtype].torch
        if str(out.dtype) == f"torch.{wanted}":
            ctypes.memmove(out.data_ptr(), address, size)
            return
        width = DTYPES[dtype].bits // 8
        if address % width:
            ctypes.memmove(address - address % width, address, size)
            address -= address % width
        name = next(row.name for row in DTYPES.values() if f"torch.{row.torch}" == str(out.dtype))
        kernel.run("cast", Span(out.data_ptr(), name, out.numel()), Span(address, dtype, out.numel()))

    def allocate(self, size: int) -> Tensor:
        """A flat uint8 tensor that copies may write at once."""
        import torch

        private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
        memory = mmap.mmap(-1, size, **private)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel may be built without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def landed(self) -> None:
        """Wait until the ring may be written again."""

    def mark(self) -> Any:
        """What was copied so far."""
        return None

    def wait(self, mark: Any) -> None:
        """Let the arithmetic wait for what was copied."""

    def used(self) -> Any:
        """The arithmetic so far."""
        return None

    def after(self, used: Any) -> None:
        """Let copies wait for the arithmetic that used their destination."""

    def close(self) -> None:
        """Nothing is held."""


class Gpu(Host):
    """A CUDA device: copies out of the pinned ring run on a stream of their own."""

    def __init__(self, ring: Ring, device: torch.device) -> None:
        import torch

        self.device = device
        self._ring, self._stream = ring, torch.cuda.Stream(device)
        self._work = torch.cuda.current_stream(device)  # where the arithmetic runs, whichever thread asks
        code = int(torch.cuda.cudart().cudaHostRegister(ring.address, ring.size, 0))
        if code != 0:
            raise MachineError(
                f"{ring.size} bytes of host memory cannot be pinned (CUDA error {code}); "
                "raise the limit of locked memory (ulimit -l), or use --device cpu"
            )
        self._bytes = torch.frombuffer(ring.view, dtype=torch.uint8)
        self._staging: Tensor | None = None

    def copy(self, out: Tensor, address: int, dtype: str, size: int) -> None:
        import torch

        first = address - self._ring.address
        source = self._bytes[first : first + size]
        with torch.cuda.stream(self._stream):
            if out.dtype == torch_dtype(dtype):
                out.view(torch.uint8).copy_(source, non_blocking=True)
                return
            if self._staging is None or self._staging.numel() < size:
                self._staging = torch.empty(math.ceil(size / 8) * 8, dtype=torch.uint8, device=self.device)
            there = self._staging[:size]
            there.copy_(source, non_blocking=True)
            out.copy_(there.view(torch_dtype(dtype)))

    def allocate(self, size: int) -> Tensor:
        import torch

        with torch.cuda.stream(self._work):
            block = torch.empty(size, dtype=torch.uint8, device=self.device)
        self.after(self.used())  # arithmetic that is still running may have used this memory before
        return block

    def landed(self) -> None:
        self._stream.synchronize()

    def mark(self) -> Any:
        import torch

        event = torch.cuda.Event()
        event.record(self._stream)
        return event

    def wait(self, mark: Any) -> None:
        self._work.wait_event(mark)

    def used(self) -> Any:
        import torch

        event = torch.cuda.Event()
        event.record(self._work)
        return event

    def after(self, used: Any) -> None:
        if used is not None:
            self._stream.wait_event(used)

    def close(self) -> None:
        import torch

        torch.cuda.synchronize(self.device)
        torch.cuda.cudart().cudaHostUnregister(self._ring.address)
        del self._bytes, self._staging


def open_place(ring: Ring, device: torch.device) -> Host:
    return Host(ring) if device.type == "cpu" else Gpu(ring, device)
