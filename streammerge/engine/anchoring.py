"""One unit at a time: anchors of each expert, then the unit's weights; what comes of it is written at once.

A sweep brings the base's weights and one expert's into memory; `emit` works on them. Anchors are durable when an
expert's visit is over, the unit's tensors when the unit is: a run that is taken up begins with the next.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from streammerge.engine.anchor_bench import Bench, Turn
from streammerge.engine.anchor_files import Given, key
from streammerge.engine.anchor_work import PROBES, Work, micro, record_inputs, run_shapes, vectors
from streammerge.engine.layers_hooks import Hooks, Loaded
from streammerge.engine.units import Runner
from streammerge.errors import Interrupted, RecipeError
from streammerge.models.build import return_freed_memory

if TYPE_CHECKING:
    from torch import Tensor

APART = 0.1  # of one and its noted loss: what other products and another transformers make of a loss, and more
KEEP = 200  # points of a curve that is kept, at most


class Anchoring(Hooks):
    """The hooks of a sweep over units; `bench` is set before it runs."""

    bench: Bench

    def __init__(self, turns: Sequence[Turn]) -> None:
        self._turns: Iterator[Turn] = iter(turns)
        self._runner: Runner | None = None

    def emit(self, loaded: Loaded) -> None:
        turn = next(self._turns)
        bench, part = self.bench, turn.work.part
        return_freed_memory(turn.work.pieces)
        if self._runner is None or self._runner.module is not part.stage.module:
            self._runner = Runner(bench.stack, part, turn.work.example, bench.device)
        visit = _Visit(bench, turn.work, self._runner, loaded)
        if turn.expert is None:
            visit.adapt()
        else:
            visit.construct(turn.expert)


class _Visit:
    def __init__(self, bench: Bench, work: Work, runner: Runner, loaded: Loaded) -> None:
        self._bench, self._work, self._runner, self._loaded = bench, work, runner, loaded
        self._base = loaded.parameters
        self._name = work.part.name

    # --- one expert ---

    def construct(self, expert: int) -> None:
        """Make the anchors of one expert, or take up those that are there, and keep what adaptation needs."""
        bench, work = self._bench, self._work
        self._runner.prepare(run_shapes(work))
        masks = self._masks() if key(work.number, expert) not in bench.done else {}
        tau = self._tau(1 + expert)
        network = work.settings.network(self._runner, self._base, tau, work.part.gated)
        anchors, notes = self._anchors(expert, network, tau, masks)
        if not work.solves:
            bench.scratch.put((expert, "x"), anchors)
            bench.scratch.put((expert, "y"), self._outputs(network, anchors))
            if bench.inputs is not None:
                bench.inputs.teach(work, expert, network, self._runner)
        else:
            self._keep_inputs(expert, anchors, tau)
        if notes is not None:
            self._write_anchors(expert, anchors, notes)

    def _masks(self) -> dict[str, Tensor]:
        if self._work.part.gated or self._work.closed or not vectors(self._work.part):
            return {}
        shape = (min(PROBES, self._work.shape[0]), *self._work.shape[1:])
        probe = self._work.settings.noise(self._name, shape).to(self._bench.device)
        found: dict[str, Tensor] = self._work.settings.masks(self._runner, self._base, probe)
        return found

    def _tau(self, source: int) -> dict[str, Tensor]:
        """An expert's task vector, fp32, by the names of parameters."""
        import torch

        found = {name: torch.empty_like(value) for name, value in self._base.items()}
        for name, view in self._loaded.stage.views(found).items():
            view.copy_(self._loaded.raw[source][name])
        for name, value in found.items():
            value -= self._base[name]
        return found

    def _anchors(
        self, expert: int, network: Any, tau: Mapping[str, Tensor], masks: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Any] | None]:
        """Anchors on the device, and what to note of them if they are not durable yet."""
        bench, work = self._bench, self._work
        name = key(work.number, expert)
        if name in bench.done:
            return bench.load(bench.anchors.spec(name, work.shape, bench.writer.partial)).to(bench.device), None
        if name in bench.given:
            given = bench.given[name]
            anchors = bench.load(given.spec).to(bench.device)
            noted = isinstance(given.figures.get("loss"), (int, float))
            if noted and not work.closed and given.figures.get("distance") == work.settings.distance:
                found = float(work.settings.construction(network, tau, anchors, masks).loss())
                self._check_loss(given, expert, found)
            return anchors, {**given.figures, "given": 1}
        began = time.perf_counter()
        if work.closed:
            (matrix,) = (value for value in tau.values() if value.dim() == 2)
            anchors, loss = work.settings.optimum(matrix)
            return anchors, {"loss": loss, "steps": 0, "seconds": _since(began)}
        raw = self._loaded.raw[1 + expert]
        matrices = [raw[each] for each in self._loaded.stage.tensors]
        first = work.settings.first(bench.seed, self._name, expert, work.shape, matrices).to(bench.device)
        course = work.settings.construction(network, tau, first, masks)
        total = work.settings.construct_steps

        def told(step: int, loss: float) -> None:
            self._tell(f"expert {expert}, step {step} of {total}, loss {loss:.4g}", work.step_load * (step > 0))

        losses = course.run(told)
        figures: dict[str, Any] = {"loss": min(losses), "steps": total, "seconds": _since(began)}
        figures |= {"distance": work.settings.distance, "first": losses[0], "curve": _thin(losses)}
        return course.best, figures

    def _check_loss(self, given: Given, expert: int, found: float) -> None:
        """Raise RecipeError if anchors fit their expert worse or better than was noted: they are another's."""
        noted = float(given.figures["loss"])
        if not abs(found - noted) <= APART * (1 + noted):
            raise RecipeError(
                f"anchors_from: {given.spec.name} in {given.spec.file} has a loss of {found:.3g} for {self._name} of "
                f"model {expert}, not {noted:.3g} as noted: it was made for another base or expert; "
                "give models in the order in which their anchors were made"
            )

    def _outputs(self, network: Any, anchors: Tensor) -> Tensor:
        import torch

        return torch.cat([network.outputs(x) for x in anchors.split(micro(self._work))])

    def _keep_inputs(self, expert: int, anchors: Tensor, tau: Mapping[str, Tensor]) -> None:
        weights = {name: value + tau[name] for name, value in self._base.items()}
        linear = self._work.part.linear
        for path, inputs in record_inputs(self._runner, weights, anchors).items():
            self._bench.scratch.put((expert, path, "x"), inputs)
            self._bench.scratch.put((expert, path, "z"), inputs @ tau[linear[path]].T)

    def _write_anchors(self, expert: int, anchors: Tensor, notes: dict[str, Any]) -> None:
        file, name = self._bench.anchors, key(self._work.number, expert)
        self._bench.put(file.number, file.begins[name], anchors.reshape(-1), "F32")
        note = {"anchors": [name, {"unit": self._name, **notes}]}
        self._bench.note(note)
        self._bench.writer.seal([(file.number, name)], [note])

    # --- the unit ---

    def adapt(self) -> None:
        """Adapt the unit to all experts' anchors, and write its tensors."""
        bench, work = self._bench, self._work
        began = time.perf_counter()
        start = None if bench.start is None else bench.start(work)
        if work.solves:
            theta, notes = self._solve(start), {"seconds": _since(began)}
        else:
            theta, notes = self._learn(start)
            notes["seconds"] = _since(began)
        written = self._write(theta)
        note = {"adapted": [self._name, notes]}
        bench.note(note)
        bench.writer.seal([(bench.planned[name].shard, name) for name in self._loaded.stage.tensors], [note])
        self._tell("written", 0.0, written)
        bench.scratch.clear()
        if bench.inputs is not None:
            bench.inputs.drop(work)

    def _begin(self, start: dict[str, Tensor] | None, moves: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """The unit's weights to begin with, where the base's lie: no later visit needs those. `moves` get how far."""
        theta = dict(self._base)
        if start is not None:
            views = self._loaded.stage.views(theta)
            changes = {} if moves is None else self._loaded.stage.views(moves)
            for name, view in views.items():
                begun = start.pop(name)
                if name in changes:
                    changes[name].copy_(begun).sub_(view)
                view.copy_(begun)
        return theta

    def _learn(self, start: dict[str, Tensor] | None) -> tuple[dict[str, Tensor], dict[str, Any]]:
        import torch

        bench, work = self._bench, self._work
        moves: list[dict[str, Tensor]] = []
        if work.settings.alphas == "experts":
            moves = [self._tau(1 + e) for e in range(work.experts)]
        elif work.settings.adapt == "coefficients":
            moves = [{name: torch.empty_like(value) for name, value in self._base.items()}]
        theta = self._begin(start, moves[0] if moves and work.settings.alphas == "merged" else None)
        anchors = [bench.scratch.get((e, "x"), bench.device) for e in range(work.experts)]
        targets = [bench.scratch.get((e, "y"), bench.device) for e in range(work.experts)]
        trial = None
        if bench.inputs is not None and bench.inputs.has(work):
            trial = partial(bench.inputs.trial, work, bench.device)
        course = work.settings.adaptation(self._runner, theta, moves, anchors, targets, trial)
        share = work.adapt_load / max(1, course.total)

        def told(step: int, steps: int, loss: float) -> None:
            self._tell(f"adapting, step {step} of {steps}, loss {loss:.4g}", share)

        losses, tried = course.run(lambda epoch: work.settings.order(bench.seed, self._name, epoch), told)
        notes: dict[str, Any] = {"epochs": len(losses), "curve": _thin(losses, 1)}
        if losses:
            notes |= {"first": losses[0], "loss": losses[-1]}
        if tried:
            notes |= {"held_out": _thin(tried), "kept": tried.index(min(tried))}
        return {name: value.detach() for name, value in course.kept.items()}, notes

    def _solve(self, start: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Matrices in closed form; all else is the start's."""
        bench, work = self._bench, self._work
        solved = {}
        for path, name in work.part.linear.items():
            inputs, moved = (
                [bench.scratch.get((e, path, which), bench.device) for e in range(work.experts)] for which in "xz"
            )
            solved[name] = self._base[name] + work.settings.solve(inputs, moved)
        return self._begin(start, None) | solved

    # --- results ---

    def _write(self, theta: Mapping[str, Tensor]) -> int:
        """Put the unit's tensors, each rounded once to its dtype; the bytes."""
        written = 0
        for name, value in self._loaded.stage.views(theta).items():
            if name in self._loaded.stage.tensors:
                place = self._bench.planned[name]
                self._bench.put(place.shard, place.begin, value.reshape(-1), place.out_dtype)
                written += place.end - place.begin
        return written

    def _tell(self, text: str, done: float, written: int = 0) -> None:
        self._bench.tell(f"{self._name}, {text}", done, written)
        if self._bench.cancelled():
            raise Interrupted("stopped on request")


def _thin(curve: Sequence[float], first: int = 0) -> list[list[float]]:
    """[step, value] of a curve whose first value belongs to step `first`; its ends are among them."""
    count = min(len(curve), KEEP)
    places = sorted({round(at * (len(curve) - 1) / max(1, count - 1)) for at in range(count)})
    return [[at + first, curve[at]] for at in places]


def _since(began: float) -> float:
    return round(time.perf_counter() - began, 3)
