"""One GPU as a run uses it: one piece of memory, three streams, and the rings of the host pinned for its copies.

Methods on whole matrices compute with what torch's allocator hands out beside that piece. So that it never keeps more
than `--vram` allows, the allocator is told a limit for the whole process: at the limit it gives back what it has cached
before it asks the driver for more. Between matrices of different shapes it gives back everything (`trim`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.budget import Budget, human
from streammerge.errors import MachineError, RecipeError
from streammerge.planner.device import BATCHES, CONTEXT, DeviceLayout
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

    `budget` is the host's, `vram` what may be held of the GPU.

    Raises:
        MachineError: the GPU has less free memory than the budget allows.
    """

    def __init__(self, name: str, layout: DeviceLayout, budget: Budget, vram: int) -> None:
        self.layout = layout
        self.place, self.streams = open_streams(name)
        self._shape: tuple[int, ...] = ()  # of the matrices that torch's allocator has memory for
        self._share = 1.0  # of the GPU that torch may take when this is closed
        self.account = Budget(vram, CONTEXT)
        self.account.take(layout.arena_bytes, "the arena of the GPU")
        self.account.take(layout.solver_bytes, "solvers on the GPU")
        self._limit(vram - CONTEXT)
        try:
            self._lay_out(budget)
        except Exception:
            self._unlimit()
            raise

    def _lay_out(self, budget: Budget) -> None:
        import torch

        from streammerge.kernels.queue import Memory, Queue

        layout = self.layout
        try:
            self.arena = torch.empty(layout.arena_bytes, dtype=torch.uint8, device=self.place)
        except torch.OutOfMemoryError:
            raise MachineError(
                f"{self.place} has less than {layout.arena_bytes} bytes free; give a smaller --vram, or free the GPU"
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

    def _limit(self, allowed: int) -> None:
        """Let torch hold so many bytes beside what this process holds already.

        Raises:
            MachineError: fewer are free.
        """
        import torch

        if self.place.type != "cuda":
            return
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.place)
        free, total = torch.cuda.mem_get_info(self.place)
        needed = self.layout.arena_bytes + self.layout.solver_bytes
        if free < needed:
            raise MachineError(
                f"{self.place} has {human(free)} free and {human(needed)} are needed; "
                "give a smaller --vram, or free the GPU"
            )
        memory = torch.cuda.memory
        self._share = getattr(memory, "get_per_process_memory_fraction", lambda place: 1.0)(self.place)
        held = torch.cuda.memory_reserved(self.place)
        memory.set_per_process_memory_fraction(min(self._share, (held + allowed) / total), self.place)

    def _unlimit(self) -> None:
        """The limit that was there before."""
        import torch

        if self.place.type == "cuda":
            torch.cuda.memory.set_per_process_memory_fraction(self._share, self.place)

    def trim(self, shape: tuple[int, ...]) -> None:
        """Before matrices of another shape are solved, the allocator gives back what it kept for those before."""
        import torch

        if self.place.type == "cuda" and shape != self._shape:
            torch.cuda.empty_cache()
        self._shape = shape

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
        self._unlimit()
        self._ring.close()
        return reserved
