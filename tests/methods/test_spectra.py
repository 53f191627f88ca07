"""Subspaces and polar factors: every route against plain decompositions in float64, and which route is taken."""

import numpy as np
import pytest
import torch

from streammerge.methods import _polar as polars
from streammerge.methods import _spectra as spectra

EXACT = 3e-5


def bases(sizes, length, seed=0, common=0.0):
    """Orthonormal rows, block by block; the first ones of the blocks are `common` alike."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(1, length))
    blocks = []
    for size in sizes:
        rows = rng.normal(size=(size, length))
        rows[0] = (1 - common) * rows[0] + common * shared
        blocks.append(np.linalg.qr(rows.T)[0].T)
    return torch.tensor(np.concatenate(blocks))


def factor(x):
    u, _, v = torch.linalg.svd(x.double(), full_matrices=False)
    return u @ v


def distance(a, b):
    return float((a.double() - b).norm() / b.norm())


@pytest.mark.parametrize(
    ("sizes", "length"), [((16, 16, 16), 48), ((64, 64), 128), ((5, 9), 14), ((9, 5), 40), ((1, 1), 2)]
)
def test_all_routes_agree(sizes, length):
    x = bases(sizes, length)
    wanted = factor(x)
    found = {"eigh": polars.inverse_root(x, polars.CUTOFF), "ns": polars.newton_schulz(x.float(), len(sizes))}
    if len(sizes) == 2:
        found["pair"] = polars.pair(x, sizes[0])
    for route, each in found.items():
        assert distance(each.factor, wanted) < EXACT, route
        assert each.deviation < polars.ORTHONORMAL
        assert float(polars.deviation(each.factor.double())) == pytest.approx(each.deviation, abs=3e-7)
    assert found["ns"].route in ("newton-schulz 8", "newton-schulz 9")


@pytest.mark.parametrize("seed", range(8))
def test_newton_schulz_up_to_condition_3000(seed):
    rng = np.random.default_rng(seed)
    left, right = (np.linalg.qr(rng.normal(size=(n, 40)))[0] for n in (40, 70))
    x = torch.tensor(left * np.geomspace(1.7, 1.7 / 3e3, 40) @ right.T)
    for blocks in (3, 0):  # with a bound that is known, and without
        found = polars.newton_schulz(x.float(), blocks)
        assert distance(found.factor, torch.tensor(left @ right.T)) < EXACT
        assert found.deviation < polars.ORTHONORMAL


def test_bf16_products_would_be_noticed():
    """TF32 or bf16 by accident must not pass as fp32."""
    x = bases((16, 16, 16), 48)
    rounded, gram = (lambda y: y.bfloat16().float()), spectra.gram
    y = x.float() / 1.75
    for a, b, c in (*polars.POLAR_EXPRESS, *[polars.QUINTIC] * 5):
        square = gram(rounded(y))
        y = a * y + rounded(b * square + c * gram(rounded(square))) @ rounded(y)
    assert distance(y, factor(x)) > 100 * EXACT
    assert polars.deviation(y) > 100 * polars.ORTHONORMAL


def test_coefficients_that_do_not_converge_would_be_noticed(monkeypatch):
    monkeypatch.setattr(polars, "QUINTIC", (3.4445, -4.7750, 2.0315))
    assert polars.newton_schulz(bases((8, 8), 16).float(), 2) is None


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
def test_any_matrix_at_any_scale(scale):
    x = scale * torch.tensor(np.random.default_rng(1).normal(size=(30, 45)))
    found = polars.polar(x.float())
    assert distance(found.factor, factor(x)) < EXACT
    assert found.route.startswith("newton-schulz")


def test_routes():
    assert polars.polar(bases((7,), 9), [0, 7, 0]).route == "orthonormal"
    assert polars.polar(bases((4, 4), 9), [4, 0, 4]).route == "pair"
    assert polars.polar(bases((4, 4), 9).float(), [4, 4]).route.startswith("newton-schulz")
    assert polars.polar(bases((3, 3, 3), 9), [3, 3, 3]).route.startswith("newton-schulz")
    assert polars.polar(torch.zeros(3, 9)).route == "eigh"
    assert polars.polar(torch.zeros(0, 9), [0, 0]).route == "none"


@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("common", [1.0, 1 - 1e-7])
def test_shared_directions_are_kept_once(count, common):
    """Rows of the polar factor are then shares of one direction: a partial isometry of the rank that there is."""
    sizes = [6] * count
    found = polars.polar(bases(sizes, 40, common=common), sizes)
    assert found.route == "eigh"
    values = torch.linalg.svdvals(found.factor)
    rank = 6 * count - count + 1
    assert torch.allclose(values[:rank], torch.ones(rank), atol=1e-4)
    assert torch.all(values[rank:] < 1e-6)


def test_nothing_comes_of_nothing():
    for rows in (0, 3):
        assert not polars.polar(torch.zeros(rows, 9), [rows]).factor.any()
        assert polars.polar(torch.zeros(rows, 9)).factor.shape == (rows, 9)


@pytest.mark.parametrize(("rows", "columns"), [(40, 40), (30, 100), (100, 30), (2, 7)])
@pytest.mark.parametrize("block", [64, 1 << 21])
def test_leading(rows, columns, block, monkeypatch):
    monkeypatch.setattr(spectra, "BLOCK", block)
    x = torch.tensor(np.random.default_rng(2).normal(size=(rows, columns)), dtype=torch.float32)
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    rank = min(rows, columns) // 2
    found = spectra.leading(x, rank)
    assert torch.allclose(found.values, s[:rank], rtol=1e-12)
    for got, wanted in ((found.left, u[:, :rank].T), (found.right, v[:rank])):
        assert got.is_contiguous()
        assert polars.deviation(got) < 1e-12
        assert torch.allclose(got.T @ got, wanted.T @ wanted, atol=1e-10)


@pytest.mark.parametrize(
    ("rows", "columns", "inner"), [(60, 40, 7), (40, 60, 7), (20, 50, 20), (12, 9, 30), (30, 30, 1)]
)
@pytest.mark.parametrize("rank", [3, 15])
def test_leading_of_factors(rows, columns, inner, rank):
    """The product is never formed, and as good as decomposed in fp64."""
    rng = np.random.default_rng(6)
    b, a = (torch.tensor(rng.normal(size=shape), dtype=torch.float32) for shape in ((rows, inner), (inner, columns)))
    dense = b.double() @ a.double()
    u, s, v = torch.linalg.svd(dense, full_matrices=False)
    kept = min(rank, inner, rows, columns)
    found = spectra.leading_of_factors(b, a, rank)
    assert torch.allclose(found.values, s[:kept], rtol=1e-12)
    wanted = u[:, :kept] * s[:kept] @ v[:kept]
    assert (found.left.T * found.values @ found.right - wanted).norm() < 1e-12 * dense.norm()
    for side in (found.left, found.right):
        assert side.dtype == torch.float64
        assert polars.deviation(side) < 1e-12


def test_leading_of_factors_drops_what_is_rounding():
    b, a = torch.randn(20, 4), torch.randn(4, 30)
    b[:, 3] = b[:, 0] * (1 + 1e-7)
    assert len(spectra.leading_of_factors(b, a, 9).values) == 3
    for nothing in (0 * b, b[:, :0]):
        found = spectra.leading_of_factors(nothing, a[: nothing.shape[1]], 9)
        assert found.left.shape == (0, 20)
        assert found.right.shape == (0, 30)


def test_leading_drops_what_is_rounding():
    rng = np.random.default_rng(3)
    x = torch.tensor(rng.normal(size=(30, 4)) @ rng.normal(size=(4, 20))).float()
    assert len(spectra.leading(x, 10).values) == 4
    assert len(spectra.leading(x, 3).values) == 3
    assert len(spectra.leading(x, 0).values) == 0
    assert len(spectra.leading(x, 10, floor=1e9).values) == 0
    assert len(spectra.leading(torch.zeros(5, 6), 3).values) == 0


@pytest.mark.parametrize("rows", [1, 3, 256, 257, 1025])
def test_gram_is_symmetric_to_the_bit(rows):
    x = torch.tensor(np.random.default_rng(4).normal(size=(rows, 33)))
    found = spectra.gram(x)
    assert torch.equal(found, found.T)
    assert torch.allclose(found, x @ x.T, rtol=1e-12, atol=1e-12)
    assert torch.allclose(spectra.gram(x, found.clone(), add=True), 2 * found, rtol=1e-12, atol=1e-12)


def test_inner():
    a, b = (torch.tensor(np.random.default_rng(5).normal(size=(700, 3))) for _ in range(2))
    assert spectra.inner(a.float(), b.float()) == pytest.approx(float((a * b).sum()), rel=1e-6)
