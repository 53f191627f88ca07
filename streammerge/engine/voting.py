"""GradFix in a sweep: each tensor's gradients are voted on, and its result is written while its layer is resident.

    learn, panel   a sample's gradient goes into the tensor's ballot, and is gone
    emit           ballots are closed; what they allow of the task vectors is merged into the target's weights and put
                   at its place in the output; or, while an alpha is still to be chosen, the signs alone are

The other models' tensors of a layer are read with it, on the way back. Nothing of a layer outlives it but its output.
"""

from __future__ import annotations

import ctypes
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from streammerge.engine.layers_hooks import Hooks, Loaded
from streammerge.engine.places import HostPlace, span
from streammerge.errors import RecipeError
from streammerge.kernels.numerics import Span
from streammerge.method import BLOCK, Cost, Flags, Survey, Tile, TileMethod
from streammerge.models.stage import Stage
from streammerge.planner.steps import PlannedTensor
from streammerge.planner.transport import packed
from streammerge.store.scatter import Member, ScatterWriter
from streammerge.store.writer import Shard

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 8 << 20  # bytes of a result that are put at once


class Ballot(Protocol):
    """Collects the gradients of one tensor."""

    nans: int

    def add(self, gradient: Tensor, sample: int) -> None: ...
    def add_panel(self, inputs: Tensor, outputs: Tensor, sample: int) -> None: ...
    def close(self, queue: Any = None) -> None: ...
    def signs(self, queue: Any = None) -> list[Span]: ...
    def slope(self, delta: Callable[[slice], Tensor]) -> float: ...


class Voter(Protocol):
    """A layer method that votes, with the parameters that it has for one tensor."""

    @property
    def alphas(self) -> tuple[float, ...]: ...
    @property
    def counts(self) -> bool: ...
    def ballot(self, numel: int, tasks: Sequence[int], device: Any) -> Ballot: ...
    def ballot_bytes(self, numel: int, tasks: Sequence[int], on_gpu: bool) -> int: ...
    def panel_bytes(self, shape: tuple[int, ...], tasks: Sequence[int], tokens: int, width: int) -> tuple[int, int]: ...
    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> TileMethod: ...


@dataclass(frozen=True)
class VotesFile:
    """A shard of signs, [sets, bytes] of each tensor; `begins` are their places by name."""

    number: int
    shard: Shard
    begins: Mapping[str, int]


@dataclass(frozen=True)
class Motion:
    """What is voted on: tensors by name, each with its method and its place in the output."""

    voters: Mapping[str, Voter]
    planned: Mapping[str, PlannedTensor]
    twins: Mapping[str, Sequence[str]]  # names that hold a copy of a tensor
    tasks: Sequence[int]  # of each batch
    tokens: int  # of all batches
    threads: int
    seed: int
    write: bool  # results; else signs alone
    votes: VotesFile | None
    exact: bool  # whether what is computed in holds what is stored

    def members(self, name: str) -> list[Member]:
        """The places that are written with a tensor."""
        names = (name, *self.twins.get(name, ()))
        results = [(self.planned[each].shard, each) for each in names if self.write]
        return results + [(self.votes.number, each) for each in names if self.votes is not None]

    def tile(self, name: str, loaded: Loaded, signs: Sequence[Span], queue: Any) -> Tile:
        """A whole tensor of all models, as it is resident, with its signs."""
        job = self.planned[name].job
        others = [loaded.raw[source][name] for source in sorted(loaded.raw) if source]
        target = loaded.raw[0][name] if 0 in loaded.raw else loaded.weights[name]
        return Tile(
            name=name,
            tensor_id=zlib.crc32(name.encode()),
            shape=job.shape,
            start=0,
            numel=math.prod(job.shape),
            base=span(target, queue),
            experts=(*(span(each, queue) for each in others), *signs),
            seed=self.seed,
        )


@dataclass
class Outcome:
    """Where results go, and who is told."""

    writer: ScatterWriter
    place: HostPlace
    note: Callable[[dict[str, Any]], None]
    put: Callable[[str, int], None]  # a tensor's name, and bytes of it


