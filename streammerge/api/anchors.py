"""Methods that work with anchors: their start, their units, anchors that are there already, and samples beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streammerge import method as methods
from streammerge import samples
from streammerge.api.files import find_file
from streammerge.api.planning import Request
from streammerge.engine.anchor_files import read_folders
from streammerge.engine.anchor_inputs import Calibration
from streammerge.engine.anchor_plan import AnchorPlan, plan_anchors
from streammerge.engine.units import Example
from streammerge.errors import RecipeError
from streammerge.models.stack import Stack
from streammerge.planner.dialect import resolve
from streammerge.planner.plan import Limits
from streammerge.planner.starting import start_of

METHOD = "fda"


def plan_request(request: Request, limits: Limits) -> AnchorPlan:
    """The plan of a recipe.

    Raises:
        RecipeError, CheckpointError: the request or an input is wrong.
        BudgetTooSmall: it does not fit; `least` would do.
    """
    import torch

    recipe = request.recipe
    if recipe.slices:
        raise RecipeError(f"{recipe.where}: {METHOD} takes whole models; use 'models'")
    assert recipe.base_model is not None
    base = request.checkpoints[recipe.base_model]
    begun = start_of(recipe)
    start = resolve(begun, {name: request.checkpoints[name] for name in begun.references}, methods.find)
    shapes = {name: spec.shape for name, spec in base.tensors.items()}
    calibration = _calibration(request)
    example = None if calibration is None else calibration.batches[0]
    stack = Stack.from_transformers(base.path, shapes, example, dtype=torch.float32, attention="eager")
    config: Any = getattr(stack.module, "config", None)
    given = read_folders([find_file(name, request.near) for name in recipe.extra.get("anchors_from", ())])
    save = recipe.extra.get("save_anchors")
    return plan_anchors(
        recipe,
        request.resolution,
        start,
        request.checkpoints,
        limits,
        stack,
        lambda tokens: Example(config, tokens),
        given,
        None if save is None else Path(save).expanduser().absolute(),
        calibration,
    )


def _calibration(request: Request) -> Calibration | None:
    """The samples that decide when to stop, if these are not held-out anchors."""
    recipe = request.recipe
    jobs = [job for job in request.resolution.jobs if job.method == METHOD]
    settings: list[Any] = [methods.build(methods.find(METHOD), job.parameters) for job in jobs]
    found = {each.files: None for each in settings}
    names = next((files for files in found if files), None)
    if names is None:
        return None
    if len(found) > 1:
        raise RecipeError(f"{recipe.where}: early_stop: samples are for the whole model; give them without a filter")
    experts = [source.model for source in recipe.models if source.model != recipe.base_model]
    if len(names) not in (1, len(experts)):
        raise RecipeError(
            f"{recipe.where}: early_stop: {len(names)} files for {len(experts)} models; give one, or one each"
        )
    assert recipe.base_model is not None
    base = request.checkpoints[recipe.base_model]
    words = (base.config or {}).get("vocab_size")
    if words is None and "image_size" in (base.config or {}):
        raise RecipeError(
            f"{recipe.where}: early_stop: {recipe.base_model} takes images, no tokens; give a share of anchors"
        )
    tokenizer, most = samples.Tokenizer(base.path), words if isinstance(words, int) else None
    rows = [samples.read_samples(find_file(name, request.near), tokenizer, vocabulary=most) for name in names]
    batches = [samples.alike(some, min(each.rows for each in settings)) for some in rows]
    whose = [expert for expert, some in enumerate(batches) for _ in some]
    return Calibration(
        [batch for some in batches for batch in some],
        whose if len(names) > 1 else [None] * len(whose),
        " ".join(map(samples.digest, rows)),
    )
