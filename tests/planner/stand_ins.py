"""Stand-in methods and checkpoints without files, so that the planner is tested on its own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from streammerge.errors import RecipeError, StreamMergeError
from streammerge.formats.dtypes import DTYPES
from streammerge.formats.header import TensorSpec
from streammerge.method import Flags, Method, Tile, TileMethod, param
from streammerge.planner.dialect import resolve
from streammerge.planner.jobs import Job, Resolution
from streammerge.planner.recipe import parse
from streammerge.store.checkpoint import Checkpoint


class Still(TileMethod):
    """A method that is only ever planned."""

    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""

    def merge(self, tile: Tile, survey: Any) -> Flags:
        return np.zeros(1, dtype=np.uint8)


@dataclass(frozen=True)
class Ties(Still):
    weight: tuple[float, ...] = param(meaning="", per_expert=True)
    density: tuple[float, ...] = param(1.0, "", per_expert=True)
    normalize: bool = param(True, "")
    lambda_: float = param(1.0, "")


@dataclass(frozen=True)
class Linear(Still):
    needs_base: ClassVar[bool] = False
    base_is_expert: ClassVar[bool] = True
    weight: tuple[float, ...] = param(meaning="", per_expert=True)
    normalize: bool = param(True, "")
    rounds: int = param(1, "")


@dataclass(frozen=True)
class Slerp(Still):
    max_experts: ClassVar[int | None] = 1
    t: float = param(meaning="")


@dataclass(frozen=True)
class NuSlerp(Still):
    needs_base: ClassVar[bool] = False
    min_experts: ClassVar[int] = 2
    max_experts: ClassVar[int | None] = 2
    keys: ClassVar[tuple[str, ...]] = ("data",)
    weight: tuple[float, ...] = param(meaning="", per_expert=True)


@dataclass(frozen=True)
class Passthrough(Still):
    needs_base: ClassVar[bool] = False
    base_is_expert: ClassVar[bool] = True
    max_experts: ClassVar[int | None] = 1
    scale: tuple[float, ...] = param(1.0, "", per_expert=True)


METHODS: dict[str, type[Method]] = {
    "ties": Ties,
    "linear": Linear,
    "slerp": Slerp,
    "nuslerp": NuSlerp,
    "passthrough": Passthrough,
}


def find(name: str) -> type[Method]:
    if name not in METHODS:
        raise RecipeError(f"unknown merge_method {name!r}")
    return METHODS[name]


def checkpoint(
    name: str,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    config: dict[str, Any] | None = None,
    shards: int = 1,
) -> Checkpoint:
    """A checkpoint as its headers would describe it; tensors are dealt to the shards in equal runs."""
    specs, at = {}, 4096
    run = -(-len(tensors) // shards)
    for i, (tensor, (dtype, shape)) in enumerate(tensors.items()):
        size = int(np.prod(shape)) * DTYPES[dtype].bits // 8
        file = f"/models/{name}/model-{i // run + 1:05}-of-{shards:05}.safetensors"
        specs[tensor] = TensorSpec(tensor, dtype, shape, file, at, at + size)
        at += size
    return Checkpoint(Path(f"/models/{name}"), specs, {}, {}, (), config)


def llama(layers: int, dtype: str = "BF16", vocabulary: int = 8, head: bool = True) -> dict[str, Any]:
    """The tensors of a tiny Llama, in the order in which files often hold them: by name."""
    found = {"model.embed_tokens.weight": (dtype, (vocabulary, 4)), "model.norm.weight": (dtype, (4,))}
    if head:
        found["lm_head.weight"] = (dtype, (vocabulary, 4))
    for i in range(layers):
        at = f"model.layers.{i}"
        found[f"{at}.input_layernorm.weight"] = (dtype, (4,))
        found[f"{at}.mlp.down_proj.weight"] = (dtype, (4, 6))
        found[f"{at}.mlp.gate_proj.weight"] = (dtype, (6, 4))
        found[f"{at}.mlp.up_proj.weight"] = (dtype, (6, 4))
        found[f"{at}.post_attention_layernorm.weight"] = (dtype, (4,))
        for part in "kqvo":
            found[f"{at}.self_attn.{part}_proj.weight"] = (dtype, (4, 4))
    return dict(sorted(found.items()))


CONFIG = {"num_hidden_layers": 5, "layer_types": list("vwxyz"), "torch_dtype": "bfloat16"}
MODELS = {name: checkpoint(name, llama(5), CONFIG, shards=2) for name in "ABC"}


def plan(text: str, **changed: Checkpoint) -> Resolution:
    recipe = parse(text, "r.yml", find)
    return resolve(recipe, {**MODELS, **changed}, find)


def jobs(text: str, **changed: Checkpoint) -> dict[str, Job]:
    return {job.name: job for job in plan(text, **changed).jobs}


def refused(text: str, **changed: Checkpoint) -> tuple[str, type[StreamMergeError]]:
    with pytest.raises(StreamMergeError) as error:
        plan(text, **changed)
    return str(error.value), type(error.value)


TIES = """
merge_method: ties
base_model: A
models:
  - model: B
    parameters:
      weight: [0.0, 0.4, 1.0]
      density: [{filter: mlp, value: [0.2, 0.6]}, {filter: self_attn.q_proj, value: 0.9}]
  - model: C
    parameters:
      weight: [{filter: layers.3., value: 0.125}, {filter: norm, value: "1e-3"}, {value: 0.5}]
parameters:
  density: [0.3, 0.7]
  normalize: [false, true, true]
  lambda: [{filter: embed, value: 0.25}, {filter: lm_head, value: [2, 3]}, {filter: "*", value: 1.5}]
"""
