"""Finds the layers of a module, stands in for them, and watches what runs before and after them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.models.record import each_tensor

if TYPE_CHECKING:
    from torch import Tensor, nn

Layer = tuple[str, "nn.Module"]  # its path in the model, and itself


def find_layers(module: nn.Module) -> list[Layer]:
    """The layers of a transformers model: the one list of modules that is in no other.

    Raises:
        RecipeError: there is none, or there are several.
    """
    from torch import nn

    lists = [
        (path, found)
        for path, found in module.named_modules()
        if isinstance(found, nn.ModuleList) and any(True for _ in found.parameters())
    ]
    outer = [item for item in lists if not any(item[0].startswith(f"{path}.") for path, _ in lists)]
    whole = set(getattr(module, "_no_split_modules", None) or ())
    named = [item for item in outer if {type(layer).__name__ for layer in item[1]} & whole]
    chosen = named if len(named) == 1 else outer
    if len(chosen) != 1:
        lists_found = ", ".join(path for path, _ in chosen) or "none"
        raise RecipeError(f"{type(module).__name__} is no chain of layers: lists of layers found: {lists_found}")
    ((path, found),) = chosen
    return [(f"{path}.{name}", layer) for name, layer in found.named_children()]


def inside(name: str, layers: list[Layer]) -> bool:
    return any(name.startswith(f"{path}.") for path, _ in layers)


def check_separate(module: nn.Module, layers: list[Layer]) -> None:
    """Raises RecipeError if a layer shares parameters with another one or with what is around them."""
    owner: dict[int, str] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        place = next((path for path, _ in layers if name.startswith(f"{path}.")), "")
        if owner.setdefault(id(parameter), place) != place:
            raise RecipeError(f"{name} is shared between layers: such models are not supported")


def replace_forward(module: nn.Module, stand_in: Callable[..., Any]) -> None:
    """Let `stand_in(real forward, args, kwargs)` answer when the module is called."""
    real = module.forward

    @functools.wraps(real)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return stand_in(real, args, kwargs)

    module.forward = forward


def accepted(module: nn.Module) -> frozenset[str]:
    """The names that a batch may hold for the module's forward; the loss is not the model's."""
    names = inspect.signature(module.forward).parameters
    return frozenset(names) - {"labels", "kwargs", "args"}


def vocabulary(module: nn.Module) -> nn.Module | None:
    """The linear map onto the vocabulary that a language model ends with."""
    from torch import nn

    found = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    return found if isinstance(found, nn.Linear) else None


@contextmanager
def touched(values: Mapping[str, Tensor], phase: Callable[[], bool]) -> Iterator[dict[bool, set[str]]]:
    """Meanwhile notes which of these tensors an operation was given, by the phase it was in."""
    from torch.overrides import TorchFunctionMode

    names = {id(value): name for name, value in values.items()}
    found: dict[bool, set[str]] = {}

    class Watch(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            def note(tensor: Tensor) -> Tensor:
                if id(tensor) in names:
                    found.setdefault(phase(), set()).add(names[id(tensor)])
                return tensor

            if getattr(function, "__name__", "") != "__get__":  # attributes: shape, device, dtype
                each_tensor((args, kwargs or {}), note)
            return function(*args, **(kwargs or {}))

    with Watch():
        yield found
