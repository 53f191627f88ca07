"""A recipe against opened checkpoints: every parameter's value for every tensor, one job each.

A parameter's value is the first that is given and has a rule for the tensor, in this order: the model's own
(for per-expert parameters), the slice's, the recipe's, the method's default. Filters see the output's name;
those of per-expert parameters see the input's, whose layer number differs in slices. Followed from what
mergekit 0.1.5 does; where it is silent (settings that nothing reads, filters that match no tensor) a warning
speaks.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge import method as methods
from streammerge.errors import RecipeError
from streammerge.formats.header import TensorSpec
from streammerge.planner.config import Origin, layered, updated_config
from streammerge.planner.groups import Group, Row, left_over, make_groups, rows
from streammerge.planner.jobs import (
    COPY,
    Job,
    Resolution,
    check_alike,
    check_unscaled,
    copy_job,
    is_floating,
    quantised,
)
from streammerge.planner.layers import Layers
from streammerge.planner.recipe import Find, Recipe
from streammerge.planner.settings import Settings, choose, evaluate, filters
from streammerge.planner.transport import Transport

if TYPE_CHECKING:
    from streammerge.store.checkpoint import Checkpoint

__all__ = ["Resolution", "resolve"]

SHOWN = 3  # names in a warning


def resolve(recipe: Recipe, checkpoints: Mapping[str, Checkpoint], find: Find = methods.find) -> Resolution:
    """The jobs that make the recipe's output, in output order.

    Args:
        recipe: checked already.
        checkpoints: every model of `recipe.references`, opened, by that name.
        find: gives a method's class by its name.

    Raises:
        RecipeError: a parameter or a model is missing, a range lies outside its model.
        CheckpointError: a tensor is missing, or two that should meet do not fit.
    """
    method = find(recipe.merge_method)
    if recipe.post is not None:
        method = methods.beside_base(method)
    groups = make_groups(recipe, checkpoints, method)
    resolver = _Resolver(recipe, checkpoints, method)
    jobs = tuple(resolver.job(row) for row in rows(groups))
    config, doubts = _config(recipe, checkpoints, groups)
    return Resolution(
        jobs,
        (*_unread(recipe, groups, method), *resolver.warnings(groups), *doubts),
        _donor(recipe, checkpoints),
        config,
        None if recipe.slices else _shards(groups[0]),
    )


class _Resolver:
    """Makes jobs of rows, and remembers what the user should know."""

    def __init__(self, recipe: Recipe, checkpoints: Mapping[str, Checkpoint], method: type[methods.Method]) -> None:
        self.recipe, self.method = recipe, method
        self.known = methods.parameters(method)
        self.after = {} if recipe.post is None else methods.parameters(methods.find_post(recipe.post.name))
        self.stored = recipe.out_dtype or recipe.dtype
        scales = {
            model: quantised(checkpoints[model].tensors.values(), checkpoints[model].tensors)
            for model in recipe.references
        }
        copies = recipe.merge_method == COPY and recipe.post is None
        self.kept = {model: {*found, *found.values()} if copies else set() for model, found in scales.items()}
        self.scales = {model: {} if copies else found for model, found in scales.items()}
        self.transport = Transport(recipe, checkpoints) if recipe.beside else None
        self.copied: dict[str, list[str]] = defaultdict(list)
        self.used: dict[str, set[str]] = defaultdict(set)

    def job(self, row: Row) -> Job:
        group = row.group
        for each, name in zip(group.inputs, row.names, strict=True):
            self.used[each.model].add(name)
        anchor, model = row.spec(group.anchor), group.inputs[group.anchor].model
        check_unscaled(anchor.name, self.scales[model], model)
        if anchor.name in self.kept[model]:
            return self._quantised_copy(row, anchor)
        if not is_floating(anchor):
            if len(group.inputs) > 1:
                self.copied[model].append(row.name)
            return copy_job(row.name, anchor)
        if self.transport is not None:
            values = {name: self.value(param, row, group.experts(self.method)) for name, param in self.known.items()}
            return self.transport.job(row, anchor, self.stored or anchor.dtype, values, self.scales)
        specs = [row.spec(i) for i in range(len(group.inputs))]
        for spec, each in zip(specs, group.inputs, strict=True):
            check_unscaled(spec.name, self.scales[each.model], each.model)
            check_alike(spec, each.model, anchor, model)
        experts = group.experts(self.method)
        has_base = self.method.takes_base() and group.inputs[group.anchor].is_base
        return Job(
            row.name,
            anchor if has_base else None,
            tuple(specs[i] for i in experts),
            {name: self.value(param, row, experts) for name, param in self.known.items()},
            self.recipe.merge_method,
            self.stored or anchor.dtype,
            anchor.shape,
            self.post(row),
        )

    def post(self, row: Row) -> tuple[str, dict[str, Any]] | None:
        """What is done to the merge of one tensor, with its parameters there."""
        post = self.recipe.post
        if post is None:
            return None
        scopes = (post.parameters,)
        return post.name, {name: self._first(param, scopes, row.name, row, None) for name, param in self.after.items()}

    def _quantised_copy(self, row: Row, spec: TensorSpec) -> Job:
        """A quantised tensor, or its scales, as it is: neither dtype nor any parameter can change it."""
        for param in self.known.values():
            value = self.value(param, row, [row.group.anchor])
            if value not in (param.default, (param.default,)):
                what = f"{param.name} cannot change tensor {row.name!r}, which is quantised"
                raise RecipeError(f"{row.group.at}: {what}; leave it out with a filter")
        return copy_job(row.name, spec)

    def value(self, param: methods.Param, row: Row, experts: Sequence[int]) -> Any:
        """The parameter for one tensor; a tuple with one value per expert where experts may differ."""
        common = (row.group.parameters, self.recipe.parameters)
        if not param.per_expert:
            return self._first(param, common, row.name, row, None)
        inputs = row.group.inputs
        return tuple(self._first(param, (inputs[i].source.parameters, *common), row.names[i], row, i) for i in experts)

    def _first(self, param: methods.Param, scopes: Sequence[Settings], name: str, row: Row, which: int | None) -> Any:
        for scope in scopes:
            if param.name in scope:
                setting = scope[param.name]
                value = choose(setting, name) if param.several else evaluate(setting, name, row.t, param.kind)
                if value is not None:
                    return value
        if param.default is methods.REQUIRED:
            raise RecipeError(self._missing(param.name, name, row, which))
        default = param.default
        return default[0] if param.per_expert and isinstance(default, tuple) and len(default) == 1 else default

    def _missing(self, param: str, name: str, row: Row, which: int | None) -> str:
        method = self.recipe.merge_method
        if which is None:
            return f"{row.group.at}: {method} needs {param!r} for tensor {name!r}; add it to parameters"
        each = row.group.inputs[which]
        start = f"{row.group.at}: {method} needs {param!r} of {each.model} for tensor {name!r}"
        if each.listed:
            return f"{start}; add it to the model's parameters"
        return f"{start}; {method} merges the base too: list it with its {param}, or leave base_model out"

    def warnings(self, groups: Sequence[Group]) -> Iterator[str]:
        """What was copied and what was left out."""
        for model, names in self.copied.items():
            yield f"{_count(names, 'tensor')} no arithmetic can merge, copied from {model} ({_some(names)})"
        yield from () if self.transport is None else self.transport.doubts
        if self.transport is not None and (names := self.transport.unmatched):
            yield f"{_count(names, 'tensor')} without a source or votes ({_some(names)})"
        left: dict[str, dict[str, None]] = defaultdict(dict)
        for group in groups:
            for model, names in left_over(group, self.used):
                left[model].update(dict.fromkeys(names))
        for model, found in left.items():
            anchor = groups[0].inputs[groups[0].anchor].model
            names = list(found)
            yield f"{model}: {_count(names, 'tensor')} that {anchor} lacks, left out ({_some(names)})"


def _unread(recipe: Recipe, groups: Sequence[Group], method: type[methods.Method]) -> Iterator[str]:
    """Settings that change nothing: shared ones under a model, the base's own, filters that match nothing."""
    known = methods.parameters(method)
    for group in groups:
        for each in group.inputs:
            shared = [name for name in each.source.parameters if not known[name].per_expert]
            if shared:
                yield f"{group.at}: {', '.join(shared)} of {each.model} is not read; set it for all models"
            own = [name for name in each.source.parameters if known[name].per_expert]
            if own and each.is_base and not method.base_is_expert:
                yield f"{group.at}: {', '.join(own)} of {each.model} is not read; the base model is no expert"
    scopes = [recipe.parameters, *(g.parameters for g in groups), *(s.parameters for s in recipe.sources)]
    scopes += [] if recipe.post is None else [recipe.post.parameters]
    wanted = dict.fromkeys(text for scope in scopes for text in filters(scope))
    if wanted:
        names = {name for row in rows(groups) for name in (row.name, *row.names)}
        for text in wanted:
            if not any(text in name for name in names):
                yield f"{recipe.where}: filter {text!r} matches no tensor"


