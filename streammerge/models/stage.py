"""One link of the chain, and the cutting of a model into links."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streammerge.models.chain import Layer
from streammerge.models.names import Part, canonical, check_complete, places

if TYPE_CHECKING:
    from torch import Tensor, nn

Values = Mapping[str, "Tensor"]  # weights or gradients by a parameter's name in the model


@dataclass(frozen=True)
class Stage:
    """The parameters that a stage runs with, and where checkpoint tensors lie in them.

    `tensors` are those checkpoint tensors that this stage answers for; `borrowed` those that another one does: a tied
    head's belong to the embedding, where their gradient is complete.
    """

    index: int  # 0 the embedding, then the layers, last the head
    kind: str  # "embedding", "layer" or "head"
    name: str  # a layer's path in the model; else the kind
    parameters: dict[str, Tensor]  # on meta
    parts: dict[str, Part]
    tensors: tuple[str, ...]
    borrowed: tuple[str, ...]
    module: nn.Module | None = None  # a layer's
    inside: dict[str, tuple[str, ...]] = field(default_factory=dict)  # its parameters -> their names inside it

    def views(self, values: Values) -> dict[str, Tensor]:
        """Checkpoint tensors as views of the parameters, or of gradients of their shapes."""
        found = {}
        for name, part in self.parts.items():
            if part.parameter in values:
                whole = values[part.parameter]
                found[name] = whole if part.shape == whole.shape else _view(whole, part)
        return found

    def local(self, values: Values) -> dict[str, Tensor]:
        """Parameters by their names inside a layer, as `module` is called with by torch.func.functional_call."""
        return {name: value for first, value in values.items() for name in self.inside.get(first, (first,))}


def _view(whole: Tensor, part: Part) -> Tensor:
    return whole.view(-1)[part.start : part.start + math.prod(part.shape)].view(part.shape)


def cut(
    module: nn.Module,
    layers: Sequence[Layer],
    parts: Mapping[str, Part],
    before: Collection[str],
    after: Collection[str],
) -> tuple[Stage, ...]:
    """The stages of a module; `before` and `after` are the parameters that run before and after its layers.

    Raises:
        CheckpointError: a parameter of a stage is in no tensor.
    """
    parameters = dict(module.named_parameters())
    names = canonical(module)
    links: list[tuple[str, str, dict[str, Tensor], nn.Module | None]] = []
    links.append(("embedding", "embedding", {n: p for n, p in parameters.items() if n in before}, None))
    for path, layer in layers:
        links.append(("layer", path, {names[f"{path}.{n}"]: p for n, p in layer.named_parameters()}, layer))
    links.append(("head", "head", {n: p for n, p in parameters.items() if n in after}, None))
    by_parameter: dict[str, dict[str, Part]] = {}
    for tensor, part in parts.items():
        by_parameter.setdefault(part.parameter, {})[tensor] = part
    stages: list[Stage] = []
    owned: set[str] = set()
    for index, (kind, name, needs, layer_module) in enumerate(links):
        found = {tensor: part for n in needs for tensor, part in by_parameter.get(n, {}).items()}
        check_complete(needs, found.values())
        own = tuple(tensor for tensor in found if tensor not in owned)
        borrowed = tuple(tensor for tensor in found if tensor in owned)
        owned.update(own)
        inside = {}
        if layer_module is not None:
            inside = {names[f"{name}.{first}"]: local for first, local in places(layer_module).items()}
        stages.append(Stage(index, kind, name, needs, found, own, borrowed, layer_module, inside))
    return tuple(stages)
