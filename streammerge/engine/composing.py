"""Learned coefficients in a sweep: weights are composed as they are loaded, gradients become inner products.

    weights   base + sum_k c_k (expert_k - base), in fp32, from what was read; or as it was kept (composing_store.py)
    learn     a tensor's gradient, summed over the step's batches, is held
    emit      its products with expert_k - base, which are resident on the way back, are the gradients of the c_k; a
              step of AdamW; the weights are composed anew and kept for the next sweep

So a step reads base and experts once where composed weights are kept, else twice, and gives the same bits either way.
A tied head runs once more at the embedding, with the weights as they were: what it alone has is updated after that.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge.engine.composing_store import Place, Store
from streammerge.engine.layers_hooks import Hooks, Loaded
from streammerge.engine.learner import Block, Learner, Table
from streammerge.engine.places import HostPlace, span
from streammerge.errors import RecipeError
from streammerge.kernels.numerics import Span
from streammerge.method import Cost, Tile
from streammerge.models.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Mix:
    """What is composed: each tensor's method, its coefficients to learn, and where its weights stay."""

    methods: Mapping[str, Any]  # tile methods with `coefficients` [experts][groups], `split`, `dots`, `dots_bytes`
    shapes: Mapping[str, tuple[int, ...]]
    blocks: Mapping[str, Block]
    places: Mapping[str, Place]
    experts: int

    def rests(self, name: str, expert: int) -> bool:
        """Whether a coefficient is 0 and stays it."""
        return not self.blocks[name].learns and not any(self.blocks[name].init[expert])


class Composing(Hooks):
    """Weights composed for a forward pass, and for a backward pass if `learns`.

    `opening` says that nothing is kept yet; `bare` that all coefficients are still where they start. `begin` is called
    before a sweep.
    """

    store: Store
    learner: Learner
    place: HostPlace

    def __init__(self, mix: Mix, *, learns: bool, opening: bool, bare: bool) -> None:
        self.mix, self.opening, self.bare = mix, opening, bare
        self.gradients = "sum" if learns else "none"
        self.losses: list[float] = []
        self._held: dict[str, Tensor] = {}

    def begin(self, store: Store, learner: Learner, place: HostPlace) -> None:
        self.store, self.learner, self.place = store, learner, place

    # --- what is read ---

    def reads(self, stage: Stage, backward: bool) -> Sequence[int]:
        return range(self.mix.experts + 1)

    def composes(self, stage: Stage) -> bool:
        return True

    def wants(self, stage: Stage, source: int, names: Sequence[str], backward: bool) -> Sequence[str]:
        return [name for name in names if self._wanted(stage, source, name, backward)]

    def _wanted(self, stage: Stage, source: int, name: str, backward: bool) -> bool:
        learns = backward and name in stage.tensors and self.mix.blocks[name].learns and self.gradients != "none"
        place = self.mix.places[name]
        if place == "pinned":
            if not self.opening:
                return False
            composed = True
        else:
            first = name in stage.tensors and (stage.kind == "head" or not backward)
            composed = place == "twice" or (self.opening and first)
        if source == 0 or (learns and not self.mix.rests(name, source - 1)):
            return learns or composed
        zero = self.opening and self.bare and not any(self.mix.blocks[name].init[source - 1])
        return composed and not zero and not self.mix.rests(name, source - 1)

    def cost(self, stage: Stage, backward: bool) -> Cost:
        names = [name for name in stage.tensors if self.mix.blocks[name].learns] if backward else []
        held = max((self.mix.methods[n].dots_bytes(math.prod(self.mix.shapes[n])) for n in names), default=0)
        return Cost(held, held)

    # --- what is done ---

    def weights(self, loaded: Loaded, backward: bool) -> None:
        with self.place.working():
            for name in loaded.fresh:
                if name in self.store:
                    self.store.fill(name, loaded.weights[name])
                    continue
                self._compose(name, loaded)
                if name in loaded.stage.tensors:
                    self.store.put(name, loaded.weights[name])

    def _inputs(self, name: str, loaded: Loaded) -> dict[int, Tensor]:
        """Base (0) and experts as they are stored, as far as they are here."""
        kept = self.store.pinned(name, loaded.weights[name].device)
        return kept or {source: each[name] for source, each in sorted(loaded.raw.items()) if name in each}

    def _compose(self, name: str, loaded: Loaded) -> None:
        """Write a tensor's weights, from what was read and the coefficients as they are."""
        inputs, out, method = self._inputs(name, loaded), loaded.weights[name], self.mix.methods[name]
        table = self.learner.coefficients[name]
        here = [expert for expert in range(len(table)) if expert + 1 in inputs]
        assert not table[[expert for expert in range(len(table)) if expert not in here]].any(), f"{name} lacks experts"
        method = replace(method, coefficients=tuple(map(tuple, table[here].tolist())))
        if out.dtype.itemsize > 4:
            exact_compose(out, inputs, table[here], method)
            return
        tile = self._tile(name, inputs, [inputs[expert + 1] for expert in here])
        self.place.fill(tile, out, lambda tile: self.place.run(method, None, tile))

    def _tile(self, name: str, inputs: Mapping[int, Tensor], experts: Sequence[Tensor]) -> Tile:
        queue, shape = self.place.queue, self.mix.shapes[name]
        spans: list[Span] = [span(each, queue) for each in experts]
        return Tile(
            name, zlib.crc32(name.encode()), shape, 0, math.prod(shape), span(inputs[0], queue), tuple(spans)
        )  # fmt: skip

    def learn(self, stage: Stage, name: str, gradient: Tensor, batch: int | None) -> None:
        if self.mix.blocks[name].learns:
            self._held[name] = gradient  # its sum is held until the stage is finished anyway

    def turned(self, losses: Sequence[float]) -> None:
        """Raise RecipeError if a loss is no number: no step can follow it."""
        for number, loss in enumerate(losses, 1):
            if self.gradients != "none" and not math.isfinite(loss):
                raise RecipeError(
                    f"step {self.learner.step + 1}: the loss of batch {number} is {loss}; give a smaller lr, or check "
                    "the samples"
                )

    def emit(self, loaded: Loaded) -> None:
        with self.place.working():
            for name in loaded.stage.tensors:
                gradient = self._held.pop(name, None)
                if gradient is None:
                    continue
                inputs = self._inputs(name, loaded)
                if self.learner.take(name, self._gradient(name, gradient, inputs)) and name in self.store:
                    self._compose(name, loaded)
                    self.store.put(name, loaded.weights[name])
                self.store.pin(name, inputs)
            if self.opening:
                for name in loaded.stage.tensors:
                    self._pin_rest(name, loaded)

    def _pin_rest(self, name: str, loaded: Loaded) -> None:
        """Tensors without a gradient are kept too."""
        if self.mix.places[name] == "pinned":
            self.store.pin(name, self._inputs(name, loaded))

    def _gradient(self, name: str, gradient: Tensor, inputs: Mapping[int, Tensor]) -> Table:
        """dL/dc, [experts, groups].

        Raises:
            RecipeError: one of them is no number.
        """
        method = self.mix.methods[name]
        experts = [inputs[source] for source in sorted(inputs) if source]
        if gradient.dtype.itemsize > 4:
            found = exact_gradient(gradient, inputs[0], experts, method)
        else:
            survey = method.dots(self.mix.shapes[name])
            tile = self._tile(name, inputs, [gradient, *experts])
            self.place.settle(method, survey, tile)
            found = survey.sums
        if not np.isfinite(found).all():
            raise RecipeError(
                f"step {self.learner.step + 1}: the gradient of {name!r} gives no number; give a smaller lr, or look "
                "for NaN and infinities in the models"
            )
        return found

    def step(self, losses: Sequence[float]) -> None:
        self.losses = list(losses)
        if self.gradients != "none":
            self.learner.finish(math.fsum(losses))