def _config(
    recipe: Recipe, checkpoints: Mapping[str, Checkpoint], groups: Sequence[Group]
) -> tuple[dict[str, Any] | None, list[str]]:
    """config.json of the output, and a doubt about it if there is one."""
    home = checkpoints[recipe.references[0]]
    dtype = recipe.out_dtype or recipe.dtype
    if home.config is None:
        return None, []
    if not recipe.slices:
        return updated_config(home.config, 0, None, dtype), []
    anchors = [(group, group.inputs[group.anchor]) for group in groups]
    stack: list[Origin] = [(a.checkpoint.config, a.first + i) for group, a in anchors for i in range(group.layers)]
    prefix, count = anchors[0][1].stack, anchors[0][1].layers.stacks[anchors[0][1].stack]
    layers = Layers(home.tensors).stacks.get(prefix, count)
    doubts = []
    if layered(home.config, layers) is None:
        doubts = [f"config.json of {recipe.references[0]} holds no layer count of {layers}; set it to {len(stack)}"]
    return updated_config(home.config, layers, stack, dtype), doubts


def _donor(recipe: Recipe, checkpoints: Mapping[str, Checkpoint]) -> Checkpoint:
    source = recipe.tokenizer_source
    return checkpoints[recipe.references[0] if source in (None, "base") else str(source)]


def _shards(group: Group) -> list[tuple[str, list[str]]]:
    """The anchor's own layout: file names with the tensors in each."""
    files: dict[str, list[str]] = defaultdict(list)
    for name, spec in group.inputs[group.anchor].checkpoint.tensors.items():
        files[Path(spec.file).name].append(name)
    return list(files.items())


def _count(names: Sequence[str], noun: str) -> str:
    return f"{len(names)} {noun}{'' if len(names) == 1 else 's'}"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
