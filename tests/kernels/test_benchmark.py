"""benchmarks/kernels.py where there is no GPU: its rows are right, and it says what is wrong. In child processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"
BROKEN = """
import sys
sys.path.insert(0, sys.argv[1])
import kernels, numpy
assert kernels.without_rows(()) == [], "each kernel wants a row in benchmarks/kernel_rows.py"
from streammerge import kernel
names = kernel.names
kernel.names = lambda: (*names(), "window_wings")
def launch(queue, base, expert, low, high, partials):
    partials[:] = 1
def find(name):
    module = found(name)
    module.launch = launch
    return module
found, kernel.find = kernel.find, find
kernels.main(["--check", "--only", "window_"])
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [str(word) for word in (sys.executable, *command)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def check(*words: str) -> None:
    done = run(FOLDER / "kernels.py", "--check", *(option for word in words for option in ("--only", word)))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    assert document["bounds"] == []
    assert "copy_gigabytes_per_second" not in document
    assert len(document["rows"]) >= len(words)
    for row in document["rows"]:
        assert row["test"] == "ok", row
        assert "ms" not in row, "a time without a GPU"


def test_some_rows_are_right():
    check("add_deltas BF16 K=2", "small tensors", "ties split", "narrow", "window_norms", "fp8_", "5120 tf32x3")


@pytest.mark.slow
def test_every_row_is_right():
    check()


def test_a_wrong_kernel_and_one_without_a_row_fail_the_run():
    done = run("-c", BROKEN, FOLDER)
    assert done.returncode == 1, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    assert lines[0] == "window_wings: no row: this kernel has no row in benchmarks/kernel_rows.py"
    assert lines[1].startswith("window_norms: WRONG: AssertionError: argument 0 4: 36 of 36 entries differ")
    assert [row["test"] for row in json.loads(lines[-1])["rows"]] == ["no row", "WRONG"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_no_figures():
    done = run(FOLDER / "kernels.py")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "no GPU: no figures. --check tests the rows in Triton's interpreter.\n"
