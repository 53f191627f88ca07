"""Executes a plan of units: first what is in no unit, as an ordinary merge, then unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streammerge.budget import Budget
from streammerge.engine.anchor_bench import Bench, Turn
from streammerge.engine.anchor_files import NOTED, key, save_folder
from streammerge.engine.anchor_inputs import Inputs
from streammerge.engine.anchor_plan import AnchorPlan
from streammerge.engine.anchor_work import Work
from streammerge.engine.anchoring import Anchoring
from streammerge.engine.layer_run import LayerRun, reserved
from streammerge.engine.layers import Sweep
from streammerge.engine.run import Run
from streammerge.engine.sinks import MemorySink
from streammerge.errors import MachineError
from streammerge.formats.header import TensorSpec
from streammerge.store.scatter import ScatterWriter
from streammerge.store.scratch import Scratch

if TYPE_CHECKING:
    from torch import Tensor


class AnchorRun(LayerRun):
    """One execution. Not reusable."""

    plan: AnchorPlan  # type: ignore[assignment]

    def __init__(self, plan: AnchorPlan, writer: ScatterWriter, budget: Budget, **options: Any) -> None:
        super().__init__(plan, writer, budget, **options)  # type: ignore[arg-type]
        self._progress.work_total = sum(work.load for work in plan.works)

    def work(self) -> None:
        """Do all of it; everything is durable and hashed when this returns.

        Raises:
            Interrupted: cancelled; what is durable is kept.
            MachineError: reading or writing failed.
        """
        if not all(shard.name in self._writer.hashes for shard in self.plan.shards):
            self._clear()
            self._merge_rest()
            with _threads(self.plan.threads):
                self._units()
        self._writer.settle()
        self._save()
        self._writer.drain()

    def _units(self) -> None:
        plan = self.plan
        assert plan.sweep is not None
        assert plan.anchors is not None
        turns = [Turn(work, e) for work in plan.works for e in (*range(work.experts), None)]
        visits = list(zip(turns, plan.sweep.visits, plan.sweep.work_bytes, strict=True))
        left = [each for each in visits if not self._is_done(each[0].work)]
        for work in plan.works:
            self._progress.work += work.load if self._is_done(work) else 0.0
        if not left:
            return
        hooks = Anchoring([turn for turn, _, _ in left])
        sweep_plan = replace(
            plan.sweep,
            hooks=hooks,
            visits=tuple(visit for _, visit, _ in left),
            work_bytes=tuple(size for _, _, size in left),
        )
        options: dict[str, Any] = {"folder": self._writer.partial, "reader": self._reader, "cancelled": self._cancelled}
        works = [turn.work for turn, _, _ in left if turn.expert is None]
        with self._inputs(works) as inputs, Sweep(sweep_plan, **options) as sweep:
            hooks.bench = self._bench(sweep, inputs)
            try:
                sweep.layers()
            finally:
                self.findings.read_bytes += sweep.bytes_read
                self.findings.vram_peak_bytes = max(self.findings.vram_peak_bytes, reserved(sweep_plan))

    def _is_done(self, work: Work) -> bool:
        names = work.part.stage.tensors
        return all(name in self._writer.sealed(self.plan.planned[name].shard) for name in names)

    @contextmanager
    def _inputs(self, works: Sequence[Work]) -> Iterator[Inputs | None]:
        """What these units are given in reality, if that decides when to stop. All of it is in files."""
        plan = self.plan.forward
        if plan is None:
            yield None
            return
        assert self.plan.calibration is not None
        self._told("what units are given", 0.0, 0)
        scratch = Scratch(Budget(0), 0, folder=self._writer.partial)
        inputs = Inputs(works, self.plan.calibration, scratch)
        try:
            self._sweep(replace(plan, hooks=inputs), self.plan.calibration.batches)
            inputs.close()
            yield inputs
        finally:
            inputs.close()
            scratch.close()

    def _bench(self, sweep: Sweep, inputs: Inputs | None) -> Bench:
        plan = self.plan
        assert plan.anchors is not None
        assert plan.stack is not None
        sealed = self._writer.sealed(plan.anchors.number)
        return Bench(
            stack=plan.stack,
            planned=plan.planned,
            anchors=plan.anchors,
            given=plan.given,
            done={name: self.findings.anchors.get(name, {}) for name in sealed},
            writer=self._writer,
            scratch=sweep.scratch,
            inputs=inputs,
            device=sweep.plan.place,
            seed=plan.seed,
            start=None if plan.start is None else self._start,
            load=_load,
            note=self.findings.take,
            tell=self._told,
            cancelled=self._cancelled,
        )

    def _told(self, text: str, done: float, written: int) -> None:
        self._progress.tensor = text
        self._progress.work += done
        self._progress.written_bytes += written
        self._tell()

    def _start(self, work: Work) -> dict[str, Tensor]:
        """The start's tensors of a unit, fp32, on the host."""
        import torch

        assert self.plan.start is not None
        names = set(work.part.stage.tensors)
        tensors = tuple(tensor for tensor in self.plan.start.tensors if tensor.job.name in names)
        plan = replace(self.plan.start, tensors=tensors)
        budget = Budget(plan.ram_peak_bytes, plan.held_bytes)
        run = Run(plan, budget, reader=self._reader, strict=self._strict, cancelled=self._cancelled)
        sink = MemorySink(plan)
        found = {}
        try:
            for index in run.results(sink):
                job = tensors[index].job
                found[job.name] = torch.from_numpy(sink.take(index)).view(torch.float32).view(job.shape)
        finally:
            run.close()
        self._collect(run)
        return found

    def _save(self) -> None:
        """Put the anchors where they are wanted."""
        plan = self.plan
        if plan.save is None or plan.anchors is None or "saved" in self.findings.anchors:
            return
        notes = {}
        for work in plan.works:
            for e in range(work.experts):
                row = self.findings.anchors[key(work.number, e)]
                notes[work.number, e] = {name: row[name] for name in NOTED if name in row}
        save_folder(plan.save, self._writer.partial / plan.anchors.shard.name, plan.units, notes)
        self._note({"anchors": ["saved", {"folder": str(plan.save)}]})


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """Torch computes with so many threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _load(spec: TensorSpec) -> Tensor:
    """A tensor of a file of anchors.

    Raises:
        MachineError: the file cannot be read.
    """
    import torch

    data = bytearray(spec.nbytes)
    try:
        with open(spec.file, "rb") as file:
            file.seek(spec.begin)
            got = file.readinto(data)
    except OSError as error:
        raise MachineError(f"{spec.file}: cannot be read: {error.strerror}") from error
    if got != spec.nbytes:
        raise MachineError(f"{spec.file}: ended early; something changed it")
    return torch.frombuffer(data, dtype=torch.float32).view(spec.shape)
