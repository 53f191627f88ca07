"""Files that a recipe names, and names of batches that no file has."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def find_file(name: str, near: Sequence[Path]) -> Path:
    """A file from here, or from beside the recipe."""
    path = Path(name).expanduser()
    return next((place for place in (path, *(folder / path for folder in near)) if place.exists()), path)


def batch_digest(batches: Sequence[Mapping[str, Any]]) -> str:
    """Names batches by their tensors; other values by their text."""
    import torch

    found = hashlib.sha256()
    for batch in batches:
        for name, value in batch.items():
            held = isinstance(value, torch.Tensor)
            found.update(f"{name} {value.dtype} {tuple(value.shape)}".encode() if held else f"{name} {value}".encode())
            if held:
                found.update(value.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def loss_name(loss: Callable[..., Any]) -> str:
    """Where a loss comes from; what it does is not looked at."""
    return f"{loss.__module__}.{getattr(loss, '__qualname__', type(loss).__qualname__)}"
