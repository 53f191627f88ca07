"""TSV-Merge against the authors' arithmetic in float64, and the identities that it must keep."""

import numpy as np
import pytest
import torch
from merging import run
from methods.memory import peak_of

from streammerge import method as methods
from streammerge.errors import RecipeError
from streammerge.methods import _spectra as spectra
from streammerge.methods._matrices import LIBRARY
from streammerge.methods.tsvm import Directions, Tsvm

SHAPES = [(48, 48, 3), (40, 96, 4), (96, 40, 2), (64, 70, 5), (31, 20, 3), (36, 36, 2), (9, 8, 8)]
AGREE = 3e-5  # of the norm: what the fp32 routes must keep, up to condition 3e3 of the stacked bases


def rotation(rng, size):
    return np.linalg.qr(rng.normal(size=(size, size)))[0]


def spectrum(rng, rows, columns, values):
    """A matrix with these singular values and random vectors, rounded to fp32."""
    k = len(values)
    return np.float32(rotation(rng, rows)[:, :k] * values @ rotation(rng, columns)[:, :k].T)


def experts(rows, columns, count, seed=0, power=0.7):
    rng = np.random.default_rng(seed)
    small = min(rows, columns)
    return [spectrum(rng, rows, columns, 0.01 * np.arange(1, small + 1) ** -power) for _ in range(count)]


def polar(x):
    u, _, v = np.linalg.svd(x, full_matrices=False)
    return u @ v


def truncated(taus, rank):
    """U_i, S_i, V_i^T of the leading triplets."""
    found = [np.linalg.svd(tau.astype(np.float64), full_matrices=False) for tau in taus]
    return [(u[:, :rank], s[:rank], v[:rank]) for u, s, v in found]


def tsvm(taus, padded=False):
    """The authors' steps, one after the other; `padded` with their buffers of min(m, n) columns."""
    small = min(taus[0].shape)
    rank = small // len(taus)
    u, s, v = (np.concatenate(part, axis) for part, axis in zip(zip(*truncated(taus, rank)), (1, 0, 0)))  # noqa: B905
    if padded:
        free = small - len(s)
        u, s, v = np.pad(u, ((0, 0), (0, free))), np.pad(s, (0, free)), np.pad(v, ((0, free), (0, 0)))
    return polar(u) @ np.diag(s) @ polar(v)


def solve(taus, solver="gram"):
    """The merged task vector, and the solver."""
    rows, columns = taus[0].shape
    work = Tsvm(solver_=solver).solver(rows, columns, len(taus))
    for i, tau in enumerate(taus):
        work.take(i, torch.tensor(tau))
    return work.finish().numpy().astype(np.float64), work


def distance(a, b):
    return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("solver", ["gram", "svd"])
@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_authors_arithmetic(rows, columns, count, solver):
    taus = experts(rows, columns, count)
    found, work = solve(taus, solver)
    assert distance(found, tsvm(taus)) < (AGREE if solver == "gram" else 1e-7)
    usual = {"gram": "pair" if count == 2 else "newton-schulz", "svd": "svd"}[solver]
    assert all(route.startswith(usual) for route in work.routes)


def test_unused_columns_change_nothing():
    taus = experts(64, 70, 5)  # 12 of each, 4 unused
    assert distance(tsvm(taus, padded=True), tsvm(taus)) < 1e-12
    assert distance(solve(taus)[0], tsvm(taus, padded=True)) < AGREE


@pytest.mark.parametrize("solver", ["gram", "svd"])
def test_one_expert_comes_out_as_it_is(solver):
    (tau,) = experts(20, 30, 1)
    assert np.array_equal(solve([tau], solver)[0], tau)


