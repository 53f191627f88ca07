"""What units are given in reality: the base runs forward over a few samples, and the input of every unit is kept.

    a sweep without a head, before any unit: x of each unit, in files of the unfinished folder
    while an expert is in memory              what it returns for x, beside it
    while the unit adapts                     how far it is from all of these, after every epoch

A unit that is a whole layer takes samples as they are, any other the rows of all their tokens. Memory holds one
batch of them: as many tokens as construction runs at once, or one sample of a whole layer if that is longer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from streammerge.engine.anchor_work import Work
from streammerge.engine.layers_hooks import Hooks, Loaded
from streammerge.engine.layers_plan import SweepPlan
from streammerge.engine.sweep_fit import Fit
from streammerge.engine.units import Runner
from streammerge.method import Cost
from streammerge.models.build import return_freed_memory
from streammerge.models.record import tensors
from streammerge.models.stack import Batch, Stack
from streammerge.models.stage import Stage
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.scratch import Scratch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@dataclass(frozen=True)
class Calibration:
    """Samples of a batch are equally long; `experts` says whose each batch is, None: all experts'."""

    batches: Sequence[Batch]
    experts: Sequence[int | None]
    digest: str

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Samples and tokens of the largest batches: any other is no larger than one of them."""
        found = sorted({tuple(batch["input_ids"].shape) for batch in self.batches})
        return [(n, t) for n, t in found if not any((n, t) != each and n <= each[0] and t <= each[1] for each in found)]


def tried_shapes(
    calibration: Calibration | None, whole: bool, rows: int, shape: Sequence[int]
) -> tuple[tuple[int, ...], ...]:
    """The largest inputs on which a unit is tried; `shape` is that of its anchors, `rows` what runs at once."""
    if calibration is None:
        return ()
    if whole:
        return tuple((n, t, shape[-1]) for n, t in calibration.shapes)
    return ((min(rows, max(n * t for n, t in calibration.shapes)), shape[-1]),)


def moved_bytes(works: Sequence[Work]) -> int:
    """Of the largest tensor that goes to a file or comes from one."""
    return max((4 * math.prod(shape) for work in works for shape in work.tried), default=0)


def plan_inputs(
    fit: Fit, stack: Stack, base: Checkpoint, works: Sequence[Work], calibration: Calibration
) -> tuple[SweepPlan, int]:
    """The sweep that finds what units are given, and bytes of the host beside it."""
    beside = moved_bytes(works) if fit.on_gpu else 0
    hooks = Inputs(works, calibration, None)
    return fit.sweep(stack, [base], calibration.batches, None, hooks, beside), fit.here + beside


class Inputs(Hooks):
    """The hooks of that sweep; afterwards, what they kept. `close` when it is over."""

    def __init__(self, works: Sequence[Work], calibration: Calibration, scratch: Scratch | None) -> None:
        self._experts = calibration.experts
        self._works = works
        self._scratch = scratch
        self._batch = 0
        self._handles: list[Any] = []
        self._kept: dict[int, list[tuple[tuple[int, int], int | None]]] = {work.number: [] for work in works}

    # --- while the sweep runs ---

    def cost(self, stage: Stage, backward: bool) -> Cost:
        return Cost(moved_bytes(self._works))

    def weights(self, loaded: Loaded, backward: bool) -> None:
        """Listen to the units of this layer, and to those of no other."""
        self.close()
        for work in self._works:
            if work.part.layer.index == loaded.stage.index:
                module: Any = work.part.stage.module
                self._handles.append(module.register_forward_pre_hook(partial(self._take, work), with_kwargs=True))

    def passes(self, loaded: Loaded, batch: int) -> None:
        self._batch = batch

    def _take(self, work: Work, module: Any, args: Any, kwargs: Any) -> None:
        x = next(tensors((args, kwargs)))
        parts = [x] if work.part.whole else x.reshape(-1, x.shape[-1]).split(work.settings.rows)
        kept = self._kept[work.number]
        assert self._scratch is not None
        for part in parts if x.numel() else ():
            kept.append(((work.number, len(kept)), self._experts[self._batch]))
            self._scratch.put(kept[-1][0], part)

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # --- while units are worked on ---

    def has(self, work: Work) -> bool:
        """Whether a unit is given anything: an expert of a layer may be sent no token."""
        return bool(self._kept[work.number])

    def teach(self, work: Work, expert: int, network: Any, runner: Runner) -> None:
        """Keep what an expert returns."""
        assert self._scratch is not None
        with _returned(work):
            for key, own in self._kept[work.number]:
                if own in (None, expert):
                    x = self._scratch.get(key, runner.device)
                    runner.prepare([x.shape])  # what it takes is no part of what the network runs and notes
                    self._scratch.put((*key, expert), network.outputs(x))
                    del x

    def trial(self, work: Work, device: torch.device) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Inputs of a unit, batch by batch, with what experts return for them."""
        assert self._scratch is not None
        with _returned(work):
            for key, own in self._kept[work.number]:
                experts = range(work.experts) if own is None else (own,)
                yield self._scratch.get(key, device), [self._scratch.get((*key, e), device) for e in experts]

    def drop(self, work: Work) -> None:
        """Forget a unit."""
        assert self._scratch is not None
        for key, own in self._kept.pop(work.number):
            self._scratch.drop(key)
            for e in range(work.experts) if own is None else (own,):
                self._scratch.drop((*key, e))


@contextmanager
def _returned(work: Work) -> Iterator[None]:
    """What is freed meanwhile is given back at once: sizes vary, so the next batch could not use what is kept."""
    return_freed_memory()
    try:
        yield
    finally:
        return_freed_memory(work.pieces)
