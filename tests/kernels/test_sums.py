"""Sums in a fixed order: against exact fractions, cut into parts, on a GPU's programs, far into a tensor."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import device, drop_rescale, norms_and_dots, reference, window_norms
from streammerge.kernels.queue import Queue
from streammerge.kernels.reference import DTYPES, span

interpreted = pytest.mark.skipif(not device.INTERPRETED, reason="sets the programs' numbers in the interpreter")


@pytest.fixture
def two_blocks(monkeypatch):
    """Programs of two blocks each, as on a GPU: some have whole blocks alone, one has the ragged last."""
    monkeypatch.setattr(device, "INTERPRETED", False)
    for module in (norms_and_dots, drop_rescale, window_norms):
        monkeypatch.setattr(module, "LAUNCH", {16: {"BLOCKS": 2, "UNROLL": 3, "num_warps": 4}})


@pytest.fixture
def far(monkeypatch):
    """The grid begins at this program."""
    from triton.runtime.interpreter import interpreter_builder

    def begin(program):
        monkeypatch.setattr(
            interpreter_builder,
            "set_grid_idx",
            lambda x, y, z: setattr(interpreter_builder, "grid_idx", (x + program, y, z)),
        )

    return begin


def gram(tensors, base, block):
    pairs = len(tensors) * (len(tensors) + 1) // 2
    partials = np.full((-(-tensors[0].numel() // block), pairs), np.nan)
    kernel.host("norms_and_dots").host(reference.spans(tensors), base if base is None else span(base), block, partials)
    return partials


def launch_columns(tensors, base, ncols, sums, parts):
    """In parts of whole rows, on one queue."""
    queue = Queue.on(arguments.DEVICE)
    tensors, base = arguments.moved([tensors, base], arguments.DEVICE)
    for rows in parts:
        cut = [t[rows] for t in tensors], base if base is None else base[rows]
        norms_and_dots.launch_columns(queue, *reference.spans(cut, queue), ncols, sums)
    queue.end().wait()
    queue.finish()


def test_by_hand():
    x, y, base = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, -1.0]), torch.ones(3)
    assert gram([x, y], None, 2).tolist() == [[5, 2, 1], [9, -3, 1]]
    assert gram([x, y], base, 4096).tolist() == [[5, -4, 5]]


def test_close_to_the_exact_sum():
    """Each of the 32 rows and 7 halvings rounds once, by at most 2**-53 of what has come together so far."""
    _, base, one, two = reference.tensors(4096, ("BF16", "F32"), 4, "cpu", 8)
    values = [(t.float() - base.float()).tolist() for t in (one, two)]
    products = [Fraction(a) * Fraction(b) for a, b in zip(*values, strict=True)]
    error = abs(Fraction(float(gram([one, two], base, 4096)[0, 1])) - sum(products))
    assert error <= 39 * Fraction(1, 1 << 53) * sum(map(abs, products))
    assert error < Fraction(1, 10**12)


@pytest.mark.parametrize("block", [4096, 1, 5, 129, 1000])
def test_parts_at_blocks_are_the_whole(block):
    _, base, *tensors = reference.tensors(9999, ("BF16", "F32", "F16"), 5, "cpu", 2)
    whole, at = gram(tensors, base, block), 2 * block
    parts = [gram([t[s] for t in tensors], base[s], block) for s in (slice(0, at), slice(at, None))]
    assert np.array_equal(whole, np.concatenate(parts))
    exact = torch.stack([t.float() - base.float() for t in tensors]).double()
    exact = (exact @ exact.T)[np.triu_indices(3)]
    assert np.allclose(whole.sum(0), exact.numpy(), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("block", [4096, 640, 1600, 1001, 5])
@pytest.mark.parametrize(("count", "based"), [(1, False), (2, True), (4, False), (7, True)])
def test_launch_on_programs_of_a_gpu(two_blocks, block, count, based):
    numel = min(5 * block, 9000) + 1
    _, base, *tensors = reference.tensors(numel, ("BF16",), count + 2, "cpu", 6)
    partials = np.full((-(-numel // block), count * (count + 1) // 2), np.nan)
    arguments.launch_agrees(norms_and_dots, (tensors, base if based else None, block, partials))


@pytest.mark.parametrize("names", [("F64",), ("F8_E4M3",), ("F8_E5M2", "F64", "F32")])
def test_launch_on_other_dtypes(two_blocks, names):
    _, base, *tensors = reference.tensors(9000, names, 4, "cpu", 7)
    arguments.launch_agrees(norms_and_dots, (tensors, base, 4096, np.full((3, 3), np.nan)))
    arguments.launch_agrees(drop_rescale, (base, tensors[0], 0.3, 1 << 63, 7, 1, 4096, np.full((3, 2), np.nan)))
    arguments.launch_agrees(window_norms, (base, tensors[0], 0x3D000000, 0x3E000000, np.full((3, 2), np.nan)))


@pytest.mark.parametrize("bounds", [(-5, 1 << 40), (0x7FC00000, 1 << 31), (0x7F800000, 0x7FFFFFFF), (9, -9)])
def test_bounds_beyond_every_key(bounds):
    args = arguments.shifted(window_norms.inputs(5000, ("F32",), *bounds), 0)
    arguments.poison(args)
    arguments.agree(window_norms, args)
    arguments.launch_agrees(window_norms, args)


@pytest.mark.parametrize("density", [0.0, 2.0**-32, 0.25, 1 - 2.0**-32, 1.0])
def test_densities_at_the_ends(two_blocks, density):
    args = drop_rescale.inputs(9000, ("F32",), density, 0)
    arguments.agree(drop_rescale, args)
    arguments.launch_agrees(drop_rescale, args)


@pytest.mark.parametrize(("ncols", "count"), [(1, 2), (7, 2), (600, 3), (1300, 1), (33, 7)])
@pytest.mark.parametrize("based", [True, False])
def test_columns(ncols, count, based):
    numel, pairs = ncols * 100, count * (count + 1) // 2
    _, base, *tensors = reference.tensors(numel, ("BF16", "F32"), count + 2, "cpu", 3)
    base = base if based else None
    sums, launched, expected = (np.ones((ncols, pairs)) for _ in range(3))
    parts = slice(0, 4 * ncols), slice(4 * ncols, numel), slice(0, 0)
    for rows in parts:
        cut = [t[rows] for t in tensors], base if base is None else base[rows]
        kernel.host("norms_and_dots").columns(*reference.spans(cut), ncols, sums)
    launch_columns(tensors, base, ncols, launched, parts)
    norms_and_dots.reference_columns(tensors, base, ncols, expected)
    assert np.array_equal(sums, expected)
    assert np.array_equal(launched, expected)
    values = torch.stack([t.float() - base.float() if based else t.float() for t in tensors]).double()
    exact = values[0].square().view(100, ncols).sum(0).numpy()
    assert np.allclose(sums[:, 0] - 1, exact, rtol=1e-12, atol=1e-12)


def test_columns_with_nan():
    x = torch.arange(12.0)
    x[4] = torch.nan
    sums, launched = np.zeros((3, 1)), np.zeros((3, 1))
    kernel.host("norms_and_dots").columns([span(x)], None, 3, sums)
    launch_columns([x], None, 3, launched, [slice(0, 12)])
    assert np.array_equal(sums, launched, equal_nan=True)
    assert np.isnan(sums[:, 0]).tolist() == [False, True, False]


def test_norms_before_and_after_dropping_in_parts():
    _, base, expert = reference.tensors(10_000, ("BF16",), 3, "cpu", 4)
    args = 0.4, 99, 7, 1
    whole = np.full((3, 2), np.nan)
    kernel.host("drop_rescale").host(span(base), span(expert), *args, 0, whole)
    part = np.full((2, 2), np.nan)
    kernel.host("drop_rescale").host(span(base[4096:]), span(expert[4096:]), *args, 4096, part)
    assert np.array_equal(whole[1:], part)
    exact = (expert.float() - base.float()).double().abs().sum().item()
    assert abs(whole[:, 0].sum() - exact) < 1e-9 * exact
    arguments.agree(drop_rescale, (base, expert, *args, 0, np.empty((3, 2))))


@interpreted
@pytest.mark.parametrize("name", list(DTYPES))
def test_blocks_beyond_the_reach_of_32_bits(far, name):
    """Program 2**20 of 2 blocks of 4,096: element 2**33. It is told that the tensor begins that far before."""
    _, x, y = reference.tensors(8000, (name,), 3, "cpu", 5)
    got, first, item = np.full((2, 3), np.nan), 1 << 21, x.element_size()
    far(1 << 20)
    norms_and_dots._blocks[(1,)](
        tuple(t.data_ptr() - item * 4096 * first for t in (x, y)),
        got.ctypes.data - 24 * first,
        4096,
        4096 * first + 8000,
        0,
        0,
        2,
        CODES=device.codes(span(x), span(y)),
        ALIGN=1,
        BASED=0,
        SIDES=(2, 0),
        BLOCKS=2,
        UNROLL=2,
    )
    assert np.array_equal(got, gram([x, y], None, 4096))


@interpreted
def test_masks_beyond_the_reach_of_32_bits(far):
    args = drop_rescale.inputs(8192, ("BF16",), 0.3, 0)
    base, expert, density, seed, tensor_id, expert_id, _, expected = args
    start, got, first = 1 << 35, np.full((2, 2), np.nan), 1 << 21
    drop_rescale.reference(base, expert, density, seed, tensor_id, expert_id, start + 4096 * first, expected)
    far(1 << 20)
    drop_rescale._norms[(1,)](
        *(t.data_ptr() - 2 * 4096 * first for t in (base, expert)),
        got.ctypes.data - 16 * first,
        start,
        drop_rescale.threshold(density) - 1,
        1,
        seed,
        0,
        tensor_id,
        expert_id,
        4096 * first + 8192,
        CODES=device.codes(span(base), span(expert)),
        ALIGN=1,
        DRAW=True,
        BLOCK=4096,
        BLOCKS=2,
        UNROLL=2,
    )
    assert np.array_equal(got, expected)


@interpreted
def test_columns_beyond_the_reach_of_32_bits(far):
    """Three rows of 2**31 + 32 columns, in memory of which but the last columns' pages are ever touched."""
    ncols = (1 << 31) + 32
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000  # MAP_NORESERVE: none of it is set aside
    memory = np.frombuffer(mmap.mmap(-1, 3 * ncols, flags=flags), np.uint8)
    expected = np.ones(32)
    for row in range(3):
        values = torch.arange(32.0).mul(row + 1).to(torch.float8_e5m2)
        memory[(row + 1) * ncols - 32 : (row + 1) * ncols] = reference.bits(values).numpy()
        expected += values.double().square().numpy()
    got = np.ones(32)
    far(1 << 26)
    norms_and_dots._columns[(1,)](
        (memory.ctypes.data,),
        got.ctypes.data - 8 * (ncols - 32),
        ncols,
        3,
        0,
        0,
        1,
        CODES=(5,),
        ALIGN=1,
        BASED=0,
        SIDES=(1, 0),
        COLUMNS=32,
        UNROLL=2,
    )
    assert np.array_equal(got, expected)


def test_columns_compile_for_gpus_that_are_not_here():
    """To machine code, without spilled registers, for one to sixteen inputs."""
    code = """
import compiled, numpy as np
from triton.runtime import driver
from streammerge.kernels import norms_and_dots, reference
driver.set_active(compiled.Driver(90))
queue = compiled.Compiler.on("cpu")
for count in (1, 3, 16):
    queue.built = []
    _, base, *tensors = reference.tensors(640, ("BF16",), count + 2, "cpu", 0)
    sums = np.zeros((64, count * (count + 1) // 2))
    norms_and_dots.launch_columns(queue, *reference.spans([tensors, base], queue), 64, sums)
    for function, made in queue.built:
        row = compiled.describe("norms_and_dots", count, function, made)
        assert not row["spilled_bytes"] and not row["fused"] and not row["flushes"], row
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=here, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
