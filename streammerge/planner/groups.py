"""Which tensors meet: the inputs of each part of a recipe, and its output tensors in order.

    models   one group: every tensor of the base (or of the first model) meets its namesakes
    slices   one group per slice: layer a + i of each source makes the next output layer; what comes before
             the layers is made by the first slice's sources, what follows them by the last's

A base that is not listed joins the inputs of `models`, last; in `slices` it must be one of the sources.
Followed from what mergekit 0.1.5 does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING

from streammerge import method as methods
from streammerge.errors import CheckpointError, RecipeError
from streammerge.formats.header import TensorSpec
from streammerge.planner.layers import Layers, comes_before, layer_depth
from streammerge.planner.recipe import Recipe, Source
from streammerge.planner.settings import Settings

if TYPE_CHECKING:
    from streammerge.store.checkpoint import Checkpoint


@dataclass(frozen=True)
class Input:
    """One checkpoint in a group; `first` is the layer that its part of a slice begins with."""

    source: Source
    checkpoint: Checkpoint
    layers_of: Callable[[str], Layers]
    is_base: bool
    listed: bool = True

    @property
    def model(self) -> str:
        return self.source.model

    @property
    def first(self) -> int:
        return self.source.layers[0] if self.source.layers else 0

    @property
    def layers(self) -> Layers:
        return self.layers_of(self.model)

    @cached_property
    def stack(self) -> str:
        return self.layers.main(self.model)

    @cached_property
    def parts(self) -> tuple[list[str], dict[int, list[str]]]:
        """Names outside the stack, and inside it per layer."""
        return self.layers.split(self.stack)


@dataclass(frozen=True)
class Group:
    """Inputs that meet. The anchor (the base, or the first) says which tensors there are, and their dtype."""

    inputs: tuple[Input, ...]
    parameters: Settings
    at: str
    base: str | None

    @cached_property
    def anchor(self) -> int:
        return next((i for i, each in enumerate(self.inputs) if each.is_base), 0)

    @property
    def sliced(self) -> bool:
        return self.inputs[0].source.layers is not None

    def experts(self, method: type[methods.Method]) -> list[int]:
        """Which inputs are the method's experts: all, or all but the base."""
        return [i for i, each in enumerate(self.inputs) if method.base_is_expert or not each.is_base]

    @property
    def layers(self) -> int:
        """How many output layers a slice makes."""
        first, end = self.inputs[0].source.layers or (0, 0)
        return end - first


@dataclass(frozen=True, slots=True)
class Row:
    """One output tensor: its name, its name in each input of the group, its depth."""

    name: str
    names: tuple[str, ...]
    group: Group
    t: float

    def spec(self, which: int) -> TensorSpec:
        """The tensor in one input.

        Raises:
            CheckpointError: that input does not have it.
        """
        found = self.group.inputs[which].checkpoint.tensors.get(self.names[which])
        if found is not None:
            return found
        model, anchor = self.group.inputs[which].model, self.group.inputs[self.group.anchor].model
        hint = "only models with the same tensors merge"
        if "head" in self.name:
            hint = "its head may be tied to the embedding: save it with the head written out"
        raise CheckpointError(f"{model}: no tensor {self.names[which]!r}, which {anchor} has; {hint}")


def make_groups(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], method: type[methods.Method]) -> list[Group]:
    """The recipe's groups, checked against what the method wants.

    Raises:
        RecipeError: a model twice, no base, too few or too many models, layers that are not there.
        CheckpointError: a model in slices has no layer stack, or several.
    """

    @cache
    def layers_of(model: str) -> Layers:
        return Layers(checkpoints[model].tensors)

    def enter(source: Source, base: str | None, listed: bool = True) -> Input:
        return Input(source, checkpoints[source.model], layers_of, source.model == base, listed)

    found = []
    if recipe.models:
        inputs = [enter(source, recipe.base_model) for source in recipe.models]
        if recipe.base_model is not None and not any(each.is_base for each in inputs):
            inputs.append(enter(Source(recipe.base_model), recipe.base_model, listed=False))
        found.append(Group(tuple(inputs), {}, f"{recipe.where}: models", recipe.base_model))
    for i, part in enumerate(recipe.slices):
        base = part.base_model or recipe.base_model
        at = f"{recipe.where}: slices[{i}]"
        inputs = [enter(source, base) for source in part.sources]
        found.append(Group(tuple(inputs), part.parameters, at, base))
    for group in found:
        beside = "" if recipe.post is None else f" with post: {recipe.post.name}"
        _check_inputs(group, recipe.merge_method + beside, method)
        if recipe.slices:
            _check_layers(group)
    return found


