"""Kernels by name: compiled loops on the CPU, Triton on a GPU, and never one in place of the other.

A kernel is a file kernels/<name>.py with `host`, `reference`, `inputs`, `CASES`, `bytes_moved` and, where there is a
GPU version, `launch`; nothing is registered. Importing one compiles it, or loads what an earlier process compiled.
"""

from __future__ import annotations

import importlib
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from streammerge.errors import RecipeError

FOLDER = Path(__file__).parent / "kernels"


def names() -> tuple[str, ...]:
    """Every kernel, sorted. Files that define no reference are helpers of kernels."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    return tuple(sorted(name for name, text in texts.items() if "\ndef reference(" in text))


@cache
def find(name: str) -> ModuleType:
    """The module kernels/<name>.py."""
    if name not in names():
        raise RecipeError(f"there is no kernel {name!r}; there are {', '.join(names())}")
    return importlib.import_module(f"streammerge.kernels.{name}")


def run(name: str, *args: Any, device: str = "cpu", **options: Any) -> Any:
    """Call the kernel where the data is: spans of host memory on the CPU, tensors on a GPU."""
    module = find(name)
    if describe(name, device) == "numba":
        return module.host(*args, **options)
    return module.launch(*args, **options)


def call(name: str, part: str, *args: Any) -> Any:
    """Call a further function of a kernel's module."""
    return getattr(find(name), part)(*args)


def describe(name: str, device: str) -> str:
    """What `run` uses there: numba or triton."""
    module = find(name)
    if device == "cpu":
        return "numba"
    if not hasattr(module, "launch"):
        raise RecipeError(f"kernel {name} has no version for {device}; run with --device cpu")
    return "triton"
