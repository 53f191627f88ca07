"""Plans of layer methods: what is swept, what is tried, and what is then merged tile by tile.

    train     one forward and one backward pass over the target; signs are voted on. With one alpha each layer's result
              is written on the way back, in any order; with several its signs are, two bits each
    trial     several alphas: one forward pass over all models for the validation loss of each
    merge     several alphas: an ordinary merge of all tensors, with signs from their file and the alpha of least loss

What no layer runs with is copied, or merged by tiles. A sweep is planned by layers_plan.py, merges by the planner;
their peaks do not add up, since they follow each other.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from streammerge import kernel
from streammerge.engine.layers_loss import Loss
from streammerge.engine.layers_plan import SweepPlan
from streammerge.engine.sweep_fit import LAUNCHES_HERE, LAUNCHES_THERE, RING, Fit
from streammerge.engine.sweep_jobs import Jobs, find_twins, signed, sort_out, votes_file
from streammerge.engine.trying import Trying
from streammerge.engine.voting import Motion, VotesFile, Voting
from streammerge.formats.dtypes import SIGNS
from streammerge.models.stack import Batch, Stack
from streammerge.planner.dialect import Resolution
from streammerge.planner.plan import Limits, Plan
from streammerge.planner.recipe import Recipe
from streammerge.planner.steps import PlannedTensor
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.writer import Shard

VOTES = "votes.safetensors"  # in the unfinished output folder
FEW = 50  # samples, up to which many votes tie
COMPUTE = {"float32": ("F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "F64"), "bfloat16": ("BF16", "F8_E4M3", "F8_E5M2")}


@dataclass(frozen=True)
class Data:
    """Samples as batches, each one vote; `digest` names them."""

    train: Sequence[Batch]
    tasks: Sequence[int]
    validation: Sequence[Batch]
    loss: Loss
    digest: str


@dataclass(frozen=True)
class LayerPlan(Plan):
    """A plan whose tensors are made in sweeps over the layers; `tensors` are merged as tiles where that is left."""

    data: Data | None = None
    train: SweepPlan | None = None
    trial: SweepPlan | None = None
    votes: VotesFile | None = None
    save_votes: Path | None = None
    rest: tuple[PlannedTensor, ...] = ()  # what is merged as tiles though there is one alpha
    alphas: tuple[float, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        sweeps = {"train": self.train, "trial": self.trial}
        found = {name: each.as_dict() for name, each in sweeps.items() if each is not None}
        samples = {"samples": len(self.data.train), "validation": len(self.data.validation)} if self.data else {}
        visits = [visit for each in (self.train, self.trial) if each is not None for visit in each.visits]
        largest = max(sum(unit.size for unit in visit.units) for visit in visits)
        return {**super().as_dict(), "step_bytes": largest, "sweeps": found, **samples}

    @property
    def shards(self) -> tuple[Shard, ...]:
        """What is written: the output's, then the file of votes."""
        return self.layout.shards + ((self.votes.shard,) if self.votes else ())

    @property
    def members(self) -> dict[int, list[str]]:
        """The shards that are written in any order, with the names of their tensors."""
        found: dict[int, list[str]] = {}
        if len(self.alphas) == 1:
            found = {number: [] for number in range(len(self.layout.shards))}
            for place in self.layout.places:
                found[place.shard].append(place.job.name)
        if self.votes is not None:
            found[self.votes.number] = list(self.votes.begins)
        return found


def open_stack(recipe: Recipe, target: Checkpoint, example: Batch) -> Stack:
    """The target as a chain of layers, as the recipe wants it computed."""
    import torch

    shapes = {name: spec.shape for name, spec in target.tensors.items()}
    kind, attention = getattr(torch, recipe.extra["compute"]), recipe.extra["attention"]
    return Stack.from_transformers(target.path, shapes, example, dtype=kind, attention=attention)


