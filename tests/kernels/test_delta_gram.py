"""delta_gram: against fp64 in every precision, symmetry, row tiles, odd sizes, marks of NaN; which tile is whose."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import arguments
import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from streammerge import kernel
from streammerge.kernels import delta_gram, gemm, reference
from streammerge.kernels.reference import DTYPES, bits

# Largest |error| / (norm of column i * norm of column j). Roundings of independent signs add up to a twentieth of the
# bounds of one product that gemm.py states; tensor cores truncate as they add, hence the same for ieee and tf32x3.
BOUNDS = {"host": 2e-6, "ieee": 2e-6, "tf32": 2e-4, "tf32x3": 1e-5, "bf16x3": 3e-5}


def gram(base, expert, columns, how="host", out=None, **options):
    """Of deltas [m, columns], on the CPU or by the kernel in one of its precisions; fresh memory is NaN."""
    side = expert.numel() // columns if options.get("rows") else columns
    out = torch.full((side * side,), torch.nan) if out is None else out
    if how == "host":
        kernel.host("delta_gram").host(*reference.spans([out, base, expert, columns]), **options)
    else:
        names = ("weight", "rows", "accumulate", "mirror")
        rest = [options.get(name, default) for name, default in zip(names, (1.0, False, False, True), strict=True)]
        arguments.launch(delta_gram, [out, base, expert, columns, *rest, how])
    return out.view(side, side)


def checkpoints(m, columns, name, seed=0, spread=1e-3):
    """A base and an expert near it."""
    random = torch.Generator().manual_seed(seed)
    base = 0.02 * torch.randn(m * columns, generator=random)
    near = base + spread * torch.randn(m * columns, generator=random)
    return reference.rounded(base, DTYPES[name]), reference.rounded(near, DTYPES[name])


def exact(base, expert, columns, rows=False):
    delta = (expert.float() - base.float()).double().view(-1, columns)
    return delta @ delta.T if rows else delta.T @ delta


def test_by_hand():
    base, expert = torch.tensor([1.0, 1, 1, 1]), torch.tensor([2.0, 3, 0, 1])  # deltas [[1, 2], [-1, 0]]
    assert gram(base, expert, 2).tolist() == [[2, 2], [2, 4]]
    assert gram(base, expert, 2, rows=True).tolist() == [[5, -1], [-1, 1]]
    assert gram(None, expert, 2, weight=0.5).tolist() == [[2, 3], [3, 5]]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("how", list(BOUNDS))
@pytest.mark.parametrize("name", ["F32", "BF16"])
def test_close_to_fp64(name, how, rows):
    base, expert = checkpoints(160, 144, name)
    truth = exact(base, expert, 144, rows)
    norms = truth.diag().sqrt()
    error = (gram(base, expert, 144, how, rows=rows).double() - truth).abs() / (norms[:, None] * norms)
    assert error.max() < BOUNDS[how]


def test_tf32_rounds_and_tf32x3_does_not():
    """Else the interpreter would show nothing of either."""
    base, expert = checkpoints(128, 32, "F32")
    truth = exact(base, expert, 32)
    errors = {how: (gram(base, expert, 32, how) - truth).norm() / truth.norm() for how in BOUNDS}
    assert 2e-5 < errors["tf32"] < 3e-4
    assert 1e-6 < errors["bf16x3"] < 2e-5
    assert errors["tf32x3"] < 3e-6


@pytest.mark.parametrize("how", list(BOUNDS))
def test_symmetric_to_the_bit(how):
    base, expert = checkpoints(50, 200, "F32")
    out = gram(base, expert, 200, how)
    assert torch.equal(bits(out), bits(out.T.contiguous()))


@pytest.mark.parametrize("how", ["host", "tf32x3", "ieee"])
def test_without_mirror_the_lower_triangle_is_left_alone(how):
    base, expert = checkpoints(40, 150, "F32")
    out = gram(base, expert, 150, how, mirror=False)
    whole = gram(base, expert, 150, how)
    below = torch.ones(150, 150, dtype=torch.bool).tril(-1)
    assert out[below].isnan().all()
    assert torch.equal(out[~below], whole[~below])


@pytest.mark.parametrize("how", ["host", *gemm.LAUNCH])
def test_row_tiles_are_the_whole_when_sums_are_exact(how):
    base, expert = (torch.randint(-3, 4, (90 * 70,)).float() for _ in range(2))
    whole, parts = gram(base, expert, 70, how), torch.full((70 * 70,), torch.nan)
    cuts = [0, 1, 33, 33, 64, 90]
    for i, (start, stop) in enumerate(itertools.pairwise(cuts)):
        cut = slice(start * 70, stop * 70)
        last = stop == 90
        gram(base[cut], expert[cut], 70, how, parts, accumulate=i > 0, mirror=last)
    assert torch.equal(whole, parts.view(70, 70))


@pytest.mark.parametrize("how", list(gemm.LAUNCH))
def test_row_tiles_of_whole_depths_are_the_whole_to_the_bit(how):
    base, expert = checkpoints(160, 48, "F32")
    whole, parts = gram(base, expert, 48, how), torch.zeros(48 * 48)
    for start, stop in ((0, 64), (64, 96), (96, 160)):
        gram(base[start * 48 : stop * 48], expert[start * 48 : stop * 48], 48, how, parts, accumulate=True)
    assert torch.equal(bits(whole), bits(parts.view(48, 48)))


@pytest.mark.parametrize("how", ["host", "tf32x3"])
def test_weighted_sum_over_experts(how):
    base, one = checkpoints(64, 80, "BF16", 1)
    _, two = checkpoints(64, 80, "BF16", 2)
    out, weights = torch.full((6400,), torch.nan), (0.3, 1.7)
    for i, (expert, weight) in enumerate(zip((one, two), weights, strict=True)):
        gram(base, expert, 80, how, out, weight=weight, accumulate=i > 0, mirror=i == 1)
    truth = sum(w * exact(base, e, 80) for w, e in zip(weights, (one, two), strict=True))
    assert (out.view(80, 80) - truth).norm() < 1e-5 * truth.norm()


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize(
    ("m", "columns"), [(1, 1), (3, 1), (1, 3), (63, 65), (65, 63), (16, 144), (33, 128), (129, 16)]
)
def test_odd_sizes(m, columns, rows):
    for precision in ("tf32x3", "bf16x3", "ieee"):
        case = (m, columns, ("BF16",), True, rows, True, True, precision)
        arguments.agree(delta_gram, delta_gram.inputs(*case))
        arguments.launch_agrees(delta_gram, delta_gram.inputs(*case))


@pytest.mark.parametrize("rows", [False, True])
def test_more_than_a_panel_on_the_cpu(rows):
    base, expert = (torch.randint(-2, 3, (1100 * 600,)).float() for _ in range(2))
    truth = exact(base, expert, 600, rows).float()
    assert torch.equal(gram(base, expert, 600, rows=rows), truth)
    out = torch.ones(truth.numel())
    gram(base, expert, 600, out=out, rows=rows, accumulate=True, mirror=False, weight=0.5)
    assert torch.equal(out.view(truth.shape), (1 + truth / 2).triu() + torch.ones_like(truth).tril(-1))


@pytest.mark.parametrize("how", ["host", "tf32x3"])
def test_no_rows_add_nothing(how):
    none, before = torch.empty(0), torch.randn(25)
    assert gram(none, none, 5, how).tolist() == [[0.0] * 5] * 5
    after = gram(none, none, 5, how, before.clone(), accumulate=True, mirror=False)
    assert torch.equal(after, before.view(5, 5))


@pytest.mark.parametrize("precision", ["tf32x3", "bf16x3"])
@pytest.mark.parametrize("name", list(DTYPES))
def test_every_dtype(name, precision):
    """Aligned and a whole number of tiles, and neither; with another dtype for the base, and without one."""
    for m, columns, based in ((64, 128, True), (37, 41, True), (37, 48, False)):
        args = delta_gram.inputs(m, columns, (name, "BF16"), based, False, True, True, precision)
        arguments.agree(delta_gram, args)
        arguments.launch_agrees(delta_gram, args)


@pytest.mark.parametrize("how", ["host", "ieee", "tf32", "tf32x3", "bf16x3"])
def test_differences_are_not_rounded(how):
    """1.25 + 256 needs ten bits, two more than its terms; all but bf16 hold it, and two bf16 do."""
    base, expert = torch.tensor([256.0, -256.0]).bfloat16(), torch.tensor([258.0, 1.25]).bfloat16()
    last = 257.25**2 - (0.75**2 if how == "bf16x3" else 0)  # 258 - 0.75
    assert gram(base, expert, 2, how).tolist() == [[4, 514.5], [514.5, last]]


@pytest.mark.parametrize("how", ["host", *gemm.LAUNCH])
def test_what_is_not_finite_marks_its_row_and_column(how):
    base, expert = checkpoints(40, 20, "F32")
    expert[3 * 20 + 7], expert[5 * 20 + 11] = torch.inf, torch.nan
    marked = gram(base, expert, 20, how).isnan()
    expected = torch.zeros(20, 20, dtype=torch.bool)
    expected[[7, 11]] = True
    assert torch.equal(marked, expected | expected.T)


@pytest.mark.parametrize("patch", [128, 256])
@pytest.mark.parametrize("side", [100, 128, 300, 640])
def test_every_tile_is_somebodys(monkeypatch, patch, side):
    """More patches than one, even and odd numbers of them; what nobody writes stays NaN."""
    monkeypatch.setattr(gemm, "PATCH", patch)
    expert = torch.randint(-2, 3, (8 * side,)).float()
    truth = exact(torch.zeros_like(expert), expert, side).float()
    assert torch.equal(gram(None, expert, side, "bf16x3"), truth)
    once = torch.ones(side * side)
    gram(None, expert, side, "bf16x3", once, accumulate=True)
    assert torch.equal(once.view(side, side), truth + 1)


@triton.jit
def _places(out, base, row, column, columns):
    at = gemm.place(row, column, columns)
    tl.store(out, at)
    tl.store(out + 1, gemm.moved(base, at, 1))


def test_places_beyond_32_bits():
    out = torch.zeros(2, dtype=torch.int64, device=arguments.DEVICE)
    _places[(1,)](out, 1 << 46, 300_000, 77, (1 << 24) - 16)
    at = 300_000 * ((1 << 24) - 16) + 77
    assert out.tolist() == [at, (1 << 46) + 2 * at]
    with pytest.raises(AssertionError, match="16777216 columns"):
        gemm.symmetric(None, out, (reference.span(torch.empty(0)),), 1 << 24, False, None, 0, 1, True, "ieee")


def test_flops_and_bytes():
    args = delta_gram.inputs(10, 20, ("F32",), True, False, False, True, "ieee")
    assert delta_gram.flops(*args) == 20 * 21 * 10
    assert delta_gram.flops(*args[:4], 1.0, True) == 10 * 11 * 20
    assert delta_gram.bytes_moved(*args) == 4 * (400 + 200 + 200)


@pytest.mark.parametrize("name", ["delta_gram", "polar_step", "adam_gemm"])
def test_products_use_tensor_cores_and_asynchronous_copies(name):
    """Compiled for an H100; the 16-byte copies where rows are aligned."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compiled.py"), name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert any(row["async_copies"] for row in rows)
    for row in rows:
        case = eval(row["case"])
        assert row["tensor_cores"] == ("ieee" not in case), row
        numbers = [n for n in case[:2] if isinstance(n, int)]
        assert row["async_copies"] or any(np.array(numbers) % 16), row
