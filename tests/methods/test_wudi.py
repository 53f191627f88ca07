"""WUDI against the authors' arithmetic in float64, autograd and products of T x m x m included, and its identities."""

import numpy as np
import pytest
import torch
from merging import run, span
from methods.memory import held_by

from streammerge.errors import RecipeError
from streammerge.method import Tile
from streammerge.methods import _wudi_flow as flows
from streammerge.methods._crew import Crew
from streammerge.methods._matrices import LIBRARY, MatrixSurvey
from streammerge.methods.wudi import Wudi

ADAM = 1e-4  # of the merged task vector's norm, fp32 against fp64: 300 steps add up to 6e-5 at worst, 1e-6 as a rule
FLOW = 3e-5  # the same for time 3: rounding of C times t |C|
EXACT = 1e-7  # what is computed in fp64 and rounded once
SHAPES = [(40, 40, 3), (70, 24, 6), (24, 70, 2), (200, 50, 3), (30, 210, 4)]
WAYS = {
    "adam": {"iterations": 20},
    "doubling": {"solver_": "spectral"},
    "eigen": {"solver_": "spectral", "keep": 0.6},
    "ridge": {"solver_": "closed_form", "ridge": 0.3},
    "inverse": {"solver_": "closed_form"},
}
pytestmark = pytest.mark.usefixtures("one_thread")


def experts(rows, columns, count, std=1e-3, seed=0):
    """Task vectors of a few strong directions in noise, their input directions falling off by a power law."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        tau = rng.normal(size=(rows, 8)) @ rng.normal(size=(8, columns)) / 3 + 0.5 * rng.normal(size=(rows, columns))
        tau *= rng.permutation(np.arange(1, columns + 1) ** -0.5)
        made.append(np.float32(tau / tau.std() * std))
    return made


def solve(taus, **options):
    """The merged task vector and the solver's figures."""
    solver = Wudi(**options).solver(*taus[0].shape, len(taus))
    for i, tau in enumerate(taus):
        solver.take(i, torch.tensor(tau))
    merged = solver.finish()
    assert merged.dtype == torch.float32
    return merged.numpy(), solver.figures


def sums(taus):
    """C, D and M_0 in float64."""
    wide = [tau.astype(np.float64) for tau in taus]
    weights = [1 / np.sum(tau**2) for tau in wide]
    c = sum(w * tau.T @ tau for w, tau in zip(weights, wide, strict=True))
    d = sum(w * tau @ tau.T @ tau for w, tau in zip(weights, wide, strict=True))
    return c, d, sum(wide)


def objective(merged, taus):
    """The authors' loss: one o x o product per task."""
    return sum((((merged - tau) @ tau.T) ** 2).sum() / (tau**2).sum() for tau in taus)


def authors(taus, iterations=300, lr=1e-5):
    """The authors' way: autograd through the products, torch's Adam, from the sum."""
    wide = [torch.tensor(tau, dtype=torch.float64) for tau in taus]
    merged = sum(wide).clone().requires_grad_()
    optimiser = torch.optim.Adam([merged], lr=lr)
    for _ in range(iterations):
        optimiser.zero_grad()
        objective(merged, wide).backward()
        optimiser.step()
    return merged.detach().numpy()


def flow(taus, time, keep=1.0):
    """Gradient flow by the eigenvectors of C, time in units of 1 / mean eigenvalue."""
    c, d, start = sums(taus)
    values, vectors = np.linalg.eigh(c)
    values = np.maximum(values, 1e-18)
    t = time * len(c) / np.trace(c)
    factors = -np.expm1(-t * values) / values
    factors[: len(c) - int(np.ceil(keep * len(c)))] = 0
    return start - (start @ c - d) @ vectors @ np.diag(factors) @ vectors.T


def away(found, wanted):
    return np.linalg.norm(found - wanted) / np.linalg.norm(wanted)


# --- Adam ---


@pytest.mark.parametrize("std", [1e-2, 1e-3, 1e-4])
@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_adam_is_the_authors_adam(rows, columns, count, std):
    taus = experts(rows, columns, count, std)
    wanted = authors(taus)
    found, figures = solve(taus)
    assert away(found, wanted) < ADAM
    c, d, start = sums(taus)
    assert np.linalg.norm(found - wanted) < 2e-4 * np.linalg.norm(wanted - start)
    assert figures["travelled"] == pytest.approx(np.linalg.norm(wanted - start), rel=1e-4)
    assert figures["residual"] == pytest.approx(
        np.linalg.norm(wanted @ c - d) / np.linalg.norm(start @ c - d), rel=2e-3, abs=1e-6
    )
    before, after = (objective(m, [tau.astype(np.float64) for tau in taus]) for m in (start, wanted))
    assert figures["loss_before"] == pytest.approx(before, rel=1e-3)
    assert figures["loss"] == pytest.approx(after, abs=1e-3 * before)


