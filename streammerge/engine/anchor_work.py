"""What is done to one unit, and the bytes that it takes, found by doing one step of it on meta."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from streammerge.engine.layers_measure import count_live
from streammerge.engine.units import Example, Part, Runner, bytes_of
from streammerge.errors import RecipeError
from streammerge.models.stack import Stack

if TYPE_CHECKING:
    from torch import Tensor

PIECES = 32 << 20  # bytes of freed memory, below which it is kept for the next step
LARGE, LEAST = 256 << 20, 1 << 20  # bytes of a unit, from which on pages are little work beside products; its pieces
PROBES = 4  # random inputs that show which entries of vectors have no gradient


@dataclass(frozen=True)
class Work:
    """A unit with its settings, an instance of the method; `shape` is that of one expert's anchors."""

    part: Part
    settings: Any
    shape: tuple[int, ...]
    experts: int
    example: Example | None
    tried: tuple[tuple[int, ...], ...] = ()  # the largest real inputs on which it is tried

    @property
    def number(self) -> int:
        return self.part.stage.index

    @property
    def closed(self) -> bool:
        """Whether its anchors need no steps: a linear map under l2."""
        from torch import nn

        return isinstance(self.part.stage.module, nn.Linear) and self.settings.distance == "l2"

    @property
    def pieces(self) -> int:
        """Bytes of freed memory below which it is kept: the same steps come again and again, and fresh pages would cost
        a small unit as much as its arithmetic.
        """
        return PIECES if bytes_of(self.part.stage) < LARGE else LEAST

    @property
    def solves(self) -> bool:
        return bool(self.settings.adapt == "closed_form")

    @property
    def step_load(self) -> float:
        """Work of a step of construction in runs of one anchor, for an estimate of the time left."""
        return 11.0 * self.shape[0]

    @property
    def adapt_load(self) -> float:
        """Work of adaptation."""
        settings = self.settings
        if self.solves:
            return 0.0
        runs = settings.adapt_steps * settings.batch or settings.adapt_epochs * self.experts * self.shape[0]
        return 3.0 * float(runs)

    @property
    def load(self) -> float:
        """All work on the unit."""
        steps = 0 if self.closed else self.settings.construct_steps
        return self.experts * steps * self.step_load + self.adapt_load

    @property
    def scratch_bytes(self) -> int:
        """Of anchors and what is kept of them until the unit is adapted."""
        size = 4 * math.prod(self.shape)
        found = size if not self.solves else 0
        rows = math.prod(self.shape[:-1])
        for path in self.part.linear if self.solves else ():
            assert self.part.stage.module is not None
            linear: Any = self.part.stage.module.get_submodule(path)
            found += 4 * rows * (linear.in_features + linear.out_features)
        results = 0 if self.solves else size
        return self.experts * (found + results)


def vectors(part: Part) -> bool:
    """Whether some of its parameters are vectors, whose gradient may be zero."""
    return any(len(parameter.shape) == 1 for parameter in part.stage.parameters.values())


@dataclass(frozen=True)
class Needs:
    """Bytes beside what was loaded."""

    construct: int
    adapt: int


def needs_of(stack: Stack, works: Sequence[Work]) -> list[Needs]:
    """Those of every unit; units that are alike need the same.

    Raises:
        RecipeError: a unit does not run alone.
    """
    found: dict[str, Needs] = {}
    needs = []
    for work in works:
        shapes = [tuple(parameter.shape) for parameter in work.part.stage.parameters.values()]
        alike = str((type(work.part.stage.module), shapes, work.settings, work.shape))
        if alike not in found:
            runner = Runner(stack, work.part, work.example, "meta")
            try:
                found[alike] = Needs(construct_bytes(work, runner), adapt_bytes(work, runner))
            except (TypeError, ValueError, RuntimeError, IndexError) as error:
                line = " ".join(str(error).split())[:120]
                raise RecipeError(
                    f"{work.part.name} does not run alone on its input ({line}); choose another unit"
                ) from None
        needs.append(found[alike])
    return needs


