"""The start of a method that refines another one's merge: that merge as a recipe of its own, with the same models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from streammerge import method as methods
from streammerge.errors import RecipeError
from streammerge.planner.checks import check_keys
from streammerge.planner.jobs import COPY
from streammerge.planner.recipe import Recipe, Source, from_dict
from streammerge.planner.settings import Rule

KEYS = ("merge_method", "parameters", "models", "post")  # `models`: the same ones, with parameters of their own
WEIGHT = "weight"


def start_of(recipe: Recipe) -> Recipe:
    """What makes the start: the recipe under `start`, or the base as it is. A weight that is needed and not given is 1.

    Raises:
        RecipeError: something in it is wrong, or it is no merge of tensors.
    """
    start: Any = recipe.extra["start"]
    base = recipe.base_model
    assert base is not None
    if start == "base":
        return replace(
            recipe, merge_method=COPY, models=(Source(base),), base_model=None, parameters={}, extra={}, beside=()
        )
    at = f"{recipe.where}: start"
    check_keys(start, KEYS, at)
    listed = start.get("models") or [{"model": source.model} for source in recipe.models]
    found = from_dict({**start, "models": listed, "base_model": base}, at)
    if sorted(s.model for s in found.models) != sorted(s.model for s in recipe.models):
        raise RecipeError(f"{at}: models must be those of the recipe")
    method = methods.find(found.merge_method)
    if method.sees == "layer" or not method.takes_base() or method.keys:
        raise RecipeError(f"{at}: {found.merge_method} is no merge of task vectors; name one, as task_arithmetic")
    return replace(
        found,
        dtype=recipe.dtype,
        out_dtype=recipe.out_dtype,
        tokenizer_source=recipe.tokenizer_source,
        parameters=_weighted(method, found.parameters),
    )


def _weighted(method: type[methods.Method], given: Mapping[str, Any]) -> dict[str, Any]:
    weight = methods.parameters(method).get(WEIGHT)
    if weight is None or weight.default is not methods.REQUIRED or WEIGHT in given:
        return dict(given)
    return {**given, WEIGHT: (Rule(1.0),)}
