"""Jobs of a method that carries task vectors to another model: inputs of a tensor are the target (its base), the
fine-tuned models, the model that those came from, and, where there are any already, signs of votes.

Shapes must be equal to the last extent. A tensor that neither the fine-tuned models nor their base have stays the
target's; one that only some of them have is refused.

A file of votes is safetensors: a tensor [sets, ceil(n / 4)] of U8 for each tensor of n elements, four signs to a byte
as in kernels/host/sign_mask.py, under the tensor's own name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.errors import CheckpointError, RecipeError
from streammerge.formats.dtypes import SIGNS
from streammerge.formats.header import TensorSpec
from streammerge.planner.jobs import COPY, Job, check_alike, check_unscaled

if TYPE_CHECKING:
    from streammerge.planner.groups import Row
    from streammerge.planner.recipe import Recipe
    from streammerge.store.checkpoint import Checkpoint

VOTES = "votes"  # the key of a recipe that names a file of them
FORMAT = {"streammerge": "votes", "version": "1"}  # metadata of such a file, beside `target`


@dataclass(frozen=True)
class Votes:
    """A file of votes: `sets` of signs, one or one for each fine-tuned model."""

    checkpoint: Checkpoint
    sets: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, sources: int, apart: bool) -> Votes:
        """Check what kind of file it is.

        Raises:
            CheckpointError: it holds no votes.
            RecipeError: it holds those of another number of tasks.
        """
        where = next(iter(checkpoint.tensors.values())).file
        if any(checkpoint.metadata.get(key) != value for key, value in FORMAT.items()):
            raise CheckpointError(f"{where}: holds no votes; give a file that save_votes wrote")
        shapes = [spec.shape for spec in checkpoint.tensors.values()]
        if any(spec.dtype != "U8" for spec in checkpoint.tensors.values()) or any(len(s) != 2 for s in shapes):
            raise CheckpointError(f"{where}: is damaged; write it again with save_votes")
        sets = shapes[0][0]
        if sets not in (1, sources if apart else 1) or any(shape[0] != sets for shape in shapes):
            raise RecipeError(
                f"{where}: holds the votes of {sets} tasks for {sources} models; they go with as many models and "
                "order: mask_then_merge"
            )
        return cls(checkpoint, sets)

    def signs(self, name: str, numel: int) -> tuple[TensorSpec, ...] | None:
        """The signs of one tensor, set by set; None if there are none.

        Raises:
            CheckpointError: they are another tensor's, by their number.
        """
        spec = self.checkpoint.tensors.get(name)
        if spec is None:
            return None
        if spec.shape[1] != packed(numel):
            raise CheckpointError(f"{spec.file}: votes of tensor {name!r} are not of {numel} elements; vote again")
        return sets_of(spec, numel)


def packed(numel: int) -> int:
    """Bytes of so many signs."""
    return -(-numel // 4)


def sets_of(spec: TensorSpec, numel: int) -> tuple[TensorSpec, ...]:
    """A tensor of packed signs, cut into its sets."""
    each = packed(numel)
    return tuple(
        TensorSpec(spec.name, SIGNS, (numel,), spec.file, spec.begin + at * each, spec.begin + (at + 1) * each)
        for at in range(spec.shape[0])
    )


class Transport:
    """Makes the jobs of one recipe; `unmatched` are tensors that stay the target's."""

    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> None:
        (source,) = recipe.beside
        self._recipe, self._source = recipe, (source, checkpoints[source])
        self.unmatched: list[str] = []
        self.doubts: list[str] = []
        self._votes: Votes | None = None
        if VOTES in recipe.extra and recipe.base_model is not None:
            apart = recipe.extra["order"] == "mask_then_merge"
            file = checkpoints[recipe.extra[VOTES]]
            self._votes = Votes.of(file, len(recipe.models), apart)
            if file.metadata.get("target") != checkpoints[recipe.base_model].fingerprint():
                self.doubts.append(f"{recipe.extra[VOTES]}: voted on at another model than {recipe.base_model}")

    def job(
        self, row: Row, target: TensorSpec, dtype: str, parameters: dict[str, Any], scales: Mapping[str, dict[str, str]]
    ) -> Job:
        """What makes one tensor of all models, or a copy of the target's, in `dtype`.

        Raises:
            CheckpointError: only some of the other models have it, or shapes differ.
        """
        copy = Job(row.name, None, (target,), {}, COPY, dtype, target.shape)
        models = [(each.model, each.checkpoint) for each in row.group.inputs if not each.is_base]
        models.append(self._source)
        found = {model: checkpoint.tensors.get(row.name) for model, checkpoint in models}
        if not any(found.values()):
            self.unmatched.append(row.name)
            return copy
        inputs = [_checked(row, model, target, found, scales) for model, _ in models]
        sources = len(models) - 1
        made = parameters | {key: self._recipe.extra[key] for key in ("merge", "order")}
        made |= {"sources": sources, "voters": self._voters(sources)}
        signs: tuple[TensorSpec, ...] = ()
        if self._votes is not None and parameters["mode"] != "random":
            given = self._votes.signs(row.name, target.numel)
            if given is None:
                self.unmatched.append(row.name)
                if parameters["unmatched"] == "drop":
                    return copy
            signs, made["voters"], made["whole"] = given or (), self._votes.sets, given is None
        name = self._recipe.merge_method
        return Job(row.name, target, (*inputs, *signs), made, name, dtype, target.shape)

    def _voters(self, sources: int) -> int:
        """How many sets of signs the samples will give: one, or one for each model."""
        tasks = len(self._recipe.extra.get("data", {}).get("train", ()))
        return tasks if tasks > 1 and sources > 1 and self._recipe.extra["order"] == "mask_then_merge" else 1


def _checked(
    row: Row,
    model: str,
    target: TensorSpec,
    found: Mapping[str, TensorSpec | None],
    scales: Mapping[str, dict[str, str]],
) -> TensorSpec:
    """One model's tensor, which fits the target's."""
    spec, anchor = found[model], row.group.inputs[row.group.anchor].model
    if spec is None:
        others = ", ".join(other for other, there in found.items() if there is not None)
        raise CheckpointError(
            f"{model}: no tensor {row.name!r}, which {others} has; the fine-tuned models and source_base must have the "
            "same tensors"
        )
    check_unscaled(spec.name, scales[model], model)
    check_alike(spec, model, target, anchor)
    return spec
