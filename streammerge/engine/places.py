"""Where tensors are merged that a sweep holds in memory: on the CPU by threads, or on a GPU by launches."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streammerge import kernel
from streammerge.engine.tiles import ROUNDS, Crew, Merger, settle_in_memory
from streammerge.formats.dtypes import bits_of
from streammerge.kernels.numerics import Span
from streammerge.method import Flags, Survey, Tile, TileMethod

if TYPE_CHECKING:
    import torch
    from torch import Tensor

STATE, WORK = 32 << 20, 4 << 20  # bytes of a GPU for what launches add to, and for what they are sent


class HostPlace:
    """The CPU: what is asked for is done when a call returns."""

    queue: Any = None

    def __init__(self, threads: int) -> None:
        self._crew = Crew(threads)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Torch's operations and kernels of the block follow each other."""
        yield

    def settle(self, method: TileMethod, survey: Survey, tile: Tile) -> None:
        """Show a survey a tensor that is there whole."""
        settle_in_memory(self._crew, method, survey, [tile])

    def merge(self, method: TileMethod, survey: Survey | None, tile: Tile, address: int, dtype: str) -> Flags | None:
        """Merge a tile into host memory; what its inputs hold, if that is known already."""
        tile.out = Span(address, dtype, tile.numel)
        return self.run(method, survey, tile)

    def run(self, method: TileMethod, survey: Survey | None, tile: Tile) -> Flags | None:
        """Merge a tile to where its `out` is, here."""
        merger = Merger(self._crew, method, survey)
        merger.merge(tile)
        return merger.flags

    def fill(self, tile: Tile, out: Tensor, work: Any) -> None:
        """Have `work(tile)` write to a tensor here; `out` is contiguous."""
        tile.out = span(out, self.queue)
        work(tile)

    def pack(self, votes: Span, address: int, size: int) -> None:
        """Pack the signs of votes into `size` bytes of host memory."""
        kernel.call("sign_mask", "pack", Span(address, "U8", size), votes)

    def finish(self) -> None:
        """All that was asked for is done, and what kernels counted is there."""

    def close(self) -> None:
        self._crew.close()


class GpuPlace(HostPlace):
    """A GPU: launches on a stream of their own, in turn with torch's operations in `working`."""

    def __init__(self, device: torch.device, piece: int) -> None:
        import torch

        from streammerge.kernels.queue import Queue

        self._device = device
        self.queue = Queue.on(device, STATE, WORK)
        self._room = torch.empty(piece, dtype=torch.uint8, device=device)

    @contextmanager
    def working(self) -> Iterator[None]:
        import torch

        if self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        with self.queue.current():
            yield
            self.finish()

    def settle(self, method: TileMethod, survey: Survey, tile: Tile) -> None:
        for number in range(method.rounds(len(tile.experts)) + ROUNDS):
            answer = survey.look(tile.only(method.reads(number, len(tile.experts))))
            self.finish()
            if survey.settle([answer]):
                return
        raise AssertionError(f"{type(survey).__name__} did not settle")

    def merge(self, method: TileMethod, survey: Survey | None, tile: Tile, address: int, dtype: str) -> Flags | None:
        tile.out = Span(self._room.data_ptr(), dtype, tile.numel, self.queue)
        self.run(method, survey, tile)
        self._bring(tile.numel * bits_of(dtype) // 8, address)
        return None

    def run(self, method: TileMethod, survey: Survey | None, tile: Tile) -> Flags | None:
        method.merge(tile, survey)
        return None

    def pack(self, votes: Span, address: int, size: int) -> None:
        kernel.call("sign_mask", "pack", Span(self._room.data_ptr(), "U8", size, self.queue), votes)
        self._bring(size, address)

    def _bring(self, size: int, address: int) -> None:
        """Copy bytes of the room to the host."""
        import torch

        self.queue.flush()
        torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8).copy_(self._room[:size])

    def fill(self, tile: Tile, out: Tensor, work: Any) -> None:
        super().fill(tile, out, work)
        self.queue.flush()

    def finish(self) -> None:
        self.queue.end().wait()
        self.queue.finish()
        self.queue.begin()

    def close(self) -> None:
        del self._room, self.queue


def span(values: Tensor, queue: Any = None) -> Span:
    """A contiguous tensor's memory; the caller keeps it."""
    from streammerge.engine.layers_order import header_dtype

    assert values.is_contiguous()
    return Span(values.data_ptr(), header_dtype(values.dtype), values.numel(), queue)