def plan_layers(
    recipe: Recipe,
    resolution: Resolution,
    checkpoints: Mapping[str, Checkpoint],
    limits: Limits,
    stack: Stack,
    data: Data,
    save_votes: Path | None = None,
) -> LayerPlan:
    """The plan of a recipe whose method runs on layers.

    Raises:
        BudgetTooSmall: a sweep or the merge does not fit; `least` would do.
        RecipeError, CheckpointError: the request or an input is wrong.
    """
    assert recipe.base_model is not None
    models = [source.model for source in recipe.models if source.model != recipe.base_model]
    target, *others = (checkpoints[model] for model in (recipe.base_model, *models, *recipe.beside))
    jobs = sort_out(resolution, stack)
    alphas = jobs.alphas
    header, signs, size = votes_file(jobs, target)
    kept = bool(jobs.voted) and (len(alphas) > 1 or save_votes is not None)
    made = jobs.jobs
    if len(alphas) > 1:
        made = tuple(signed(job, signs) for job in made)
    fit = Fit(limits)
    plan = fit.tiled(recipe, replace(resolution, jobs=made), checkpoints)
    planned = {tensor.job.name: tensor for tensor in plan.tensors}
    begins = {name: spec.begin for name, spec in signs.items()}
    votes = VotesFile(len(plan.layout.shards), Shard(VOTES, header, size), begins) if kept else None
    motion = Motion(
        voters={name: jobs.voters[name] for name in jobs.voted if name not in stack.copies},
        planned=planned,
        twins=find_twins(stack, jobs, planned),
        tasks=data.tasks,
        tokens=_tokens(stack, data.train) if limits.on_gpu else 0,
        threads=plan.threads,
        seed=limits.seed,
        write=len(alphas) == 1,
        votes=votes,
        exact=all(target.tensors[name].dtype in COMPUTE[recipe.extra["compute"]] for name in jobs.voted),
    )
    train = trial = None
    if jobs.voted:
        voting = Voting(motion, len(others), limits.on_gpu)
        train = fit.sweep(stack, [target, *others], data.train, data.loss, voting)
    if len(alphas) > 1:
        specs = {job.name: [spec for spec in job.experts if spec.dtype == SIGNS] for job in made}
        trying = Trying(replace(motion, voters=jobs.voters), len(others), len(data.validation), specs)
        trial = fit.sweep(stack, [target, *others], list(data.validation) * len(alphas), data.loss, trying)
    fit.check()
    return _whole_plan(plan, data, train, trial, votes, save_votes, alphas, jobs, limits)


def _tokens(stack: Stack, batches: Sequence[Batch]) -> int:
    """Positions of all batches, as layers see them."""
    import torch

    found: dict[str, int] = {}
    total = 0
    for batch in batches:
        key = str([(name, value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)])
        if key not in found:
            shape = stack.enter({}, batch).shapes[0, 0].shape
            found[key] = math.prod(shape[:-1])
        total += found[key]
    return total


def _even(tasks: Sequence[int], jobs: Jobs) -> Iterator[str]:
    """What to say of few samples that can tie."""
    if not any(jobs.voters[name].counts for name in jobs.voted):
        return
    for task, count in sorted(Counter(tasks).items()):
        if count % 2 == 0 and count <= FEW:
            which = f" of task {task + 1}" if len(set(tasks)) > 1 else ""
            yield f"{count} samples{which}: an odd number leaves fewer ties, which are dropped"


def _whole_plan(
    plan: Plan,
    data: Data,
    train: SweepPlan | None,
    trial: SweepPlan | None,
    votes: VotesFile | None,
    save_votes: Path | None,
    alphas: tuple[float, ...],
    jobs: Jobs,
    limits: Limits,
) -> LayerPlan:
    """The parts as one plan: they follow each other, so bytes add up and peaks do not."""
    voted = set(jobs.voted)
    rest = tuple(tensor for tensor in plan.tensors if tensor.job.name not in voted) if len(alphas) == 1 else ()
    sweeps = [sweep for sweep in (train, trial) if sweep is not None]
    tiled = plan.read_bytes if len(alphas) > 1 else sum(spec.nbytes for tensor in rest for spec in tensor.inputs)
    launches = LAUNCHES_HERE if limits.on_gpu else 0
    peaks = [plan.ram_peak_bytes + RING, *(sweep.ram_peak_bytes + RING + launches for sweep in sweeps)]
    there = [sweep.vram_peak_bytes + LAUNCHES_THERE for sweep in sweeps if limits.on_gpu]
    panels = ["vote_gemm"] if limits.on_gpu and train is not None else []
    work = {
        "plan": plan.digest,
        "samples": data.digest,
        "computed_on": "cpu" if limits.device == "cpu" else "cuda",
        "votes": votes is not None,
    }
    values = {item.name: getattr(plan, item.name) for item in fields(Plan)}
    values |= {
        "digest": hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest(),
        "device": limits.device,
        "kernels": {name: kernel.describe(name, limits.device) for name in (*plan.kernels, *panels)},
        "ram_budget_bytes": limits.ram,
        "ram_peak_bytes": max(peaks),
        "vram_budget_bytes": limits.vram,
        "vram_peak_bytes": max(there, default=0),
        "read_bytes": tiled + sum(sweep.read_bytes for sweep in sweeps),
        "write_bytes": plan.write_bytes + (votes.shard.size if votes else 0),
        "passes": sum(sweep.passes for sweep in sweeps) + (len(alphas) > 1),
        "steps": sum(len(sweep.visits) for sweep in sweeps) + (plan.steps if len(alphas) > 1 else 0),
        "out_bytes": max(plan.out_bytes, RING),
        "warnings": (*plan.warnings, *jobs.warnings, *_even(data.tasks, jobs)),
    }
    return LayerPlan(
        **values, data=data, train=train, trial=trial, votes=votes, save_votes=save_votes, rest=rest, alphas=alphas
    )