def test_rate_and_iterations():
    taus = experts(30, 40, 3)
    assert away(solve(taus, iterations=50, lr=1e-4)[0], authors(taus, 50, 1e-4)) < ADAM
    assert away(solve(taus, iterations=0)[0], sum(taus)) < EXACT


def test_gradient_and_trace():
    """2 (M C - D) is autograd's gradient at any M; tr C is the number of experts; C belongs to the columns."""
    for rows, columns in ((50, 20), (20, 50)):
        taus = experts(rows, columns, 3)
        solver = Wudi().solver(rows, columns, 3)
        for i, tau in enumerate(taus):
            solver.take(i, torch.tensor(tau))
        upper = solver._gram.double().triu()
        c = (upper + upper.triu(1).T).numpy()
        assert c.shape == (columns, columns)
        assert np.trace(c) == pytest.approx(3, rel=1e-6)
        merged = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        merged *= 1e-3
        merged.requires_grad_()
        objective(merged, [torch.tensor(tau).double() for tau in taus]).backward()
        found = 2 * (merged.detach().numpy() @ c - solver._target.double().numpy())
        assert away(found, merged.grad.numpy()) < 1e-6


def test_adam_sees_scale_and_rotation():
    """Its rate is absolute: were this equal, something would have normalised it."""
    taus = experts(40, 30, 3)
    plain = solve(taus)[0]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 30)))[0].astype(np.float32)
    assert away(solve([10 * tau for tau in taus])[0] / 10, plain) > 0.02
    assert away(solve([tau @ turn for tau in taus])[0] @ turn.T, plain) > 0.02


# --- the stationary point ---


def test_closed_form_is_d_over_c():
    for rows, columns, count in SHAPES:
        taus = experts(rows, columns, count)
        c, d, start = sums(taus)
        found, figures = solve(taus, solver_="closed_form")
        assert away(found, d @ np.linalg.pinv(c, rcond=1e-13, hermitian=True)) < EXACT
        assert figures["residual"] < 1e-12
        for ridge in (0.5, 1e-7):
            wanted = start - (start @ c - d) @ np.linalg.inv(c + ridge * count / columns * np.eye(columns))
            assert away(solve(taus, solver_="closed_form", ridge=ridge)[0], wanted) < EXACT


def test_closed_form_turns_and_scales_with_the_task_vectors():
    taus = [tau.astype(np.float64) for tau in experts(40, 30, 3)]
    plain = solve(np.float32(taus), solver_="closed_form")[0]
    turn = np.linalg.qr(np.random.default_rng(1).normal(size=(30, 30)))[0]
    assert away(solve(np.float32([8 * tau for tau in taus]), solver_="closed_form")[0] / 8, plain) < EXACT
    turned = solve(np.float32([tau @ turn for tau in taus]), solver_="closed_form")[0]
    assert away(turned @ turn.T, plain) < 1e-5  # the rotated inputs are rounded to fp32


def test_few_rows_leave_the_kernel_of_c_alone():
    taus = experts(10, 64, 3)
    found, figures = solve(taus, solver_="closed_form")
    assert figures["residual"] < 1e-12
    span = np.linalg.svd(np.concatenate(taus).astype(np.float64), full_matrices=False)[2]
    assert np.linalg.norm(found - found @ span.T @ span) < 1e-6 * np.linalg.norm(found)


def test_descent_never_raises_the_residual():
    c, d, merged = sums(experts(30, 20, 4))
    step = 1 / np.linalg.eigvalsh(c)[-1]
    residuals = []
    for _ in range(200):
        residuals.append(np.linalg.norm(merged @ c - d))
        merged = merged - step * (merged @ c - d)
    assert np.all(np.diff(residuals) <= 0)


# --- gradient flow ---