def construct_bytes(work: Work, runner: Runner) -> int:
    """What a visit for one expert holds beside the weights of both."""
    import torch

    base = _meta(work.part)
    runner.prepare(run_shapes(work))
    live = count_live(list(base.values()))
    with live:
        tau = {name: torch.empty_like(value) for name, value in base.items()}
        network = work.settings.network(runner, base, tau, work.part.gated)
        anchors = torch.empty(work.shape, device="meta")
        if not work.closed:
            course = work.settings.construction(network, tau, anchors, {})
            course.loss()
            course.step()
        network.outputs(anchors[: micro(work)])
        for shape in work.tried:
            network.outputs(torch.empty(shape, device="meta"))
        if work.solves:
            record_inputs(runner, base, anchors)
    rows = 8 * (math.prod(work.shape) + math.prod(work.shape[:-1]))  # drawn on the host, with places of rows
    return int(live.peak) + rows


def adapt_bytes(work: Work, runner: Runner) -> int:
    """What the visit that adapts a unit holds beside the weights that were loaded."""
    import torch

    base = _meta(work.part)
    live = count_live(list(base.values()))
    with live:
        if work.solves:
            return bytes_of(work.part.stage) + _solving_bytes(work)
        sets = {"weights": 0, "coefficients": 1}[work.settings.adapt]
        sets = work.experts if work.settings.alphas == "experts" else sets
        moves = [{name: torch.empty_like(value) for name, value in base.items()} for _ in range(sets)]
        anchors = [torch.empty(work.shape, device="meta") for _ in range(work.experts)]
        with torch.no_grad():
            wanted = [runner(anchors[0][: micro(work)], base)] * work.experts
        targets = [torch.empty((work.shape[0], *each.shape[1:]), device="meta") for each in wanted]
        trial = partial(_trial, work, runner, base) if work.tried else None
        course = work.settings.adaptation(runner, {**base}, moves, anchors, targets, trial)
        course.step(course.everything[: work.settings.batch])
        if trial is not None:
            course.look()
    return int(live.peak)


def _trial(work: Work, runner: Runner, base: Mapping[str, Tensor]) -> Iterator[tuple[Tensor, list[Tensor]]]:
    """Real inputs of the largest shapes, with what experts return."""
    import torch

    for shape in work.tried:
        x = torch.empty(shape, device="meta")
        yield x, [torch.empty_like(runner(x, base)) for _ in range(work.experts)]


def _solving_bytes(work: Work) -> int:
    """Of the largest matrix that is solved: inputs and results of all anchors, and the system, in fp64."""
    assert work.part.stage.module is not None
    most = 0
    rows = work.experts * math.prod(work.shape[:-1])
    for path in work.part.linear:
        linear: Any = work.part.stage.module.get_submodule(path)
        side = min(rows, linear.in_features)
        panel = rows * (linear.in_features + linear.out_features)
        most = max(most, 12 * panel + 8 * (3 * side * side + 2 * linear.in_features * (side + linear.out_features)))
    return most


def micro(work: Work) -> int:
    """Anchors that run at once."""
    return int(work.settings.micro_batch(work.shape))


def run_shapes(work: Work) -> set[tuple[int, ...]]:
    """What runs at once in construction: so many anchors, and real inputs."""
    counts = (micro(work), work.shape[0] % micro(work) or micro(work), min(PROBES, work.shape[0]))
    return {*((count, *work.shape[1:]) for count in counts), *work.tried}


def _meta(part: Part) -> dict[str, Tensor]:
    import torch

    return {
        name: torch.empty(parameter.shape, dtype=torch.float32, device="meta")
        for name, parameter in part.stage.parameters.items()
    }


def record_inputs(runner: Runner, weights: Mapping[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """What every linear map of a unit is given, [tokens, columns], by the map's path."""
    import torch
    from torch import nn

    found: dict[str, Tensor] = {}
    handles = []
    for path, module in runner.module.named_modules():
        if isinstance(module, nn.Linear):

            def note(_: Any, args: Sequence[Any], path: str = path) -> None:
                found[path] = args[0].detach().reshape(-1, args[0].shape[-1])

            handles.append(module.register_forward_pre_hook(note))
    try:
        with torch.no_grad():
            runner(x, weights)
    finally:
        for handle in handles:
            handle.remove()
    return found
