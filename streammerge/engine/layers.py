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

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from streammerge.engine.layers_device import open_place
from streammerge.engine.layers_gradients import Gradients, leaves
from streammerge.engine.layers_hooks import Loaded
from streammerge.engine.layers_loss import CrossEntropy
from streammerge.engine.layers_plan import SweepPlan
from streammerge.engine.layers_weights import Blocks, Feed, Ready
from streammerge.errors import Interrupted
from streammerge.models.build import return_freed_memory
from streammerge.models.record import Call, Key, Record
from streammerge.models.stack import Batch
from streammerge.models.stage import Stage, Values
from streammerge.store.reader import Mode, Reader
from streammerge.store.ring import Ring
from streammerge.store.scratch import Scratch

if TYPE_CHECKING:
    from torch import Tensor


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
        self._learns = self._hooks.gradients != "none"
        self._records: list[Record] = []
        self._batches: Sequence[Batch] = ()
        self._done: frozenset[str] = frozenset()

    @property
    def bytes_read(self) -> int:
        """Bytes of checkpoints asked of the disks so far."""
        return self._reader.bytes_read

    def run(self, batches: Sequence[Batch], done: Collection[str] = ()) -> list[float]:
        """One sweep: forward, and backward if the hooks want gradients. The losses, one per batch.

        `done` names stages whose results are there already. Raises Interrupted if cancelled between two visits.
        """
        self._batches, self._done, self._records = batches, frozenset(done), []
        losses: list[float] = []
        head = len(self.stack.stages) - 1
        try:
            with closing(self._ready()) as visits:
                for ready in visits:
                    stages = ready.visit.stages
                    if stages == (head,):
                        losses = self._turn(ready.loaded[head])
                    elif stages[0] > 0:
                        (self._backward if ready.visit.backward else self._forward)(ready)
                    elif ready.visit.backward:
                        self._leave(ready)
                    else:
                        self._enter(ready.loaded[0])
        except BaseException:
            self.scratch.close()
            raise
        finally:
            self._records = []
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
                return_freed_memory()
                ready = feed.next()
                for index in sorted(ready.new):
                    self._hooks.weights(ready.loaded[index], visit.backward)
                yield ready
                if self._progress is not None:
                    self._progress(number + 1, len(plan.visits))
        finally:
            feed.close()

    def _enter(self, loaded: Loaded) -> None:
        """The embedding of every batch; what its layers will be given."""
        import torch

        weights = leaves(loaded, self._hooks)
        for number, batch in enumerate(self._moved()):
            self._passes(loaded, number)
            with torch.set_grad_enabled(self._learns):
                record = self.stack.enter(weights, batch)
            for index, entry in enumerate(record.entries):
                if index == 0 or (0, index) in record.wanted:
                    self._put("value", number, (0, index), entry)
            record.forget()
            self._records.append(record)

    def _forward(self, ready: Ready) -> None:

        stages = [self.stack.stages[index] for index in ready.visit.stages]
        for number in range(len(self._batches)):
            for stage in stages:
                self._passes(ready.loaded[stage.index], number)
                self._through(stage, ready.loaded[stage.index], number, keep=True)
                if stage is not stages[0] or not self._learns:
                    self._drop("value", number, (stage.index - 1, 0))

    def _through(self, stage: Stage, loaded: Loaded, number: int, keep: bool) -> None:
        """One layer, one batch: its hidden state is kept, and, given `keep`, whatever else later layers take.

        Autograd is on if a backward pass follows: torch has other kernels for when it is not, with other last bits.
        """
        import torch

        record = self._records[number]
        call = record.calls[stage.index - 1]
        values = self._arguments(number, call)
        with torch.set_grad_enabled(self._learns):
            results = self.stack.layer(stage, leaves(loaded, self._hooks), call, values)
        for key, result in zip(call.gives, results, strict=True):
            if key is not None and (key[1] == 0 or (keep and key in record.wanted)):
                self._put("value", number, key, result)

    def _turn(self, loaded: Loaded) -> list[float]:
        """The head: losses, the gradients of its own weights, and those of the last hidden state."""
        import torch

        last = (loaded.stage.index - 1, 0)
        gradients = self._gradients(loaded)
        losses = []
        for number, batch in enumerate(self._moved()):
            self._passes(loaded, number)
            gradients.batch = number
            hidden = self._get("value", number, last).detach().requires_grad_(self._learns)
            with torch.set_grad_enabled(self._learns):
                loss = self._compute_loss(gradients.leaves, batch, hidden)
            if self._learns:
                loss.backward(inputs=[hidden] if loaded.stage.name in self._done else None)
                self._put("gradient", number, last, hidden.grad)
            losses.append(float(loss.detach()))
            del loss, hidden
            if not loaded.stage.borrowed or not self._learns:
                self._drop("value", number, last)
            if not self._learns:
                for key in self._records[number].wanted:
                    self._drop("value", number, key)
        gradients.finish()
        self._hooks.turned(losses)
        if self._learns:
            self._emit(loaded)
        return losses

    def _passes(self, loaded: Loaded, number: int) -> None:
        if not self._learns:
            self._hooks.passes(loaded, number)

    def _backward(self, ready: Ready) -> None:
        stages = [self.stack.stages[index] for index in ready.visit.stages]
        if len(stages) > 1:
            for number in range(len(self._batches)):
                for stage in stages[:-1]:
                    self._through(stage, ready.loaded[stage.index], number, keep=False)
        for stage in reversed(stages):
            loaded = ready.loaded[stage.index]
            gradients = self._gradients(loaded)
            for number in range(len(self._batches)):
                self._back(stage, gradients, number)
            gradients.finish()
            self._emit(loaded)

    def _back(self, stage: Stage, gradients: Gradients, number: int) -> None:
        """One layer, one batch: run it again under autograd, and its results' gradients through it."""
        import torch

        call = self._records[number].calls[stage.index - 1]
        values = self._arguments(number, call)
        gradients.batch = number
        with torch.enable_grad():
            results = self.stack.layer(stage, gradients.leaves, call, values)
        roots = {
            key: result
            for key, result in zip(call.gives, results, strict=True)
            if key is not None and self._has("gradient", number, key)
        }
        del results
        self._run_back(roots, number, list(values.values()) if stage.name in self._done else None)
        for key, value in values.items():
            if value.grad is not None:
                self._add("gradient", number, key, value.grad)
        del values
        self._drop("value", number, call.takes[0])
        for given in call.gives[1:]:
            if given is not None and self._has("value", number, given):
                self._drop("value", number, given)

    def _arguments(self, number: int, call: Call) -> dict[Key, Tensor]:
        """What earlier stages computed for a layer, as leaves of its graph."""
        values = {key: self._get("value", number, key).detach() for key in call.takes}
        for value in values.values():
            value.requires_grad_(self._learns and value.is_floating_point())
        return values

    def _run_back(self, roots: dict[Key, Tensor], number: int, towards: list[Tensor] | None = None) -> None:
        """The backward pass from these tensors, whose gradients are dropped, to all leaves or to some."""
        import torch

        upstream = [self._get("gradient", number, key) for key in roots]
        if roots:
            torch.autograd.backward(list(roots.values()), upstream, inputs=towards)
        for key in roots:
            self._drop("gradient", number, key)

    def _leave(self, ready: Ready) -> None:
        """The embedding, last; first, batch by batch, what a tied head adds to its gradients."""
        import torch

        loaded, head = ready.loaded[0], ready.loaded.get(len(self.stack.stages) - 1)
        shown = loaded.stage.name not in self._done
        gradients = self._gradients(loaded)
        for number, batch in enumerate(self._moved()):
            gradients.batch = number
            if head is not None:
                last = (head.stage.index - 1, 0)
                if shown:
                    self._add_head(head, gradients, batch, self._get("value", number, last).detach())
                self._drop("value", number, last)
            with torch.enable_grad():
                entries = self.stack.enter(gradients.leaves, batch).entries
            roots = {(0, index): entry for index, entry in enumerate(entries) if entry.requires_grad and shown}
            self._run_back({key: root for key, root in roots.items() if self._has("gradient", number, key)}, number)
            for index in range(len(entries)):
                for kind in ("gradient", "value"):
                    if self._has(kind, number, (0, index)):
                        self._drop(kind, number, (0, index))
        gradients.finish()
        self._emit(loaded)

    def _add_head(self, head: Loaded, gradients: Gradients, batch: Batch, hidden: Tensor) -> None:
        """The head once more, for the weights that it shares with the embedding; their gradients stay in the leaves."""
        import torch

        shared = {name: leaf for name, leaf in gradients.leaves.items() if name in head.parameters}
        own = {name: value.detach() for name, value in head.parameters.items()}
        gradients.held = True
        with torch.enable_grad():
            self._compute_loss(own | shared, batch, hidden).backward()
        gradients.held = False

    def _compute_loss(self, weights: Values, batch: Batch, hidden: Tensor) -> Tensor:
        if isinstance(self._loss, CrossEntropy):
            return self._loss.run(self.stack, weights, batch, hidden)
        assert self._loss is not None, "the plan is for layers alone"
        return self._loss(self.stack.leave(weights, batch, hidden), batch)

    def _gradients(self, loaded: Loaded) -> Gradients:
        return Gradients(loaded, self._hooks, loaded.stage.name not in self._done)

    def _emit(self, loaded: Loaded) -> None:
        if loaded.stage.name not in self._done:
            self._hooks.emit(loaded)

    def _moved(self) -> Iterator[Batch]:
        """The batches, one at a time where it is computed."""
        import torch

        for batch in self._batches:
            yield {
                name: value.to(self._place.device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }

    def _put(self, kind: str, number: int, key: Key, tensor: Tensor) -> None:
        self.scratch.put((kind, number, key), tensor)

    def _get(self, kind: str, number: int, key: Key) -> Tensor:
        return self.scratch.get((kind, number, key), self._place.device)

    def _has(self, kind: str, number: int, key: Key) -> bool:
        return (kind, number, key) in self.scratch

    def _drop(self, kind: str, number: int, key: Key) -> None:
        self.scratch.drop((kind, number, key))

    def _add(self, kind: str, number: int, key: Key, tensor: Tensor) -> None:
        if self._has(kind, number, key):
            tensor = self._get(kind, number, key) + tensor
            self._drop(kind, number, key)
        self._put(kind, number, key, tensor)

    def close(self) -> None:
        self.scratch.close()
        self._blocks.close()
        self._reader.close()
        self._place.close()
        self._ring.close()

    def __enter__(self) -> Sweep:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()
