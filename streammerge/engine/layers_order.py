"""The order in which a sweep visits its stages, and what must be in memory at each visit. Pure integers.

    embedding, group 1, ..., group n, head, group n, ..., group 1, embedding

A group is one layer, or several that are resident together: then only the hidden states between groups are kept, and
those within a group are computed again. A tied head's gradient is complete only at the embedding: both are visited
together at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.engine.layers_hooks import Hooks
from streammerge.errors import CheckpointError
from streammerge.formats.dtypes import DTYPES
from streammerge.formats.header import TensorSpec
from streammerge.models.stack import Stack
from streammerge.models.stage import Stage
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.ring import round_up

if TYPE_CHECKING:
    import torch

ALIGN = 256  # bytes: every tensor of a block starts at a multiple
_NAMES = {row.torch: row.name for row in DTYPES.values() if row.torch}


@dataclass(frozen=True)
class Place:
    """A tensor in a block."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True)
class Read:
    """A tensor of a file and where it goes: at `offset` of a block, as `dtype` (a header's string)."""

    spec: TensorSpec
    offset: int
    dtype: str


@dataclass(frozen=True)
class Unit:
    """What is loaded into one block: a stage's parameters (`source` -1), or checkpoint `source`'s tensors for it."""

    stage: int
    source: int
    places: tuple[Place, ...]
    reads: tuple[Read, ...]

    @property
    def size(self) -> int:
        return round_up(max((p.offset + math.prod(p.shape) * p.dtype.itemsize for p in self.places), default=0))

    @property
    def read_bytes(self) -> int:
        return sum(read.spec.nbytes for read in self.reads)


@dataclass(frozen=True)
class Visit:
    """Stages that are resident together, in the order of the forward pass."""

    stages: tuple[int, ...]
    backward: bool
    units: tuple[Unit, ...]


class Sources:
    """The checkpoints of a run under the first one's names; the first is the one that the model runs with."""

    def __init__(self, stack: Stack, checkpoints: Sequence[Checkpoint]) -> None:
        self.stack = stack
        self.checkpoints = tuple(checkpoints)
        self._specs = [self._named(checkpoint) for checkpoint in checkpoints]

    def _named(self, checkpoint: Checkpoint) -> dict[str, TensorSpec]:
        shapes = {name: spec.shape for name, spec in checkpoint.tensors.items()}
        return {ours: checkpoint.tensors[theirs] for ours, theirs in self.stack.names_in(shapes).items()}

    def parameters(self, stage: Stage, without: Iterable[str], read: bool) -> Unit:
        """The unit of a stage's parameters, some of which another stage of the same visit has."""
        places: list[Place] = []
        at = 0
        for name, parameter in stage.parameters.items():
            if name not in without:
                places.append(Place(name, at, tuple(parameter.shape), parameter.dtype))
                at = round_up(at + parameter.numel() * parameter.dtype.itemsize, ALIGN)
        found = {place.name: place for place in places}
        reads = []
        for name, part in stage.parts.items():
            place = found.get(part.parameter)
            if read and place is not None:
                offset = place.offset + part.start * place.dtype.itemsize
                reads.append(Read(_floating(self._specs[0][name]), offset, header_dtype(place.dtype)))
        return Unit(stage.index, -1, tuple(places), tuple(reads))

    def raw(self, stage: Stage, source: int, names: Iterable[str]) -> Unit:
        """The unit of a checkpoint's tensors, as they are stored."""
        import torch

        places, reads, at = [], [], 0
        for name in names:
            spec = self._specs[source].get(name)
            if spec is not None:
                torch_name = DTYPES[_floating(spec).dtype].torch or ""
                places.append(Place(name, at, spec.shape, getattr(torch, torch_name)))
                reads.append(Read(spec, at, spec.dtype))
                at = round_up(at + spec.nbytes, ALIGN)
        return Unit(stage.index, source, tuple(places), tuple(reads))


def _floating(spec: TensorSpec) -> TensorSpec:
    if not DTYPES[spec.dtype].floating:
        raise CheckpointError(f"{spec.file}: tensor {spec.name!r} is {spec.dtype}, no gradient is defined on it")
    return spec


def header_dtype(dtype: Any) -> str:
    """torch.float32 -> "F32"."""
    return _NAMES[str(dtype).removeprefix("torch.")]


def sweep_order(sources: Sources, hooks: Hooks, group: int) -> tuple[Visit, ...]:
    """The visits of one forward pass, and of one backward pass if gradients are wanted."""
    stages = sources.stack.stages
    learns = hooks.gradients != "none"
    layers = [tuple(range(at, min(at + group, len(stages) - 1))) for at in range(1, len(stages) - 1, group)]
    tied = bool(stages[-1].borrowed)
    there = [(0,), *layers]
    back = [*reversed(layers), (0, len(stages) - 1) if tied else (0,)]
    visits = [_visit(sources, hooks, found, False) for found in there]
    visits.append(_visit(sources, hooks, (len(stages) - 1,), learns))
    return (*visits, *(_visit(sources, hooks, found, True) for found in back if learns))


def layer_order(sources: Sources, hooks: Hooks) -> tuple[Visit, ...]:
    """Every layer once, alone."""
    layers = [stage.index for stage in sources.stack.stages if stage.kind == "layer"]
    return tuple(_visit(sources, hooks, (index,), True) for index in layers)


def _visit(sources: Sources, hooks: Hooks, indices: tuple[int, ...], backward: bool) -> Visit:
    units: list[Unit] = []
    present: set[str] = set()
    for index in indices:
        stage = sources.stack.stages[index]
        composed = hooks.composes(stage)
        units.append(sources.parameters(stage, present, not composed))
        names = (
            tuple(n for n, part in stage.parts.items() if part.parameter not in present) if composed else stage.tensors
        )
        present.update(stage.parameters)
        if composed or index == indices[0] or stage.kind == "layer":  # a head beside the embedding was finished before
            for source in hooks.reads(stage, backward):
                units.append(sources.raw(stage, source, hooks.wants(stage, source, names, backward)))
    return Visit(indices, backward, tuple(unit for unit in units if unit.places or unit.source < 0))


def alive(visits: Sequence[Visit], prefetch: int) -> list[dict[Unit, None]]:
    """For every visit, the units in memory while it runs and the next ones are being read."""
    return [dict.fromkeys(u for v in visits[at : at + 1 + prefetch] for u in v.units) for at in range(len(visits))]


def fresh(visits: Sequence[Visit], prefetch: int) -> list[list[Unit]]:
    """For every visit, the units that must be read for it: the others are still in memory."""
    found = []
    for at, visit in enumerate(visits):
        kept = {unit for earlier in visits[max(0, at - 1 - prefetch) : at] for unit in earlier.units}
        found.append([unit for unit in visit.units if unit not in kept])
    return found
