"""`plan`: from whatever names a recipe to a Plan, from headers alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge import method as methods
from streammerge.budget import cores, default_ram, parse_size
from streammerge.engine import device as devices
from streammerge.errors import RecipeError
from streammerge.planner import recipe as recipes
from streammerge.planner.dialect import Resolution, resolve
from streammerge.planner.plan import Limits, Plan, make_plan
from streammerge.planner.transport import VOTES
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.hub import locate

RecipeLike = str | Path | Mapping[str, Any] | recipes.Recipe


def plan(
    recipe: RecipeLike,
    *,
    ram: str | int | None = None,
    vram: str | int | None = None,
    device: str = "auto",
    threads: int = 0,
    shard_size: str | int | None = None,
    seed: int = 0,
    in_memory: bool = False,
) -> Plan:
    """What a merge would read, hold and write, from headers alone.

    Args:
        recipe: a YAML file, a mapping of the same form, or a Recipe.
        ram: bytes of host memory the process may hold ("4GiB"); 80 % of what is free if left out.
        vram: bytes of device memory, the driver's own included; 80 % of what is free if left out.
        device: "cpu", "cuda", "cuda:1"; "auto" is a GPU if there is one. The result does not depend on it, except
            that libraries round differently for methods on whole matrices.
        threads: for the arithmetic; all processors if 0. The result does not depend on it.
        shard_size: bytes of tensors in an output shard; the base model's own shards if left out.
        seed: of the methods that draw random numbers.
        in_memory: count two of the largest results, as `stream` holds them.

    Raises:
        RecipeError, CheckpointError: the request or an input is wrong.
        BudgetTooSmall: the merge does not fit; `least` would do.
    """
    limits = read_limits(ram, vram, device, threads, shard_size, seed, in_memory)
    request = read_request(recipe)
    if methods.find(request.recipe.merge_method).sees == "layer":
        from streammerge.api import anchors, composing, layers, lessons

        known = {lessons.METHOD: composing.plan_request, anchors.METHOD: anchors.plan_request}
        return known.get(request.recipe.merge_method, layers.plan_request)(request, limits)
    return make_plan(request.recipe, request.resolution, request.checkpoints, limits)


@dataclass(frozen=True)
class Request:
    """A recipe with its models opened; `near` are folders beside the current one in which its files may lie."""

    recipe: recipes.Recipe
    checkpoints: dict[str, Checkpoint]
    resolution: Resolution
    near: list[Path]


def read_request(recipe: RecipeLike) -> Request:
    """Read a recipe, open what it names, and work out what makes each tensor."""
    parsed, near = _load(recipe)
    named = [*parsed.references, *([parsed.extra[VOTES]] if VOTES in parsed.extra else [])]
    checkpoints = {name: Checkpoint.open(locate(name, near)) for name in named}
    return Request(parsed, checkpoints, resolve(parsed, checkpoints, methods.find), near)


def read_limits(
    ram: str | int | None = None,
    vram: str | int | None = None,
    device: str = "auto",
    threads: int = 0,
    shard_size: str | int | None = None,
    seed: int = 0,
    in_memory: bool = False,
) -> Limits:
    """What `plan` is told, in numbers."""
    check_numbers(threads, seed)
    place, free = devices.find(device)
    allowed = 0 if vram is None else _size("--vram", vram)
    return Limits(
        ram=default_ram() if ram is None else _size("--ram", ram),
        threads=threads or cores(),
        device=place,
        vram=(allowed or free * 8 // 10) if place != "cpu" else 0,
        shard_size=None if shard_size is None else _size("--shard-size", shard_size),
        seed=seed,
        in_memory=in_memory,
    )


def _load(recipe: RecipeLike) -> tuple[recipes.Recipe, list[Path]]:
    """The recipe, and the folders beside the current one in which its models may lie."""
    if isinstance(recipe, recipes.Recipe):
        return recipe, []
    if isinstance(recipe, Mapping):
        return recipes.from_dict(recipe), []
    return recipes.load(recipe), [Path(recipe).resolve().parent]


def check_numbers(threads: int, seed: int) -> None:
    if threads < 0:
        raise RecipeError(f"--threads {threads}: give the number of threads, 0 for all processors")
    if not 0 <= seed < 1 << 64:
        raise RecipeError(f"--seed {seed}: give a number from 0 to 2^64 - 1")


def _size(option: str, given: str | int) -> int:
    """The bytes that an option asks for."""
    try:
        found = parse_size(given)
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None
    if found < 1:
        raise RecipeError(f"{option} {given}: must be more than nothing; write it as 4GiB, 4GB or 500M")
    return found
