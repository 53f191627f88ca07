"""What a layer returns, without running it: its structure, and the shapes of its tensors."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.models.names import places
from streammerge.models.record import each_tensor, replace, tensors

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Given:
    """In what a layer returns: one of the tensors it was given."""

    number: int


@dataclass(frozen=True, slots=True)
class Made:
    """In what a layer returns: a tensor of its own."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def no_memory(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of zeros, all of them in the same place."""
    import torch

    return torch.zeros((), dtype=dtype, device=device).expand(shape)


def template(layer: nn.Module, dtype: torch.dtype, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a layer that computes in `dtype` returns for such arguments, with Given and Made in place of tensors.

    It runs on meta or, where its way depends on values (routed experts), on zeros that take no memory.
    """
    import torch

    parameters = dict(layer.named_parameters())
    own = {name: parameters[first] for first, names in places(layer).items() for name in names}
    own |= dict(layer.named_buffers())
    for tried in (dtype, torch.bfloat16):  # on meta, torch takes grouped products for what GPUs can do

        def meta(tensor: Tensor, tried: torch.dtype = tried) -> Tensor:
            return tensor.detach().to("meta", tried if tensor.is_floating_point() else None)

        with suppress(NotImplementedError, RuntimeError), torch.no_grad():
            return _run(layer, dtype, args, kwargs, {name: meta(tensor) for name, tensor in own.items()}, meta)
    device = next(tensors((args, kwargs))).device
    zeros = {name: no_memory(t.shape, t.dtype, device) for name, t in own.items() if t.is_meta}
    with torch.no_grad():
        return _run(layer, dtype, args, kwargs, zeros, lambda tensor: tensor.detach())


def _run(
    layer: nn.Module,
    dtype: torch.dtype,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    values: dict[str, Tensor],
    move: Callable[[Tensor], Tensor],
) -> Any:
    from torch.func import functional_call

    numbers: dict[int, int] = {}
    alive: list[Tensor] = []

    def moved(tensor: Tensor) -> Tensor:
        alive.append(move(tensor))
        numbers[id(alive[-1])] = len(alive) - 1
        return alive[-1]

    def describe(tensor: Tensor) -> Given | Made:
        if id(tensor) in numbers:
            return Given(numbers[id(tensor)])
        return Made(tuple(tensor.shape), dtype if tensor.is_floating_point() else tensor.dtype)

    return each_tensor(functional_call(layer, values, *each_tensor((args, kwargs), moved), tie_weights=False), describe)


def fill_template(found: Any, given: list[Tensor]) -> Any:
    """The tree with tensors again: those that were given, and new ones that take no memory."""

    def make(leaf: Given | Made) -> Tensor:
        if isinstance(leaf, Given):
            return given[leaf.number]
        return no_memory(leaf.shape, leaf.dtype, given[0].device)

    return replace(found, lambda leaf: isinstance(leaf, (Given, Made)), make)
