"""Plans of learned coefficients: which sweeps there are, what stays in memory between them, what each reads.

    select    a budget of experts: one sweep at the base that looks at the gradients of all of them
    try       validation samples: a forward pass before the first step and after every epoch; look: the same for the
              training samples, where their labels are the model's own
    opening   the first step: weights start as the base, experts are read on the way back
    steady    every other step
    merge     an ordinary merge of tiles with the coefficients that were learned

They follow each other, so bytes add up and peaks do not. All are planned with the largest batches of any step.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Protocol

from streammerge import kernel
from streammerge.engine.composing import Composing, Mix, Selecting
from streammerge.engine.composing_choice import mosaics
from streammerge.engine.composing_store import Place, Sizes, choose_places
from streammerge.engine.layers_loss import Loss
from streammerge.engine.layers_plan import SweepPlan
from streammerge.engine.learner import Block, Course
from streammerge.engine.objectives import Look
from streammerge.engine.sweep_fit import LAUNCHES_THERE, RING, SPARE, Fit
from streammerge.errors import RecipeError
from streammerge.method import build, find
from streammerge.models.stack import Batch, Stack
from streammerge.planner.coefficients import Coefficients
from streammerge.planner.dialect import Resolution
from streammerge.planner.plan import Limits, Plan
from streammerge.planner.recipe import Recipe
from streammerge.planner.steps import PlannedTensor
from streammerge.store.checkpoint import Checkpoint

SHOWN = 3  # names in a warning
COPIES = 8  # of the coefficients: values, two moments, the best ones, gradients, and what is written of them


class Lessons(Protocol):
    """The samples of a run, step by step."""

    steps: int
    count_all: int  # training samples, or batches of a caller's
    widest: Sequence[Batch]  # no step has larger batches, one by one
    every: Sequence[Batch]  # all training samples
    validation: Sequence[Batch]
    loss: Loss
    trial: Loss
    trials: Sequence[int]  # steps after which validation samples are tried; 0: before the first
    looks: Sequence[int]  # and after which all samples are labelled anew, by what the model predicts
    digest: str

    def step(self, number: int) -> Sequence[Batch]: ...
    def label(self, step: int, tokens: Sequence[Sequence[int]], confidence: Sequence[float]) -> None: ...


@dataclass(frozen=True)
class ComposePlan(Plan):
    """A plan of sweeps that learn, and of the merge of what was learned."""

    lessons: Lessons | None = None
    mix: Mix | None = None
    course: Course | None = None
    select: SweepPlan | None = None
    bare: SweepPlan | None = None  # validation samples before the first step
    trial: SweepPlan | None = None
    bare_look: SweepPlan | None = None  # training samples, to label them
    look: SweepPlan | None = None
    opening: SweepPlan | None = None
    steady: SweepPlan | None = None
    kept_bytes: int = 0  # of the host, from sweep to sweep
    twins: Mapping[str, str] = field(default_factory=dict)  # tensors that are stored once more, and what they copy
    experts: tuple[str, ...] = ()  # as the recipe names them
    least: int = 0  # experts that a tensor keeps; 0: all
    given: Coefficients | None = None  # learned before: there are no sweeps then

    def as_dict(self) -> dict[str, Any]:
        if self.mix is None or self.lessons is None:
            return super().as_dict()
        names = ("select", "bare", "trial", "bare_look", "look", "opening", "steady")
        sweeps = {name: each.as_dict() for name in names if (each := getattr(self, name)) is not None}
        learned = [block for block in self.mix.blocks.values() if block.learns]
        largest = max(sum(unit.size for unit in visit.units) for sweep in self.sweeps for visit in sweep.visits)
        return {
            **super().as_dict(),
            "step_bytes": largest,
            "sweeps": sweeps,
            "samples": self.lessons.count_all,
            "validation": len(self.lessons.validation),
            "learn": {
                "steps": self.lessons.steps,
                "coefficients": sum(len(block.init) * len(block.init[0]) for block in learned),
                "step_read_bytes": (self.steady or self.opening).read_bytes,  # type: ignore[union-attr]
                "kept_bytes": self.kept_bytes,
                "stages": dict(Counter(self.stage_places)),
            },
        }

    @property
    def sweeps(self) -> list[SweepPlan]:
        found = (self.select, self.bare, self.trial, self.bare_look, self.look, self.opening, self.steady)
        return [each for each in found if each is not None]

    @property
    def stage_places(self) -> list[Place]:
        """Where the weights of each stage stay."""
        assert self.opening is not None
        assert self.mix is not None
        return [self.mix.places[stage.tensors[0]] for stage in self.opening.sources.stack.stages if stage.tensors]


@dataclass(frozen=True)
class _Parts:
    """The recipe's tensors, told apart by what is done for them."""

    planned: Mapping[str, PlannedTensor]
    settings: Mapping[str, Any]  # the layer method of every tensor that is merged
    outside: tuple[str, ...]  # those that no layer runs with


