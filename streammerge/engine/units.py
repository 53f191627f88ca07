"""Parts of layers that can run alone: the MLP of a layer, a whole layer, its linear maps, modules by a pattern.

A unit is a stage like any other (models/stage.py), of fewer parameters: a sweep loads what it names and nothing else.
A whole layer runs with what the model's own forward hands it for tokens that are all seen: masks and rotary tables,
recorded without weights. Any other module must return something for its input alone.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.models.record import Call, each_tensor, fill, tensors
from streammerge.models.shapes import no_memory
from streammerge.models.stack import Batch, Stack
from streammerge.models.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor, nn

MLPS = ("mlp", "feed_forward", "ffn", "ff")
GATED = ("gate_proj", "up_proj", "down_proj")
ROUTED = "experts"  # the module of a layer that sends each token to a few of them


@dataclass(frozen=True)
class Part:
    """A unit: `stage.index` is its number among all units, `layer` the stage of the layer that it is of."""

    stage: Stage
    layer: Stage

    @property
    def name(self) -> str:
        return self.stage.name

    @property
    def whole(self) -> bool:
        return self.stage.module is self.layer.module

    @property
    def gated(self) -> tuple[str, str, str] | None:
        """The matrices of gate, up and down, if it is an MLP of SiLU without biases."""
        from torch import nn

        module: Any = self.stage.module
        found = [getattr(module, name, None) for name in GATED]
        silu = type(getattr(module, "act_fn", None)).__name__ in ("SiLU", "SiLUActivation")
        if not silu or not all(isinstance(each, nn.Linear) and each.bias is None for each in found):
            return None
        names = {local: name for name, inside in self.stage.inside.items() for local in inside}
        gate, up, down = (names[f"{name}.weight"] for name in GATED)
        return (gate, up, down) if len(self.stage.parameters) == len(GATED) else None

    @property
    def linear(self) -> dict[str, str]:
        """The modules in it that are linear maps (their path) with the name of their weight."""
        from torch import nn

        names = {local: name for name, inside in self.stage.inside.items() for local in inside}
        assert self.stage.module is not None
        maps = [(path, m) for path, m in self.stage.module.named_modules() if isinstance(m, nn.Linear)]
        return {path: names[f"{path}.weight" if path else "weight"] for path, _ in maps}


def find_parts(stack: Stack, unit: str) -> list[Part]:
    """All units of a kind, from the first layer to the last.

    Raises:
        RecipeError: a layer has none, one is inside another, or it sends tokens to experts.
    """
    found: list[Part] = []
    for layer in stack.stages:
        if layer.kind != "layer":
            continue
        paths = _paths(layer, unit)
        if not paths:
            raise RecipeError(f"unit: {unit!r} is in no module of {layer.name}; {_known(layer)}")
        for path in paths:
            _check_alone(layer, path, paths)
            found.append(Part(_part(layer, path, len(found)), layer))
    return found


def _check_alone(layer: Stage, path: str, paths: Sequence[str]) -> None:
    assert layer.module is not None
    name, inner = f"{layer.name}.{path}" if path else layer.name, f"{path}." if path else ""
    within = next((other for other in paths if other != path and other.startswith(inner)), None)
    if within is not None:
        raise RecipeError(f"unit: {within!r} is inside {path!r} of {layer.name}; give a pattern of one of them")
    modules = [f"{inner}{below}".rstrip(".") for below, _ in layer.module.get_submodule(path).named_modules()]
    if any(each.rpartition(".")[2] == ROUTED for each in modules):
        raise RecipeError(
            f"{name} sends tokens to experts of its own, to some of which no anchor may go; give a unit without them, "
            "as linear or self_attn.*_proj"
        )


def default_unit(stack: Stack) -> str:
    """mlp where a model maps onto a vocabulary and its layers have one; else block."""
    layer = next(stage for stage in stack.stages if stage.kind == "layer")
    return "mlp" if stack.vocabulary is not None and _paths(layer, "mlp") else "block"


def _paths(layer: Stage, unit: str) -> list[str]:
    from torch import nn

    assert layer.module is not None
    if unit == "block":
        return [""]
    named = [(path, module) for path, module in layer.module.named_modules() if path and _has_weights(module)]
    if unit == "mlp":
        return [path for path, _ in named if path in MLPS]
    if unit == "linear":
        return [path for path, module in named if isinstance(module, nn.Linear)]
    return [path for path, _ in named if fnmatchcase(path, unit)]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())


def _known(layer: Stage) -> str:
    assert layer.module is not None
    paths = [path for path, module in layer.module.named_modules() if path and _has_weights(module)]
    return f"it has {', '.join(paths[:8])}{', ...' if len(paths) > 8 else ''}; or say block"


def _part(layer: Stage, path: str, number: int) -> Stage:
    """A stage of what is below `path` in a layer."""
    if not path:
        return replace(layer, index=number)
    prefix = f"{path}."
    inside = {
        name: tuple(local.removeprefix(prefix) for local in locals_ if local.startswith(prefix))
        for name, locals_ in layer.inside.items()
    }
    inside = {name: found for name, found in inside.items() if found}
    parts = {tensor: part for tensor, part in layer.parts.items() if part.parameter in inside}
    assert layer.module is not None
    return Stage(
        number,
        "layer",
        f"{layer.name}.{path}",
        {name: layer.parameters[name] for name in inside},
        parts,
        tuple(tensor for tensor in layer.tensors if tensor in parts),
        (),
        layer.module.get_submodule(path),
        inside,
    )


def with_stages(stack: Stack, stages: Sequence[Stage]) -> Stack:
    """The same model with other stages, units of layers: to load them, not to run."""
    found = copy.copy(stack)
    found.stages = tuple(stages)
    return found


class Example:
    """Makes batches without content, to find out what layers are called with."""

    def __init__(self, config: Any, tokens: int) -> None:
        self._config, self._tokens = config, tokens

    def __call__(self, count: int, tokens: int | None = None) -> Batch:
        import torch

        size = getattr(self._config, "image_size", None)
        if size is not None and getattr(self._config, "vocab_size", None) is None:
            height, width = (size, size) if isinstance(size, int) else size
            return {"pixel_values": torch.zeros(count, self._config.num_channels, height, width)}
        ids = torch.zeros((count, tokens or self._tokens), dtype=torch.int64)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


class Runner:
    """Runs a unit on given weights: `runner(x, weights)`, weights by their names in the model."""

    def __init__(self, stack: Stack, part: Part, example: Example | None, device: Any) -> None:
        self._stack, self._part, self._example, self.device = stack, part, example, device
        self._calls: dict[tuple[int, int], Call] = {}
        module = part.stage.module
        assert module is not None
        self.module = module
        self._buffers = {name: value.to(device) for name, value in module.named_buffers()} if _on_meta(device) else {}

    def __call__(self, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        from torch.func import functional_call

        args: Any = (x,)
        kwargs: dict[str, Any] = {}
        if self._part.whole:
            call = self._call(x.shape)
            args, kwargs = each_tensor(
                fill(call, {call.takes[0]: x}), lambda value: value.to(x.dtype) if value.is_floating_point() else value
            )
        local = {**self._part.stage.local(weights), **self._buffers}
        return next(tensors(functional_call(self.module, local, args, kwargs, tie_weights=False)))

    def prepare(self, shapes: Iterable[Sequence[int]]) -> None:
        """Find out now what inputs of these shapes are run with: the model's own forward runs for it."""
        for shape in shapes if self._part.whole else ():
            self._call(shape)

    def _call(self, shape: Sequence[int]) -> Call:
        """What the layer is called with for an input [count, tokens, d].

        Raises:
            RecipeError: it needs more than a hidden state.
        """
        count, tokens = shape[:2]
        if (count, tokens) not in self._calls:
            assert self._example is not None
            there = "cpu" if _on_meta(self.device) else self.device  # where the model's buffers are
            batch = {name: value.to(there) for name, value in self._example(count, tokens).items()}
            call = self._stack.enter(self._embedding(there), batch).calls[self._part.layer.index - 1]
            if len(call.takes) > 1:
                raise RecipeError(
                    f"{self._part.name} needs what earlier layers compute, so it is no unit; choose a part, as linear"
                )
            args, kwargs = each_tensor((call.args, call.kwargs), lambda tensor: tensor.detach().to(self.device))
            self._calls[count, tokens] = Call(args, kwargs, call.takes, call.gives)
        return self._calls[count, tokens]

    def _embedding(self, device: Any) -> dict[str, Tensor]:
        """Weights without content that require a gradient, so that what comes of them is no constant."""
        parameters = self._stack.stages[0].parameters.items()
        return {name: no_memory(tuple(p.shape), p.dtype, device).requires_grad_() for name, p in parameters}


def _on_meta(device: Any) -> bool:
    return str(device) == "meta"


def anchor_shape(stack: Stack, part: Part, anchors: int, example: Example | None) -> tuple[int, ...]:
    """[anchors, d], or [anchors, tokens, d] of a whole layer.

    Raises:
        RecipeError: the width of a unit's input cannot be told.
    """
    if part.whole:
        assert example is not None
        hidden = stack.enter({}, example(1)).shapes[0, 0]
        return (anchors, *hidden.shape[1:])
    width = _width(part)
    if width is None:
        raise RecipeError(f"{part.name}: the width of its input cannot be told; choose another unit")
    return (anchors, width)


def _width(part: Part) -> int | None:
    """Of the input of a module: what its first linear map reads."""
    from torch import nn

    assert part.stage.module is not None
    for _, module in part.stage.module.named_modules():
        if isinstance(module, nn.Linear):
            return int(module.in_features)
        if hasattr(module, "nx") and hasattr(module, "nf"):  # transformers' Conv1D
            return int(module.nx)
    return None


def bytes_of(stage: Stage, itemsize: int = 4) -> int:
    """Of all parameters, in fp32."""
    return sum(math.prod(parameter.shape) * itemsize for parameter in stage.parameters.values())