def _check_inputs(group: Group, name: str, method: type[methods.Method]) -> None:
    models = [each.model for each in group.inputs]
    for model in models:
        if models.count(model) > 1:
            raise RecipeError(f"{group.at}: {model} is listed twice; list it once")
    if method.needs_base and group.base is None:
        raise RecipeError(f"{group.at}: {name} needs a base_model; name the model that the others were fine-tuned from")
    if method.takes_base() and group.base is not None and group.base not in models:
        raise RecipeError(f"{group.at}: the base model {group.base} must be one of the sources")
    count = len(group.experts(method))
    wanted = _wanted(count, method.min_experts, method.max_experts)
    if wanted and method.base_is_expert:
        joined = [f", with the base {each.model} that joins them" for each in group.inputs if not each.listed]
        raise RecipeError(f"{group.at}: {name} merges {wanted}; there are {count}{''.join(joined)}")
    if wanted:
        beside = "" if group.base is None else f" beside the base model {group.base}"
        raise RecipeError(f"{group.at}: {name} merges {wanted}{beside}; there are {count}")


def _wanted(count: int, least: int, most: int | None) -> str:
    """How many models there should be; nothing if `count` is right."""
    if count < least or (most is not None and count > most):
        bound = "exactly" if least == most else "at least" if count < least else "at most"
        number = least if count < least else most
        return f"{bound} {number} model{'' if number == 1 else 's'}"
    return ""


def _check_layers(group: Group) -> None:
    """Every source's layers are there, and as many as the others'."""
    for each in group.inputs:
        assert each.source.layers is not None  # the recipe has seen to it
        first, end = each.source.layers
        count = each.layers.stacks[each.stack]
        if end > count:
            wrong = f"layer_range [{first}, {end}] of {each.model}, which has {count} layers"
            raise RecipeError(f"{group.at}: {wrong}; they count from 0 and the end is left out")
        if end - first != group.layers:
            models = f"{group.inputs[0].model} gives {group.layers} layers, {each.model} {end - first}"
            raise RecipeError(f"{group.at}: {models}; the sources of a slice must give equally many")


def rows(groups: Sequence[Group]) -> Iterator[Row]:
    """The output tensors, in order."""
    return _slice_rows(groups) if groups[0].sliced else _model_rows(groups[0])


def _model_rows(group: Group) -> Iterator[Row]:
    anchor = group.inputs[group.anchor]
    for name in anchor.checkpoint.tensors:
        yield Row(name, (name,) * len(group.inputs), group, anchor.layers.depth(name))


def _slice_rows(groups: Sequence[Group]) -> Iterator[Row]:
    yield from _outside(groups[0], before=True)
    prefix = groups[0].inputs[groups[0].anchor].stack
    at = 0
    for group in groups:
        anchor = group.inputs[group.anchor]
        for i in range(group.layers):
            t = layer_depth(i, group.layers)
            for rest in anchor.parts[1][anchor.first + i]:
                names = tuple(f"{each.stack}.{each.first + i}.{rest}" for each in group.inputs)
                yield Row(f"{prefix}.{at}.{rest}", names, group, t)
            at += 1
    yield from _outside(groups[-1], before=False)


def _outside(group: Group, before: bool) -> Iterator[Row]:
    for name in group.inputs[group.anchor].parts[0]:
        if comes_before(name) == before:
            yield Row(name, (name,) * len(group.inputs), group, 0.0)


def left_over(group: Group, used: Mapping[str, set[str]]) -> Iterator[tuple[str, list[str]]]:
    """Per model other than the anchor: tensors in its part of the group that went into no output."""
    for which, each in enumerate(group.inputs):
        if which == group.anchor:
            continue
        names: Iterable[str] = each.checkpoint.tensors
        if group.sliced:
            taken = range(each.first, each.first + group.layers)
            names = [f"{each.stack}.{i}.{rest}" for i in taken for rest in each.parts[1][i]]
        extra = [name for name in names if name not in used[each.model]]
        if extra:
            yield each.model, extra
