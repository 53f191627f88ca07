"""The arithmetic of one sweep: what is done while a visit's stages are in memory.

What lives between visits is kept in Scratch by batch and key: hidden states and whatever else layers hand on
("value"), and the gradients of these ("gradient"). Each is dropped after its last use, so that nothing is left.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TYPE_CHECKING

from streammerge.engine.layers_gradients import Gradients, leaves
from streammerge.engine.layers_hooks import Hooks, Loaded
from streammerge.engine.layers_loss import CrossEntropy, Loss
from streammerge.engine.layers_weights import Ready
from streammerge.models.record import Call, Key, Record
from streammerge.models.stack import Batch, Stack
from streammerge.models.stage import Stage, Values
from streammerge.store.scratch import Scratch

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Kept:
    """Scratch, by kind, number of the batch, and key."""

    def __init__(self, scratch: Scratch, device: torch.device) -> None:
        self._scratch, self._device = scratch, device

    def put(self, kind: str, number: int, key: Key, tensor: Tensor) -> None:
        self._scratch.put((kind, number, key), tensor)

    def get(self, kind: str, number: int, key: Key) -> Tensor:
        return self._scratch.get((kind, number, key), self._device)

    def has(self, kind: str, number: int, key: Key) -> bool:
        return (kind, number, key) in self._scratch

    def drop(self, kind: str, number: int, key: Key) -> None:
        self._scratch.drop((kind, number, key))

    def add(self, kind: str, number: int, key: Key, tensor: Tensor) -> None:
        """What is there and this, in this order: as autograd adds up what flows into a tensor."""
        if self.has(kind, number, key):
            tensor = self.get(kind, number, key) + tensor
            self.drop(kind, number, key)
        self.put(kind, number, key, tensor)


class Passes:
    """One sweep over batches; a method for each kind of visit. `done` names stages whose results are there."""

    def __init__(
        self,
        stack: Stack,
        hooks: Hooks,
        loss: Loss | None,
        scratch: Scratch,
        device: torch.device,
        batches: Sequence[Batch],
        done: Collection[str],
        graphs: bool = False,
    ) -> None:
        self._stack, self._hooks, self._loss, self._device = stack, hooks, loss, device
        self._kept = Kept(scratch, device)
        self._batches, self._done = batches, frozenset(done)
        self._learns = hooks.gradients != "none"
        self._records: list[Record] = []
        self._graphs = graphs and self._learns  # of every layer and batch, kept from the way there to the way back
        self._open: dict[int, Gradients] = {}
        self._ran: dict[tuple[int, int], tuple[list[Tensor], dict[Key, Tensor]]] = {}

    def enter(self, loaded: Loaded) -> None:
        """The embedding of every batch; what its layers will be given."""
        import torch

        weights = leaves(loaded, self._hooks)
        for number, batch in enumerate(self._moved()):
            self._passes(loaded, number)
            with torch.set_grad_enabled(self._learns):
                record = self._stack.enter(weights, batch)
            for index, entry in enumerate(record.entries):
                if index == 0 or (0, index) in record.wanted:
                    self._kept.put("value", number, (0, index), entry)
            record.forget()
            self._records.append(record)

    def forward(self, ready: Ready) -> None:

        stages = [self._stack.stages[index] for index in ready.visit.stages]
        for number in range(len(self._batches)):
            for stage in stages:
                self._passes(ready.loaded[stage.index], number)
                self._through(stage, ready.loaded[stage.index], number, keep=True)
                if (stage is not stages[0] or not self._learns) and not self._graphs:
                    self._kept.drop("value", number, (stage.index - 1, 0))

    def _through(self, stage: Stage, loaded: Loaded, number: int, keep: bool) -> None:
        """One layer, one batch: its hidden state is kept, and, given `keep`, whatever else later layers take.

        Autograd is on if a backward pass follows: torch has other kernels for when it is not, with other last bits.
        """
        import torch

        record = self._records[number]
        call = record.calls[stage.index - 1]
        values = self._arguments(number, call)
        if self._graphs and stage.index not in self._open:
            self._open[stage.index] = self._gradients(loaded)
        weights = self._open[stage.index].leaves if self._graphs else leaves(loaded, self._hooks)
        with torch.set_grad_enabled(self._learns):
            results = self._stack.layer(stage, weights, call, values)
        if self._graphs:
            self._ran[stage.index, number] = results, values
        for key, result in zip(call.gives, results, strict=True):
            if key is not None and (key[1] == 0 or (keep and key in record.wanted)):
                self._kept.put("value", number, key, result)

    def turn(self, loaded: Loaded) -> list[float]:
        """The head: losses, the gradients of its own weights, and those of the last hidden state."""
        import torch

        last = (loaded.stage.index - 1, 0)
        gradients = self._gradients(loaded)
        losses = []
        for number, batch in enumerate(self._moved()):
            self._passes(loaded, number)
            gradients.batch = number
            hidden = self._kept.get("value", number, last).detach().requires_grad_(self._learns)
            with torch.set_grad_enabled(self._learns):
                loss = self._compute_loss(gradients.leaves, batch, hidden)
            if self._learns:
                loss.backward(inputs=[hidden] if loaded.stage.name in self._done else None)
                self._kept.put("gradient", number, last, hidden.grad)
            losses.append(float(loss.detach()))
            del loss, hidden
            if not loaded.stage.borrowed or not self._learns:
                self._kept.drop("value", number, last)
            if not self._learns:
                for key in self._records[number].wanted:
                    self._kept.drop("value", number, key)
        gradients.finish()
        self._hooks.turned(losses)
        if self._learns:
            self._emit(loaded)
        return losses

    def _passes(self, loaded: Loaded, number: int) -> None:
        if not self._learns:
            self._hooks.passes(loaded, number)

    def backward(self, ready: Ready) -> None:
        stages = [self._stack.stages[index] for index in ready.visit.stages]
        if len(stages) > 1 and not self._graphs:
            for number in range(len(self._batches)):
                for stage in stages[:-1]:
                    self._through(stage, ready.loaded[stage.index], number, keep=False)
        for stage in reversed(stages):
            loaded = ready.loaded[stage.index]
            gradients = self._open.pop(stage.index) if self._graphs else self._gradients(loaded)
            for number in range(len(self._batches)):
                self._back(stage, gradients, number)
            gradients.finish()
            self._emit(loaded)

    def _back(self, stage: Stage, gradients: Gradients, number: int) -> None:
        """One layer, one batch: run it again under autograd, unless that was kept, and its results' gradients back."""
        import torch

        call = self._records[number].calls[stage.index - 1]
        gradients.batch = number
        if self._graphs:
            results, values = self._ran.pop((stage.index, number))
        else:
            values = self._arguments(number, call)
            with torch.enable_grad():
                results = self._stack.layer(stage, gradients.leaves, call, values)
        roots = {
            key: result
            for key, result in zip(call.gives, results, strict=True)
            if key is not None and self._kept.has("gradient", number, key)
        }
        del results
        self._run_back(roots, number, list(values.values()) if stage.name in self._done else None)
        for key, value in values.items():
            if value.grad is not None:
                self._kept.add("gradient", number, key, value.grad)
        del values
        self._kept.drop("value", number, call.takes[0])
        for given in call.gives[1:]:
            if given is not None and self._kept.has("value", number, given):
                self._kept.drop("value", number, given)

    def _arguments(self, number: int, call: Call) -> dict[Key, Tensor]:
        """What earlier stages computed for a layer, as leaves of its graph."""
        values = {key: self._kept.get("value", number, key).detach() for key in call.takes}
        for value in values.values():
            value.requires_grad_(self._learns and value.is_floating_point())
        return values

    def _run_back(self, roots: dict[Key, Tensor], number: int, towards: list[Tensor] | None = None) -> None:
        """The backward pass from these tensors, whose gradients are dropped, to all leaves or to some."""
        import torch

        upstream = [self._kept.get("gradient", number, key) for key in roots]
        if roots:
            torch.autograd.backward(list(roots.values()), upstream, inputs=towards)
        for key in roots:
            self._kept.drop("gradient", number, key)

    def leave(self, ready: Ready) -> None:
        """The embedding, last; first, batch by batch, what a tied head adds to its gradients."""
        import torch

        loaded, head = ready.loaded[0], ready.loaded.get(len(self._stack.stages) - 1)
        shown = loaded.stage.name not in self._done
        gradients = self._gradients(loaded)
        for number, batch in enumerate(self._moved()):
            gradients.batch = number
            if head is not None:
                last = (head.stage.index - 1, 0)
                if shown:
                    self._add_head(head, gradients, batch, self._kept.get("value", number, last).detach())
                self._kept.drop("value", number, last)
            with torch.enable_grad():
                entries = self._stack.enter(gradients.leaves, batch).entries
            roots = {(0, index): entry for index, entry in enumerate(entries) if entry.requires_grad and shown}
            self._run_back(
                {key: root for key, root in roots.items() if self._kept.has("gradient", number, key)}, number
            )
            for index in range(len(entries)):
                for kind in ("gradient", "value"):
                    if self._kept.has(kind, number, (0, index)):
                        self._kept.drop(kind, number, (0, index))
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
            return self._loss.run(self._stack, weights, batch, hidden)
        assert self._loss is not None, "the plan is for layers alone"
        return self._loss(self._stack.leave(weights, batch, hidden), batch)

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
                name: value.to(self._device) if isinstance(value, torch.Tensor) else value
                for name, value in batch.items()
            }
