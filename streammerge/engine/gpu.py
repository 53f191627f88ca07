"""Executes a plan on a GPU: the same steps, methods and bytes, with the arithmetic behind a pair of copy streams.

    disk -> ring -> | copy there | survey, merge | copy back | -> result ring -> disk

Nothing waits but for a place: a step is copied, worked on and copied back by three streams that events tie together,
while the host is two steps further on. Only a survey makes the host wait, once per round, for what it must decide on.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from streammerge.budget import Budget, human
from streammerge.engine.device import Device
from streammerge.engine.feed import Loaded
from streammerge.engine.run import Run, fresh
from streammerge.engine.sinks import AHEAD, Sink
from streammerge.engine.tiles import RESIDENT_SAMPLE, ROUNDS, are_equal, as_bytes, can_copy, sample_of
from streammerge.errors import MachineError
from streammerge.formats.dtypes import DTYPES
from streammerge.kernels.numerics import Span
from streammerge.method import Flags, Survey, TensorMethod, Tile
from streammerge.planner.device import DeviceStep, place
from streammerge.planner.plan import Plan
from streammerge.planner.steps import Piece


@dataclass
class OnDevice:
    """A step whose inputs are on the device, or on their way: its slot, and where its bytes lie there."""

    slot: int
    where: DeviceStep
    arrived: Any
    equal: tuple[bool, ...]  # per piece: it is the same bytes in all inputs, as was all of its tensor before it


@dataclass
class Batch:
    """Launches under way, and what is free again, known or to be put when they are done."""

    receipt: Any
    memory: Any
    slot: int | None = None
    out: int | None = None
    returned: Any = None
    written: int = 0
    flags: list[tuple[int, Flags]] = field(default_factory=list)
    finished: list[int] = field(default_factory=list)

    def passed(self) -> bool:
        return bool(self.receipt.passed() and (self.returned is None or self.returned.passed()))


@dataclass
class Account:
    """What merging a tensor notices; a Merger's, without the work."""

    equal: bool
    flags: Flags | None = None
    ranks: npt.NDArray[np.int64] | None = None