def plan_composing(
    recipe: Recipe,
    resolution: Resolution,
    checkpoints: Mapping[str, Checkpoint],
    limits: Limits,
    stack: Stack,
    lessons: Lessons,
) -> ComposePlan:
    """The plan of a recipe whose coefficients are learned.

    Raises:
        BudgetTooSmall: a sweep or the merge does not fit; `least` would do.
        RecipeError, CheckpointError: the request or an input is wrong.
    """
    assert recipe.base_model is not None
    experts = [source.model for source in recipe.models if source.model != recipe.base_model]
    opened = [checkpoints[model] for model in (recipe.base_model, *experts)]
    fit = Fit(limits)
    for name in ("multi_dot", "add_deltas"):
        kernel.describe(name, limits.device)
    plan = fit.tiled(recipe, resolution, checkpoints)
    parts = _sort_out(plan, stack, recipe)
    method = next(iter(parts.settings.values()))
    several = 0 if method.budget >= len(experts) else method.budget
    if several and any(any(any(row) for row in _block(parts, name).init) for name in parts.settings):
        raise RecipeError(f"{recipe.where}: budget chooses experts at the base; leave init at 0")
    select = None
    if several:
        every = _mix(parts, stack, dict.fromkeys(parts.settings, "twice"), len(experts))
        select = fit.sweep(stack, opened, lessons.every, lessons.loss, Selecting(every))
    used = mosaics(opened, parts.planned, {}, several) if several else opened
    mix, kept = _place(parts, stack, used, fit, lessons, limits, method.clip > 0)
    late = frozenset(stack.stages[-1].tensors) if stack.stages[-1].borrowed else frozenset()
    course = Course(lessons.steps, method.schedule == "cosine", method.clip, late)

    def sweep(batches: Sequence[Batch], loss: Loss, learns: bool, opening: bool) -> SweepPlan:
        hooks = Composing(mix, learns=learns, opening=opening, bare=opening)
        return fit.sweep(stack, used, batches, loss, hooks, kept)

    opening = sweep(lessons.widest, lessons.loss, True, True)
    steady = None
    if lessons.steps > 1:
        if set(mix.places.values()) == {"pinned"}:
            hooks = Composing(mix, learns=True, opening=False, bare=False)
            steady = fit.resident(stack, used, lessons.widest, lessons.loss, hooks, kept)
        steady = steady or sweep(lessons.widest, lessons.loss, True, False)
    tried, first = list(lessons.trials), 0 in lessons.trials
    bare = sweep(lessons.validation, lessons.trial, False, True) if first else None
    trial = sweep(lessons.validation, lessons.trial, False, False) if tried else None
    looks = len(lessons.looks)
    bare_look = sweep(lessons.every, Look(), False, True) if looks else None
    look = sweep(lessons.every, Look(), False, False) if looks > 1 else None
    fit.check()
    found = {"select": select, "bare": bare, "trial": trial, "bare_look": bare_look, "look": look}
    found |= {"opening": opening, "steady": steady}
    counts = {"select": 1, "bare": 1, "trial": len(tried) - first, "bare_look": 1, "look": looks - 1}
    counts |= {"opening": 1, "steady": lessons.steps - 1}
    own = {"lessons": lessons, "mix": mix, "course": course, "kept_bytes": kept, "experts": tuple(experts)}
    values = _whole(plan, found, counts, kept, fit, limits, lessons, parts)
    return ComposePlan(**values, **found, **own, twins=dict(stack.copies), least=several)  # type: ignore[arg-type]


def _sort_out(plan: Plan, stack: Stack, recipe: Recipe) -> _Parts:
    """Every merged tensor's settings; those of the whole run must be the same everywhere.

    Raises:
        RecipeError: they are not, or nothing would learn.
    """
    planned = {tensor.job.name: tensor for tensor in plan.tensors}
    jobs = [tensor.job for tensor in plan.tensors if tensor.job.method == recipe.merge_method]
    settings: dict[str, Any] = {job.name: build(find(job.method), job.parameters) for job in jobs}
    if not any(settings[job.name].learns(job.name, job.shape) for job in jobs):
        raise RecipeError(f"{recipe.where}: blocks names no tensor; give all, weights, or patterns as *mlp*")
    first = next(iter(settings.values()))
    for name, each in settings.items():
        for key in first.common:
            if getattr(each, key) != getattr(first, key):
                raise RecipeError(f"{recipe.where}: {key} is for the whole run; {name!r} has another")
    inside = {name for stage in stack.stages for name in stage.tensors}
    outside = tuple(name for name in settings if name not in inside and name not in stack.copies)
    return _Parts(planned, settings, outside)


def _block(parts: _Parts, name: str) -> Block:
    tensor, method = parts.planned[name], parts.settings[name]
    composer: Any = tensor.method
    learns = method.learns(name, tensor.job.shape)
    return Block(name, composer.coefficients, method.lr, method.weight_decay, learns)


