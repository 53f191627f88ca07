"""Kernels by name: compiled loops on the CPU, Triton on a GPU, and never one in place of the other.

A kernel is a file kernels/<name>.py with `launch` (Triton), `reference` (torch, the truth), `inputs`, `CASES` and
`bytes_moved`; what runs on the CPU is `host` in kernels/host/<name>.py. Nothing is registered. Arguments are spans of
memory: where the first of them lies, the kernel runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from streammerge.errors import RecipeError
from streammerge.kernels.numerics import Span

FOLDER = Path(__file__).parent / "kernels"


def names() -> tuple[str, ...]:
    """Every kernel, sorted. Files that define no reference are helpers of kernels."""
    texts = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py")}
    return tuple(sorted(name for name, text in texts.items() if "\ndef reference(" in text))


@cache
def find(name: str) -> ModuleType:
    """The module kernels/<name>.py; it imports torch and triton."""
    return importlib.import_module(f"streammerge.kernels.{_known(name)}")


@cache
def host(name: str) -> ModuleType:
    """What runs on the CPU, kernels/host/<name>.py. Importing it compiles it, or loads what was compiled before."""
    return importlib.import_module(f"streammerge.kernels.host.{_known(name)}")


def run(name: str, *args: Any) -> Any:
    """Call the kernel where its arguments lie. On a GPU the answer is filled in later: see kernels/queue.py."""
    queue = next((span.queue for span in _spans(args)), None)
    return host(name).host(*args) if queue is None else find(name).launch(queue, *args)


def call(name: str, part: str, *args: Any) -> Any:
    """Call a further function of a kernel: <part> on the CPU, launch_<part> on a GPU."""
    queue = next((span.queue for span in _spans(args)), None)
    return getattr(host(name), part)(*args) if queue is None else getattr(find(name), f"launch_{part}")(queue, *args)


def describe(name: str, device: str) -> str:
    """What `run` uses there: numba or triton. Loads it."""
    if device == "cpu":
        host(name)
        return "numba"
    try:
        module = find(name)
    except ImportError as error:
        raise RecipeError(f"--device {device}: {error.name} is not installed; run with --device cpu") from None
    if not hasattr(module, "launch"):
        raise RecipeError(f"kernel {name} has no version for {device}; run with --device cpu")
    return "triton"


def _spans(args: Any) -> Iterator[Span]:
    for arg in args:
        if isinstance(arg, Span):
            yield arg
        elif isinstance(arg, (list, tuple)):
            yield from _spans(arg)


def _known(name: str) -> str:
    if name not in names():
        raise RecipeError(f"there is no kernel {name!r}; there are {', '.join(names())}")
    return name
