"""Iso-C and Iso-CTS against the authors' arithmetic in float64."""

import numpy as np
import pytest
import torch
from merging import run
from test_tsvm import AGREE, distance, experts, polar, spectrum

from streammerge.errors import CheckpointError, RecipeError
from streammerge.methods.iso_c import IsoC
from streammerge.methods.iso_cts import IsoCts

SHAPES = [(48, 48, 3), (40, 96, 4), (96, 40, 2), (30, 33, 7), (20, 31, 1)]


def iso_c(taus):
    u, s, v = np.linalg.svd(sum(tau.astype(np.float64) for tau in taus), full_matrices=False)
    return s.mean() * u @ v


def iso_cts(taus, fraction=0.8):
    """The authors' steps, one after the other."""
    taus = [tau.astype(np.float64) for tau in taus]
    small, count = min(taus[0].shape), len(taus)
    own = round((small - int(small * fraction)) / count)
    common = small - own * count
    u, s, v = np.linalg.svd(sum(taus), full_matrices=False)
    parts = [(u[:, :common], s[:common], v[:common])]
    for tau in taus:
        x, y, z = np.linalg.svd(tau - parts[0][0] @ parts[0][0].T @ tau, full_matrices=False)
        parts.append((x[:, :own], y[:own], z[:own]))
    left, values, right = (np.concatenate([part[i] for part in parts], (1, 0, 0)[i]) for i in range(3))
    return values.sum() / small * polar(left) @ polar(right)


def merged(method, taus):
    out, _ = run(method, np.zeros_like(taus[0]), taus)
    return out.astype(np.float64)


@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_iso_c(rows, columns, count):
    taus = experts(rows, columns, count)
    assert distance(merged(IsoC(scale=1.6), taus), 1.6 * iso_c(taus)) < AGREE
    weights = tuple(1.0 + i for i in range(count))
    scaled = [w * tau for w, tau in zip(weights, taus, strict=True)]
    assert distance(merged(IsoC(weight=weights), taus), iso_c(scaled)) < AGREE


def test_iso_c_has_one_singular_value():
    found = merged(IsoC(), experts(40, 56, 3))
    values = np.linalg.svd(found, compute_uv=False)
    assert values.max() < (1 + 1e-5) * values.min()


@pytest.mark.parametrize("worst", [1e-3, 1e-5, 3e-6])
def test_iso_c_of_wide_spectra(worst):
    """What is too wide for fp32 steps goes the fp64 way."""
    tau = spectrum(np.random.default_rng(1), 40, 56, np.geomspace(1, worst, 40))
    work = IsoC().solver(40, 56, 1)
    work.take(0, torch.tensor(tau))
    assert distance(work.finish().numpy(), iso_c([tau])) < AGREE
    assert work.route.startswith("newton-schulz" if worst > 1e-4 else "eigh")


@pytest.mark.parametrize("columns", [30, 50])
def test_iso_c_leaves_out_what_is_rounding(columns):
    rng = np.random.default_rng(2)
    tau = np.float32(rng.normal(size=(40, 6)) @ rng.normal(size=(6, columns)))
    u, s, v = np.linalg.svd(tau.astype(np.float64), full_matrices=False)
    wanted = s[:6].sum() / min(tau.shape) * u[:, :6] @ v[:6]
    assert distance(merged(IsoC(), [tau]), wanted) < AGREE
    assert distance(merged(IsoC(), [tau, tau]), 2 * wanted) < AGREE
    assert not merged(IsoC(), [tau, -tau]).any()


@pytest.mark.parametrize("fraction", [0.8, 0.5, 0.0, 1.0])
@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_iso_cts(rows, columns, count, fraction):
    taus = experts(rows, columns, count)
    found = merged(IsoCts(common_fraction=fraction, scale=1.4), taus)
    assert distance(found, 1.4 * iso_cts(taus, fraction)) < AGREE


def test_all_common_is_iso_c_and_one_expert_too():
    taus = experts(36, 30, 3)
    assert distance(merged(IsoCts(common_fraction=1.0), taus), iso_c(taus)) < AGREE
    assert distance(merged(IsoCts(), taus[:1]), iso_c(taus[:1])) < AGREE


def test_iso_cts_of_experts_that_have_nothing_of_their_own():
    tau = experts(30, 44, 1)[0]
    zero = np.zeros_like(tau)
    u, s, v = np.linalg.svd(3 * tau.astype(np.float64), full_matrices=False)
    common = 24  # of 30, two for each expert
    # Equal experts: their remainders have equal directions, which are kept once.
    own = s[common : common + 2] / 3
    kept = u[:, : common + 2] @ v[: common + 2]
    assert distance(merged(IsoCts(), [tau] * 3), (s[:common].sum() + 3 * own.sum()) / 30 * kept) < AGREE
    assert not merged(IsoCts(), [zero] * 3).any()
    # All of rank 3: the sum has all directions, what is left is rounding.
    rng = np.random.default_rng(3)
    low = np.float32(rng.normal(size=(30, 3)) @ rng.normal(size=(3, 44)))
    u, s, v = np.linalg.svd(low.astype(np.float64), full_matrices=False)
    assert distance(merged(IsoCts(), [low, 2 * low, zero]), 3 * s[:3].sum() / 30 * u[:, :3] @ v[:3]) < AGREE


def test_iso_cts_reads_every_expert_twice():
    method = IsoCts()
    assert method.rounds(3) == 6
    assert [method.reads(i, 3) for i in range(7)] == [(0, 1), (0, 2), (0, 3), (0, 1), (0, 2), (0, 3), (0,)]
    taus = experts(24, 36, 3)
    base = np.ones((24, 36), np.float32)
    models = [base + tau for tau in taus]
    whole, merger = run(method, base, models)
    cut, _ = run(method, base, models, tile=100, threads=2, streamed=True)
    assert np.array_equal(whole, cut)
    assert len(merger.flags) == 4
    models[2][0, 0] = np.nan
    with pytest.raises(CheckpointError, match="expert 3 holds a NaN"):
        run(method, base, models)


def test_norm_guard_holds_for_two_passes_too():
    taus = experts(24, 36, 3)
    longest = max(np.linalg.norm(tau) for tau in taus)
    for method in (IsoCts, IsoC):
        assert np.linalg.norm(merged(method(norm_guard=0.5, scale=3.0), taus)) == pytest.approx(0.5 * longest, rel=1e-5)


def test_fractions_outside_are_refused():
    with pytest.raises(RecipeError, match=r"must lie in \[0, 1\]"):
        IsoCts(common_fraction=1.2)
