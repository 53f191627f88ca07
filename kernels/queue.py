"""Launches in order on one device, and the memory they need beside their tensors.

A kernel's `launch` gets a queue first, then the arguments of its reference as spans and numpy arrays. Nothing waits:
launches are put on a stream; small inputs (`constant`) and small results (`peaks`) travel with the batch they belong
to; arrays that kernels add to (`mirror`) live on the device until `finish` brings them back.

    queue.begin(); ...launches...; receipt = queue.end()        one batch: the work of one step
    receipt.wait()                                              its small results are there
    queue.finish()                                              mirrored arrays are there, all of them

Memory is handed to the queue: `state` for mirrors, and a `Memory` for each batch. A batch may reuse the memory of
another once that one's receipt was waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from .device import OPTIONS
from .numerics import Array, flags

ALIGN = 256  # bytes: a whole number of the largest loads, and of a memory transaction
RESULTS = 1 << 16  # bytes of small results that a batch may have: four for each input of each tensor


class Event(Protocol):
    """A place in a stream."""

    def wait(self) -> None:
        """Block until the stream has come here."""


class Stream(Protocol):
    """Work that a device does in order, beside other streams."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Start copying bytes; neither side may be touched until the stream has passed."""

    def run(self, work: Callable[[], Any]) -> None:
        """Launch kernels."""

    def mark(self) -> Any:
        """An event behind all work so far."""

    def after(self, event: Any) -> None:
        """Hold back further work until another stream's event."""

    def current(self) -> AbstractContextManager[None]:
        """What torch does within the block goes onto this stream, in turn with what is launched there."""


class CudaStream:
    """A stream of a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)

    def run(self, work: Callable[[], Any]) -> None:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            work()

    def mark(self) -> CudaEvent:
        event = torch.cuda.Event(blocking=True)  # whoever waits leaves the processor to the readers
        event.record(self._stream)
        return CudaEvent(event)

    def after(self, event: CudaEvent) -> None:
        self._stream.wait_event(event.event)

    @contextmanager
    def current(self) -> Iterator[None]:
        with torch.cuda.device(self._device), torch.cuda.stream(self._stream):
            yield


class CudaEvent(NamedTuple):
    event: Any

    def wait(self) -> None:
        self.event.synchronize()

    def passed(self) -> bool:
        return bool(self.event.query())


class PlainStream:
    """Does everything at once: host memory under Triton's interpreter."""

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        target.copy_(source)

    def run(self, work: Callable[[], Any]) -> None:
        work()

    def mark(self) -> PlainStream:
        return self

    def after(self, event: Any) -> None:
        """Nothing is ever late."""

    @contextmanager
    def current(self) -> Iterator[None]:
        yield

    def wait(self) -> None:
        """Nothing is ever late."""

    def passed(self) -> bool:
        return True


@dataclass
class Memory:
    """What one batch works with: `work` on the device and `staging`, as large and pinned, for what is sent there;
    `results` on the device, all zeros, and `received`, as large and pinned, for what comes back.
    """

    work: torch.Tensor
    staging: torch.Tensor
    results: torch.Tensor
    received: torch.Tensor


@dataclass
class Receipt:
    """What `end` gives: when it has been waited for, the batch's small results are filled in."""

    event: Any
    fills: list[Callable[[], None]] = field(default_factory=list)

    def passed(self) -> bool:
        return bool(self.event.passed())

    def wait(self) -> None:
        self.event.wait()
        for fill in self.fills:
            fill()
        self.fills = []


