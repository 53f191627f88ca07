"""Reads steps ahead of the arithmetic, as far as the ring has room."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from streammerge.planner.steps import Step
from streammerge.store.reader import Reader
from streammerge.store.ring import Closed, Ring, Slot


@dataclass(slots=True)
class Loaded:
    """A step whose slot is being filled; `wait` returns when it is."""

    step: Step
    slot: Slot
    reads: list[Future[None]]
    moved: set[int] = field(default_factory=set)  # offsets whose bytes were moved onto their alignment
    held: Any = None  # where a device holds it

    def bytes_at(self, offset: int, size: int) -> npt.NDArray[np.uint8]:
        """Bytes of the slot as an array; valid until the slot is given back."""
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(self.slot.address + offset))

    def wait(self) -> None:
        for read in self.reads:
            read.result()


class Feed:
    """A thread that takes slots and starts reads in the order of the steps."""

    def __init__(self, ring: Ring, reader: Reader, steps: Iterable[Step]) -> None:
        self._ring, self._reader, self._steps = ring, reader, steps
        self._queue: queue.SimpleQueue[Loaded | BaseException | None] = queue.SimpleQueue()
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="feed", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for step in self._steps:
                slot = self._ring.take(step.size)
                if self._stopped.is_set():
                    self._ring.give(slot)
                    return
                self._queue.put(Loaded(step, slot, self._reader.fill(slot, step.extents)))
            self._queue.put(None)
        except Closed:
            self._queue.put(None)
        except BaseException as error:
            self._queue.put(error)

    def ready(self) -> bool:
        """Whether `next` has something without waiting for a slot."""
        return not self._queue.empty()

    def next(self) -> Loaded | None:
        """The next step with its slot filled; None after the last."""
        loaded = self._queue.get()
        if isinstance(loaded, BaseException):
            raise loaded
        if loaded is not None:
            loaded.wait()
        return loaded

    def close(self) -> None:
        """Stop reading ahead and give back every slot that nobody took."""
        self._stopped.set()
        while self._thread.is_alive() or not self._queue.empty():
            try:
                loaded = self._queue.get(timeout=0.05)
            except queue.Empty:
                continue
            if isinstance(loaded, Loaded):
                for read in loaded.reads:
                    read.cancel()
                for read in loaded.reads:
                    if not read.cancelled():
                        read.exception()  # only waits: an error of a read that nobody needs is nobody's error
                self._ring.give(loaded.slot)
        self._thread.join()
