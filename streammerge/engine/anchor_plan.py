"""Plans of methods that work with anchors: units one after the other, and everything else as an ordinary merge.

    start      the merge that the recipe names, tile by tile, of all that is in no unit
    unit       a visit for each expert: the base's weights and that expert's, whose anchors are made and kept
               one more: the base's weights, and the start's from its own merge in fp32; all anchors; the result
               is rounded once and written

What a visit holds beside the weights that were loaded is not a formula: one step of it runs on meta, where all that it
makes is counted (layers_measure.py). The next visit's weights are read meanwhile if they fit.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from streammerge import kernel
from streammerge.budget import MIB, human
from streammerge.engine.anchor_files import AnchorsFile, Given, key
from streammerge.engine.anchor_inputs import Calibration, moved_bytes, plan_inputs, tried_shapes
from streammerge.engine.anchor_work import PIECES, Needs, Work, needs_of
from streammerge.engine.layers_hooks import Hooks
from streammerge.engine.layers_order import Sources, Visit
from streammerge.engine.layers_plan import Limits as SweepLimits
from streammerge.engine.layers_plan import SweepPlan, fit_visits
from streammerge.engine.sweep_fit import RING, Fit
from streammerge.engine.units import Example, anchor_shape, bytes_of, default_unit, find_parts, with_stages
from streammerge.errors import BudgetTooSmall, CheckpointError, RecipeError
from streammerge.method import build, find
from streammerge.models.stack import Stack
from streammerge.planner.dialect import Resolution
from streammerge.planner.jobs import Job
from streammerge.planner.plan import Limits, Plan, make_plan
from streammerge.planner.recipe import Recipe
from streammerge.planner.steps import PlannedTensor
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.ring import round_up
from streammerge.store.writer import Shard

HEAP = 2 * PIECES  # freed memory that is kept between steps, and what lies scattered between pieces in use
STATES = 4  # anchors, the best of them, two moments
FAR = 4  # times the memory that is allowed
Examples = Callable[[int], Example]  # of so many tokens


@dataclass(frozen=True)
class AnchorPlan(Plan):
    """A plan of a start and of units; `tensors` are all, `rest` those of no unit."""

    works: tuple[Work, ...] = ()
    stack: Stack | None = None
    sweep: SweepPlan | None = None  # over units instead of layers
    start: Plan | None = None  # of the units' tensors, in fp32; None: the base's
    rest: tuple[PlannedTensor, ...] = ()
    planned: Mapping[str, PlannedTensor] = field(default_factory=dict)
    anchors: AnchorsFile | None = None
    given: Mapping[str, Given] = field(default_factory=dict)
    save: Path | None = None
    units: tuple[str, ...] = ()  # the names of all units of the model
    calibration: Calibration | None = None
    forward: SweepPlan | None = None  # finds what units are given in reality
    experts: int = 0

    def as_dict(self) -> dict[str, Any]:
        both = {"inputs": self.forward, "units": self.sweep}
        sweeps = {name: each.as_dict() for name, each in both.items() if each is not None}
        return {**super().as_dict(), "sweeps": sweeps, "units": len(self.works), "units_of": len(self.units)}

    @property
    def shards(self) -> tuple[Shard, ...]:
        return self.layout.shards + ((self.anchors.shard,) if self.anchors else ())

    @property
    def members(self) -> dict[int, list[str]]:
        """The shards, all of which are written in any order, with the names of their tensors."""
        found: dict[int, list[str]] = {number: [] for number in range(len(self.layout.shards))}
        for place in self.layout.places:
            found[place.shard].append(place.job.name)
        if self.anchors is not None:
            found[self.anchors.number] = list(self.anchors.begins)
        return found


def plan_anchors(
    recipe: Recipe,
    resolution: Resolution,
    start: Resolution,
    checkpoints: Mapping[str, Checkpoint],
    limits: Limits,
    stack: Stack,
    examples: Examples,
    given: Mapping[str, Given],
    save: Path | None,
    calibration: Calibration | None = None,
) -> AnchorPlan:
    """The plan of a recipe; `start` is its start's resolution, `given` are anchors that are there.

    Raises:
        BudgetTooSmall: a unit or the start does not fit.
        RecipeError, CheckpointError: the request or an input is wrong.
    """
    assert recipe.base_model is not None
    experts = [source.model for source in recipe.models if source.model != recipe.base_model]
    opened = [checkpoints[model] for model in (recipe.base_model, *experts)]
    every = _works(recipe, resolution, stack, examples, len(experts), calibration)
    first, last = recipe.extra.get("units", (0, len(every) - 1))
    if last >= len(every):
        raise RecipeError(f"{recipe.where}: units: the model has units 0-{len(every) - 1}, {last} is none of them")
    works = every[first : last + 1]
    _check_given(given, works, len(experts))
    kernel.describe("cast", "cpu")
    within = replace(limits, device="cpu", vram=0, ram=max(limits.ram - RING, 1))
    plan = make_plan(recipe, start, checkpoints, within)
    planned = {tensor.job.name: tensor for tensor in plan.tensors}
    inside = {name for work in works for name in work.part.stage.tensors}
    _check_counts(works, limits)
    needs = needs_of(stack, works)
    begun = _start(recipe, start, checkpoints, within, works, needs) if recipe.extra["start"] != "base" else None
    fit = Fit(limits)
    sweeps = [] if calibration is None else [plan_inputs(fit, stack, opened[0], works, calibration)]
    constants = sum(inputs.constants_bytes for inputs, _ in sweeps)
    sweeps.append(_sweep(stack, opened, works, needs, begun, limits, fit, constants))
    fit.check()
    shapes = {key(work.number, e): work.shape for work in works for e in range(len(experts))}
    rest = tuple(tensor for tensor in plan.tensors if tensor.job.name not in inside)
    own = {
        "works": tuple(works),
        "stack": stack,
        "sweep": sweeps[-1][0],
        "start": begun,
        "rest": rest,
        "planned": planned,
        "anchors": AnchorsFile.of(len(plan.layout.shards), shapes),
        "given": given,
        "save": save,
        "units": tuple(work.part.name for work in every),
        "experts": len(experts),
        "calibration": calibration,
        "forward": sweeps[0][0] if calibration is not None else None,
    }
    return AnchorPlan(**_whole(plan, begun, sweeps, rest, given, limits, own), **own)  # type: ignore[arg-type]


def start_method(recipe: Recipe) -> str:
    """The name of what makes the start."""
    start: Any = recipe.extra["start"]
    return str(start if start == "base" else start["merge_method"])


def _works(
    recipe: Recipe,
    resolution: Resolution,
    stack: Stack,
    examples: Examples,
    experts: int,
    calibration: Calibration | None,
) -> list[Work]:
    """All units of the model, each with its settings: those of its first tensor."""
    jobs = {job.name: job for job in resolution.jobs}
    kinds = {job.parameters["unit"] for job in resolution.jobs if job.method == recipe.merge_method}
    if len(kinds) > 1:
        raise RecipeError(f"{recipe.where}: unit is for the whole model; give one")
    kind = next(iter(kinds), "auto")
    parts = find_parts(stack, default_unit(stack) if kind == "auto" else kind)
    found = []
    for part in parts:
        job = jobs[part.stage.tensors[0]]
        if job.method != recipe.merge_method:
            raise CheckpointError(f"tensor {job.name!r} is in a unit and cannot be merged: it is {job.dtype}")
        settings: Any = build(find(job.method), job.parameters)
        settings = settings.settled(start_method(recipe))
        if settings.adapt == "closed_form" and not part.linear:
            raise RecipeError(f"{recipe.where}: adapt: closed_form solves linear maps; {part.name} has none")
        example = examples(settings.tokens) if part.whole else None
        shape = anchor_shape(stack, part, settings.anchors, example)
        tried = tried_shapes(calibration, part.whole, settings.rows, shape)
        found.append(Work(part, settings, shape, experts, example, tried))
    return found


def _check_counts(works: Sequence[Work], limits: Limits) -> None:
    """Refuse what is far too much before it is counted, which takes as long as a step has micro-batches."""
    flag, allowed = ("--vram", limits.vram) if limits.on_gpu else ("--ram", limits.ram)
    for work in works:
        least = 4 * math.prod(work.shape) * (1 if work.closed else STATES)
        if least > FAR * allowed:
            raise BudgetTooSmall(
                f"{work.shape[0]:,} anchors of {work.part.name} take {human(least)} while they are made, and "
                f"{human(allowed)} are allowed; give fewer anchors, or {flag} {round_up(least, MIB) // MIB}MiB at least"
            )


def _check_given(given: Mapping[str, Given], works: Sequence[Work], experts: int) -> None:
    for work in works:
        for e in range(experts):
            there = given.get(key(work.number, e))
            if there is not None and there.spec.shape != work.shape:
                raise CheckpointError(
                    f"{there.spec.file}: anchors {there.spec.name} are {list(there.spec.shape)}, {work.part.name} "
                    f"takes {list(work.shape)}; they were made for another unit or model, or by another number: anchors"
                )


def _start(
    recipe: Recipe,
    start: Resolution,
    checkpoints: Mapping[str, Checkpoint],
    within: Limits,
    works: Sequence[Work],
    needs: Sequence[Needs],
) -> Plan:
    """The start's merge of the units' tensors, in fp32, in about the memory that a unit's work needs anyway."""
    names = {name for work in works for name in work.part.stage.tensors}
    jobs = tuple(_widened(job) for job in start.jobs if job.name in names)
    resolution = replace(start, jobs=jobs, shards=None)
    room = max(each.construct for each in needs)
    try:
        alone = make_plan(recipe, resolution, checkpoints, replace(within, ram=1 << 62))
        return make_plan(recipe, resolution, checkpoints, replace(within, ram=alone.held_bytes + room))
    except BudgetTooSmall as error:
        return make_plan(recipe, resolution, checkpoints, replace(within, ram=(error.least or 0) + 8 * MIB))


