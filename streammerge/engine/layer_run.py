"""Executes a plan of a layer method: sweep, trial, merge, each taken up where an earlier run left it.

What is durable is in the journal: a tensor (or its signs) when its layer is, the chosen alpha, shards of a merge. So a
sweep that is taken up computes through the layers whose results are there and writes the others, and what is written
does not depend on where it was stopped.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from streammerge.budget import Budget
from streammerge.engine.findings import Findings, Progress
from streammerge.engine.layers import Sweep
from streammerge.engine.layers_plan import SweepPlan
from streammerge.engine.places import GpuPlace, HostPlace
from streammerge.engine.run import Run
from streammerge.engine.sinks import FileSink, ScatterSink
from streammerge.engine.sweeping import VOTES, LayerPlan
from streammerge.engine.trying import Trying
from streammerge.engine.voting import PIECE, Outcome, Voting
from streammerge.errors import CheckpointError, OutputExists, RecipeError
from streammerge.planner.plan import Plan
from streammerge.planner.steps import PlannedTensor
from streammerge.store import journal
from streammerge.store.publish import machine
from streammerge.store.reader import Mode
from streammerge.store.scatter import ScatterWriter


class LayerRun:
    """One execution. Not reusable."""

    def __init__(
        self,
        plan: LayerPlan,
        writer: ScatterWriter,
        budget: Budget,
        *,
        reader: Mode = "auto",
        strict: bool = False,
        progress: Callable[[Progress], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        self.plan, self._writer, self._budget = plan, writer, budget
        self._reader: Mode = reader
        self._strict, self._report, self._cancelled = strict, progress, cancelled
        self.findings = Findings()
        total = sum(tensor.end - tensor.begin for tensor in plan.tensors)
        self._progress = Progress(read_total=plan.read_bytes, written_total=total)
        for note in writer.earlier_notes:
            self._take(note)

    def work(self) -> None:
        """Do all of it; everything is durable and hashed when this returns.

        Raises:
            Interrupted: cancelled; what is durable is kept.
            MachineError: reading or writing failed.
        """
        plan, writer = self.plan, self._writer
        self._clear()
        if not all(shard.name in writer.hashes for shard in plan.layout.shards) or self._unsaved:
            self._train()
            self._save_votes()
            if plan.trial is not None and "curve" not in self.findings.transport:
                self._try(plan.trial)
            if len(plan.alphas) > 1:
                self._merge_chosen()
            else:
                self._merge_rest()
                self._note({"gradfix": {"alpha": plan.alphas[0]}})
        writer.drain()

    def _clear(self) -> None:
        """Remove what a run that was killed kept between layers."""
        for left in self._writer.partial.glob("streammerge-*"):
            shutil.rmtree(left, ignore_errors=True)

    @property
    def _unsaved(self) -> bool:
        return self.plan.save_votes is not None and "votes" not in self.findings.transport

    def _take(self, note: dict[str, Any]) -> None:
        self.findings.take(note)
        if self._strict and "nonfinite" in note:
            tensor, file, kind = note["nonfinite"]
            raise CheckpointError(f"{file}: tensor {tensor!r} holds {kind}; mend it, or merge without --strict")

    def _note(self, note: dict[str, Any]) -> None:
        self.findings.take(note)
        self._writer.seal([], [note])

    # --- the sweep over the training samples ---

    def _train(self) -> None:
        plan = self.plan.train
        if plan is None:
            return
        assert self.plan.data is not None
        assert isinstance(plan.hooks, Voting)
        sealed = {(shard, name) for shard in self.plan.members for name in self._writer.sealed(shard)}
        motion = plan.hooks.motion
        done = [
            stage.name
            for stage in plan.sources.stack.stages
            if all(set(motion.members(name)) <= sealed for name in stage.tensors if name in motion.voters)
        ]
        if len(done) == len(plan.sources.stack.stages):
            return
        place = self._place(plan)
        plan.hooks.outcome = Outcome(self._writer, place, self._take, self._put)
        try:
            self._sweep(plan, self.plan.data.train, done)
        finally:
            place.close()

    def _place(self, plan: SweepPlan) -> HostPlace:
        return GpuPlace(plan.place, PIECE) if plan.on_gpu else HostPlace(self.plan.threads)

    def _sweep(self, plan: SweepPlan, batches: Sequence[Any], done: Sequence[str] = ()) -> None:
        def told(number: int, count: int) -> None:
            self._progress.read_bytes = before + sweep.bytes_read
            self._tell()

        before = self.findings.read_bytes
        with Sweep(
            plan, folder=self._writer.partial, reader=self._reader, progress=told, cancelled=self._cancelled
        ) as sweep:
            try:
                sweep.run(batches, done)
            finally:
                self.findings.read_bytes = before + sweep.bytes_read
                self.findings.vram_peak_bytes = max(self.findings.vram_peak_bytes, reserved(plan))

    def _put(self, name: str, size: int) -> None:
        self._progress.tensor = name
        self._progress.written_bytes += size
        self._tell()

    def _tell(self) -> None:
        if self._report is not None:
            self._report(replace(self._progress))

    # --- several alphas ---

    def _try(self, plan: SweepPlan) -> None:
        """The validation loss of every alpha, in one pass over the weights; the one of least loss is chosen.

        Raises:
            RecipeError: no alpha has a finite loss.
        """
        assert self.plan.data is not None
        assert isinstance(plan.hooks, Trying)
        self._writer.settle()
        place = plan.hooks.place = self._place(plan)
        plan.hooks.file = str(self._votes_path)
        count = len(self.plan.data.validation)
        try:
            self._sweep(plan, list(self.plan.data.validation) * len(self.plan.alphas))
        finally:
            place.close()
        losses = [
            math.fsum(plan.hooks.losses[at : at + count]) / count for at in range(0, len(plan.hooks.losses), count)
        ]
        curve = [[alpha, loss] for alpha, loss in zip(self.plan.alphas, losses, strict=True)]
        finite = [loss for loss in losses if math.isfinite(loss)]
        if not finite:
            raise RecipeError("no alpha has a finite loss on data.validation; give smaller ones")
        best = losses.index(min(finite))
        shown = [[alpha, loss if math.isfinite(loss) else None] for alpha, loss in curve]
        self._note({"gradfix": {"alpha": self.plan.alphas[best], "curve": shown}})

    @property
    def _votes_path(self) -> Path:
        return self._writer.partial / VOTES

    def _merge_chosen(self) -> None:
        """An ordinary merge of everything with the chosen alpha and the signs that are on the disk."""
        self._writer.settle()
        which = self.plan.alphas.index(self.findings.transport["alpha"])
        plan = replace(self.plan, tensors=tuple(self._chosen(tensor, which) for tensor in self.plan.tensors))
        sink = FileSink(plan, self._writer)
        self._run(plan, sink)
        sink.finish()

    def _chosen(self, tensor: PlannedTensor, which: int) -> PlannedTensor:
        """A tensor with its chosen alpha, and its signs in the file that there is now."""
        assert self.plan.trial is not None
        assert isinstance(self.plan.trial.hooks, Trying)
        voter = self.plan.trial.hooks.motion.voters.get(tensor.job.name)
        if voter is None:
            return tensor
        method: Any = tensor.method
        method = replace(method, alpha=voter.alphas[which % len(voter.alphas)])
        file = str(self._votes_path)
        experts = tuple(spec if spec.file else replace(spec, file=file) for spec in tensor.job.experts)
        return replace(tensor, method=method, job=replace(tensor.job, experts=experts))

    # --- one alpha: what was not swept ---

    def _merge_rest(self) -> None:
        """Merge as tiles what no layer runs with, wherever it lies."""
        left = [tensor for tensor in self.plan.rest if tensor.job.name not in self._writer.sealed(tensor.shard)]
        for tensors in _neighbours(left):
            sink = ScatterSink(self._writer)
            self._run(replace(self.plan, tensors=tuple(tensors)), sink)
            self._writer.seal([(tensor.shard, tensor.job.name) for tensor in tensors], sink.notes)

    def _run(self, plan: Plan, sink: Any) -> None:
        before = self._progress.written_bytes, self.findings.read_bytes

        def told(now: Progress) -> None:
            self._progress.tensor = now.tensor
            self._progress.written_bytes = before[0] + now.written_bytes
            self._progress.read_bytes = before[1] + now.read_bytes
            self._tell()

        run = Run(
            plan, self._budget, reader=self._reader, strict=self._strict, progress=told, cancelled=self._cancelled
        )
        try:
            for _ in run.results(sink):
                pass
        finally:
            run.close()
        self._collect(run)

    def _collect(self, run: Run) -> None:
        """Take over what a merge found, once it is closed."""
        self.findings.read_bytes += run.findings.read_bytes
        self.findings.copied |= run.findings.copied
        self.findings.nonfinite += [each for each in run.findings.nonfinite if each not in self.findings.nonfinite]
        for name, figures in run.findings.masked.items():
            self.findings.masked.setdefault(name, {}).update(figures)
        self.findings.figures |= run.findings.figures

    # --- the file of votes ---

    def _save_votes(self) -> None:
        """Link (or copy) the file of votes to where it is wanted; it comes there whole."""
        path = self.plan.save_votes
        if path is None or not self._unsaved:
            return
        self._writer.settle()
        new = path.with_name(path.name + ".new")
        with machine(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            new.unlink(missing_ok=True)
            try:
                os.link(self._votes_path, new)
            except OSError:  # another file system, or one without links
                shutil.copyfile(self._votes_path, new)
            os.replace(new, path)
        self._note({"gradfix": {"votes": str(path)}})


def check_votes_path(plan: LayerPlan, out: Path, partial: Path, overwrite: bool) -> None:
    """Refuse a place for the file of votes that is taken, or that goes away.

    Raises:
        RecipeError: it lies in the output folder.
        OutputExists: it is there, and no unfinished work of this plan made it.
    """
    path = plan.save_votes
    if path is None:
        return
    if out in path.parents or partial in path.parents:
        raise RecipeError(f"save_votes: {path} lies in the output folder; choose another place")
    own = [note["gradfix"].get("votes") for note in journal.read(partial).notes.values() if "gradfix" in note]
    if path.exists() and not overwrite and str(path) not in own:
        raise OutputExists(f"{path}: exists; --overwrite replaces it")


def _neighbours(tensors: Sequence[PlannedTensor]) -> Iterator[list[PlannedTensor]]:
    """Runs of tensors that follow each other in one shard."""
    group: list[PlannedTensor] = []
    for tensor in tensors:
        if group and (group[-1].shard, group[-1].end) != (tensor.shard, tensor.begin):
            yield group
            group = []
        group.append(tensor)
    if group:
        yield group


def reserved(plan: SweepPlan) -> int:
    if not plan.on_gpu:
        return 0
    import torch

    return int(torch.cuda.max_memoryreserved(plan.place))
