"""Recipes for every method that `streammerge methods` lists, in the dialect that mergekit reads too.

Built from the method's own description, so a new method joins the checks by existing; what it must be told beyond
that stands in SETTINGS. `streammerge` itself runs as a process of its own, as a user would start it.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from checkpoints import Shape, make

WEIGHTS = (0.5, 0.3, 0.7, 0.2)  # of the models in turn
SETTINGS: dict[str, dict[str, Any]] = {
    "ties": {"density": 0.2},
    "dare_ties": {"density": 0.3},
    "dare_linear": {"density": 0.3},
    "breadcrumbs": {"density": 0.6, "gamma": 0.02},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.02},
    "slerp": {"t": 0.4},
}
TWO_LISTED = ("slerp",)  # mergekit wants the base among the models
WITH_BASE = ("nuslerp",)  # the base is optional; with it, task vectors turn instead of models
TINY = Shape("tiny", 1, 64, 176, 512, 2)


@dataclass(frozen=True)
class Case:
    """One method on a base and its experts: the recipe, and the folders that it reads."""

    method: str
    recipe: dict[str, Any]
    models: tuple[Path, ...]

    def write(self, folder: Path) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.method}.yml"
        path.write_text(json.dumps(self.recipe, indent=1))  # JSON is YAML
        return path

    @property
    def files(self) -> list[Path]:
        return [path for model in self.models for path in sorted(model.glob("*.safetensors"))]

    @property
    def input_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)


def command(*args: str) -> list[str]:
    """How streammerge is started."""
    return [sys.executable, "-m", "streammerge", *args]


def described() -> dict[str, dict[str, Any]]:
    """The methods by name, as the command line describes them."""
    done = subprocess.run(command("methods", "--json"), capture_output=True, text=True, check=True)
    return {row["name"]: row for row in json.loads(done.stdout)["methods"]}


def case(about: dict[str, Any], base: Path, experts: Sequence[Path], dtype: str = "bfloat16") -> Case:
    """A recipe for a method on as many of the experts as it takes."""
    name, most = about["name"], about["models"][1]
    with_base = about["base_model"] == "needed" or name in WITH_BASE
    if with_base:
        chosen = list(experts[:most])
        models = (base, *chosen)
        listed = list(models) if name in TWO_LISTED else chosen
    else:
        listed = [base, *experts][:most]
        models = tuple(listed)
    known = {p["name"]: p for p in about["parameters"]}
    settings = SETTINGS.get(name, {})
    general = {key: value for key, value in settings.items() if not known[key]["per_expert"]}
    own = {key: value for key, value in settings.items() if known[key]["per_expert"]}
    entries = []
    for at, model in enumerate(listed):
        weight = {"weight": WEIGHTS[at % len(WEIGHTS)]} if "weight" in known else {}
        entries.append({"model": str(model.resolve()), "parameters": {**weight, **own}})
    recipe: dict[str, Any] = {"merge_method": name, "models": entries, "parameters": general, "dtype": dtype}
    if with_base:
        recipe["base_model"] = str(base.resolve())
    return Case(name, recipe, models)


def trio(folder: Path, shape: Shape) -> tuple[Path, tuple[Path, ...]]:
    """A base and two experts of a shape, made unless they are there."""
    base, *experts = (make(folder / shape.name / name, shape, k) for k, name in enumerate(("base", "a", "b")))
    return base, tuple(experts)