def _widened(job: Job) -> Job:
    return replace(job, dtype="F32")


def _sweep(
    stack: Stack,
    opened: Sequence[Checkpoint],
    works: Sequence[Work],
    needs: Sequence[Needs],
    start: Plan | None,
    limits: Limits,
    fit: Fit,
    constants: int,
) -> tuple[SweepPlan, int]:
    """Visits and their budget; bytes of the host beside. `constants` are those of real inputs."""
    stages = [replace(work.part.stage, index=at) for at, work in enumerate(works)]
    sources = Sources(with_stages(stack, stages), opened)
    visits: list[Visit] = []
    costs: list[int] = []
    held = 0 if start is None else start.ram_peak_bytes - start.held_bytes
    beside = moved_bytes(works) if limits.on_gpu else 0
    for work, need, stage in zip(works, needs, stages, strict=True):
        loaded = sources.parameters(stage, (), True)
        others = [sources.raw(stage, 1 + e, stage.tensors) for e in range(work.experts)]
        for other in others:
            visits.append(Visit((stage.index,), True, (loaded, other)))
            costs.append(need.construct)
        more = others if work.settings.alphas == "experts" else []
        visits.append(Visit((stage.index,), True, (loaded, *more)))
        begun = held + bytes_of(stage) if start is not None else 0
        costs.append(max(need.adapt, 0 if limits.on_gpu else begun))
        beside = max(beside, begun if limits.on_gpu else 0)
    scratch = max(work.scratch_bytes for work in works)
    here = RING + HEAP + beside
    allowed = SweepLimits(max(limits.ram - here, 1), limits.vram if limits.on_gpu else None, limits.device)
    try:
        return fit_visits(sources, Hooks(), None, tuple(visits), costs, constants, scratch, allowed), here
    except BudgetTooSmall as error:
        device = "--vram" in str(error)
        fit.short("a unit", "--vram" if device else "--ram", (error.least or 0) + (0 if device else here))
    fit.check(", or smaller rows or fewer anchors")
    raise AssertionError("what is short was noted")