class Queue:
    """Launches on one stream."""

    def __init__(self, stream: Stream, state: torch.Tensor, memory: Memory, arena: torch.Tensor | None = None) -> None:
        self.stream = stream
        self._state = state
        self._arena = arena  # what `move` moves within
        self._mirrors: dict[int, tuple[Array, torch.Tensor]] = {}
        self._mirrored = 0
        self._bundles: dict[Any, tuple[Callable[..., None], list[Any]]] = {}
        self._direct = False  # whether bundles are launched at once
        self._memory = memory
        self._used = 0  # bytes of the batch's work memory, and of its results
        self._results = 0
        self._fills: list[Callable[[], None]] = []

    @classmethod
    def on(cls, device: torch.device | str, state: int = 64 << 20, work: int = 16 << 20) -> Queue:
        """A queue with memory of its own: for tests, benchmarks and whoever has tensors rather than a plan."""
        place = torch.device(device)
        pinned = place.type == "cuda"
        stream = CudaStream(place) if pinned else PlainStream()
        memory = Memory(
            _bytes(work, place),
            torch.empty(work, dtype=torch.uint8, pin_memory=pinned),
            torch.zeros(RESULTS, dtype=torch.uint8, device=place),
            torch.empty(RESULTS, dtype=torch.uint8, pin_memory=pinned),
        )
        if pinned:  # tensors made before were made on another stream
            torch.cuda.synchronize(place)
        return cls(stream, _bytes(state, place), memory)

    @property
    def device(self) -> torch.device:
        return self._state.device

    # --- for kernels ---

    def submit(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launch a Triton kernel; a grid with a zero in it is nothing to do."""
        if all(grid):
            self.stream.run(lambda: kernel[grid](*args, **OPTIONS, **options))

    def run(self, work: Callable[[], Any]) -> None:
        """Run torch operations on the queue's stream, sooner or later."""
        self.stream.run(work)

    @contextmanager
    def current(self) -> Iterator[None]:
        """Torch's operations go onto the queue's stream within the block, in turn with launches: none is put off."""
        self.flush()
        self._direct = True
        try:
            with self.stream.current():
                yield
        finally:
            self._direct = False

    def constant(self, array: Array) -> int:
        """The device address of a copy of a small array, for kernels of this batch to read."""
        at = self._take(array.nbytes)
        if array.nbytes:
            staged = self._memory.staging[at : at + array.nbytes]
            staged.numpy()[:] = np.ascontiguousarray(array).view(np.uint8).ravel()
            self.stream.copy(self._memory.work[at : at + array.nbytes], staged)
        return int(self._memory.work.data_ptr()) + at

    def scratch(self, nbytes: int, zero: bool = False) -> int:
        """The device address of bytes for kernels of this batch."""
        at = self._take(nbytes)
        if zero:
            room = self._memory.work[at : at + nbytes]
            self.stream.run(room.zero_)
        return int(self._memory.work.data_ptr()) + at

    def peaks(self, inputs: int) -> tuple[int, Array]:
        """Zeros on the device, int32, for the largest magnitude of each input; the flags that come of them later."""
        at, found = self._results, np.zeros(inputs, np.uint8)
        self._results = end = at + -(-4 * inputs // 16) * 16
        assert end <= self._memory.results.numel(), "a batch has more results than there is room for"
        staged = self._memory.received[at : at + 4 * inputs].numpy()

        def fill() -> None:
            found[:] = flags(staged.view(np.uint32))

        self._fills.append(fill)
        return int(self._memory.results.data_ptr()) + at, found

    def mirror(self, array: Array, fresh: bool = False) -> int:
        """The device address of a numpy array that kernels change; `finish` brings it up to date.

        `fresh`: the kernels write all of it, so what it holds need not be sent. The same array asked for again is
        the same memory.
        """
        known = self._mirrors.get(id(array))
        if known is None:
            assert array.flags.c_contiguous
            end = self._mirrored + -(-max(array.nbytes, 1) // ALIGN) * ALIGN
            assert end <= self._state.numel(), f"mirrors of {end} bytes in {self._state.numel()}"
            room = self._state[self._mirrored : self._mirrored + array.nbytes]
            self._mirrored = end
            self._mirrors[id(array)] = known = (array, room)
            if not fresh and array.nbytes:
                self.stream.copy(room, torch.from_numpy(array.reshape(-1).view(np.uint8)))
        return int(known[1].data_ptr())

    def move(self, target: int, source: int, nbytes: int) -> None:
        """Copy bytes within the memory that the queue was made with, behind the launches so far."""
        assert self._arena is not None
        start = self._arena.data_ptr()
        where = [self._arena[at - start : at - start + nbytes] for at in (target, source)]
        self.flush()  # it may be what they write
        self.run(lambda: where[0].copy_(where[1]))

    def bundle(self, key: Any, launch: Callable[[Queue, list[Any]], None], item: Any) -> None:
        """Keep a small piece of work until the batch ends; all that share a key are launched at once."""
        if self._direct:
            launch(self, [item])
        else:
            self._bundles.setdefault(key, (launch, []))[1].append(item)

    # --- for whoever drives the queue ---

    def begin(self, memory: Memory | None = None) -> None:
        """Start a batch in memory that no unfinished batch uses; by default that of the last one."""
        self._memory = memory or self._memory
        self._used = self._results = 0
        self._fills = []

    def end(self) -> Receipt:
        """Launch what was bundled and send the batch's small results on their way."""
        self.flush()
        if self._results:
            results = self._memory.results[: self._results]
            self.stream.copy(self._memory.received[: self._results], results)
            self.stream.run(results.zero_)
        receipt = Receipt(self.stream.mark(), self._fills)
        self._fills = []
        return receipt

    def flush(self) -> None:
        """Launch what was bundled now."""
        for launch, items in self._bundles.values():
            launch(self, items)
        self._bundles.clear()

    def finish(self) -> None:
        """Wait for all work; every mirrored array is up to date, and its memory is free."""
        arrays = list(self._mirrors.values())
        back = [torch.from_numpy(array.reshape(-1).view(np.uint8)) for array, _ in arrays]
        for target, (_, room) in zip(back, arrays, strict=True):
            if target.numel():
                self.stream.copy(target, room)
        self.stream.mark().wait()
        self._mirrors.clear()
        self._mirrored = 0

    def _take(self, nbytes: int) -> int:
        at = self._used
        self._used += -(-nbytes // ALIGN) * ALIGN
        assert self._used <= self._memory.work.numel(), f"a batch needs {self._used} bytes of its own"
        return at


def _bytes(size: int, place: torch.device) -> torch.Tensor:
    return torch.empty(size, dtype=torch.uint8, device=place)
