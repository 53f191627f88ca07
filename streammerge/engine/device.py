"""One GPU as a run uses it: one piece of memory, three streams, and the rings of the host pinned for its copies."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.budget import Budget
from streammerge.errors import MachineError, RecipeError
from streammerge.planner.device import BATCHES, DeviceLayout
from streammerge.store.ring import Ring

if TYPE_CHECKING:
    import torch

    from streammerge.kernels.queue import Memory, Queue


@dataclass
class Streams:
    """Copies there, kernels, copies back: three orders of work that events tie together."""

    there: Any
    work: Any
    back: Any


def find(wanted: str) -> tuple[str, int]:
    """What `auto`, `cpu`, `cuda` or `cuda:N` stands for here, and its free bytes (0 for the CPU).

    Raises:
        RecipeError: it names no device, or one that is not there.
    """
    if wanted == "auto" and not any(Path(node).exists() for node in ("/dev/nvidiactl", "/dev/dxg")):
        return "cpu", 0  # without importing torch, which takes a second and 140 MiB
    if wanted == "cpu":
        return "cpu", 0
    if not re.fullmatch(r"auto|cuda(:[0-9]+)?", wanted):
        raise RecipeError(f"--device {wanted}: use auto, cpu, cuda or cuda:N")
    import torch

    number = int(wanted.partition(":")[2] or 0)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if number >= count:
        if wanted == "auto":
            return "cpu", 0
        raise RecipeError(f"--device {wanted}: torch sees {count or 'no'} GPUs here; use --device cpu")
    return f"cuda:{number}", int(torch.cuda.mem_get_info(number)[0])


def open_streams(name: str) -> tuple[torch.device, Streams]:
    """A GPU that `find` has found, and its streams."""
    import torch

    from streammerge.kernels.queue import CudaStream

    device = torch.device(name)
    return device, Streams(CudaStream(device), CudaStream(device), CudaStream(device))


class Device:
    """Memory of a GPU, laid out as the plan says, and the host memory that goes with it.

    Raises:
        MachineError: the GPU has less free memory than the budget allows.
    """

    def __init__(self, name: str, layout: DeviceLayout, budget: Budget) -> None:
        import torch

        from streammerge.kernels.queue import Memory, Queue

        self.layout = layout
        self.place, self.streams = open_streams(name)
        try:
            self.arena = torch.empty(layout.arena_bytes, dtype=torch.uint8, device=self.place)
        except torch.OutOfMemoryError:
            raise MachineError(
                f"{name} has less than {layout.arena_bytes} bytes free; give a smaller --vram, or free the GPU"
            ) from None
        self._pinned: list[Ring] = []
        self._ring = Ring(budget, layout.pinned_bytes, "what launches send and receive")
        self._host = self.pin(self._ring)
        self.memories: list[Memory] = []
        for which in range(BATCHES):
            at, work = layout.batch_at(which), layout.work_bytes
            host = which * layout.batch_bytes
            results = self.arena[at + work : at + layout.batch_bytes]
            results.zero_()
            self.memories.append(
                Memory(
                    self.arena[at : at + work],
                    self._host[host : host + work],
                    results,
                    self._host[host + work : host + layout.batch_bytes],
                )
            )
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)  # the zeros were written on another stream
        state = self.arena[layout.state_at : layout.state_at + layout.state_bytes]
        self.queue: Queue = Queue(self.streams.work, state, self.memories[0], self.arena)

    def pin(self, ring: Ring) -> torch.Tensor:
        """A ring as bytes that the GPU can reach by itself, so that copies run beside everything else."""
        import torch

        if self.place.type == "cuda":
            code = torch.cuda.cudart().cudaHostRegister(ring.address, ring.size, 0)
            if int(code) != 0:
                raise MachineError(
                    f"{ring.size} bytes of host memory cannot be pinned (CUDA error {int(code)}); "
                    "raise the limit of locked memory (ulimit -l), or use --device cpu"
                )
            self._pinned.append(ring)
        return torch.frombuffer(ring.view, dtype=torch.uint8)

    def close(self) -> int:
        """Wait for the GPU, give back its memory, unpin the host's; the bytes that torch held of it at most."""
        import torch

        reserved = 0
        if self.place.type == "cuda":
            torch.cuda.synchronize(self.place)
            reserved = int(torch.cuda.max_memory_reserved(self.place))
            for ring in self._pinned:
                torch.cuda.cudart().cudaHostUnregister(ring.address)
        del self.queue, self.memories, self.arena, self._host
        if self.place.type == "cuda":
            torch.cuda.empty_cache()
        self._ring.close()
        return reserved
