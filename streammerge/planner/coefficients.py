"""Learned coefficients as a file: JSON beside the manifest, and what a recipe's `coefficients` names.

    {"streammerge": "coefficients", "version": 1, "models": ["a", "b"], "seed": 0,
     "tensors": {"w": [[0.5], [-0.25]]},          for each model one coefficient, or one for each group of elements
     "copies": {"lm_head.weight": "model.embed_tokens.weight"}}        tensors whose groups are those of another

`seed` decides which elements are in which group. Models stand in the recipe's order; their names are for people.
"""

from __future__ import annotations

import hashlib
import json
import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from streammerge.errors import RecipeError
from streammerge.formats.dtypes import bits_of
from streammerge.planner.dialect import Resolution
from streammerge.planner.jobs import Job
from streammerge.planner.plan import Plan

NAME = "coefficients.json"
FORMAT, VERSION = "coefficients", 1


@dataclass(frozen=True)
class Coefficients:
    """By tensor: [models][groups]."""

    models: tuple[str, ...]
    seed: int
    tensors: Mapping[str, Sequence[Sequence[float]]]
    copies: Mapping[str, str] = field(default_factory=dict)

    def write(self) -> bytes:
        """The file's bytes."""
        head = {"streammerge": FORMAT, "version": VERSION, "models": list(self.models), "seed": self.seed}
        start = json.dumps({**head, "copies": dict(self.copies)})[:-1]
        rows = ",\n".join(f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in self.tensors.items())
        return f'{start}, "tensors": {{\n{rows}\n}}}}\n'.encode()

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.write()).hexdigest()

    def parameters(self, name: str) -> dict[str, Any]:
        """What the method of a tensor is told."""
        origin = zlib.crc32(self.copies.get(name, name).encode())
        return {"coefficients": tuple(map(tuple, self.tensors[name])), "origin": origin, "seed": self.seed}

    def settle(self, resolution: Resolution, method: str) -> Resolution:
        """The jobs of a recipe with these coefficients.

        Raises:
            RecipeError: a tensor, or a model, has none.
        """
        return replace(resolution, jobs=tuple(self._settled(job, method) for job in resolution.jobs))

    def of_plan(self, plan: Plan) -> Plan:
        """A plan whose tensors are merged with these coefficients; what rounding leaves of them is looked at."""
        tensors = []
        for tensor in plan.tensors:
            if tensor.job.method == plan.recipe.merge_method:
                values = {**self.parameters(tensor.job.name), "watched": bits_of(tensor.out_dtype) < 32}
                tensor = replace(tensor, method=replace(tensor.method, **values))  # type: ignore[type-var]
            tensors.append(tensor)
        return replace(plan, tensors=tuple(tensors))

    def figures(self) -> dict[str, Any]:
        """For a report: the models, and for each tensor the mean of every model's groups."""
        rows = {
            name: {f"c_{number}": math.fsum(row) / len(row) for number, row in enumerate(rows, 1)}
            for name, rows in self.tensors.items()
        }
        return {"models": list(self.models), "tensors": rows}

    def _settled(self, job: Job, method: str) -> Job:
        if job.method != method:
            return job
        if job.name not in self.tensors:
            raise RecipeError(f"tensor {job.name!r} has no coefficients in the file; learn them again")
        if len(self.tensors[job.name]) != len(job.experts):
            raise RecipeError(
                f"the coefficients are those of {len(self.tensors[job.name])} models, the recipe has "
                f"{len(job.experts)}; give the same models in the same order"
            )
        return replace(job, parameters=job.parameters | self.parameters(job.name))


def read(path: Path) -> Coefficients:
    """The coefficients in a file.

    Raises:
        RecipeError: it cannot be read, or holds something else.
    """
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise RecipeError(f"{path}: the coefficients cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise RecipeError(f"{path}: not JSON; give the {NAME} of a merge that learned") from None
    if not isinstance(found, dict) or found.get("streammerge") != FORMAT:
        raise RecipeError(f"{path}: holds no coefficients; give the {NAME} of a merge that learned")
    if found.get("version") != VERSION:
        raise RecipeError(f"{path}: version {found.get('version')!r} of coefficients, {VERSION} is known")
    try:
        models, seed = tuple(found["models"]), found["seed"]
        tensors, copies = found["tensors"], found.get("copies", {})
        for name, rows in tensors.items():
            _check(name, rows, len(models))
        if not isinstance(seed, int) or not 0 <= seed < 1 << 64 or not set(copies.values()) <= set(tensors):
            raise ValueError("seed or copies")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecipeError(f"{path}: is damaged ({error}); learn the coefficients again") from None
    return Coefficients(models, seed, tensors, copies)


def _check(name: str, rows: Any, models: int) -> None:
    numbers = all(
        isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        for row in rows
        for value in row
    )
    if len(rows) != models or not numbers or len({len(row) for row in rows}) > 1 or not all(rows):
        raise ValueError(f"tensor {name!r}")
