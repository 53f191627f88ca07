"""Methods that run on layers: their samples from files, or batches and a loss from the caller."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge import samples
from streammerge.api.files import batch_digest, find_file, loss_name
from streammerge.api.merging import Token
from streammerge.api.merging import merge as run
from streammerge.api.planning import Request, read_limits, read_request
from streammerge.engine.findings import Progress
from streammerge.engine.layers_loss import CrossEntropy
from streammerge.engine.sweep_jobs import count_alphas, needs_samples
from streammerge.engine.sweeping import Data, open_stack, plan_layers
from streammerge.errors import RecipeError
from streammerge.planner.plan import Limits, Plan, make_plan

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.models.stack import Stack

WORDS = 1 << 15  # of the vocabulary whose logits are there at a time


def plan_request(request: Request, limits: Limits) -> Plan:
    """The plan of a recipe with samples in files, or with votes that are there already.

    Raises:
        RecipeError: samples are missing or wrong.
    """
    recipe, several = request.recipe, count_alphas(request.resolution) > 1
    if not needs_samples(request.resolution) and not several:
        within = replace(limits, device="cpu", vram=0)  # disks are slower than either
        return make_plan(recipe, request.resolution, request.checkpoints, within)
    data = _read(request, several)
    example = [*data.train, *data.validation][0]
    assert recipe.base_model is not None
    stack = open_stack(recipe, request.checkpoints[recipe.base_model], example)
    return plan_layers(recipe, request.resolution, request.checkpoints, limits, stack, data, _save_votes(request))


def _save_votes(request: Request) -> Path | None:
    name = request.recipe.extra.get("save_votes")
    return None if name is None else Path(name).expanduser().absolute()


def _read(request: Request, several: bool) -> Data:
    """The samples that a recipe names."""
    recipe, given = request.recipe, request.recipe.extra.get("data") or {}
    files = (
        [find_file(name, request.near) for name in given.get("train", ())] if needs_samples(request.resolution) else []
    )
    if not files and needs_samples(request.resolution):
        raise RecipeError(f"{recipe.where}: {recipe.merge_method} needs data.train: a file of samples, or votes")
    if several and not given.get("validation"):
        raise RecipeError(f"{recipe.where}: alpha is a list; give data.validation to choose one of it")
    assert recipe.base_model is not None
    target = request.checkpoints[recipe.base_model]
    tokenizer, words = samples.Tokenizer(target.path), (target.config or {}).get("vocab_size")
    options = {"max_length": given.get("max_length"), "vocabulary": words if isinstance(words, int) else None}
    train = [samples.read_samples(file, tokenizer, **options) for file in files]
    tried = samples.read_samples(find_file(given["validation"], request.near), tokenizer, **options) if several else []
    return Data(
        samples.batches([sample for task in train for sample in task]),
        [number for number, task in enumerate(train) for _ in task],
        samples.batches(tried),
        CrossEntropy(chunk=WORDS),
        " ".join(map(samples.digest, [*train, tried])),
    )


def gradfix(
    stack: Stack,
    batches: Sequence[Mapping[str, Any]],
    loss: Callable[[Any, Mapping[str, Any]], Tensor],
    *,
    target: str | Path,
    source_base: str | Path,
    models: Sequence[str | Path],
    out: str | Path,
    validation: Sequence[Mapping[str, Any]] = (),
    tasks: Sequence[int] | None = None,
    parameters: Mapping[str, Any] | None = None,
    merge: str = "mean",
    order: str = "merge_then_mask",
    save_votes: str | Path | None = None,
    resume: bool = True,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    cancel: Token | None = None,
    **options: Any,
) -> dict[str, Any]:
    """GradFix on any network that is a chain of layers, with the caller's own loss: encoders, vision, ...

        shapes = {each["name"]: each["shape"] for each in sm.inspect("b")["entries"]}
        stack = sm.Stack.from_transformers("b", shapes, batches[0])
        sm.gradfix(stack, batches, loss, target="b", source_base="a", models=["a-tuned"], out="out")

    Args:
        stack: the target as a chain; what it computes in is its own dtype.
        batches: each is one vote: what the model's forward takes by name, and what the loss takes.
        loss: of a model's output and its batch, a scalar.
        target, source_base, models: checkpoints, as a recipe names them.
        out: the folder to make, as for `merge`.
        validation: batches to choose an alpha with, where `parameters["alpha"]` is a list.
        tasks: per batch the number of its task, from 0 on and rising, for several models with votes of their own.
        parameters: alpha, vote, mode, unmatched.
        save_votes: a file for the signs, two bits each.
        resume, overwrite, progress, cancel: as for `merge`. Unfinished work is taken up if recipe, inputs, batches and
            the loss's name are the same; what the loss does is not looked at.
        options: ram, vram, device, threads, shard_size, seed, as for `plan`.

    Returns:
        The report; "gradfix" has what was kept, per tensor and in total.
    """
    counted = [0] * len(batches) if tasks is None else list(tasks)
    if len(counted) != len(batches) or sorted(counted) != counted or set(counted) != set(range(len(set(counted)))):
        raise RecipeError("tasks: give the number of every batch's task, from 0 on and rising")
    recipe = {
        "merge_method": "gradfix",
        "base_model": str(target),
        "source_base": str(source_base),
        "models": [{"model": str(model)} for model in models],
        "parameters": dict(parameters or {}),
        "merge": merge,
        "order": order,
        "data": {"train": ["batches"] * len(set(counted))},
    }
    if save_votes is not None:
        recipe["save_votes"] = str(save_votes)
    request = read_request(recipe)
    if count_alphas(request.resolution) > 1 and not validation:
        raise RecipeError("alpha is a list; give validation batches to choose one of it")
    parts = [batch_digest(batches), batch_digest(validation), str(counted), loss_name(loss), str(stack.dtype)]
    data = Data(batches, counted, validation, loss, " ".join(parts))
    limits = read_limits(**options)
    plan = plan_layers(
        request.recipe, request.resolution, request.checkpoints, limits, stack, data, _save_votes(request)
    )
    return run(plan, out, resume=resume, overwrite=overwrite, progress=progress, cancel=cancel)
