"""The command line with clocks in it: where a merge by a matrix method spends its time.

    python benchmarks/matrix_clocks.py FILE merge RECIPE OUT [options]      as `streammerge merge`; FILE gets the clocks

Every call of the library that multiplies or decomposes matrices is timed in whatever thread it runs, and counted with
the threads that it may use there: core seconds. FLOP are those of the operands' shapes. A product that goes by a name
that is not in PRODUCTS counts as anything else, so that the share of products is never too large. A call costs about
a microsecond more; the smallest product of a 1.3B merge takes some hundred.
"""

from __future__ import annotations

import importlib
import json
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

PRODUCTS = (
    *("torch:mm", "torch:addmm", "torch:matmul"),
    *("torch:Tensor.mm", "torch:Tensor.addmm", "torch:Tensor.addmm_", "torch:Tensor.matmul", "torch:Tensor.__matmul__"),
)
CLOCKS = {
    "products": PRODUCTS,
    "decompositions": ("torch.linalg:eigh", "torch.linalg:svd", "torch.linalg:cholesky", "torch:cholesky_inverse"),
    "adam": ("torch:_fused_adam_",),
    "solvers": tuple(
        f"streammerge.methods.{solver}.{step}"
        for solver in ("tsvm:Directions", "_wudi:Gram")
        for step in ("take", "finish")
    ),
    "norms": ("streammerge.methods._matrices:norm",),
    "task vectors": ("streammerge.methods._matrices:MatrixSurvey.look",),
    "additions": ("streammerge.methods._matrices:MatrixMethod.merge",),
    "other tensors": ("streammerge.methods.task_arithmetic:TaskArithmetic.merge",),
    "waiting for reads": ("streammerge.engine.feed:Feed.next",),
}
INSIDE = ("products", "decompositions", "adam")  # of solvers


@dataclass
class Clock:
    """What all calls of one kind took together."""

    calls: int = 0
    seconds: float = 0.0
    core_seconds: float = 0.0
    single_flop: float = 0.0
    double_flop: float = 0.0


class Clocks:
    """One clock per kind, in every thread."""

    def __init__(self) -> None:
        self.found = {kind: Clock() for kind in CLOCKS}
        self._lock = threading.Lock()

    def install(self) -> None:
        """Put clocks around what CLOCKS names; what does not exist is an AttributeError."""
        for kind, targets in CLOCKS.items():
            for target in targets:
                module, _, path = target.partition(":")
                *outer, name = path.split(".")
                owner: Any = importlib.import_module(module)
                for each in outer:
                    owner = getattr(owner, each)
                setattr(owner, name, self._timed(kind, getattr(owner, name)))

    def _timed(self, kind: str, work: Callable[..., Any]) -> Callable[..., Any]:
        clock, library, multiplies = self.found[kind], kind in INSIDE, kind == "products"

        def timed(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*args, **options)
            finally:
                spent = time.perf_counter() - began
                with self._lock:
                    clock.calls += 1
                    clock.seconds += spent
                    clock.core_seconds += spent * (torch.get_num_threads() if library else 1)
                    if multiplies and args[-1].dtype == torch.float64:
                        clock.double_flop += flop(args[-2], args[-1])
                    elif multiplies:
                        clock.single_flop += flop(args[-2], args[-1])

        return timed


def flop(left: torch.Tensor, right: torch.Tensor) -> float:
    """Of the product of two matrices, or of a matrix and a vector."""
    return float(2 * left.numel() * (right.shape[1] if right.dim() > 1 else 1))


def main() -> None:
    from streammerge.cli import main as command

    target, clocks = Path(sys.argv.pop(1)), Clocks()
    clocks.install()
    try:
        command()
    finally:
        target.write_text(json.dumps({kind: asdict(clock) for kind, clock in clocks.found.items()}))


if __name__ == "__main__":
    main()
