"""config.json of a model whose layers were stacked anew or whose dtype changed.

The layer count is every known key that holds the old count; a list with one entry per layer follows its
layers; a list of layer numbers is renumbered. Everything else is the base model's.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from streammerge.formats.dtypes import DTYPES

COUNTS = (
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
    "num_decoder_layers",
    "decoder_layers",
    "encoder_layers",
    "depth",
    "max_window_layers",
)
NUMBERS = ("mlp_only_layers", "cross_attention_layers", "full_attn_idxs", "attn_layer_indices")  # of layers
NOT_PER_LAYER = ("architectures", "eos_token_id", "bos_token_id", "pad_token_id", "suppress_tokens")
PARTS = ("text_config", "llm_config", "language_config")  # the language model's own part of a larger config

Origin = tuple[Mapping[str, Any] | None, int]  # a source model's config.json and the number of the layer in it


def count_keys(config: Mapping[str, Any], layers: int) -> list[str]:
    """The keys of `config` that hold the layer count."""
    return [key for key in COUNTS if type(config.get(key)) is int and config[key] == layers]


def layered(config: Mapping[str, Any], layers: int) -> Mapping[str, Any] | None:
    """The part of the config that holds the layer count; None if none does."""
    parts = [config, *(config[key] for key in PARTS if isinstance(config.get(key), dict))]
    return next((part for part in parts if count_keys(part, layers)), None)


def updated_config(
    config: Mapping[str, Any], layers: int, stack: Sequence[Origin] | None = None, dtype: str | None = None
) -> dict[str, Any]:
    """A copy of `config` for a model made of the layers `stack` (None: as they were), stored as `dtype`.

    `layers` is the layer count that `config` speaks of; `dtype` is the header's string, None leaves it alone.
    """
    new = copy.deepcopy(dict(config))
    part: Any = layered(new, layers)
    if stack is not None and part is not None:
        for key in [key for key in part if _is_per_layer(key, part[key], layers)]:
            part[key] = [_entry(key, part[key], origin, layers) for origin in stack]
        for key in NUMBERS:
            if isinstance(part.get(key), list):
                part[key] = [at for at, origin in enumerate(stack) if _listed(key, part[key], origin)]
        for key in count_keys(part, layers):
            part[key] = len(stack)
    if dtype is not None:
        _set_dtype(new, DTYPES[dtype].torch)
    return new


def _is_per_layer(key: str, value: Any, layers: int) -> bool:
    return isinstance(value, list) and len(value) == layers and key not in NOT_PER_LAYER + NUMBERS


def _of(origin: Origin, key: str) -> Any:
    """The source model's own value, wherever its config keeps it."""
    found = origin[0] or {}
    parts = [found, *(found[part] for part in PARTS if isinstance(found.get(part), dict))]
    return next((part[key] for part in parts if key in part), None)


def _entry(key: str, base: list[Any], origin: Origin, layers: int) -> Any:
    own = _of(origin, key)
    values = own if isinstance(own, list) and origin[1] < len(own) else base
    return values[min(origin[1], layers - 1)]


def _listed(key: str, base: list[Any], origin: Origin) -> bool:
    own = _of(origin, key)
    return origin[1] in (own if isinstance(own, list) else base)


def _set_dtype(config: dict[str, Any], name: str | None) -> None:
    parts = [config, *(config[key] for key in PARTS if isinstance(config.get(key), dict))]
    for part in parts:
        for key in ("torch_dtype", "dtype"):
            if key in part:
                part[key] = name
    if not any(key in config for key in ("torch_dtype", "dtype")):
        config["torch_dtype"] = name