class GpuRun(Run):
    """One execution of a plan on a GPU. Not reusable."""

    def __init__(self, plan: Plan, budget: Budget, **options: Any) -> None:
        super().__init__(plan, budget, **options)
        assert plan.device_layout is not None
        self.device = Device(plan.device, plan.device_layout, budget, plan.vram_budget_bytes)
        self._input = self.device.pin(self.ring)
        self._slots = deque(range(plan.device_layout.slots))
        self._outs = deque(range(AHEAD))
        self._memories = deque(self.device.memories)
        self._busy: deque[Batch] = deque()
        self._leaving: deque[tuple[Any, Loaded]] = deque()  # host slots whose bytes are being copied
        self._coming: deque[Loaded] = deque()  # steps on the device that nobody asked for yet
        self._ended = False
        self._accounts: dict[int, Account] = {}
        self._same: dict[int, bool] = {}
        self._samples: dict[int, list[Tile]] = {}
        self._kept: dict[int, list[Any]] = {}  # the arrays that samples lie in
        self._done: deque[int] = deque()  # tensors whose last bytes were put
        self._sink: Sink | None = None
        self._shard = -1
        self._solving = ""  # the matrix at hand
        self._output: Any = None

    def results(self, sink: Sink) -> Iterator[int]:
        """As Run's.

        Raises:
            MachineError: also if a solver did not get the memory that the plan has for it.
        """
        import torch

        self._sink = sink
        if sink.ring is not None:
            self._output = self.device.pin(sink.ring)
        try:
            yield from super().results(sink)
        except torch.OutOfMemoryError:
            raise MachineError(
                f"{self.plan.device} has less than the {human(self.device.layout.solver_bytes)} of memory that were "
                f"planned to solve {self._solving!r}; free the GPU, or give a larger --vram"
            ) from None
        while self._busy:
            self._retire()
        yield from self._finished()

    def close(self) -> None:
        self.ring.stop()
        if self._feed is not None:
            self._feed.close()
        self._output = self._input = None
        self._surveys.clear()  # some hold memory of the device
        self.findings.vram_peak_bytes = self.device.close()
        super().close()

    # --- steps come to the device ahead of their turn ---

    def _next(self) -> Loaded | None:
        loaded = self._coming.popleft() if self._coming else self._bring()
        while self._slots and not self._coming and loaded is not None and self._feed is not None and self._feed.ready():
            ahead = self._bring()
            if ahead is None:
                break
            self._coming.append(ahead)
        return loaded

    def _bring(self) -> Loaded | None:
        """The next step from the disk, its inputs on their way to the device unless it is a sample."""
        if self._ended:
            return None
        self._tidy()
        assert self._feed is not None
        if not self._feed.ready():  # the disk is behind: meanwhile nothing of ours may keep it waiting
            while self._busy:
                self._retire()
            self._release(wait=True)
        loaded = super()._next()
        self._ended = loaded is None
        if loaded is not None and loaded.step.kind != "sample":
            self._upload(loaded)
        return loaded

    def _upload(self, loaded: Loaded) -> None:
        while not self._slots:
            self._retire()
        slot = self._slots.popleft()
        where = place(self.plan.tensors, loaded.step)
        equal = tuple(self._watch(loaded, piece) for piece in loaded.step.pieces)
        start, base = loaded.slot.offset, slot * self.device.layout.slot_bytes
        for host, there, size in where.there:
            target = self.device.arena[base + there : base + there + size]
            self.device.streams.there.copy(target, self._input[start + host : start + host + size])
        arrived = self.device.streams.there.mark()
        loaded.held = OnDevice(slot, where, arrived, equal)
        self._leaving.append((arrived, loaded))

    def _watch(self, loaded: Loaded, piece: Piece) -> bool:
        """While a piece's bytes are on the host: take a sample, and see whether all inputs are the same."""
        tensor, index = self.plan.tensors[piece.tensor], piece.tensor
        if loaded.step.kind != "merge" or not piece.numel:
            return loaded.step.kind == "merge" and can_copy(tensor.method)
        tile = self._tile(loaded, piece)
        tile.out = Span(0, tensor.out_dtype, piece.numel)
        sampled = tensor.surveyed and not isinstance(tensor.method, TensorMethod)
        if sampled and index not in self._surveys and tensor.numel > RESIDENT_SAMPLE:
            self._samples.setdefault(index, []).extend(
                self._copied(index, part) for part in sample_of(tile, tensor.numel)
            )
        same = self._same.get(index, can_copy(tensor.method)) and are_equal(tile)
        self._same[index] = same
        return same

    def _span(self, loaded: Loaded, offset: int, dtype: str, numel: int) -> Span:
        """Bytes on their way to the device stay where they are: the copy brings them onto their alignment."""
        if loaded.step.kind == "sample":
            return super()._span(loaded, offset, dtype, numel)
        return Span(loaded.slot.address + offset, dtype if DTYPES[dtype].bits >= 8 else "U8", numel)

    def _copied(self, index: int, part: Tile) -> Tile:
        """A tile in memory of its own."""
        kept = self._kept.setdefault(index, [])

        def copy(span: Span) -> Span:
            kept.append(as_bytes(span, span.numel * DTYPES[span.dtype].bits // 8).copy())
            return span._replace(address=kept[-1].ctypes.data)

        base = None if part.base is None else copy(part.base)
        return replace(part, base=base, experts=tuple(copy(span) for span in part.experts))

    def _restart(self, index: int) -> None:
        while self._coming:
            dropped = self._coming.popleft()
            if dropped.held is None:
                self.ring.give(dropped.slot)
            else:
                self._slots.append(dropped.held.slot)
        self._release(wait=True)
        self._ended = False
        super()._restart(index)

    # --- surveys ---

    def _settle(self, group: list[Loaded]) -> None:
        tiles: dict[int, list[tuple[Loaded, Tile]]] = {}
        for member in group:
            for number, piece in enumerate(member.step.pieces):
                if self.plan.tensors[piece.tensor].surveyed and piece.tensor not in self._surveys:
                    tiles.setdefault(piece.tensor, []).append((member, self._there(member, number)))
        for index, found in tiles.items():
            tensor = self.plan.tensors[index]
            self._make_room(index)
            self._surveys[index] = survey = fresh(tensor)
            if survey.wants_sample and index in self._samples:
                survey.sample(self._samples.pop(index), resident=True)
            self._kept.pop(index, None)
            experts = len(tensor.job.experts)
            rounds = tensor.method.rounds(experts)
            for number in range(rounds + ROUNDS):
                reads = tensor.method.reads(min(number, rounds - 1), experts)
                partials = [self._look(survey, member, tile.only(reads)) for member, tile in found]
                if self._settled(index, survey, partials):
                    break
            else:
                raise AssertionError(f"{type(survey).__name__} did not settle in {ROUNDS} rounds")

    def _make_room(self, index: int) -> None:
        """Before a matrix is solved: the answers to those that were merged go."""
        tensor = self.plan.tensors[index]
        if isinstance(tensor.method, TensorMethod):
            self._solving = tensor.job.name
            self._finish()
            for batch in self._busy:
                for merged in batch.finished:
                    if merged in self._surveys:
                        self._surveys[merged].release()
            self.device.trim(tensor.job.shape)

    def _finish(self) -> None:
        """Wait for all launches; what they found is filled in."""
        self.device.queue.finish()
        for batch in self._busy:
            batch.receipt.wait()

    def _settled(self, index: int, survey: Survey, partials: list[object]) -> bool:
        self._finish()
        return super()._settled(index, survey, partials)

    def _look(self, survey: Survey, member: Loaded, tile: Tile, slot: int | None = None) -> Any:
        memory = self._begin(member)
        answer = survey.look(tile)
        self._busy.append(Batch(self.device.queue.end(), memory, slot))
        return answer

    def _round(self, index: int, survey: Survey) -> list[object]:
        tensor = self.plan.tensors[index]
        partials: list[object] = []
        done = 0
        while done < tensor.numel:
            loaded = self._must()
            (piece,) = loaded.step.pieces
            assert loaded.held is not None
            partials.append(self._look(survey, loaded, self._there(loaded, 0), loaded.held.slot))
            done += piece.numel
        return partials

    def _survey_streamed(self, sample: Loaded) -> None:
        self._make_room(sample.step.pieces[0].tensor)
        super()._survey_streamed(sample)

    # --- merges ---

    def _skip(self, loaded: Loaded) -> None:
        assert loaded.held is not None
        self._slots.append(loaded.held.slot)

    def _merge(self, loaded: Loaded, sink: Sink) -> Iterator[int]:
        pieces, held = loaded.step.pieces, loaded.held
        assert held is not None
        head = self.plan.tensors[pieces[0].tensor]
        if head.shard != self._shard:  # the sink ends the shard before
            while self._busy:
                self._retire()
            self._shard = head.shard
        while not self._outs:
            self._retire()
        sizes = [piece.numel * self.plan.tensors[piece.tensor].out_itemsize for piece in pieces]
        address = sink.room(head.shard, head.begin + pieces[0].start * head.out_itemsize, sum(sizes))
        out = self._outs.popleft()
        batch = Batch(None, self._begin(loaded), held.slot, out, written=sum(sizes))
        at = self.device.layout.out_at(out)
        for number, piece in enumerate(pieces):
            tile = self._there(loaded, number)
            tensor = self.plan.tensors[piece.tensor]
            result = self.device.arena.data_ptr() + at + held.where.results[number]
            tile.out = Span(result, tensor.out_dtype, piece.numel, self.device.queue)
            self._work(piece, tile, held.equal[number], batch)
            if piece.start + piece.numel == tensor.numel:
                batch.finished.append(piece.tensor)
        batch.receipt = self.device.queue.end()
        self._fetch(batch, held.where, at, address)
        self._busy.append(batch)
        self._tidy()
        yield from self._finished()

    def _work(self, piece: Piece, tile: Tile, equal: bool, batch: Batch) -> None:
        """Launch one piece's merge; inputs that are the same bytes give those bytes, whatever a NaN holds."""
        tensor = self.plan.tensors[piece.tensor]
        survey = self._surveys.get(piece.tensor)
        account = self._accounts.setdefault(piece.tensor, Account(can_copy(tensor.method)))
        account.equal = account.equal and equal
        assert tile.out is not None
        if DTYPES[tile.out.dtype].floating and piece.numel:
            if survey is not None and account.ranks is None:
                account.ranks = survey.first_ranks()
            tile.ranks = account.ranks
            batch.flags.append((piece.tensor, tensor.method.merge(tile, survey)))
        if account.equal:
            nbytes = piece.numel * tensor.out_itemsize
            self.device.queue.move(tile.out.address, tile.anchor.address, nbytes)

    def _fetch(self, batch: Batch, where: DeviceStep, at: int, address: int) -> None:
        """Copy a step's results to the host as soon as they are made."""
        back = self.device.streams.back
        back.after(batch.receipt.event)
        for there, host, size in where.back:
            target = self._host_bytes(address + host, size)
            back.copy(target, self.device.arena[at + there : at + there + size])
        batch.returned = back.mark()

    def _host_bytes(self, address: int, size: int) -> Any:
        if self._output is None:
            import torch

            return torch.from_numpy(as_bytes(Span(address, "U8", size), size))
        at = address - self._output.data_ptr()
        return self._output[at : at + size]

    # --- places are taken and given back ---

    def _begin(self, loaded: Loaded) -> Any:
        """Start a batch behind the arrival of a step."""
        assert loaded.held is not None
        while not self._memories:
            self._retire()
        memory = self._memories.popleft()
        self.device.streams.work.after(loaded.held.arrived)
        self.device.queue.begin(memory)
        return memory

    def _there(self, loaded: Loaded, number: int) -> Tile:
        """A piece as a tile of device memory."""
        assert loaded.held is not None
        piece = loaded.step.pieces[number]
        start = self.device.arena.data_ptr() + loaded.held.slot * self.device.layout.slot_bytes
        spans = [
            Span(start + offset, spec.dtype if DTYPES[spec.dtype].bits >= 8 else "U8", piece.numel, self.device.queue)
            for spec, offset in zip(piece.inputs(self.plan.tensors), loaded.held.where.offsets[number], strict=True)
        ]
        return self._tile_of(piece, spans)

    def _tidy(self) -> None:
        """Take in what is done, without waiting."""
        while self._busy and self._busy[0].passed():
            self._retire()
        self._release(wait=False)

    def _release(self, wait: bool) -> None:
        """Give back host slots whose bytes are on the device."""
        while self._leaving and (wait or self._leaving[0][0].passed()):
            event, loaded = self._leaving.popleft()
            event.wait()
            self.ring.give(loaded.slot)

    def _retire(self) -> None:
        """Wait for the oldest batch; its places are free, its results are put."""
        assert self._busy, "every place on the device is held by nobody"
        batch = self._busy.popleft()
        batch.receipt.wait()
        self._memories.append(batch.memory)
        if batch.slot is not None:
            self._slots.append(batch.slot)
        if batch.out is None:
            return
        batch.returned.wait()
        assert self._sink is not None
        for index, flags in batch.flags:
            account = self._accounts[index]
            account.flags = flags if account.flags is None else np.maximum(account.flags, flags)
            self._look_at(index, account.flags, self._sink)
        for index in batch.finished:
            self._close_tensor(index, self._accounts.pop(index).equal, self._sink)
            self._same.pop(index, None)
        self._outs.append(batch.out)
        self._sink.put()
        self._progress.written_bytes += batch.written
        self._tell()
        self._done.extend(batch.finished)

    def _finished(self) -> Iterator[int]:
        while self._done:
            yield self._done.popleft()