@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_flow(rows, columns, count):
    taus = experts(rows, columns, count)
    for time in (0.1, 1.0, 3.0):
        found, figures = solve(taus, solver_="spectral", time=time)
        assert away(found, flow(taus, time)) < FLOW
        for keep in (0.999999, 0.5, 0.01):
            other, same = solve(taus, solver_="spectral", time=time, keep=keep)
            assert away(other, flow(taus, time, keep)) < FLOW
            if keep > 0.99:  # eigh and doubling are two ways to one thing
                assert same["residual"] == pytest.approx(figures["residual"], rel=1e-3)
                assert same["loss"] == pytest.approx(figures["loss"], rel=1e-3)


def test_flow_from_the_sum_to_the_stationary_point():
    taus = experts(40, 24, 3)
    assert away(solve(taus, solver_="spectral", time=1e-7)[0], sum(taus)) < 1e-6
    end = solve(taus, solver_="closed_form")[0]
    assert away(solve(taus, solver_="spectral", time=1e4)[0], end) < 2e-3
    assert away(solve(taus, solver_="spectral", time=1e4, keep=0.9999)[0], end) < 2e-3
    residuals = [solve(taus, solver_="spectral", time=time)[1]["residual"] for time in (0.01, 0.1, 1.0, 10.0)]
    assert residuals == sorted(residuals, reverse=True)


def test_flow_is_descent_in_small_steps():
    taus = experts(30, 20, 3)
    c, d, merged = sums(taus)
    steps, t = 20000, 2.0 * 20 / 3
    for _ in range(steps):
        merged = merged - t / steps * (merged @ c - d)
    assert away(solve(taus, solver_="spectral", time=2.0)[0], merged) < 2e-4


def test_polynomial_and_doubling_alone():
    """Against the functions themselves, in fp64, past the reach of the polynomial."""
    y = np.linspace(-1, 1, 1001)
    x = np.maximum(flows.REACH / 2 * (y + 1), 1e-12)
    assert np.abs(np.polynomial.Polynomial(flows._terms(flows.REACH / 2))(y) - -np.expm1(-x) / x).max() < 5e-10
    taus = experts(250, 220, 3)
    c, d, start = (torch.tensor(part) for part in sums(taus))
    rest = d - start @ c
    moved, _ = flows.doubling(Crew(c.device), c, 3 / 220, time=50.0)(rest)
    assert away((start + moved).numpy(), flow(taus, 50.0)) < 1e-9


# --- special task vectors ---


@pytest.mark.parametrize("way", WAYS)
def test_one_task_vector_is_the_answer_to_the_bit(way):
    for balance in ("none", "norms"):
        (tau,) = experts(30, 20, 1)
        assert np.array_equal(solve([tau], balance=balance, **WAYS[way])[0], tau)
        zero = np.zeros_like(tau)
        assert np.array_equal(solve([zero, tau, zero], balance=balance, **WAYS[way])[0], tau)
        assert not np.any(solve([zero, zero], balance=balance, **WAYS[way])[0])
    assert solve([tau, zero])[1] == {}


@pytest.mark.parametrize("way", WAYS)
def test_zero_task_vectors_are_taken_out(way):
    taus = experts(30, 20, 3)
    zero = np.full_like(taus[0], 1e-9)
    found, figures = solve([zero, taus[0], zero, *taus[1:]], **WAYS[way])
    wanted, same = solve(taus, **WAYS[way])
    assert np.array_equal(found, wanted)
    assert figures == same


def test_orthogonal_rows_are_stationary():
    """Disjoint input directions do not interfere, whatever the outputs; were C built from the rows' side they would."""
    rng = np.random.default_rng(0)
    outputs = rng.normal(size=(25, 10))  # common to all
    taus = [np.zeros((25, 60), np.float32) for _ in range(3)]
    for i, tau in enumerate(taus):
        tau[:, 20 * i : 20 * i + 20] = 1e-3 * outputs @ rng.normal(size=(10, 20))
    for way in WAYS:
        if way != "adam":
            assert away(solve(taus, **WAYS[way])[0], sum(taus)) < 1e-5
    assert away(solve(taus)[0], sum(taus)) < 1e-3  # where the gradient is zero, Adam follows its rounding
    flipped = [np.ascontiguousarray(tau.T) for tau in taus]
    assert away(solve(flipped)[0], sum(flipped)) > 0.1


