"""Methods that work with anchors: their start, their units, and anchors that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from streammerge import method as methods
from streammerge.api.files import find_file
from streammerge.api.planning import Request
from streammerge.engine.anchor_files import read_folders
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
    stack = Stack.from_transformers(base.path, shapes, dtype=torch.float32, attention="eager")
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
    )
