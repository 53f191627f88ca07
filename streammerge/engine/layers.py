"""The layer sweep: a whole model's gradient with one group of layers in memory.

    forward    every group is loaded once; all batches run through it; the hidden state that enters it is kept
    head       loss and its gradient with respect to the last hidden state, batch by batch
    backward   groups in reverse: each layer runs again from the kept state, under autograd; the gradients of its
               weights go to the method, the gradient of its input to the layer before; both are freed

The operations are those of the ordinary backward pass in the same order, so the gradients are the same bits. Each
weight is read once per direction, whatever the number of batches. Nothing of a sweep is kept for a later one: after an
interruption it runs again, and `done` names the stages whose results the caller has; they are computed through, without
gradients of their weights and without hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import closing
from pathlib import Path

from streammerge.engine.layers_device import open_place
from streammerge.engine.layers_passes import Passes
from streammerge.engine.layers_plan import PIECE, SweepPlan
from streammerge.engine.layers_weights import Blocks, Feed, Ready
from streammerge.errors import Interrupted
from streammerge.models.build import return_freed_memory
from streammerge.models.stack import Batch
from streammerge.store.reader import Mode, Reader
from streammerge.store.ring import Ring
from streammerge.store.scratch import Scratch


class Sweep:
    """Runs a plan's stages over batches; may be used for several sweeps. A context: closing gives everything back."""

    def __init__(
        self,
        plan: SweepPlan,
        *,
        folder: str | Path | None = None,
        reader: Mode = "auto",
        poison: bool = False,
        progress: Callable[[int, int], None] | None = None,
        cancelled: Callable[[], bool] = lambda: False,
    ) -> None:
        """`folder` is where hidden states spill to; `poison` overwrites what is given back with NaN; `progress` is told
        the number of visits done and of all.
        """
        self.plan, self.stack, self._hooks, self._loss = plan, plan.sources.stack, plan.hooks, plan.loss
        self._progress, self._cancelled = progress, cancelled
        self.host, self.device = plan.budgets()
        self._ring = Ring(self.host, plan.ring_bytes, "the ring that weights are read into")
        self._reader = Reader(self._ring, reader)
        self._reader.choose([(read.spec.file, read.spec.end) for v in plan.visits for u in v.units for read in u.reads])
        self._place = open_place(self._ring, plan.place)
        self._blocks = Blocks(self._place, poison)
        self.scratch = Scratch(
            self.host,
            plan.scratch_host_bytes,
            device=self.device,
            device_share=plan.scratch_device_bytes,
            folder=folder,
            dtype=plan.scratch_dtype,
            poison=poison,
        )
        self.stack.to(self._place.device)
        if plan.graphs:
            return_freed_memory(PIECE)

    @property
    def bytes_read(self) -> int:
        """Bytes of checkpoints asked of the disks so far."""
        return self._reader.bytes_read

    def run(self, batches: Sequence[Batch], done: Collection[str] = ()) -> list[float]:
        """One sweep: forward, and backward if the hooks want gradients. The losses, one per batch; none without a loss.

        `done` names stages whose results are there already. Raises Interrupted if cancelled between two visits.
        """
        place, graphs = self._place.device, self.plan.graphs
        passes = Passes(self.stack, self._hooks, self._loss, self.scratch, place, batches, done, graphs)
        losses: list[float] = []
        head = len(self.stack.stages) - 1
        try:
            with closing(self._ready()) as visits:
                for ready in visits:
                    stages = ready.visit.stages
                    if stages == (head,):
                        losses = passes.turn(ready.loaded[head])
                    elif stages[0] > 0:
                        (passes.backward if ready.visit.backward else passes.forward)(ready)
                    elif ready.visit.backward:
                        passes.leave(ready)
                    else:
                        passes.enter(ready.loaded[0])
        except BaseException:
            self.scratch.close()
            raise
        if self._loss is None:  # no head takes what the last layer returned
            self.scratch.clear()
        assert not len(self.scratch), "something is kept that no layer takes"
        self._hooks.step(losses)
        return losses

    def layers(self) -> None:
        """Bring every layer into memory, one after the other, for `emit`; nothing runs."""
        with closing(self._ready()) as visits:
            for ready in visits:
                for loaded in ready.loaded.values():
                    self._hooks.emit(loaded)

    def _ready(self) -> Generator[Ready, None, None]:
        plan = self.plan
        room = [plan.room_bytes - work for work in plan.work_bytes]
        feed = Feed(self.stack, plan.visits, plan.prefetch, room, self._blocks, self._ring, self._reader, self._place)
        try:
            for number, visit in enumerate(plan.visits):
                if self._cancelled():
                    raise Interrupted("stopped on request")
                if not plan.graphs:
                    return_freed_memory()
                ready = feed.next()
                for index in sorted(ready.new):
                    self._hooks.weights(ready.loaded[index], visit.backward)
                yield ready
                if self._progress is not None:
                    self._progress(number + 1, len(plan.visits))
        finally:
            feed.close()

    def close(self) -> None:
        """Give everything back."""
        import torch

        self.stack.to(torch.device("cpu"))
        return_freed_memory()
        self.scratch.close()
        self._blocks.close()
        self._reader.close()
        self._place.close()
        self._ring.close()

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