def test_identical_task_vectors_come_back_once():
    tau = experts(30, 20, 1)[0]
    assert away(solve([tau] * 3, solver_="closed_form")[0], tau) < EXACT
    assert away(solve([tau] * 3, solver_="spectral", time=3e3)[0], tau) < 0.1
    found, figures = solve([tau] * 3)
    assert np.linalg.norm(found - tau) < np.linalg.norm(2 * tau)
    assert figures["loss"] < figures["loss_before"]


def test_balance_is_scaling_beforehand():
    taus = [size * tau for size, tau in zip((1, 4, 0.3), experts(30, 40, 3), strict=True)]
    norms = [np.linalg.norm(tau.astype(np.float64)) for tau in taus]
    scaled = [np.float32(tau * np.mean(norms) / norm) for tau, norm in zip(taus, norms, strict=True)]
    for way in WAYS.values():
        assert away(solve(taus, balance="norms", **way)[0], solve(scaled, **way)[0]) < 1e-5
    assert away(solve(taus, balance="norms")[0], solve(taus)[0]) > 0.1
    weighted = solve([2 * taus[0], -taus[1], 0 * taus[2]], balance="norms", weight=(2.0, -1.0, 0.0))[0]
    pair = [np.float32(tau * np.mean(norms[:2]) / norm) for tau, norm in zip(taus[:2], norms[:2], strict=True)]
    assert away(weighted, solve([2 * pair[0], -pair[1]])[0]) < 1e-5


# --- as a method ---


def test_scale_weights_and_figures_reach_the_tensor():
    taus = experts(30, 40, 2)
    base = np.random.default_rng(5).normal(0, 0.02, (30, 40)).astype(np.float32)
    out, _ = run(Wudi(weight=(0.5, 2.0), scale=0.7), base, [base + tau for tau in taus])
    weighted = [w * ((base + tau) - base) for w, tau in zip((0.5, 2.0), taus, strict=True)]
    np.testing.assert_allclose(out, base + 0.7 * authors(weighted), rtol=0, atol=1e-7)
    survey = MatrixSurvey(Wudi().solver(30, 40, 2), (30, 40), np.ones(2))
    zero = np.zeros_like(taus[0])
    for tau in taus:
        tile = Tile("w", 0, (30, 40), 0, 1200, span(zero, 0, 1200), (span(tau, 0, 1200),))
        survey.settle([survey.look(tile)])
    figures = solve(taus)[1]
    assert set(figures) == {"residual", "travelled", "loss_before", "loss"}
    assert figures.items() <= survey.figures.items()


@pytest.mark.parametrize("way", WAYS)
def test_threads_do_not_change_a_bit(way):
    taus = experts(410, 230, 3)
    found = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(solve(taus, **WAYS[way]))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for merged, figures in found[1:]:
        assert np.array_equal(merged, found[0][0])
        assert figures == found[0][1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"solver_": "sgd"},
        {"balance": "mean"},
        {"iterations": -1},
        {"lr": 0.0},
        {"time": 0.0},
        {"keep": 0.0},
        {"keep": 1.1},
        {"ridge": -1.0},
        {"other": "matrix"},
    ],
)
def test_wrong_parameters(wrong):
    with pytest.raises(RecipeError, match=next(iter(wrong)).rstrip("_")):
        Wudi(**wrong)


def peak_of(rows, columns, options):
    """Memory beyond the task vector that one solver takes at its peak, and what it declares, in bytes."""
    before = f"""
        from streammerge.methods import _wudi_flow
        from streammerge.methods.wudi import Wudi

        method, delta = Wudi(**{options}), torch.full(({rows}, {columns}), 0.0)
        (torch.ones(64, 64) @ torch.ones(64, 64)).sum()
    """
    work = f"""
        solver = method.solver({rows}, {columns}, 2)
        for i in range(2):
            solver.take(i, delta.normal_(0, 1e-3))
        solver.finish()
    """
    return held_by(before, work, f"method.bytes_kept({rows}, {columns}, 2)")


@pytest.mark.parametrize(
    ("rows", "columns", "way"),
    [
        (1024, 1536, "adam"),
        (400, 1536, "doubling"),
        *(pytest.param(*shape, way, marks=pytest.mark.slow) for shape in ((2048, 5504), (5504, 2048)) for way in WAYS),
    ],
)
def test_peak_is_what_is_declared(rows, columns, way):
    options = {**WAYS[way], "iterations": 2} if way == "adam" else {**WAYS[way], "time": 0.3}
    peak, declared = peak_of(rows, columns, options)
    assert peak <= declared + LIBRARY
    assert declared <= 1.5 * peak
