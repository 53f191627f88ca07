"""Learned coefficients: from a recipe with samples in files, or with batches and a loss of the caller's."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.api.files import batch_digest, find_file, loss_name
from streammerge.api.lessons import METHOD, Batches, Rows, settings_of, trials_of
from streammerge.api.merging import Token
from streammerge.api.merging import merge as run
from streammerge.api.planning import Request, read_limits, read_request
from streammerge.engine.composing_plan import ComposePlan, plan_composing
from streammerge.engine.findings import Progress
from streammerge.engine.sweeping import open_stack
from streammerge.errors import RecipeError
from streammerge.planner import coefficients
from streammerge.planner.jobs import COPY
from streammerge.planner.plan import Limits, Plan, make_plan

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.models.stack import Stack

DEAD_ZONE = (
    "compute: bfloat16 rounds the composed weights to 16 bits: of task vectors of 0.3 % of the weights with a "
    "coefficient of 0.1 about 16 % survives, of 3 % about 93 %; float32 keeps all"
)


def plan_request(request: Request, limits: Limits) -> Plan:
    """The plan of a recipe that learns coefficients, or that has them in a file.

    Raises:
        RecipeError: samples or coefficients are missing or wrong.
    """
    recipe = request.recipe
    if recipe.slices:
        raise RecipeError(f"{recipe.where}: {METHOD} takes whole models; use 'models'")
    if "coefficients" in recipe.extra:
        path = find_file(recipe.extra["coefficients"], request.near)
        found = coefficients.read(path)
        try:
            settled = found.settle(request.resolution, METHOD)
        except RecipeError as error:
            raise RecipeError(f"{path}: {error}") from None
        plan = make_plan(recipe, settled, request.checkpoints, replace(limits, device="cpu", vram=0))
        values = {item.name: getattr(plan, item.name) for item in fields(Plan)}
        return ComposePlan(**{**values, "digest": _joined(plan.digest, found.digest)}, given=found)
    lessons = Rows.read(request, limits.seed)
    assert recipe.base_model is not None
    stack = open_stack(recipe, request.checkpoints[recipe.base_model], lessons.widest[0])
    return _plan(request, limits, stack, lessons)


def _plan(request: Request, limits: Limits, stack: Stack, lessons: Any) -> Plan:
    """The plan of a recipe that learns."""
    seeded = tuple(
        job if job.method == COPY else replace(job, parameters=job.parameters | _origin(job.name, stack, limits.seed))
        for job in request.resolution.jobs
    )
    resolution = replace(request.resolution, jobs=seeded)
    plan = plan_composing(request.recipe, resolution, request.checkpoints, limits, stack, lessons)
    if str(stack.dtype) not in ("torch.float32", "torch.float64"):
        plan = replace(plan, warnings=(*plan.warnings, DEAD_ZONE))
    return plan


def _origin(name: str, stack: Stack, seed: int) -> dict[str, Any]:
    """The groups of a tensor that is stored twice are those of the first."""
    import zlib

    first = stack.copies.get(name)
    return {"seed": seed} if first is None else {"seed": seed, "origin": zlib.crc32(first.encode())}


def _joined(*digests: str) -> str:
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def atlas(
    stack: Stack,
    batches: Sequence[Mapping[str, Any]],
    loss: Callable[[Any, Mapping[str, Any]], Tensor],
    *,
    base_model: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    validation: Sequence[Mapping[str, Any]] = (),
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Token | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Learned coefficients on any network that is a chain of layers, for the caller's own loss.

        shapes = {each["name"]: each["shape"] for each in sm.inspect("base")["entries"]}
        stack = sm.Stack.from_transformers("base", shapes, batches[0])
        sm.atlas(stack, batches, loss, base_model="base", models=["a", "b"], out="out", parameters={"batch": 4})

    Args:
        stack: the base as a chain; what it computes in is its own dtype.
        batches: what the model's forward takes by name, and what the loss takes. They run one after the other; a step
            takes `parameters["batch"]` of them (all: every step sees all), in their order and over again.
        loss: of a model's output and its batch, a scalar. A step goes down the sum over its batches.
        base_model, models: checkpoints, as a recipe names them.
        out: the folder to make, as for `merge`; coefficients.json in it has what was learned.
        validation: batches whose summed loss chooses among the coefficients of the epochs.
        parameters: steps, epochs, batch, lr, weight_decay, schedule, clip, partitions, blocks, budget, init.
        dtype: of the output, as in a recipe.
        resume, overwrite, progress, cancel: as for `merge`. Unfinished work is taken up if recipe, inputs, batches and
            the loss's name are the same; what the loss does is not looked at.
        options: ram, vram, device, threads, shard_size, seed, as for `plan`.

    Returns:
        The report; "atlas" has losses and coefficients.
    """
    given = dict(parameters or {})
    if "objective" in given:
        raise RecipeError("objective: the loss is the objective of a call; leave it out")
    if not batches:
        raise RecipeError("batches: give one at least")
    recipe: dict[str, Any] = {
        "merge_method": METHOD,
        "base_model": str(base_model),
        "models": [{"model": str(model)} for model in models],
        "parameters": {"batch": "all", **given},
        "data": {"train": ["batches"]},
        **({} if dtype is None else {"dtype": dtype}),
    }
    request = read_request(recipe)
    method = settings_of(request)
    each = len(batches) if method.batch == "all" else min(method.batch, len(batches))
    epoch = -(-len(batches) // each)
    steps = method.steps or method.epochs * epoch
    parts = [batch_digest(batches), batch_digest(validation), loss_name(loss), str(stack.dtype)]
    trials = trials_of(steps, epoch) if validation else ()
    lessons = Batches(batches, validation, steps, each, loss, trials, " ".join(parts))
    limits = read_limits(**options)
    plan = _plan(request, limits, stack, lessons)
    return run(plan, out, resume=resume, overwrite=overwrite, progress=progress, cancel=cancel)