def _whole(
    plan: Plan,
    start: Plan | None,
    sweeps: Sequence[tuple[SweepPlan, int]],
    rest: Sequence[PlannedTensor],
    given: Mapping[str, Given],
    limits: Limits,
    own: Mapping[str, Any],
) -> dict[str, Any]:
    """The fields of a Plan, all parts together: they follow each other, so bytes add up and peaks do not.

    `sweeps` come with bytes of the host beside them.
    """
    values = {item.name: getattr(plan, item.name) for item in fields(Plan)}
    tiled = sum(spec.nbytes for tensor in rest for spec in tensor.inputs)
    work = {
        "plan": plan.digest,
        "start": None if start is None else start.digest,
        "given": [[name, _identity(each)] for name, each in given.items()],
        "computed_on": "cpu" if limits.device == "cpu" else "cuda",
        "calibration": None if own["calibration"] is None else own["calibration"].digest,
    }
    return values | {
        "digest": hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest(),
        "device": limits.device,
        "ram_budget_bytes": limits.ram,
        "ram_peak_bytes": max(plan.ram_peak_bytes + RING, *(each.ram_peak_bytes + beside for each, beside in sweeps)),
        "vram_budget_bytes": limits.vram,
        "vram_peak_bytes": max(each.vram_peak_bytes for each, _ in sweeps),
        "read_bytes": tiled + sum(each.read_bytes for each, _ in sweeps) + (0 if start is None else start.read_bytes),
        "write_bytes": plan.write_bytes + own["anchors"].shard.size,
        "passes": len(sweeps) + (start is not None),
        "steps": sum(len(each.visits) for each, _ in sweeps),
        "out_bytes": max(plan.out_bytes, RING),
    }


def _identity(given: Given) -> list[Any]:
    """Names a file as it is now."""
    found = Path(given.spec.file).stat()
    return [given.spec.begin, list(given.spec.shape), found.st_size, found.st_mtime_ns]