class Selecting(Composing):
    """One sweep at the base: gradients are looked at and nothing is learned; `sizes` has |dL/dc| by tensor."""

    def __init__(self, mix: Mix) -> None:
        super().__init__(mix, learns=True, opening=True, bare=True)
        self.sizes: dict[str, list[float]] = {}

    def emit(self, loaded: Loaded) -> None:
        with self.place.working():
            for name in loaded.stage.tensors:
                gradient = self._held.pop(name, None)
                if gradient is not None:
                    table = self._gradient(name, gradient, self._inputs(name, loaded))
                    self.sizes[name] = np.abs(table).sum(1).tolist()

    def step(self, losses: Sequence[float]) -> None:
        self.losses = list(losses)


# --- weights of 64 bits: kernels have 32; torch does it, for networks that check the arithmetic ---


def exact_compose(out: Tensor, inputs: Mapping[int, Tensor], table: Table, method: Any) -> None:
    base = inputs[0].double()
    out.copy_(base)
    groups = exact_groups(out, method)
    for row, expert in zip(table, (inputs[source] for source in sorted(inputs) if source), strict=True):
        out += out.new_tensor(row)[groups] * (expert.double() - base)


def exact_gradient(gradient: Tensor, base: Tensor, experts: Sequence[Tensor], method: Any) -> Table:
    groups, count = exact_groups(gradient, method), len(method.coefficients[0])
    found = np.empty((len(experts), count))
    for row, expert in enumerate(experts):
        products = gradient * (expert.double() - base.double())
        found[row] = [float(products[groups == group].sum()) for group in range(count)]
    return found


def exact_groups(like: Tensor, method: Any) -> Tensor:
    """The group of each element."""
    import torch

    from streammerge.kernels import reference

    if method.split is None:
        return torch.zeros(like.shape, dtype=torch.int64, device=like.device)
    count = len(method.coefficients[0])
    return reference.partition(0, like.numel(), count, method.split, like.device).view(like.shape).long()
