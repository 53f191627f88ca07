"""Merges tensors that are in memory already: the same methods, surveys and kernels, no plan and no files."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from streammerge.engine.tiles import Crew, Merger, settle_in_memory
from streammerge.errors import CheckpointError
from streammerge.formats.dtypes import DTYPES
from streammerge.kernels.numerics import Span
from streammerge.method import Tile, TileMethod

if TYPE_CHECKING:
    from torch import Tensor

_NAMES = {row.torch: row.name for row in DTYPES.values() if row.torch}


def merge_tensors(
    method: TileMethod,
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None,
    dtype: str | None,
    crew: Crew,
    seed: int,
) -> dict[str, Tensor]:
    """Every tensor of the base (the first model, where there is none), merged on the CPU.

    Tensors that no arithmetic is defined on are cloned from the base.

    Raises:
        CheckpointError: a tensor is missing in a model, or shapes differ.
    """
    anchor = models[0] if base is None else base
    return {name: _merge(method, name, anchor, models, base, dtype, crew, seed) for name in anchor}


def _merge(
    method: TileMethod,
    name: str,
    anchor: Mapping[str, Tensor],
    models: Sequence[Mapping[str, Tensor]],
    base: Mapping[str, Tensor] | None,
    dtype: str | None,
    crew: Crew,
    seed: int,
) -> Tensor:
    import torch

    first = anchor[name]
    if not _is_floating(first):
        return first.detach().cpu().clone()
    experts = [_input(model, name, first, f"model {number}") for number, model in enumerate(models)]
    root = None if base is None else _input(base, name, first, "the base")
    wanted = first.dtype if dtype is None else getattr(torch, DTYPES[dtype].torch or "")
    out = torch.empty(first.shape, dtype=wanted)
    tile = Tile(
        name=name,
        tensor_id=zlib.crc32(name.encode()),
        shape=tuple(first.shape),
        start=0,
        numel=first.numel(),
        base=None if root is None else _span(root),
        experts=tuple(_span(expert) for expert in experts),
        out=_span(out),
        seed=seed,
    )
    method = method.for_tensor(name, tile.shape, len(experts))
    if not method.takes_base():
        tile = replace(tile, base=None)
    survey = method.survey(tile.shape, len(experts))
    if survey is not None:
        settle_in_memory(crew, method, survey, [tile])
    Merger(crew, method, survey).merge(tile)
    return out


def _input(model: Mapping[str, Tensor], name: str, first: Tensor, who: str) -> Tensor:
    if name not in model:
        raise CheckpointError(f"{who} has no tensor {name!r}")
    tensor = model[name].detach().cpu().contiguous()
    if tensor.shape != first.shape:
        raise CheckpointError(f"{who}: tensor {name!r} has shape {list(tensor.shape)}, another {list(first.shape)}")
    if not _is_floating(tensor):
        raise CheckpointError(f"{who}: tensor {name!r} is {tensor.dtype}, no arithmetic is defined on it")
    return tensor


def _is_floating(tensor: Tensor) -> bool:
    """Whether a merge can compute on it; torch has dtypes that no file holds, and those it cannot."""
    name = _NAMES.get(str(tensor.dtype).removeprefix("torch."))
    return name is not None and DTYPES[name].floating


def _dtype(tensor: Tensor) -> str:
    return _NAMES[str(tensor.dtype).removeprefix("torch.")]


def _span(tensor: Tensor) -> Span:
    return Span(tensor.data_ptr(), _dtype(tensor), tensor.numel())
