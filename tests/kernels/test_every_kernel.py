"""What holds for every kernel, by name: a new file joins by existing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import arguments
import pytest

from streammerge import kernel
from streammerge.errors import RecipeError

CASES = [(name, case) for name in kernel.names() for case in kernel.find(name).CASES]
IDS = [f"{name}-{case}" for name, case in CASES]


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_host_is_the_reference(name, case):
    module = kernel.find(name)
    arguments.agree(module, module.inputs(*case))


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_with_nan_and_infinities_at_odd_addresses(name, case):
    module = kernel.find(name)
    args = arguments.shifted(module.inputs(*case, seed=1), 3)
    arguments.poison(args)
    arguments.agree(module, args)


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_launch_is_the_reference(name, case):
    module = kernel.find(name)
    arguments.launch_agrees(module, module.inputs(*case))


@pytest.mark.parametrize(("name", "case"), CASES, ids=IDS)
def test_launch_with_nan_and_infinities_at_odd_addresses(name, case):
    module = kernel.find(name)
    args = arguments.shifted(module.inputs(*case, seed=1), 3)
    arguments.poison(args)
    arguments.launch_agrees(module, args)


@pytest.mark.parametrize("few", [2, pytest.param(0, marks=pytest.mark.slow)], ids=["few", "all"])
@pytest.mark.parametrize("name", kernel.names())
def test_compiles_for_gpus_that_are_not_here(name, few):
    """To machine code: no spilled registers, no contracted or approximate arithmetic."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compiled.py"), name, "90", str(few)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert rows
    for row in rows:
        assert not row["spilled_bytes"], row
        assert not row["fused"] or getattr(kernel.find(name), "FUSED", False), row
        assert not row["approximate"], row
        assert not row["flushes"], row


@pytest.mark.parametrize("name", kernel.names())
def test_bytes_moved_counts_every_tensor_once(name):
    module = kernel.find(name)
    args = module.inputs(*module.CASES[2])
    sizes = [t.numel() * t.element_size() for t in arguments.tensors_in(args)]
    assert module.bytes_moved(*args) == sum(sizes)


def test_names_are_files_with_a_reference():
    assert {"add_deltas", "magnitude_histogram", "sign_elect", "drop_rescale", "norms_and_dots"} <= set(kernel.names())
    assert "numerics" not in kernel.names()


def test_an_unknown_kernel_is_named():
    with pytest.raises(RecipeError, match="no kernel 'add_delta'"):
        kernel.find("add_delta")


def test_a_gpu_never_falls_back_to_the_cpu(monkeypatch):
    module = kernel.find("add_deltas")
    monkeypatch.delattr(module, "launch", raising=False)
    with pytest.raises(RecipeError, match="add_deltas has no version for cuda"):
        kernel.describe("add_deltas", "cuda")
    assert kernel.describe("add_deltas", "cpu") == "numba"


def test_the_cpu_imports_neither_torch_nor_triton():
    code = "import sys; from streammerge import kernel; [kernel.host(n) for n in kernel.names()]; "
    code += "assert not {'torch', 'triton'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_works_where_no_cache_can_be_written():
    """numba finds no folder for its cache: the loop is compiled and used all the same."""
    code = """
import numpy as np
from numba.core import caching
caching.CacheImpl._locator_classes = []
from streammerge.kernels.host import norms_and_dots as kernel
from streammerge.kernels.numerics import Span
x, partials = np.arange(5, dtype=np.float32), np.empty((1, 1))
kernel.host([Span(x.ctypes.data, "F32", 5)], None, 5, partials)
assert partials[0, 0] == 30, partials
"""
    subprocess.run([sys.executable, "-c", code], check=True)
