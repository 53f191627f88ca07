"""Which part of which parameter of the running model each tensor of a checkpoint is.

A checkpoint's names are mostly the model's own. What differs: a prefix ("model.") that one has and the other lacks,
LayerNorm's gamma and beta of old files, a tied head that is stored once, or twice, and models that store their experts
one by one and run them as one stacked tensor (transformers 5). transformers knows its own renamings; it is asked for
them, and for what it would store, on tensors without memory: a tensor that comes out as a contiguous view of a
parameter is that part of it. Everything else is refused by its name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor, nn

Shape = tuple[int, ...]
OLD_NAMES = (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias"))


@dataclass(frozen=True, slots=True)
class Part:
    """A checkpoint's tensor in the running model: the elements of `parameter` from `start` on, in the same order."""

    parameter: str
    start: int
    shape: Shape


@dataclass
class Match:
    """`parts` by checkpoint name; `copies` hold the same values as another tensor; `unused` belong to no parameter."""

    parts: dict[str, Part] = field(default_factory=dict)
    copies: dict[str, str] = field(default_factory=dict)
    unused: list[str] = field(default_factory=list)


def match(module: nn.Module, shapes: Mapping[str, Shape]) -> Match:
    """Find the parameter of every checkpoint tensor.

    Raises:
        CheckpointError: a shape differs, or a tensor is stored in another layout than the model runs it in.
    """
    names = canonical(module)
    state = {name for name, buffer in module.state_dict(keep_vars=True).items() if buffer.is_floating_point()}
    resolve = _resolver(module, names)
    found = Match()
    owner: dict[tuple[str, int], str] = {}
    for name, shape in shapes.items():
        part = resolve(name)
        if part is None:
            found.unused.append(name)
            continue
        if part.parameter not in names:
            if part.parameter in state:
                raise CheckpointError(f"tensor {name!r} is a state beside the weights; such models are not supported")
            found.unused.append(name)
            continue
        part = Part(names[part.parameter], part.start, part.shape)
        if part.shape != tuple(shape):
            raise CheckpointError(
                f"tensor {name!r} has shape {list(shape)}, the model's {part.parameter} wants {list(part.shape)}; "
                "check that config.json belongs to these weights"
            )
        first = owner.setdefault((part.parameter, part.start), name)
        if first != name:
            found.copies[name] = first
        else:
            found.parts[name] = part
    return found


def canonical(module: nn.Module) -> dict[str, str]:
    """Every name of every parameter -> the first name of that parameter: tied ones have several."""
    first: dict[int, str] = {}
    names = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names[name] = first.setdefault(id(parameter), name)
    return names


def places(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """The first name of every parameter -> one name for each module that holds it: what to replace when it is tied.

    A module that is in two places has two names and is replaced once.
    """
    seen: set[tuple[int, str]] = set()
    found: dict[str, tuple[str, ...]] = {}
    for name, first in canonical(module).items():
        owner, _, attribute = name.rpartition(".")
        place = (id(module.get_submodule(owner)), attribute)
        if place not in seen:
            seen.add(place)
            found[first] = (*found.get(first, ()), name)
    return found


def check_complete(parameters: Mapping[str, Tensor], parts: Iterable[Part]) -> None:
    """Raises CheckpointError if some elements of these parameters are in no tensor."""
    held = dict.fromkeys(parameters, 0)
    for part in parts:
        if part.parameter in held:
            held[part.parameter] += math.prod(part.shape)
    for name, count in held.items():
        if count != parameters[name].numel():
            lacks = "lacks part of" if count else "has no tensor for"
            raise CheckpointError(
                f"the checkpoint {lacks} the model's {name}; name the class that it was saved from, or mend it"
            )


def _resolver(module: nn.Module, names: Mapping[str, str]) -> Callable[[str], Part | None]:
    """Checkpoint name -> the part that it is; None if the model has no use for it."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    known = dict.fromkeys(module.state_dict(keep_vars=True))
    rename, stored = _transformers(module, known)

    def whole(name: str) -> Part:
        parameter = parameters.get(name)
        return Part(name, 0, () if parameter is None else tuple(parameter.shape))

    def resolve(name: str) -> Part | None:
        for spelled in _spellings(module, name):
            if spelled in known:
                return whole(spelled)
        target, converted = rename(name)
        if target in known and not converted:
            return whole(target)
        if not converted:
            return None
        part = next((stored[spelled] for spelled in _spellings(module, name) if spelled in stored), None)
        if part is None:
            raise CheckpointError(
                f"tensor {name!r} is stored in another layout than this version of transformers runs it in; "
                "use a version that runs it as stored"
            )
        return part

    return resolve


def _spellings(module: nn.Module, name: str) -> Iterator[str]:
    """A name as the model may know it."""
    prefix = getattr(module, "base_model_prefix", "")
    for old, new in (("", ""), *OLD_NAMES):
        if old in name:
            spelled = name.replace(old, new) if old else name
            yield spelled
            if prefix and spelled.startswith(prefix + "."):
                yield spelled.removeprefix(prefix + ".")
            elif prefix:
                yield f"{prefix}.{spelled}"


def _transformers(
    module: nn.Module, known: Mapping[str, Any]
) -> tuple[Callable[[str], tuple[str, bool]], dict[str, Part]]:
    """transformers' own renamings (name -> name, and whether more than the name changes), and the parts it stores."""
    try:
        from transformers import PreTrainedModel
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightRenaming, rename_source_key, revert_weight_conversion
    except ImportError:  # no transformers, or version 4, whose models run what is stored
        return lambda name: (name, False), {}
    if not isinstance(module, PreTrainedModel):
        return lambda name: (name, False), {}
    transforms = get_model_conversion_mapping(module)
    renamings = [entry for entry in transforms if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in transforms if not isinstance(entry, WeightRenaming)]
    prefix, meta = module.base_model_prefix, dict.fromkeys(known, True)

    def rename(name: str) -> tuple[str, bool]:
        target, pattern = rename_source_key(name, renamings, converters, prefix, meta)
        return target, pattern is not None

    if not converters:
        return rename, {}
    parameters = dict(module.named_parameters())
    with _views_stay_views():
        stored = revert_weight_conversion(module, {name: value.detach() for name, value in parameters.items()})
    return rename, _parts(parameters, stored)


def _views_stay_views() -> Any:
    """Meanwhile `contiguous` makes no copies: what transformers would store is asked for, not made."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Views(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0] if function is torch.Tensor.contiguous else function(*args, **(kwargs or {}))

    return Views()


def _parts(parameters: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> dict[str, Part]:
    """Those of the stored tensors that are contiguous views of a parameter."""
    owners = {parameter.untyped_storage()._cdata: name for name, parameter in parameters.items()}
    found = {}
    for name, view in stored.items():
        owner = owners.get(view.untyped_storage()._cdata)
        if owner is not None and view.is_contiguous():
            found[name] = Part(owner, view.storage_offset(), tuple(view.shape))
    return found
