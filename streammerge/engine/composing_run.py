"""Executes the sweeps of a plan that learns coefficients; taken up again at the step where an earlier run ended.

After every step coefficients and moments are on the disk, in the unfinished output folder. What was kept between
sweeps is not: the first step of a run composes all weights anew, from base and experts unless nothing was learned yet.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.engine.composing import Composing, Mix, Selecting
from streammerge.engine.composing_choice import largest, mosaics
from streammerge.engine.composing_plan import ComposePlan
from streammerge.engine.composing_store import Store
from streammerge.engine.findings import Findings, Progress
from streammerge.engine.layers import Sweep
from streammerge.engine.layers_order import Sources, sweep_order
from streammerge.engine.layers_plan import SweepPlan
from streammerge.engine.learner import Learner, Table
from streammerge.engine.objectives import Look
from streammerge.engine.places import GpuPlace, HostPlace
from streammerge.engine.voting import PIECE
from streammerge.models.stack import Batch
from streammerge.planner.coefficients import Coefficients
from streammerge.store.publish import machine
from streammerge.store.reader import Mode

STATE, CHOSEN, LABELS = "learning.npz", "chosen.json", "labels-"  # in the unfinished output folder


class Learning:
    """One execution of a plan's sweeps. Not reusable."""

    def __init__(
        self,
        plan: ComposePlan,
        partial: Path,
        *,
        reader: Mode = "auto",
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self._partial, self._reader = plan, partial, reader
        self._report, self._cancelled = progress, cancelled
        self.findings = Findings()
        total = sum(tensor.end - tensor.begin for tensor in plan.tensors)
        self._progress = Progress(read_total=plan.read_bytes, written_total=total)

    def work(self) -> tuple[Coefficients, dict[str, Any]]:
        """Learn; the coefficients of every tensor and expert, and what there is to say of it.

        Raises:
            Interrupted: cancelled; the steps that are done are kept.
            RecipeError: a loss is no number.
        """
        plan = self.plan
        if plan.given is not None:
            return plan.given, {}
        assert plan.mix is not None
        assert plan.course is not None
        for left in self._partial.glob("streammerge-*"):  # of a run that was killed
            shutil.rmtree(left, ignore_errors=True)
        chosen = self._choose()
        blocks = plan.mix.blocks
        learner = Learner(blocks, plan.course)
        learner.load(self._partial / STATE)
        store, began = Store(plan.mix.places, self._partial), time.perf_counter()
        try:
            self._learn(learner, store, self._checkpoints(chosen))
        finally:
            store.close()
        tables = {name: self._spread(name, table, chosen) for name, table in learner.chosen().items()}
        told = {
            "steps": learner.step,
            "seconds": round(time.perf_counter() - began, 3),
            "loss": learner.losses,
            **({"validation": learner.tried, "kept": learner.best} if learner.tried else {}),
            **({"chosen": chosen} if chosen else {}),
            "composed_read_bytes": store.bytes_read,
            "composed_written_bytes": store.bytes_written,
        }
        return self._coefficients(tables), told

    def clean(self) -> None:
        """Remove what was kept for a run that goes on."""
        for path in (self._partial / STATE, self._partial / CHOSEN, *self._partial.glob(f"{LABELS}*.json")):
            path.unlink(missing_ok=True)

    # --- sweeps ---

    def _learn(self, learner: Learner, store: Store, sources: Sources | None) -> None:
        plan, lessons = self.plan, self.plan.lessons
        assert lessons is not None
        assert plan.opening is not None
        if not (self._partial / STATE).exists():
            self._pause(learner, store, sources)
            store.close()  # what was kept lacks the experts
        else:
            self._recall(learner.step)
        opening, stops = True, {*lessons.trials, *lessons.looks}
        while learner.step < lessons.steps:
            sweep = plan.opening if opening else plan.steady
            assert sweep is not None
            hooks = Composing(sweep.hooks.mix, learns=True, opening=opening, bare=learner.step == 0)  # type: ignore[attr-defined]
            with self._open(sweep, hooks, learner, store, sources) as run:
                while learner.step < lessons.steps:
                    run(lessons.step(learner.step))
                    if opening or learner.step in stops:
                        break
                    learner.save(self._partial / STATE)
            opening = False
            self._pause(learner, store, sources)

    def _pause(self, learner: Learner, store: Store, sources: Sources | None) -> None:
        """Before the first step or after another one: try validation samples, label the others, if it is time; save."""
        plan, lessons = self.plan, self.plan.lessons
        assert lessons is not None
        if learner.step in lessons.trials:
            sweep = plan.trial if learner.step else plan.bare
            learner.keep(math.fsum(self._forward(sweep, lessons.validation, learner, store, sources)))
        if learner.step in lessons.looks:
            look = Look()
            sweep = plan.look if learner.step else plan.bare_look
            assert sweep is not None
            self._forward(replace(sweep, loss=look), lessons.every, learner, store, sources)
            lessons.label(learner.step, look.tokens, look.confidence)
            self._write(f"{LABELS}{learner.step}.json", {"tokens": look.tokens, "confidence": look.confidence})
        learner.save(self._partial / STATE)

    def _recall(self, step: int) -> None:
        """Give the samples the labels of the last look before this step."""
        assert self.plan.lessons is not None
        before = max((at for at in self.plan.lessons.looks if at <= step), default=-1)
        if before >= 0:
            found = json.loads((self._partial / f"{LABELS}{before}.json").read_bytes())
            self.plan.lessons.label(before, found["tokens"], found["confidence"])

    def _forward(
        self,
        plan: SweepPlan | None,
        batches: Sequence[Batch],
        learner: Learner,
        store: Store,
        sources: Sources | None,
    ) -> list[float]:
        """The losses of batches with the coefficients as they are."""
        assert plan is not None
        bare = learner.step == 0
        hooks = Composing(plan.hooks.mix, learns=False, opening=bare, bare=bare)  # type: ignore[attr-defined]
        with self._open(plan, hooks, learner, store, sources) as run:
            return run(batches)

    def _open(
        self, plan: SweepPlan, hooks: Composing, learner: Learner, store: Store, sources: Sources | None
    ) -> _Open:
        """A sweep that can run several times; its reads are those of the coefficients as they are now."""
        place = GpuPlace(plan.place, PIECE) if plan.on_gpu else HostPlace(self.plan.threads)
        hooks.begin(store, learner, place)
        found = plan.sources if sources is None else sources
        visits = sweep_order(found, hooks, plan.group)
        return _Open(self, replace(plan, sources=found, hooks=hooks, visits=visits), hooks, place)

    # --- a budget of experts ---

    def _choose(self) -> dict[str, list[int]]:
        """The experts that every tensor keeps, by the gradients at the base; empty if it keeps all."""
        plan, path = self.plan.select, self._partial / CHOSEN
        if plan is None:
            return {}
        if path.exists():
            return dict(json.loads(path.read_bytes()))
        assert isinstance(plan.hooks, Selecting)
        assert self.plan.lessons is not None
        assert self.plan.course is not None
        mix: Mix = plan.hooks.mix
        hooks = Selecting(mix)
        store = Store(mix.places, self._partial)
        with self._open(plan, hooks, Learner(mix.blocks, self.plan.course), store, None) as run:
            run(self.plan.lessons.every)
        found = {name: largest(sizes, self.plan.least) for name, sizes in hooks.sizes.items()}
        self._write(CHOSEN, found)
        return found

    def _write(self, name: str, what: Any) -> None:
        """A file in the unfinished folder, whole or not there."""
        path, new = self._partial / name, self._partial / f"{name}.new"
        with machine(path):
            new.write_text(json.dumps(what))
            os.replace(new, path)

    def _checkpoints(self, chosen: Mapping[str, Sequence[int]]) -> Sources | None:
        """Base and experts put together from what each tensor keeps; None if that is all."""
        plan = self.plan
        if plan.select is None or plan.opening is None:
            return None
        opened, planned = plan.select.sources.checkpoints, {tensor.job.name: tensor for tensor in plan.tensors}
        return Sources(plan.opening.sources.stack, mosaics(opened, planned, chosen, plan.least))

    def _spread(self, name: str, table: Table, chosen: Mapping[str, Sequence[int]]) -> list[list[float]]:
        """A tensor's coefficients for all experts: 0 for those that it does not keep."""
        if self.plan.select is None:
            return [list(row) for row in table.tolist()]
        found = [[0.0] * table.shape[1] for _ in self.plan.experts]
        for row, at in zip(table.tolist(), sorted(chosen.get(name, ())), strict=False):
            found[at] = row
        return found

    def _coefficients(self, tables: Mapping[str, list[list[float]]]) -> Coefficients:
        """Of all tensors that are merged, those that no layer runs with included."""
        plan = self.plan
        assert plan.mix is not None
        found = {}
        for tensor in plan.tensors:
            name = plan.twins.get(tensor.job.name, tensor.job.name)
            if tensor.job.method == plan.recipe.merge_method:
                own: Any = tensor.method
                found[tensor.job.name] = tables[name] if name in tables else [list(row) for row in own.coefficients]
        twins = {copy: first for copy, first in plan.twins.items() if copy in found}
        first: Any = next(iter(plan.mix.methods.values()))
        return Coefficients(plan.experts, first.seed, found, twins)


class _Open:
    """An open sweep as a context: calling it runs it once."""

    def __init__(self, owner: Learning, plan: SweepPlan, hooks: Composing, place: HostPlace) -> None:
        self._owner, self._plan, self._hooks, self._place = owner, plan, hooks, place

    def __enter__(self) -> Callable[[Sequence[Batch]], list[float]]:
        owner, self._exit = self._owner, ExitStack()
        self._exit.callback(self._place.close)
        before = owner.findings.read_bytes

        def told(number: int, count: int) -> None:
            owner._progress.read_bytes = before + sweep.bytes_read
            owner._progress.tensor = f"step {self._hooks.learner.step + 1}"
            if owner._report is not None:
                owner._report(replace(owner._progress))

        sweep = self._exit.enter_context(
            Sweep(self._plan, folder=owner._partial, reader=owner._reader, progress=told, cancelled=owner._cancelled)
        )

        def counted() -> None:
            owner.findings.read_bytes = before + sweep.bytes_read
            if self._plan.on_gpu:
                import torch

                peak = int(torch.cuda.max_memory_reserved(self._plan.place))
                owner.findings.vram_peak_bytes = max(owner.findings.vram_peak_bytes, peak)

        self._exit.callback(counted)
        return sweep.run

    def __exit__(self, *error: object) -> None:
        self._exit.close()
