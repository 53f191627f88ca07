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
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from streammerge.budget import MIB, human
from streammerge.engine.layers_plan import Limits as SweepLimits
from streammerge.engine.layers_plan import Loss, SweepPlan, plan_sweep
from streammerge.engine.places import STATE, WORK
from streammerge.engine.trying import Trying
from streammerge.engine.voting import PIECE, Motion, Voter, VotesFile, Voting
from streammerge.errors import BudgetTooSmall, CheckpointError, RecipeError
from streammerge.formats.dtypes import SIGNS
from streammerge.formats.header import TensorSpec, build_header
from streammerge.method import build, find
from streammerge.models.stack import Batch, Stack
from streammerge.planner.jobs import COPY, Job, Resolution
from streammerge.planner.plan import Limits, Plan, make_plan
from streammerge.planner.recipe import Recipe
from streammerge.planner.steps import PlannedTensor
from streammerge.planner.transport import FORMAT, packed, sets_of
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.ring import PAGE, round_up
from streammerge.store.writer import Shard

VOTES = "votes.safetensors"  # in the unfinished output folder
RING = round_up(4 * (PIECE + 2 * PAGE))  # bytes in which results wait for the disk
SPARE = 64 * MIB  # by which a process may grow between two plans
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
        return {**super().as_dict(), "sweeps": found, **samples}

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


@dataclass(frozen=True)
class _Jobs:
    """Every tensor's job, told apart by what a sweep does for it."""

    jobs: tuple[Job, ...]
    voters: Mapping[str, Voter]  # of every tensor that is masked
    voted: tuple[str, ...]  # those of them whose signs a sweep finds
    warnings: tuple[str, ...]

    @property
    def alphas(self) -> tuple[float, ...]:
        """Those to choose from; tensors with one of their own have no say.

        Raises:
            RecipeError: tensors have lists of different lengths.
        """
        lists = {voter.alphas for voter in self.voters.values()}
        longest = max(lists, key=len, default=(0.0,))
        if any(len(each) not in (1, len(longest)) for each in lists):
            raise RecipeError("alpha has lists of different lengths; give one list, or equally long ones")
        return longest


def needs_samples(resolution: Resolution) -> bool:
    """Whether some tensor has no signs yet, so that there must be samples to vote."""
    return any(_is_open(job) for job in resolution.jobs)


def _is_open(job: Job) -> bool:
    """Whether the signs of a tensor are still to be found."""
    if job.method == COPY or job.parameters.get("whole") or job.parameters["mode"] == "random":
        return False
    return not any(spec.dtype == SIGNS for spec in job.experts)


def count_alphas(resolution: Resolution) -> int:
    """How many alphas there are to choose from."""
    found = [job.parameters["alpha"] for job in resolution.jobs if job.method != COPY]
    return max((len(each) for each in found if isinstance(each, tuple)), default=1)


def _sorted_out(resolution: Resolution, stack: Stack) -> _Jobs:
    """What no layer runs with is copied, or passes."""
    inside = {name for stage in stack.stages for name in stage.tensors}
    known = {job.name for job in resolution.jobs if job.method != COPY}
    jobs: list[Job] = []
    voters: dict[str, Voter] = {}
    voted: list[str] = []
    outside: list[str] = []
    for job in resolution.jobs:
        if job.method != COPY and _is_open(job):
            if job.name in inside or stack.copies.get(job.name) in known:
                voted.append(job.name)
            else:
                outside.append(job.name)
                job = _unmatched(job)
        if job.method != COPY:
            voters[job.name] = build(find(job.method), job.parameters)  # type: ignore[assignment]
        jobs.append(job)
    told = f"{len(outside)} tensors that no layer runs with ({', '.join(outside[:3])}{', ...' * (len(outside) > 3)})"
    return _Jobs(tuple(jobs), voters, tuple(voted), (told,) if outside else ())


def _unmatched(job: Job) -> Job:
    assert job.base is not None
    if job.parameters["unmatched"] == "pass":
        return replace(job, parameters=job.parameters | {"whole": True})
    return Job(job.name, None, (job.base,), {}, COPY, job.dtype, job.shape)


