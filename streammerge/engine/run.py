"""Executes a plan: steps come in filled, are surveyed and merged in order, and go out to a sink.

    disk -> ring -> survey, merge -> result ring -> disk

Reading runs ahead on its own threads, writing and hashing follow on theirs; this loop is the arithmetic between
them. All three meet in two rings, which is where a fast stage waits for a slow one.
"""

from __future__ import annotations

import ctypes
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from functools import partial
from typing import Any

from streammerge.budget import Budget
from streammerge.engine.feed import Feed, Loaded
from streammerge.engine.findings import Findings, Progress
from streammerge.engine.lanes import Lanes
from streammerge.engine.sinks import Sink
from streammerge.engine.tiles import Crew, Merger, look, settle_in_memory
from streammerge.errors import CheckpointError, Interrupted
from streammerge.formats.dtypes import SIGNS, bits_of
from streammerge.kernels.numerics import Span
from streammerge.method import Flags, Survey, TensorMethod, Tile
from streammerge.planner.plan import Plan
from streammerge.planner.steps import Piece, PlannedTensor, Step, tile_steps
from streammerge.store.reader import Mode, Reader
from streammerge.store.ring import Ring

LOOK = 0.002  # seconds between looks for room in the ring while a matrix is solved


class Run:
    """One execution of a plan. Not reusable."""

    def __init__(
        self,
        plan: Plan,
        budget: Budget,
        *,
        reader: Mode = "auto",
        strict: bool = False,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self._strict, self._report, self._cancelled = plan, strict, progress, cancelled
        self.findings = Findings()
        self.ring = Ring(budget, plan.ring_bytes, "the ring of tiles")
        self._reader = Reader(self.ring, reader)
        self._crew = Crew(plan.threads)
        self._lanes = Lanes(plan.at_once)
        self._progress = Progress(read_total=plan.read_bytes, written_total=sum(t.end - t.begin for t in plan.tensors))
        self._mergers: dict[int, Merger] = {}
        self._surveys: dict[int, Survey] = {}
        self._settling: dict[int, Future[None]] = {}  # surveys that a lane works on
        self._waiting: deque[list[Loaded]] = deque()  # groups to be merged, in order
        self._halfway = -1  # the tensor whose first half an earlier run merged
        self._feed: Feed | None = None

    def results(self, sink: Sink) -> Iterator[int]:
        """Do the work; yields the number of each tensor when the last of its bytes was put.

        Raises:
            Interrupted: cancelled; what the sink holds is kept.
            CheckpointError: an input changed while it was read, or holds a NaN or an infinity and `strict` is set.
            MachineError: reading or writing failed.
        """
        files = {spec.file: spec.end for tensor in self.plan.tensors for spec in tensor.inputs}
        self._reader.choose(list(files.items()))
        for note in sink.earlier_notes():
            self._take(note)
        first, start = self._resume(*sink.position())
        self._halfway = first if start else -1
        if first or start:
            left = sum(step.read_bytes for step in self.plan.work(first, start))
            self._progress.read_bytes = max(0, self.plan.read_bytes - left)
        self._progress.written_bytes = sum(t.end - t.begin for t in self.plan.tensors[:first])
        self._feed = Feed(self.ring, self._reader, self.plan.work(first, start))
        try:
            yield from self._groups(sink)
        except Interrupted:  # what lanes work on is waited for in any case, so it is kept
            while self._waiting and not any(each.cancel() for each in self._futures(self._waiting[0])):
                yield from self._merge_waiting(sink, len(self._waiting) - 1)
            raise

    def _groups(self, sink: Sink) -> Iterator[int]:
        while True:
            yield from self._make_way(sink)
            if (loaded := self._next()) is None:
                break
            if loaded.step.kind == "sample":
                yield from self._merge_waiting(sink, 0)
                self._survey_streamed(loaded)
                continue
            if loaded.step.kind == "survey":  # a round that the survey did without
                self._skip(loaded)
                continue
            group = [loaded]
            while not group[-1].step.last:
                yield from self._make_way(sink)
                group.append(self._must())
            self._settle(group)
            self._waiting.append(group)
            while self._waiting and self._is_settled(self._waiting[0]):
                yield from self._merge_waiting(sink, len(self._waiting) - 1)
        yield from self._merge_waiting(sink, 0)

    def _make_way(self, sink: Sink) -> Iterator[int]:
        """Merge what waits and is settled, as long as the next step has no room in the ring."""
        assert self._feed is not None
        while self._waiting and not self._feed.ready():
            if self._is_settled(self._waiting[0], LOOK):
                yield from self._merge_waiting(sink, len(self._waiting) - 1)

    def _is_settled(self, group: list[Loaded], seconds: float = 0) -> bool:
        """Whether no lane works on a group any more; waits so long for it."""
        return not wait(self._futures(group), seconds).not_done

    def _futures(self, group: list[Loaded]) -> list[Future[None]]:
        return [self._settling[index] for index in _tensors(group) if index in self._settling]

    def _merge_waiting(self, sink: Sink, left: int) -> Iterator[int]:
        """Merge the oldest groups until so many are left."""
        while len(self._waiting) > left:
            group = self._waiting.popleft()
            for index in _tensors(group):
                if (settled := self._settling.pop(index, None)) is not None:
                    settled.result()
            for member in group:
                yield from self._merge(member, sink)

    def _skip(self, loaded: Loaded) -> None:
        """Give back a step that nobody needs."""
        self.ring.give(loaded.slot)

    def close(self) -> None:
        """Stop reading and give back the ring."""
        self.ring.stop()
        if self._feed is not None:
            self._feed.close()
        self._reader.close()
        self._lanes.close()
        self._crew.close()
        self.findings.read_bytes = self._reader.bytes_read
        self.ring.close()

    def _resume(self, shard: int, at: int) -> tuple[int, int]:
        """The first tensor with bytes to write, and the element of it to start from."""
        for index, tensor in enumerate(self.plan.tensors):
            if (tensor.shard, tensor.end) <= (shard, at):
                continue
            counted = tensor.method.tally(tensor.job.shape) is not None
            if tensor.shard != shard or tensor.surveyed or counted or at <= tensor.begin:
                return index, 0
            grain = tensor.method.grain(tensor.job.shape)
            element = (at - tensor.begin) * tensor.numel // (tensor.end - tensor.begin)
            return index, element // grain * grain
        return len(self.plan.tensors), 0

    def _next(self) -> Loaded | None:
        if self._cancelled():
            raise Interrupted("stopped on request")
        assert self._feed is not None
        loaded = self._feed.next()
        if loaded is not None:
            self._progress.read_bytes += loaded.step.read_bytes
            self._progress.tensor = self.plan.tensors[loaded.step.pieces[0].tensor].job.name
            self._tell()
        return loaded

    def _must(self) -> Loaded:
        loaded = self._next()
        assert loaded is not None, "the plan ended in the middle of a tensor"
        return loaded

    def _tell(self) -> None:
        if self._report is not None:
            self._report(replace(self._progress))

    def _settle(self, group: list[Loaded]) -> None:
        """Survey, in memory, every tensor of these steps that asks for it and was not surveyed by streaming."""
        tiles: dict[int, list[Tile]] = {}
        for member in group:
            for piece in member.step.pieces:
                if self.plan.tensors[piece.tensor].surveyed and piece.tensor not in self._surveys:
                    tiles.setdefault(piece.tensor, []).append(self._tile(member, piece))
        for index, found in tiles.items():
            tensor = self.plan.tensors[index]
            self._surveys[index] = survey = fresh(tensor)
            settle = partial(settle_in_memory, self._crew, tensor.method, survey, found)
            if isinstance(tensor.method, TensorMethod):
                self._settling[index] = self._lanes.do(settle)
            else:
                settle()

    def _survey_streamed(self, sample: Loaded) -> None:
        """Survey a tensor that does not fit: read once per round, tile by tile."""
        index = sample.step.pieces[0].tensor
        self._surveys[index] = survey = fresh(self.plan.tensors[index])
        if survey.wants_sample:
            survey.sample([self._tile(sample, piece) for piece in sample.step.pieces], resident=False)
        self.ring.give(sample.slot)
        tensor = self.plan.tensors[index]
        planned = tensor.method.rounds(len(tensor.job.experts))
        while not self._settled(index, survey, self._round(index, survey)):
            planned -= 1
            if planned < 1:
                self.findings.extra_rounds += 1
                self._restart(index)

    def _round(self, index: int, survey: Survey) -> list[object]:
        tensor = self.plan.tensors[index]
        partials: list[object] = []
        done = 0
        while done < tensor.numel:
            loaded = self._must()
            (piece,) = loaded.step.pieces
            partials.extend(look(self._crew, tensor.method, survey, [self._tile(loaded, piece)]))
            self.ring.give(loaded.slot)
            done += piece.numel
        return partials

    def _settled(self, index: int, survey: Survey, partials: list[object]) -> bool:
        return survey.settle(partials)

    def _restart(self, index: int) -> None:
        """Read a tensor's tiles for another round: rare, so what was read ahead is simply dropped."""
        assert self._feed is not None
        self._feed.close()
        self._feed = Feed(self.ring, self._reader, self._again(index))

    def _again(self, index: int) -> Iterator[Step]:
        method, experts = self.plan.tensors[index].method, len(self.plan.tensors[index].job.experts)
        rounds = method.rounds(experts)
        again = method.reads(rounds - 1, experts)
        yield from tile_steps(self.plan.tensors, index, self.plan.cut, "survey", reads=again)
        yield from tile_steps(self.plan.tensors, index, self.plan.cut, "merge", reads=method.reads(rounds, experts))
        yield from self.plan.work(index + 1)

    def _merge(self, loaded: Loaded, sink: Sink) -> Iterator[int]:
        """Merge one step's pieces into one contiguous result."""
        pieces = loaded.step.pieces
        head = self.plan.tensors[pieces[0].tensor]
        sizes = [piece.numel * self.plan.tensors[piece.tensor].out_itemsize for piece in pieces]
        address = sink.room(head.shard, head.begin + pieces[0].start * head.out_itemsize, sum(sizes))
        finished = []
        for piece, size in zip(pieces, sizes, strict=True):
            tensor = self.plan.tensors[piece.tensor]
            tile = self._tile(loaded, piece)
            tile.out = Span(address, tensor.out_dtype, piece.numel)
            address += size
            merger = self._merger(piece.tensor)
            merger.merge(tile)
            self._look_at(piece.tensor, merger.flags, sink)
            if piece.start + piece.numel == tensor.numel:
                finished.append(piece.tensor)
                self._close_tensor(piece.tensor, self._mergers.pop(piece.tensor).equal, sink)
        self.ring.give(loaded.slot)
        sink.put()
        self._progress.written_bytes += sum(sizes)
        self._tell()
        yield from finished

    def _merger(self, index: int) -> Merger:
        if index not in self._mergers:
            tensor = self.plan.tensors[index]
            if index not in self._surveys and (tally := tensor.method.tally(tensor.job.shape)) is not None:
                self._surveys[index] = tally
            self._mergers[index] = Merger(self._crew, tensor.method, self._surveys.get(index))
        return self._mergers[index]

    def _look_at(self, index: int, flags: Flags | None, sink: Sink) -> None:
        """Note at once which inputs hold what is not finite: a tensor's other half may be another run's."""
        tensor = self.plan.tensors[index]
        for spec, flag in zip(tensor.inputs, () if flags is None else flags, strict=False):
            found = (tensor.job.name, spec.file, "NaN" if flag == 2 else "an infinity")
            if flag and found not in self.findings.nonfinite:
                self._take({"nonfinite": list(found)})
                sink.note({"nonfinite": list(found)})

    def _take(self, note: dict[str, Any]) -> None:
        self.findings.take(note)
        if self._strict and "nonfinite" in note:
            tensor, file, kind = note["nonfinite"]
            raise CheckpointError(f"{file}: tensor {tensor!r} holds {kind}; mend it, or merge without --strict")

    def _close_tensor(self, index: int, equal: bool, sink: Sink) -> None:
        """Forget a finished tensor's survey; note its figures, and if it was only copied, all of it by this run."""
        survey = self._surveys.pop(index, None)
        tensor = self.plan.tensors[index]
        if survey is not None and survey.figures:
            told = {"figures": [tensor.job.name, dict(survey.figures)], "section": survey.section}
            self.findings.take(told)
            sink.note(told)
        if equal and len(tensor.inputs) > 1 and index != self._halfway:
            note = {"copied": tensor.job.name}
            self.findings.take(note)
            sink.note(note)

    def _tile(self, loaded: Loaded, piece: Piece) -> Tile:
        spans = [
            self._span(loaded, offset, spec.dtype, piece.numel)
            for spec, offset in zip(piece.inputs(self.plan.tensors), piece.offsets, strict=True)
        ]
        return self._tile_of(piece, spans)

    def _tile_of(self, piece: Piece, spans: list[Span]) -> Tile:
        """A piece as a tile; `spans` are its inputs, base first."""
        tensor = self.plan.tensors[piece.tensor]
        has_base = tensor.job.base is not None and (piece.reads is None or 0 in piece.reads)
        base = spans.pop(0) if has_base else None
        return Tile(
            name=tensor.job.name,
            tensor_id=zlib.crc32(tensor.job.name.encode()),
            shape=tensor.job.shape,
            start=piece.start,
            numel=piece.numel,
            base=base,
            experts=tuple(spans),
            seed=self.plan.seed,
        )

    def _span(self, loaded: Loaded, offset: int, dtype: str, numel: int) -> Span:
        """An input's elements in the slot; bytes that a file keeps off their alignment are moved onto it."""
        width = max(1, bits_of(dtype) // 8)
        address = loaded.slot.address + offset
        if address % width and numel:
            if offset not in loaded.moved:
                ctypes.memmove(address - address % width, address, numel * width)
                loaded.moved.add(offset)
            address -= address % width
        return Span(address, dtype if bits_of(dtype) >= 8 or dtype == SIGNS else "U8", numel)


def open_run(plan: Plan, budget: Budget, **options: Any) -> Run:
    """The run that a plan asks for: on the CPU, or on a GPU."""
    if plan.device_layout is None:
        return Run(plan, budget, **options)
    from streammerge.engine.gpu import GpuRun

    return GpuRun(plan, budget, **options)


def fresh(tensor: PlannedTensor) -> Survey:
    survey = tensor.method.survey(tensor.job.shape, len(tensor.job.experts))
    assert survey is not None
    return survey


def _tensors(group: Sequence[Loaded]) -> list[int]:
    """The tensors that steps have pieces of."""
    return list(dict.fromkeys(piece.tensor for member in group for piece in member.step.pieces))
