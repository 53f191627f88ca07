"""Compiles kernels for a GPU that is not there, and says what the machine code is like.

    python tests/kernels/compiled.py NAME [ARCH [FEW]]      (ARCH: 80, 90, ...; without TRITON_INTERPRET)

Runs `launch` as it is, on tensors that are never read, with a queue that compiles instead of launching. Prints one JSON
object per compiled variant: kernel, case, registers, spilled bytes, shared memory, whether the PTX loads 16 bytes at a
time and whether it contracts a*b + c anywhere.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from streammerge import kernel
from streammerge.kernels import reference
from streammerge.kernels.queue import Queue

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Driver:
    """What Triton asks of a GPU before it compiles."""

    def __init__(self, arch: int) -> None:
        self._arch = arch

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


class Compiler(Queue):
    """Compiles what is submitted."""

    built: list[tuple[str, Any]]

    def submit(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if all(grid):
            made = kernel.warmup(*args, grid=grid, enable_fp_fusion=False, **options)
            self.built.append((kernel.fn.__name__, made))


def describe(name: str, case: Any, function: str, made: Any) -> dict[str, Any]:
    exact = getattr(kernel.find(name), "EXACT_FMA", False)  # fp64 products of fp32 values need no rounding
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [TOOLS / "cuobjdump", "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ptx = made.asm["ptx"]
    numbers = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    return {
        "kernel": name,
        "case": repr(case),
        "function": function,
        "registers": numbers["REG"],
        "spilled_bytes": numbers["STACK"] + numbers["LOCAL"],
        "shared_bytes": numbers["SHARED"],
        "wide_loads": "ld.global.v4.b32" in ptx,
        "fused": bool(re.search(r"\bfma\." if not exact else r"\bfma\.(?!rn\.f64)", ptx)),
        "approximate": bool(re.search(r"\b(div\.full|div\.approx|rcp\.approx|sqrt\.approx|ex2\.approx)", ptx)),
        "flushes": bool(re.search(r"\.ftz\b", ptx)),
        "async_copies": "cp.async.cg.shared.global" in ptx,
        "tensor_cores": bool(re.search(r"\b(wgmma\.mma_async|mma\.sync)\.", ptx)),
    }


def compile_kernel(name: str, arch: int, few: int = 0) -> list[dict[str, Any]]:
    """All cases of a kernel, or `few` of them spread over the list."""
    driver.set_active(Driver(arch))
    module, found = kernel.find(name), []
    cases = [case for case in module.CASES if case[0]]  # no elements: nothing to launch
    for case in cases[:: max(1, len(cases) // few)] if few else cases:
        queue = Compiler.on("cpu")
        queue.built = []
        args = module.inputs(*case)
        module.launch(queue, *reference.spans(args, queue))
        queue.end()
        found += [describe(name, case, function, made) for function, made in queue.built]
    return found


if __name__ == "__main__":
    for row in compile_kernel(sys.argv[1], *map(int, sys.argv[2:] or ["90"])):
        print(json.dumps(row))