def _votes_file(jobs: _Jobs, target: Checkpoint) -> tuple[bytes, dict[str, TensorSpec], int]:
    """Header of a file of votes, the place of each tensor in it, and its size."""
    rows = [
        (job.name, "U8", (job.parameters["voters"], packed(job.base.numel)))
        for job in jobs.jobs
        if job.name in set(jobs.voted) and job.base is not None
    ]
    header = build_header(rows, {**FORMAT, "target": target.fingerprint()})
    found, at = {}, len(header)
    for name, dtype, shape in rows:
        found[name] = TensorSpec(name, dtype, shape, "", at, at + shape[0] * shape[1])
        at += shape[0] * shape[1]
    return header, found, at


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
    jobs = _sorted_out(resolution, stack)
    alphas = jobs.alphas
    header, signs, size = _votes_file(jobs, target)
    kept = bool(jobs.voted) and (len(alphas) > 1 or save_votes is not None)
    made = jobs.jobs
    if len(alphas) > 1:
        made = tuple(_signed(job, signs) for job in made)
    fit = _Fit(limits)
    plan = fit.tiled(recipe, replace(resolution, jobs=made), checkpoints)
    planned = {tensor.job.name: tensor for tensor in plan.tensors}
    begins = {name: spec.begin for name, spec in signs.items()}
    votes = VotesFile(len(plan.layout.shards), Shard(VOTES, header, size), begins) if kept else None
    twins: dict[str, list[str]] = {}
    for copy, first in stack.copies.items():
        if copy in set(jobs.voted):
            _check_twin(planned[copy], planned[first])
            twins.setdefault(first, []).append(copy)
    motion = Motion(
        voters={name: jobs.voters[name] for name in jobs.voted if name not in stack.copies},
        planned=planned,
        twins=twins,
        tasks=data.tasks,
        tokens=_tokens(stack, data.train) if limits.on_gpu else 0,
        threads=plan.threads,
        seed=limits.seed,
        write=len(alphas) == 1,
        votes=votes,
        exact=all(spec.dtype in COMPUTE[recipe.extra["compute"]] for spec in target.tensors.values()),
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


class _Fit:
    """Plans the parts of a recipe; those that do not fit are planned all the same, so that the refusal names a budget
    that would do for all of them.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._least = {"--ram": 0, "--vram": 0}
        self._what = ""

    def tiled(self, recipe: Recipe, resolution: Resolution, checkpoints: Mapping[str, Checkpoint]) -> Plan:
        """What is merged as tiles, on the CPU: disks are slower. The ring of results is larger than it would be."""
        within = replace(self._limits, device="cpu", vram=0, ram=max(self._limits.ram - RING, 1))
        try:
            return make_plan(recipe, resolution, checkpoints, within)
        except BudgetTooSmall as error:
            least = error.least or 0
            self._short("this merge", "--ram", least + RING)
            return make_plan(recipe, resolution, checkpoints, replace(within, ram=least + SPARE))

    def sweep(
        self, stack: Stack, checkpoints: list[Checkpoint], batches: Sequence[Batch], loss: Loss, hooks: Any
    ) -> SweepPlan:
        """A sweep within what the ring of results, and what launches need on a GPU, leave of the budget."""
        limits = self._limits
        there = STATE + WORK + PIECE + MIB if limits.on_gpu else 0
        here = RING + (2 * WORK if limits.on_gpu else 0)
        ram, vram = max(limits.ram - here, 1), max(limits.vram - there, 1)
        while True:
            allowed = SweepLimits(ram, vram if limits.on_gpu else None, limits.device)
            try:
                return plan_sweep(stack, checkpoints, batches, loss, hooks, allowed)
            except BudgetTooSmall as error:
                least = error.least or 0
                if "--vram" in str(error):
                    vram = least + SPARE
                    self._short("a sweep over the layers", "--vram", least + there)
                else:
                    ram = least + SPARE
                    self._short("a sweep over the layers", "--ram", least + here)

    def _short(self, what: str, option: str, least: int) -> None:
        if least > self._least[option]:
            self._least[option] = least
            self._what = what

    def check(self) -> None:
        """Refuse what does not fit.

        Raises:
            BudgetTooSmall: some part did not; `least` would do for all.
        """
        for option, limit in (("--ram", self._limits.ram), ("--vram", self._limits.vram)):
            if self._least[option]:
                least = round_up(self._least[option] + MIB, MIB)
                raise BudgetTooSmall(
                    f"{self._what} needs at least {human(least)} and {human(limit)} are allowed; give {option} "
                    f"{least // MIB}MiB or more",
                    least,
                )


def _signed(job: Job, signs: Mapping[str, TensorSpec]) -> Job:
    """A job whose signs will be in the file of votes."""
    if job.name not in signs or job.base is None:
        return job
    return replace(job, experts=(*job.experts, *sets_of(signs[job.name], job.base.numel)))


def _check_twin(copy: PlannedTensor, first: PlannedTensor) -> None:
    if (copy.job.dtype, copy.job.shape) != (first.job.dtype, first.job.shape):
        raise CheckpointError(
            f"tensors {copy.job.name!r} and {first.job.name!r} are one in the model and differ in dtype or shape; "
            "save the target again with transformers"
        )


def _whole_plan(
    plan: Plan,
    data: Data,
    train: SweepPlan | None,
    trial: SweepPlan | None,
    votes: VotesFile | None,
    save_votes: Path | None,
    alphas: tuple[float, ...],
    jobs: _Jobs,
    limits: Limits,
) -> LayerPlan:
    """The parts as one plan: they follow each other, so bytes add up and peaks do not."""
    voted = set(jobs.voted)
    rest = tuple(tensor for tensor in plan.tensors if tensor.job.name not in voted) if len(alphas) == 1 else ()
    sweeps = [sweep for sweep in (train, trial) if sweep is not None]
    tiled = plan.read_bytes if len(alphas) > 1 else sum(spec.nbytes for tensor in rest for spec in tensor.inputs)
    launches = 2 * WORK if limits.on_gpu else 0
    peaks = [plan.ram_peak_bytes + RING, *(sweep.ram_peak_bytes + RING + launches for sweep in sweeps)]
    there = STATE + WORK + PIECE + MIB
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
        "ram_budget_bytes": limits.ram,
        "ram_peak_bytes": max(peaks),
        "vram_budget_bytes": limits.vram,
        "vram_peak_bytes": max((sweep.vram_peak_bytes + there for sweep in sweeps if limits.on_gpu), default=0),
        "read_bytes": tiled + sum(sweep.read_bytes for sweep in sweeps),
        "write_bytes": plan.write_bytes + (votes.shard.size if votes else 0),
        "passes": sum(sweep.passes for sweep in sweeps) + (len(alphas) > 1),
        "steps": sum(len(sweep.visits) for sweep in sweeps) + (plan.steps if len(alphas) > 1 else 0),
        "out_bytes": max(plan.out_bytes, RING),
        "warnings": (*plan.warnings, *jobs.warnings),
    }
    return LayerPlan(
        **values, data=data, train=train, trial=trial, votes=votes, save_votes=save_votes, rest=rest, alphas=alphas
    )
