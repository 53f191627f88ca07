"""Several alphas in one pass over the weights: validation losses of the target with each of them.

Every layer's weights of all models are read once, with the signs of its votes; for each alpha the merged weights are
composed where the layer's are, and that alpha's own hidden states run through them. What is composed is what would be
written, before it is rounded to the output's dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge import kernel
from streammerge.engine.layers_hooks import Hooks, Loaded
from streammerge.engine.places import HostPlace, span
from streammerge.engine.voting import Motion
from streammerge.errors import CheckpointError, MachineError
from streammerge.formats.dtypes import SIGNS
from streammerge.formats.header import TensorSpec
from streammerge.kernels.numerics import Span
from streammerge.method import Cost, Survey, Tile
from streammerge.models.stage import Stage
from streammerge.planner.steps import PlannedTensor

if TYPE_CHECKING:
    from torch import Tensor


class Trying(Hooks):
    """The hooks of a forward pass over alphas x `batches` validation batches; `place` is set before it.

    `signs` are the votes' specs by tensor; their file may be named later (`file`).
    """

    gradients = "none"
    place: HostPlace

    def __init__(self, motion: Motion, others: int, batches: int, signs: Mapping[str, Sequence[TensorSpec]]) -> None:
        self.motion, self._others, self._batches, self._signs = motion, others, batches, signs
        self.file = ""
        self._tiles: dict[str, tuple[Tile, list[Tensor]]] = {}
        self._surveys: dict[str, Survey] = {}
        self._which = -1
        self.losses: list[float] = []

    def reads(self, stage: Stage, backward: bool) -> Sequence[int]:
        return range(self._others + 1)

    def composes(self, stage: Stage) -> bool:
        return True

    def cost(self, stage: Stage, backward: bool) -> Cost:
        held = sum(spec.nbytes for name in stage.parts for spec in self._signs.get(name, ()))
        whole = [tensor for name in stage.parts if (tensor := self.motion.planned[name]).surveyed]
        held += sum(4 * math.prod(tensor.job.shape) for tensor in whole)
        held += max((self._work_bytes(self.motion.planned[name]) for name in stage.parts), default=0)
        return Cost(held, held)

    def _work_bytes(self, tensor: PlannedTensor) -> int:
        inputs, threads = len(tensor.job.experts), self.motion.threads
        whole = tensor.method.survey_bytes(tensor.job.shape, inputs, threads) if tensor.surveyed else 0
        return whole + threads * tensor.method.cost(math.prod(tensor.job.shape), inputs, "cpu").host

    def weights(self, loaded: Loaded, backward: bool) -> None:
        self._tiles = {name: self._tile(name, loaded) for name in loaded.fresh if name in self.motion.voters}
        self._surveys = {}
        with self.place.working():
            for name, (tile, _) in self._tiles.items():
                tensor = self.motion.planned[name]
                if tensor.surveyed:
                    survey = tensor.method.survey(tile.shape, len(tile.experts))
                    assert survey is not None
                    self.place.settle(tensor.method, survey, tile)
                    self._surveys[name] = survey
        self._compose(loaded, 0)

    def passes(self, loaded: Loaded, batch: int) -> None:
        """This batch runs next, with its own alpha's weights."""
        if batch // self._batches != self._which:
            self._compose(loaded, batch // self._batches)

    def _compose(self, loaded: Loaded, which: int) -> None:
        self._which = which
        with self.place.working():
            for name in loaded.fresh:
                out = loaded.weights[name]
                if name in self._tiles:
                    alphas = self.motion.voters[name].alphas
                    method: Any = self.motion.planned[name].method
                    method = replace(method, alpha=alphas[which % len(alphas)])
                    tile, survey = self._tiles[name][0], self._surveys.get(name)
                    self.place.fill(replace(tile), out, lambda tile: self.place.run(method, survey, tile))  # noqa: B023
                else:
                    kernel.run("cast", span(out, self.place.queue), span(loaded.raw[0][name], self.place.queue))

    def step(self, losses: Sequence[float]) -> None:
        self.losses = list(losses)

    def _tile(self, name: str, loaded: Loaded) -> tuple[Tile, list[Tensor]]:
        """A tensor of all models with its signs, and who holds those."""
        held = [self._read(spec) for spec in self._signs.get(name, ())]
        numel, queue = math.prod(self.motion.planned[name].job.shape), self.place.queue
        signs = [Span(each.data_ptr(), SIGNS, numel, queue) for each in held]
        return self.motion.tile(name, loaded, signs, queue), held

    def _read(self, spec: TensorSpec) -> Tensor:
        """Packed signs from their file."""
        import torch

        values = torch.empty(spec.nbytes, dtype=torch.uint8)
        file = spec.file or self.file
        try:
            with open(file, "rb") as source:
                source.seek(spec.begin)
                got = source.readinto(memoryview(values.numpy()))
        except OSError as error:
            raise MachineError(f"{file}: the votes cannot be read: {error.strerror}") from error
        if got < spec.nbytes:
            raise CheckpointError(f"{file}: ended at byte {spec.begin + got}; something changed it")
        return values if self.place.queue is None else values.to(self.place.queue.device)