class Voting(Hooks):
    """The hooks of a sweep over the training samples; `outcome` is set before it runs."""

    gradients = "each"
    outcome: Outcome

    def __init__(self, motion: Motion, others: int, on_gpu: bool) -> None:
        self.motion, self._others = motion, others
        self.panels = on_gpu
        self._open: dict[str, Ballot] = {}
        self._news: list[dict[str, Any]] = []  # to be told with the next stage

    def reads(self, stage: Stage, backward: bool) -> Sequence[int]:
        if not backward:
            return ()
        return range(0 if not self.motion.exact else 1, self._others + 1)

    def cost(self, stage: Stage, backward: bool) -> Cost:
        names = [name for name in stage.tensors if name in self.motion.voters] if backward else []
        panels = linear_tensors(stage) if self.panels else frozenset()
        held = most = 0
        for name in names:
            kept, work = self._panel_bytes(name, stage) if name in panels else (self._ballot_bytes(name), 0)
            held += kept
            most = max(most, work + self._work_bytes(name))
        return Cost(held + most, held + most)

    def _ballot_bytes(self, name: str) -> int:
        numel = _numel(self.motion.planned[name])
        return self.motion.voters[name].ballot_bytes(numel, self.motion.tasks, self.panels)

    def _panel_bytes(self, name: str, stage: Stage) -> tuple[int, int]:
        width = stage.parameters[stage.parts[name].parameter].dtype.itemsize
        shape = self.motion.planned[name].job.shape
        return self.motion.voters[name].panel_bytes(shape, self.motion.tasks, self.motion.tokens, width)

    def _work_bytes(self, name: str) -> int:
        """What merging one tensor takes beside its ballot."""
        tensor, threads = self.motion.planned[name], self.motion.threads
        inputs, numel = len(tensor.job.experts), _numel(tensor)
        whole = tensor.method.survey_bytes(tensor.job.shape, inputs, threads) if tensor.surveyed else 0
        cost = tensor.method.cost(min(numel, PIECE), inputs, "cuda" if self.panels else "cpu")
        return whole + (cost.device if self.panels else threads * cost.host)

    def learn(self, stage: Stage, name: str, gradient: Tensor, batch: int | None) -> None:
        if name in self.motion.voters:
            assert batch is not None
            self._of(name, gradient.device).add(gradient, batch)

    def panel(self, stage: Stage, name: str, inputs: Tensor, outputs: Tensor, batch: int) -> None:
        if name in self.motion.voters:
            self._of(name, inputs.device).add_panel(inputs, outputs, batch)

    def _of(self, name: str, device: Any) -> Ballot:
        if name not in self._open:
            numel = _numel(self.motion.planned[name])
            self._open[name] = self.motion.voters[name].ballot(numel, self.motion.tasks, device)
        return self._open[name]

    def turned(self, losses: Sequence[float]) -> None:
        """All losses are known, and nothing is written yet.

        Raises:
            RecipeError: one of them is no number.
        """
        for number, loss in enumerate(losses, 1):
            if not math.isfinite(loss):
                raise RecipeError(f"the target's loss of training sample {number} is {loss}; check sample and target")
        mean = math.fsum(losses) / len(losses)
        self._news = [{"gradfix": {"samples": len(losses), "loss": mean}}]

    def emit(self, loaded: Loaded) -> None:
        names = [name for name in loaded.stage.tensors if name in self.motion.voters]
        out, notes, self._news = self.outcome, self._news, []
        with out.place.working():
            for name in names:
                notes += self._finish(name, loaded)
        for note in notes:
            out.note(note)
        out.writer.seal([member for name in names for member in self.motion.members(name)], notes)

    def _finish(self, name: str, loaded: Loaded) -> list[dict[str, Any]]:
        """Close one tensor's ballot and write what came of it; what to tell of it."""
        place, planned = self.outcome.place, self.motion.planned[name]
        ballot = self._of(name, loaded.weights[name].device)
        del self._open[name]
        ballot.close(place.queue)
        tile = self.motion.tile(name, loaded, ballot.signs(place.queue), place.queue)
        survey = planned.method.survey(tile.shape, len(tile.experts)) or planned.method.tally(tile.shape)
        assert survey is not None
        if planned.surveyed:
            place.settle(planned.method, survey, tile)
        slope = ballot.slope(lambda part: self._delta(planned.method, survey, tile.part(part.start, part.stop)))
        figures = {"slope": slope / len(self.motion.tasks), "nan_gradients": ballot.nans}
        notes = []
        if self.motion.votes is not None:
            self._put_signs(name, self.motion.votes, tile)
        if self.motion.write:
            found = self._put_result(name, planned, survey, tile)
            place.finish()
            figures |= survey.figures
            notes = list(self._nonfinite(planned, found))
        return [*notes, {"figures": [name, figures], "section": "gradfix"}]

    def _nonfinite(self, planned: PlannedTensor, found: Sequence[Flags]) -> Iterator[dict[str, Any]]:
        """Which of the models hold what is no number."""
        for flag, spec in zip(np.max(found, 0) if found else (), planned.inputs, strict=False):
            if flag:
                kind = "NaN" if flag == 2 else "an infinity"
                yield {"nonfinite": [planned.job.name, spec.file, kind]}

    def _delta(self, method: Any, survey: Survey, tile: Tile) -> Tensor:
        """The step that an alpha of 1 makes, fp32."""
        import torch

        place = self.outcome.place
        device = "cpu" if place.queue is None else place.queue.device
        out = torch.zeros(tile.numel, dtype=torch.float32, device=device)
        place.fill(tile, out, lambda part: method.delta(part, survey))
        return out

    def _put_result(self, name: str, planned: PlannedTensor, survey: Survey, tile: Tile) -> list[Flags]:
        """Write a tensor to its places; what the pieces of its inputs hold, as far as that is known."""
        names = (name, *self.motion.twins.get(name, ()))
        width, dtype, places = planned.out_itemsize, planned.out_dtype, [self.motion.planned[each] for each in names]
        step = PIECE // width // BLOCK * BLOCK
        found = []
        for first in range(0, tile.numel, step):
            part = tile.part(first, min(first + step, tile.numel))

            def merge(address: int, part: Tile = part) -> None:
                flags = self.outcome.place.merge(planned.method, survey, part, address, dtype)
                found.extend([] if flags is None else [flags])

            self._put([(place.shard, place.begin + first * width) for place in places], part.numel * width, merge)
            self.outcome.put(name, len(places) * part.numel * width)
        return found

    def _put_signs(self, name: str, votes: VotesFile, tile: Tile) -> None:
        names = (name, *self.motion.twins.get(name, ()))
        for number in range(self._others, len(tile.experts)):
            before = (number - self._others) * packed(tile.numel)
            for first in range(0, tile.numel, 4 * PIECE):
                part = tile.part(first, min(first + 4 * PIECE, tile.numel))
                size, signs = packed(part.numel), part.experts[number]

                def pack(address: int, size: int = size, signs: Span = signs) -> None:
                    self.outcome.place.pack(signs, address, size)

                self._put([(votes.number, votes.begins[each] + before + first // 4) for each in names], size, pack)

    def _put(self, places: Sequence[tuple[int, int]], size: int, fill: Callable[[int], None]) -> None:
        """Have bytes made once and written to every place, a shard and a byte of it."""
        writer = self.outcome.writer
        (shard, begin), *others = places
        slot, address = writer.place(begin, size)
        fill(address)
        for other, at in others:
            copy, there = writer.place(at, size)
            ctypes.memmove(there, address, size)
            writer.put_at(other, at, copy, size)
        writer.put_at(shard, begin, slot, size)


def linear_tensors(stage: Stage) -> frozenset[str]:
    """A layer's tensors that are weights of linear maps, each all of one."""
    from torch import nn

    by_parameter: dict[str, list[str]] = {}
    for name, part in stage.parts.items():
        by_parameter.setdefault(part.parameter, []).append(name)
    modules = [] if stage.module is None else stage.module.named_modules()
    found = [by_parameter.get(f"{stage.name}.{path}.weight", []) for path, m in modules if isinstance(m, nn.Linear)]
    return frozenset(names[0] for names in found if len(names) == 1)


def _numel(tensor: PlannedTensor) -> int:
    return math.prod(tensor.job.shape)