@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_singular_values_are_those_that_were_kept(rows, columns, count):
    taus = experts(rows, columns, count, seed=1)
    kept = np.sort(np.concatenate([s for _, s, _ in truncated(taus, min(rows, columns) // count)]))[::-1]
    found, _ = solve(taus)
    np.testing.assert_allclose(np.linalg.svd(found, compute_uv=False)[: len(kept)], kept, atol=1e-5 * kept[0])
    assert np.linalg.norm(found) ** 2 == pytest.approx((kept**2).sum(), rel=1e-5)


@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_a_sum_of_truncations_whitened_on_both_sides(rows, columns, count):
    taus = experts(rows, columns, count, seed=2)
    parts = truncated(taus, min(rows, columns) // count)

    def root(x):
        values, vectors = np.linalg.eigh(x)
        values = np.where(values > 1e-11, np.maximum(values, 1e-300) ** -0.5, 0)
        return vectors * values @ vectors.T

    left, right = root(sum(u @ u.T for u, _, _ in parts)), root(sum(v.T @ v for _, _, v in parts))
    wanted = left @ sum(u * s @ v for u, s, v in parts) @ right
    assert distance(wanted, tsvm(taus)) < 1e-9
    assert distance(solve(taus)[0], wanted) < AGREE


@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_only_subspaces_matter(rows, columns, count):
    """P_U blockdiag(B_i^T tau_i C_i) P_V with any bases B_i, C_i of the leading subspaces."""
    taus, rng = experts(rows, columns, count, seed=12), np.random.default_rng(13)
    left, cores, right = [], [], []
    for tau, (u, _, v) in zip(taus, truncated(taus, min(rows, columns) // count), strict=True):
        left.append(u @ rotation(rng, u.shape[1]))
        right.append(rotation(rng, len(v)) @ v)
        cores.append(torch.tensor(left[-1].T @ tau @ right[-1].T))
    p_u, p_v = polar(np.concatenate(left, 1)), polar(np.concatenate(right))
    assert np.allclose(p_u.T @ p_u, np.eye(p_u.shape[1]), atol=1e-10)
    wanted = p_u @ torch.block_diag(*cores).numpy() @ p_v
    assert distance(wanted, tsvm(taus)) < 1e-9
    assert distance(solve(taus)[0], wanted) < AGREE


def test_orthogonal_tasks_are_truncated_and_added():
    rng = np.random.default_rng(3)
    left, right = rotation(rng, 30), rotation(rng, 24)
    parts = [slice(0, 8), slice(8, 16), slice(16, 24)]
    taus = [np.float32(left[:, at] * np.linspace(2, 1, 8) @ right[:, at].T) for at in parts]
    assert distance(solve(taus)[0], sum(taus)) < AGREE  # rank 8 = k
    taus = [np.float32(left[:, at] * [3, 2, 1, 1, 1, 1, 1, 1] @ right[:, at].T) for at in parts]
    many = [*taus, *[np.zeros_like(taus[0])] * 9]  # twelve experts, so that k = 2
    wanted = sum(u * s @ v for u, s, v in truncated(taus, 2))
    assert distance(solve(many)[0], wanted) < AGREE


@pytest.mark.parametrize("count", [2, 3])
def test_equivariances(count):
    taus = experts(24, 36, count, seed=4)
    found, _ = solve(taus)
    rng = np.random.default_rng(5)
    r, s = rotation(rng, 24), rotation(rng, 36)
    assert distance(solve(taus[::-1])[0], found) < AGREE
    assert distance(solve([np.ascontiguousarray(tau.T) for tau in taus])[0].T, found) < AGREE
    assert distance(solve([np.float32(1e-3) * tau for tau in taus])[0], 1e-3 * found) < AGREE
    assert distance(solve([np.float32(r @ tau @ s) for tau in taus])[0], r @ found @ s) < AGREE


@pytest.mark.parametrize("solver", ["gram", "svd"])
@pytest.mark.parametrize("count", [2, 3])
def test_equal_experts_merge_to_one_truncated(count, solver):
    taus = experts(30, 42, 1) * count
    ((u, s, v),) = truncated(taus[:1], 30 // count)
    found, work = solve(taus, solver)
    assert distance(found, u * s @ v) < AGREE
    assert work.routes == [{"gram": "eigh", "svd": "svd"}[solver]] * 2


@pytest.mark.parametrize("solver", ["gram", "svd"])
def test_experts_without_a_change_count_but_add_nothing(solver):
    taus = experts(30, 42, 2)
    zero = np.zeros_like(taus[0])
    parts = truncated(taus, 10)
    wanted = polar(np.concatenate([u for u, _, _ in parts], 1)) @ np.diag(np.concatenate([s for _, s, _ in parts]))
    wanted = wanted @ polar(np.concatenate([v for _, _, v in parts]))
    for order in ([zero, *taus], [taus[0], zero, taus[1]]):
        assert distance(solve(order, solver)[0], wanted) < AGREE
    ((u, s, v),) = truncated(taus[:1], 15)
    assert distance(solve([zero, taus[0]], solver)[0], u * s @ v) < AGREE
    for count in (1, 2, 3):
        assert not solve([zero] * count, solver)[0].any()


@pytest.mark.parametrize("solver", ["gram", "svd"])
def test_ranks_below_k(solver):
    """Adapters: what is rounding of their low rank is dropped, so no expert gets arbitrary directions."""
    rng = np.random.default_rng(6)
    taus = [np.float32(rng.normal(size=(60, 3)) @ rng.normal(size=(3, 80))) for _ in range(4)]  # k = 15
    low = truncated(taus, 3)
    wanted = polar(np.concatenate([u for u, _, _ in low], 1)) @ np.diag(np.concatenate([s for _, s, _ in low]))
    wanted = wanted @ polar(np.concatenate([v for _, _, v in low]))
    assert distance(solve(taus, solver)[0], wanted) < AGREE


@pytest.mark.parametrize("count", [2, 3])
def test_wide_spectra_need_the_fp64_gram(count, monkeypatch):
    """Largest to k-th singular value 1e3: ours holds, an fp32 Gram matrix in its place does not."""
    rng = np.random.default_rng(7)
    values = np.geomspace(1, 1e-3 ** (count * 47 / 48), 48)
    taus = [spectrum(rng, 48, 60, values) for _ in range(count)]
    wanted = tsvm(taus)
    assert distance(solve(taus)[0], wanted) < AGREE
    exact = spectra.wide_gram
    monkeypatch.setattr(spectra, "wide_gram", lambda x: exact(x).float().double())
    assert distance(solve(taus)[0], wanted) > 3 * AGREE


@pytest.mark.parametrize("rank", [1, 6, 25])  # k = 20
@pytest.mark.parametrize("count", [2, 3])
def test_adapters_are_merged_from_their_factors(rank, count):
    rng = np.random.default_rng(9)
    factors = [(rng.normal(size=(70, rank)), rng.normal(size=(rank, 60))) for _ in range(count)]
    low = [truncated([np.float32(b) @ np.float32(a)], 60 // count)[0] for b, a in factors]
    low = [(u[:, :rank], s[:rank], v[:rank]) for u, s, v in low]
    wanted = polar(np.concatenate([u for u, _, _ in low], 1)) @ np.diag(np.concatenate([s for _, s, _ in low]))
    wanted = wanted @ polar(np.concatenate([v for _, _, v in low]))
    work = Tsvm().solver(70, 60, count)
    for i, (b, a) in enumerate(factors):
        work.take_factors(i, torch.tensor(b).float(), torch.tensor(a).float())
        assert [tuple(side.shape) for sides in work._sides for side in sides[i:]] == [
            (min(rank, 60 // count), 70),
            (min(rank, 60 // count), 60),
        ]
    assert distance(work.finish().numpy(), wanted) < AGREE


def test_adapters_beside_task_vectors():
    taus = experts(40, 30, 3)
    u, s, v = np.linalg.svd(taus[1], full_matrices=False)
    taus[1] = (u[:, :5] * s[:5]) @ v[:5]
    wanted = solve(taus)[0]
    for which in (1, 2):
        work, order = Tsvm().solver(40, 30, 3), [0, 1, 2] if which == 1 else [0, 2, 1]
        for i, number in enumerate(order):
            if i == which:
                work.take_factors(i, torch.tensor(u[:, :5] * s[:5]), torch.tensor(v[:5]))
            else:
                work.take(i, torch.tensor(taus[number]))
        assert distance(work.finish().numpy(), wanted) < AGREE


@pytest.mark.parametrize(("name", "count"), [("tsvm", 1), ("wudi", 2), ("cart", 2)])
def test_solvers_without_a_way_for_factors_get_the_product(name, count):
    factors = [(torch.randn(30, 4), torch.randn(4, 20)) for _ in range(count)]
    low, dense = (methods.build(methods.find(name), {"weight": 1.0}).solver(30, 20, count) for _ in range(2))
    for i, (b, a) in enumerate(factors):
        low.take_factors(i, b, a)
        dense.take(i, (b.double() @ a.double()).float())
    assert torch.equal(low.finish(), dense.finish())


@pytest.mark.parametrize(
    ("shape", "count", "options"),
    [
        ((1024, 1800), 2, {}),
        ((800, 800), 6, {}),
        pytest.param((1984, 1984), 3, {}, marks=pytest.mark.slow),
        pytest.param((5504, 2048), 3, {}, marks=pytest.mark.slow),
        pytest.param((1000, 1200), 3, {"solver": "svd"}, marks=pytest.mark.slow),
    ],
)
def test_peak_is_what_is_declared(shape, count, options):
    peak, declared = peak_of("tsvm", options, shape, count)
    assert peak <= declared
    assert declared - LIBRARY <= 2 * peak


def test_mean_of_vectors_is_scaled_too_and_small_matrices_count_as_vectors():
    base, one, other = np.float32([[1, 2], [3, 4]]), np.float32([[2, 2], [3, 4]]), np.float32([[1, 2], [3, 8]])
    for shape in ((4,), (2, 2, 1)):
        out, _ = run(Tsvm(scale=0.5), *(base.reshape(shape), [one.reshape(shape), other.reshape(shape)]))
        np.testing.assert_allclose(out.reshape(-1), [1.25, 2, 3, 5])
    out, _ = run(Tsvm(), base, [one, other, base])  # three experts, two rows
    np.testing.assert_allclose(out, base + (one - base + other - base) / 3)
    out, _ = run(Tsvm(other="base"), base, [one, other, base])
    np.testing.assert_array_equal(out, base)


def test_weights_scale_task_vectors_before_they_are_decomposed():
    taus = experts(24, 24, 3, seed=8)
    base = np.zeros((24, 24), np.float32)
    out, _ = run(Tsvm(weight=(1.0, 0.0, -2.5), scale=1.5), base, taus)
    assert distance(out, 1.5 * solve([taus[0], 0 * taus[1], -2.5 * taus[2]])[0]) < AGREE


def test_unknown_solvers_are_refused():
    with pytest.raises(RecipeError, match="one of gram, svd"):
        methods.build(Tsvm, {"solver": "qr"})


@pytest.mark.parametrize(("rows", "columns", "count"), [(400, 300, 3), (210, 430, 2), (200, 200, 4)])
def test_threads_do_not_change_a_bit(rows, columns, count):
    taus, found = experts(rows, columns, count), []
    if (rows, columns) == (200, 200):
        taus[1] = taus[0]  # the way without Newton-Schulz
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(solve(taus)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert np.array_equal(found[0], found[1])
    assert np.array_equal(found[0], found[2])


def test_take_may_be_given_the_same_memory_again():
    """A solver keeps nothing of a task vector but what it copied."""
    taus = experts(20, 30, 3)
    work = Directions(3, 6, False)
    buffer = torch.empty(20, 30)
    for i, tau in enumerate(taus):
        work.take(i, buffer.copy_(torch.tensor(tau)))
    buffer.zero_()
    assert np.array_equal(work.finish().numpy(), solve(taus)[0])
