"""What a model's own forward hands to its layers: hidden states, masks, rotary tables, whatever it is.

The model runs with stand-ins for its layers. A stand-in notes the arguments it was called with and returns tensors of
the right shapes that hold nothing; what it returned and what the embedding computed are known by identity when they
are handed to a later layer, everything else is a constant of the batch. So nothing about an architecture is written
down here, and nothing about a version of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor

Key = tuple[int, int]  # (stage, number): tensor `number` of what a stage hands on; number 0 is the hidden state


@dataclass(frozen=True, slots=True)
class Carry:
    """In a layer's arguments: a tensor that an earlier stage computed."""

    key: Key


@dataclass(frozen=True, slots=True)
class Call:
    """One layer's arguments, with carries in place of what earlier stages compute, and the keys of what it returns."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    takes: tuple[Key, ...]  # hidden state first
    gives: tuple[Key | None, ...]  # for each tensor it returns; None if that is one it was given

    def describe(self) -> str:
        """Arguments by shape: layers that are described alike need as much memory."""
        shapes = each_tensor((self.args, self.kwargs), lambda tensor: (tensor.shape, tensor.dtype))
        return str(replace(shapes, lambda leaf: isinstance(leaf, Carry), lambda carry: carry.key[1]))


@dataclass
class Record:
    """One batch's way through the model. `calls[i]` is stage i + 1's, `entries` are what the embedding hands on."""

    calls: list[Call] = field(default_factory=list)
    entries: list[Tensor] = field(default_factory=list)

    shapes: dict[Key, Tensor] = field(default_factory=dict)  # of everything handed on, filled with anything

    @property
    def wanted(self) -> set[Key]:
        """What some layer takes beside the hidden state."""
        return {key for call in self.calls for key in call.takes if key[1] > 0}

    def forget(self) -> None:
        """Keep the calls alone."""
        self.entries.clear()
        self.shapes.clear()

    def constants(self) -> list[Tensor]:
        """Masks, rotary tables and the like, each once."""
        found: dict[int, Tensor] = {}
        for call in self.calls:
            each_tensor((call.args, call.kwargs), lambda tensor: found.setdefault(id(tensor), tensor))
        return list(found.values())


def each_tensor(tree: Any, visit: Callable[[Tensor], Any]) -> Any:
    """The tree with every tensor replaced by visit(tensor)."""
    return replace(tree, _is_tensor, visit)


def fill(call: Call, values: Mapping[Key, Tensor]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A layer's arguments with tensors in place of the carries."""
    args, kwargs = replace(
        (call.args, call.kwargs), lambda leaf: isinstance(leaf, Carry), lambda carry: values[carry.key]
    )
    return args, kwargs


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors of a tree, in order."""
    found: list[Tensor] = []
    each_tensor(tree, found.append)
    return iter(found)


def _is_tensor(leaf: Any) -> bool:
    import torch

    return isinstance(leaf, torch.Tensor)


def replace(tree: Any, wanted: Callable[[Any], bool], visit: Callable[[Any], Any]) -> Any:
    """The tree of tuples, lists and dicts with every wanted leaf replaced by visit(leaf)."""
    if wanted(tree):
        return visit(tree)
    if isinstance(tree, dict):
        items = {key: replace(value, wanted, visit) for key, value in tree.items()}
        return type(tree)(**items) if hasattr(tree, "to_tuple") else items
    if isinstance(tree, (tuple, list)):
        parts = [replace(item, wanted, visit) for item in tree]
        return type(tree)(*parts) if hasattr(tree, "_fields") else type(tree)(parts)
    return tree


class Recorder:
    """Stands in for the layers while the model's own forward runs once.

    `shapes(index, args, kwargs)` says what the real layer would return: a tree of tensors whose values do not matter.
    With `last` given, the last layer returns it in place of its hidden state.
    """

    def __init__(self, layers: int, shapes: Callable[[int, Any, Any], Any], last: Tensor | None = None) -> None:
        self.record = Record()
        self._layers, self._shapes, self._last = layers, shapes, last
        self._known: dict[int, Key] = {}
        self._alive: list[Tensor] = []  # so that no identity is used twice

    def visit(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Called in place of layer `index`."""
        if index != len(self.record.calls):
            raise RecipeError(
                f"layer {index} runs when layer {len(self.record.calls)} should: "
                "layers that are shared, skipped or run in another order are not supported"
            )
        takes: dict[Key, None] = {}

        def carry(tensor: Tensor) -> Tensor | Carry:
            if id(tensor) not in self._known and (tensor.requires_grad or (index == 0 and not takes)):
                self._know(tensor, (0, len(self.record.entries)))
                self.record.entries.append(tensor)
            key = self._known.get(id(tensor))
            if key is None:
                return tensor
            takes[key] = None
            return Carry(key)

        hidden_first = dict(sorted(kwargs.items(), key=lambda item: item[0] != "hidden_states"))
        held_args, held_kwargs = each_tensor((args, hidden_first), carry)
        if next(iter(takes), None) != (index, 0):
            raise RecipeError(
                f"hidden states are changed between layers {index - 1} and {index}: this model is no chain of layers"
            )
        gives: list[Key | None] = []

        def give(tensor: Tensor) -> Tensor:
            if not gives:
                last = self._last if index == self._layers - 1 else None
                tensor = tensor.view_as(tensor) if last is None else last
            key = None if id(tensor) in self._known else (index + 1, len(gives))
            gives.append(key)
            if key is not None:
                self._know(tensor, key)
            return tensor

        result = each_tensor(self._shapes(index, args, kwargs), give)
        self.record.calls.append(Call(held_args, held_kwargs, tuple(takes), tuple(gives)))
        return result

    def _know(self, tensor: Tensor, key: Key) -> None:
        self._known[id(tensor)] = key
        self.record.shapes[key] = tensor
        self._alive.append(tensor)
