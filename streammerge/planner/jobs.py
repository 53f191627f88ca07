"""What a recipe comes down to: one job per output tensor, each checked against the headers.

A job's inputs have one shape and floating dtypes, its parameters are plain values. What cannot be computed on
(integers, booleans, packed formats) is copied from the base. Quantised weights are values only together with
their scales, so every method but passthrough refuses them.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.errors import CheckpointError
from streammerge.formats.dtypes import DTYPES
from streammerge.formats.header import TensorSpec
from streammerge.method import is_vocabulary

if TYPE_CHECKING:
    from streammerge.store.checkpoint import Checkpoint

COPY = "passthrough"
_ENDINGS = ("_scale_inv", "_scale", "_scales", ".scale", ".scales", ".absmax", ".quant_state", ".scale_inv")
_STEMS = (".weight", ".qweight", "_blocks", "_packed")


@dataclass(frozen=True)
class Job:
    """How one output tensor is made.

    `parameters` are the method's by their recipe names; per-expert ones are tuples, one value per expert. `post` is
    the name and the parameters of what is done to its merge. A copy is the method passthrough with no parameters, no
    base and one expert of the output's dtype.
    """

    name: str
    base: TensorSpec | None
    experts: tuple[TensorSpec, ...]
    parameters: dict[str, Any]
    method: str
    dtype: str
    shape: tuple[int, ...]
    post: tuple[str, dict[str, Any]] | None = None


@dataclass(frozen=True)
class Resolution:
    """A recipe resolved: jobs in output order, and what belongs to the output beside its tensors.

    `donor` gives the side files, `config` is config.json (None: there is none). `shards` keeps the base
    model's layout, file name by file name; None if slices make a new one.
    """

    jobs: tuple[Job, ...]
    warnings: tuple[str, ...]
    donor: Checkpoint
    config: dict[str, Any] | None
    shards: list[tuple[str, list[str]]] | None


def copy_job(name: str, spec: TensorSpec) -> Job:
    """The tensor as it is, byte by byte."""
    return Job(name, None, (spec,), {}, COPY, spec.dtype, spec.shape)


def is_floating(spec: TensorSpec) -> bool:
    """Whether a merge can compute on the tensor."""
    return DTYPES[spec.dtype].floating


def scale_of(spec: TensorSpec, names: Container[str]) -> str | None:
    """The name of the scales that a quantised tensor needs; None if it stands for itself."""
    if is_floating(spec) and not spec.dtype.startswith("F8"):
        return None
    stems = [spec.name, *(spec.name.removesuffix(end) for end in _STEMS if spec.name.endswith(end))]
    spelled = (stem + end for stem in stems for end in (*_ENDINGS, ".weight_scale", ".scale_weight"))
    return next((name for name in spelled if name in names and name != spec.name), None)


def quantised(specs: Iterable[TensorSpec], names: Container[str]) -> dict[str, str]:
    """Every quantised tensor's name with its scales' name."""
    return {spec.name: scale for spec in specs if (scale := scale_of(spec, names)) is not None}


def check_unscaled(name: str, scales: dict[str, str], model: str) -> None:
    """Refuse a quantised tensor as the input of a merge."""
    if name in scales:
        raise CheckpointError(
            f"{model}: tensor {name!r} is quantised, its scales are {scales[name]!r}; such weights are not "
            "merged yet, convert the model to bfloat16 first"
        )


def check_alike(spec: TensorSpec, model: str, anchor: TensorSpec, anchor_model: str) -> None:
    """Refuse an input that does not fit the anchor's (the base's, or the first input's) tensor."""
    if not is_floating(spec):
        raise CheckpointError(
            f"{model}: tensor {spec.name!r} is {spec.dtype}, in {anchor_model} it is {anchor.dtype}; "
            "only floating dtypes merge"
        )
    if spec.shape != anchor.shape:
        shapes = f"{list(spec.shape)}, in {anchor_model} it is {list(anchor.shape)}"
        hint = "only models of one architecture and size merge"
        if is_vocabulary(spec.name):
            hint = "the vocabularies differ, bring the models to one tokenizer first"
        raise CheckpointError(f"{model}: tensor {spec.name!r} is {shapes}; {hint}")