def _mix(parts: _Parts, stack: Stack, places: Mapping[str, Place], experts: int) -> Mix:
    names = [name for stage in stack.stages for name in stage.tensors]
    blocks = {name: _block(parts, name) for name in names}
    blocks = {name: replace(block, init=block.init[:experts]) for name, block in blocks.items()}
    composers: dict[str, Any] = {name: parts.planned[name].method for name in names}
    methods = {name: replace(composer, coefficients=blocks[name].init) for name, composer in composers.items()}
    shapes = {name: parts.planned[name].job.shape for name in names}
    return Mix(methods, shapes, blocks, places, experts)


def _place(
    parts: _Parts, stack: Stack, used: Sequence[Checkpoint], fit: Fit, lessons: Lessons, limits: Limits, late: bool
) -> tuple[Mix, int]:
    """Where the weights of every stage stay, in what a sweep that keeps nothing leaves of the budget; and the bytes."""
    experts = len(used) - 1
    nowhere: dict[str, Place] = dict.fromkeys(parts.settings, "twice")
    mix = _mix(parts, stack, nowhere, experts)
    numbers = COPIES * 8 * sum(len(block.init) * len(block.init[0]) for block in mix.blocks.values())
    hooks = Composing(mix, learns=True, opening=False, bare=False)
    alone = fit.sweep(stack, list(used), lessons.widest, lessons.loss, hooks, numbers)
    room = limits.ram - alone.ram_peak_bytes - fit.here - numbers - SPARE
    tied = bool(stack.stages[-1].borrowed)
    stages = [stage for stage in stack.stages if stage.tensors]
    sizes = []
    for stage in stages:
        inputs = learned = composed = 0
        for name in stage.tensors:
            read = [used[0], *(e for at, e in enumerate(used[1:]) if not mix.rests(name, at))]
            size = sum(each.tensors[name].nbytes for each in read)
            inputs += size
            learned += size if mix.blocks[name].learns else 0
            composed += math.prod(mix.shapes[name]) * stack.dtype.itemsize
        sizes.append(Sizes(inputs, learned, composed))
    waits = [late or (tied and stage is stages[-1]) for stage in stages]
    chosen = choose_places(sizes, max(room, 0), waits)
    places = {**nowhere, **{n: place for stage, place in zip(stages, chosen, strict=True) for n in stage.tensors}}
    held = sum(size.held(place) for size, place in zip(sizes, chosen, strict=True))
    return replace(mix, places=places), held + numbers


def _whole(
    plan: Plan,
    sweeps: Mapping[str, SweepPlan | None],
    counts: Mapping[str, int],
    kept: int,
    fit: Fit,
    limits: Limits,
    lessons: Lessons,
    parts: _Parts,
) -> dict[str, Any]:
    """The fields of a Plan, all parts together."""
    there = [(sweep, counts[name]) for name, sweep in sweeps.items() if sweep is not None]
    beside = {id(sweeps["select"]): 0}
    peaks = [sweep.ram_peak_bytes + fit.here + beside.get(id(sweep), kept) for sweep, _ in there]
    work = {
        "plan": plan.digest,
        "samples": lessons.digest,
        "computed_on": "cpu" if limits.device == "cpu" else "cuda",
    }
    values = {item.name: getattr(plan, item.name) for item in fields(Plan)}
    names = ", ".join([*parts.outside[:SHOWN], *(["..."] if len(parts.outside) > SHOWN else [])])
    told = f"{len(parts.outside)} tensor{'' if len(parts.outside) == 1 else 's'} that no layer runs with ({names})"
    return values | {
        "digest": hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest(),
        "device": limits.device,
        "kernels": {name: kernel.describe(name, limits.device) for name in ("multi_dot", "add_deltas")},
        "ram_budget_bytes": limits.ram,
        "ram_peak_bytes": max(plan.ram_peak_bytes + RING, *peaks),
        "vram_budget_bytes": limits.vram,
        "vram_peak_bytes": max((s.vram_peak_bytes + LAUNCHES_THERE for s, _ in there if limits.on_gpu), default=0),
        "read_bytes": plan.read_bytes + sum(sweep.read_bytes * count for sweep, count in there),
        "passes": plan.passes + sum(_passes(sweep) * count for sweep, count in there),
        "steps": plan.steps + sum(len(sweep.visits) * count for sweep, count in there),
        "out_bytes": max(plan.out_bytes, RING),
        "warnings": (*plan.warnings, *((f"{told}: they keep their init",) if parts.outside else ())),
    }


def _passes(sweep: SweepPlan) -> int:
    """How often the checkpoints are read in a sweep."""
    hooks: Any = sweep.hooks
    return sweep.passes if "twice" in hooks.mix.places.values() or hooks.opening else min(1, sweep.read_bytes)
