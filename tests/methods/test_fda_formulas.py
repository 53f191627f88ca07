"""The mathematics of FDA against double backward in fp64, and what a toy must show (never that it beats a merge)."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch.nn import functional

from streammerge.errors import RecipeError
from streammerge.methods import _rounded, _rounded_matrix, _swiglu
from streammerge.methods._adapt import Adaptation, Course, closed_form
from streammerge.methods._anchors import Construction, gaussian, linear_optimum, random_of, rows_of
from streammerge.methods._induced import aim, inner
from streammerge.methods._swiglu import GatedMlp
from streammerge.methods._whole_unit import WholeUnit, without_gradient
from streammerge.methods.fda import PRESETS, Fda

D, M, N = 64, 172, 40
NAMES = ("gate", "up", "down")
PLACES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
pytestmark = pytest.mark.usefixtures("one_thread")


def mlp(x, weights):
    gate, up, down = (weights[name] for name in NAMES)
    return functional.linear(functional.silu(functional.linear(x, gate)) * functional.linear(x, up), down)


def attention(x, weights, scores_in=None):
    """A layer of 4 heads: norm, queries, keys and values with biases, output, residual."""
    h = functional.layer_norm(x, (D,), weights["norm.weight"], weights["norm.bias"])
    q, k, v = (functional.linear(h, weights[f"{n}.weight"], weights[f"{n}.bias"]) for n in "qkv")
    q, k, v = (each.view(*x.shape[:-1], 4, D // 4).transpose(1, 2) for each in (q, k, v))
    scores = functional.softmax(q @ k.transpose(2, 3) / 4, dim=-1, dtype=scores_in).to(q.dtype)
    return x + functional.linear((scores @ v).transpose(1, 2).flatten(2), weights["o.weight"], weights["o.bias"])


def weights_of(kind, relative, seed=0):
    """Base and task vector; `relative` is their ratio of norms."""
    torch.manual_seed(seed)
    if kind == "mlp":
        shapes = {"gate": (M, D), "up": (M, D), "down": (D, M)}
    else:
        shapes = {f"{n}.weight": (D, D) for n in "qkvo"} | {f"{n}.bias": (D,) for n in ("q", "k", "v", "o", "norm")}
        shapes["norm.weight"] = (D,)
    base = {name: torch.randn(shape) / math.sqrt(shape[-1]) for name, shape in shapes.items()}
    return base, {name: relative * value.std() * torch.randn_like(value) for name, value in base.items()}


CASES = {"mlp": (mlp, (N, D)), "attention": (attention, (12, 5, D))}


def likeness(y0, y1, distance):
    if distance == "cosine":
        return functional.cosine_similarity(y0.flatten(1), y1.flatten(1), dim=1).mean()
    return -((y0 - y1).abs() if distance == "l1" else (y0 - y1).square()).mean()


def oracle(run, base, tau, x, distance="cosine", leave=()):
    """Induced gradients, the loss and its derivative by the anchors, through a graph of a graph in fp64."""
    x = x.double().requires_grad_()
    theta = {name: value.double().requires_grad_() for name, value in base.items()}
    expert = {name: base[name].double() + tau[name].double() for name in base}
    names = [name for name in theta if name not in leave]
    f = likeness(run(x, theta), run(x, expert), distance)
    induced = dict(zip(names, torch.autograd.grad(f, [theta[n] for n in names], create_graph=True), strict=True))
    loss = sum(1 - functional.cosine_similarity(induced[n].flatten(), tau[n].double().flatten(), dim=0) for n in names)
    (slope,) = torch.autograd.grad(loss, x)
    return {name: value.detach() for name, value in induced.items()}, float(loss.detach()), slope


def streamed(network, x, tau, micro):
    """The same in two passes over micro-batches."""
    shares = [network.likeness_gradient(part, len(x), list(tau)) for part in x.split(micro)]
    gradients = {name: sum(parts).contiguous() for name, parts in zip(tau, zip(*shares, strict=True), strict=True)}
    induced = {name: value.clone() for name, value in gradients.items()}
    loss = aim(gradients, tau, {name: inner(value, value).sqrt() for name, value in tau.items()})
    slope = torch.cat([network.slope(part, len(x), gradients) for part in x.split(micro)])
    return induced, float(loss), slope


def error(found, wanted):
    return float((found.double() - wanted).norm() / wanted.norm())


def network_of(kind, run, base, tau, distance="cosine", precision="fp32"):
    if kind == "explicit":
        return GatedMlp(base, tau, NAMES, distance, precision)
    return WholeUnit(run, base, tau, distance, precision)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("micro", [5, 7, 40])
@pytest.mark.parametrize(("kind", "case"), [("explicit", "mlp"), ("whole", "mlp"), ("whole", "attention")])
def test_the_streamed_gradient_is_that_of_double_backward(kind, case, micro, place):
    run, shape = CASES[case]
    base, tau = weights_of(case, 0.3)
    leave = ("k.bias",) if case == "attention" else ()
    tau = {name: value for name, value in tau.items() if name not in leave} | {n: torch.zeros(D) for n in leave}
    x = 0.5 * torch.randn(shape)
    induced, loss, slope = oracle(run, base, tau, x, leave=leave)
    aims = {name: value for name, value in tau.items() if name not in leave}
    base, tau, aims = ({name: value.to(place) for name, value in each.items()} for each in (base, tau, aims))
    found = streamed(network_of(kind, run, base, tau), x.to(place), aims, micro)
    for name, value in induced.items():
        assert error(found[0][name].cpu(), value) < 1e-5
    assert found[1] == pytest.approx(loss, abs=1e-6)
    assert error(found[2].cpu(), slope) <= 1e-6


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("micro", [7, 40])
@pytest.mark.parametrize("relative", [0.1, 0.01, 0.003])
@pytest.mark.parametrize(("kind", "case"), [("explicit", "mlp"), ("whole", "mlp"), ("whole", "attention")])
def test_bfloat16_keeps_two_digits_for_any_size_of_task_vectors(kind, case, relative, micro, place):
    run, shape = CASES[case]
    base, tau = weights_of(case, relative)
    tau = {name: torch.zeros_like(value) if name == "k.bias" else value for name, value in tau.items()}
    x = 0.5 * torch.randn(shape)
    aims = {name: value for name, value in tau.items() if name != "k.bias"}
    _, _, slope = oracle(run, base, tau, x, leave=("k.bias",))
    base, tau, aims = ({name: value.to(place) for name, value in each.items()} for each in (base, tau, aims))
    found = streamed(network_of(kind, run, base, tau, precision="bf16"), x.to(place), aims, micro)
    assert error(found[2].cpu(), slope) <= 1e-2


@pytest.mark.parametrize("relative", [0.1, 0.003])
@pytest.mark.parametrize(("kind", "case"), [("explicit", "mlp"), ("whole", "mlp"), ("whole", "attention")])
def test_operands_that_are_cast_and_results_that_are_not_rounded(kind, case, relative, monkeypatch):
    """As on a GPU: bfloat16 tensors go into products, fp32 comes out."""
    for module in (_rounded, _rounded_matrix):
        monkeypatch.setattr(module, "product_of_rounded", lambda one, other: one.float() @ other.float())
    monkeypatch.setattr(_swiglu, "casts", lambda precision, device: True)
    monkeypatch.setattr(_rounded_matrix, "multiplies_bf16", lambda device: True)
    monkeypatch.setattr(_rounded_matrix, "here", lambda x: False)
    run, shape = CASES[case]
    base, tau = weights_of(case, relative)
    tau = {name: torch.zeros_like(value) if name == "k.bias" else value for name, value in tau.items()}
    x = 0.5 * torch.randn(shape)
    _, _, slope = oracle(run, base, tau, x, leave=("k.bias",))
    network = network_of(kind, run, base, tau, precision="bf16")
    monkeypatch.setattr(network, "_exactly", nullcontext)  # nor does the library round what is left
    found = streamed(network, x, {name: value for name, value in tau.items() if name != "k.bias"}, 7)
    assert 1e-4 < error(found[2], slope) <= 1e-2


def test_explicit_formulas_keep_five_digits_where_task_vectors_are_small():
    base, tau = weights_of("mlp", 0.003)
    x = 0.5 * torch.randn(N, D)
    _, _, slope = oracle(mlp, base, tau, x)
    assert error(streamed(GatedMlp(base, tau, NAMES, "cosine"), x, tau, 16)[2], slope) <= 3e-5


@pytest.mark.parametrize("distance", ["l2", "l1"])
@pytest.mark.parametrize("kind", ["explicit", "whole"])
def test_other_distances(kind, distance):
    base, tau = weights_of("mlp", 0.3)
    x = 0.5 * torch.randn(N, D)
    _, loss, slope = oracle(mlp, base, tau, x, distance)
    found = streamed(network_of(kind, mlp, base, tau, distance), x, tau, 16)
    assert found[1] == pytest.approx(loss, abs=1e-5)
    assert error(found[2], slope) <= 1e-5


def test_a_keys_bias_is_left_out():
    base, tau = weights_of("attention", 0.1)
    masks = without_gradient(lambda x, w: attention(x, w, torch.float32), base, torch.randn(4, 5, D))
    assert set(masks) == {"k.bias"}
    assert bool(masks["k.bias"].all())
    network = WholeUnit(attention, base, tau, "cosine")
    course = Construction(network, tau, 0.5 * torch.randn(12, 5, D), 1e-2, 0, 64, masks)
    _, loss, _ = oracle(attention, base, tau, course.anchors, leave=("k.bias",))
    assert float(course.loss()) == pytest.approx(loss, abs=1e-4)


@pytest.mark.parametrize("left", [0.0, 1e-35])
def test_a_tensor_that_the_expert_did_not_change_has_no_part(left):
    """Nor one whose change is too small for its norm in fp32."""
    base, tau = weights_of("mlp", 0.3)
    tau["up"].mul_(left)
    course = Construction(GatedMlp(base, tau, NAMES, "cosine"), tau, torch.randn(N, D), 1e-2, 5, 16, {})
    assert max(course.run(lambda *_: None)) < 2.5


# --- one linear map under l2: everything is known ---


def linear(x, weights):
    return functional.linear(x, weights["w"])


def long_tailed(seed=3):
    torch.manual_seed(seed)
    left, right = (torch.linalg.qr(torch.randn(48, 48))[0] for _ in range(2))
    values = torch.arange(1, 49.0) ** -0.7
    return {"w": torch.randn(48, 48) / 7}, {"w": 0.1 * left @ torch.diag(values) @ right}, values, right


@pytest.mark.parametrize("count", [1, 4, 12])
def test_a_linear_maps_optimum_is_reached_by_steps_and_by_its_closed_form(count):
    base, tau, values, _ = long_tailed()
    best = float((values[:count].square().sum() / values.square().sum()).sqrt())
    anchors, loss = linear_optimum(tau["w"], count)
    assert 1 - loss == pytest.approx(best, abs=1e-6)
    course = Construction(WholeUnit(linear, base, tau, "l2"), tau, anchors.clone(), 1e-2, 0, 64, {})
    assert 1 - float(course.loss()) == pytest.approx(best, abs=1e-5)
    start = 0.3 * torch.randn(count, 48, generator=torch.Generator().manual_seed(0))
    losses = Construction(WholeUnit(linear, base, tau, "l2"), tau, start, 1e-2, 1500, 64, {}).run(lambda *_: None)
    assert 1 - min(losses) == pytest.approx(best, abs=2e-3 if count > 1 else 1e-4)


def test_the_gradient_of_a_linear_map_is_the_task_vector_times_a_gram_matrix():
    base, tau, _, _ = long_tailed()
    x = torch.randn(10, 48)
    found = streamed(WholeUnit(linear, base, tau, "l2"), x, tau, 4)[0]["w"]
    assert error(found, (tau["w"] @ x.T @ x * 2 / (10 * 48)).double()) < 1e-5


def test_the_literal_sign_of_the_formula_ends_in_the_tail():
    base, tau, _, right = long_tailed()
    wrong = {"w": -tau["w"]}
    start = 0.3 * torch.randn(1, 48, generator=torch.Generator().manual_seed(0))
    course = Construction(WholeUnit(linear, base, tau, "l2"), wrong, start, 1e-2, 1500, 64, {})
    losses = course.run(lambda *_: None)
    assert min(losses) > 1  # a cosine below zero
    energy = (course.best @ right.T).square()
    assert float(energy[:, -8:].sum() / energy.sum()) > 0.9


def test_wide_matrices_and_more_anchors_than_ranks():
    tau = torch.randn(6, 20)
    anchors, loss = linear_optimum(tau, 9)
    assert loss == pytest.approx(0, abs=1e-6)
    assert error(tau @ anchors.T @ anchors, tau.double()) < 1e-5
    assert not bool(anchors[6:].any())


# --- adaptation ---

COURSE = Course(lr=1e-2, epochs=3, steps=0, batch=16, held_out=0.0, rows=8, distance="cosine")


def order(epoch):
    return random_of(1, "unit", 0, 1 + epoch)


def made(relative=0.3, experts=1):
    base, _ = weights_of("mlp", relative)
    taus = [weights_of("mlp", relative, seed=1 + e)[1] for e in range(experts)]
    anchors = [0.5 * torch.randn(N, D) for _ in taus]
    theirs = [{name: base[name] + tau[name] for name in base} for tau in taus]
    return base, taus, anchors, [mlp(x, weights) for x, weights in zip(anchors, theirs, strict=True)]


def test_a_start_that_is_the_only_expert_has_nothing_to_learn():
    base, (tau,), anchors, targets = made()
    theta = {name: base[name] + tau[name] for name in base}
    before = {name: value.clone() for name, value in theta.items()}
    course = Adaptation(mlp, theta, [tau], anchors, targets, COURSE)
    loss = sum(course.step(course.everything[at : at + 8]) for at in (0, 8)) / 16
    assert loss == pytest.approx(-1, abs=1e-6)
    for name, value in theta.items():  # the gradient is rounding; Adam makes a step of any gradient
        assert float(torch.linalg.vector_norm((value - before[name]) / tau[name], math.inf)) < 0.03


def test_one_expert_is_recovered_on_its_anchors():
    base, _, anchors, targets = made()
    theta = {name: value.clone() for name, value in base.items()}
    course = Course(lr=3e-3, epochs=60, steps=0, batch=16, held_out=0.0, rows=1024, distance="cosine")
    losses, _ = Adaptation(mlp, theta, [], anchors, targets, course).run(order, lambda *_: None)
    assert losses[0] > -0.97
    assert losses[-1] < -0.998


@pytest.mark.parametrize("count", [1, 2])
def test_coefficients_are_those_of_adam_on_alpha(count):
    """The same loop with alpha as a parameter of torch's Adam."""
    base, taus, anchors, targets = made(experts=2)
    taus = taus[:count]
    start = {name: base[name] + 0.5 * sum(tau[name] for tau in taus) for name in base}
    moves = taus if count > 1 else [{name: start[name] - base[name] for name in base}]
    first = 0.5 if count > 1 else 1.0
    alphas = [{name: torch.full_like(value, first).requires_grad_() for name, value in move.items()} for move in moves]
    adam = torch.optim.Adam([value for alpha in alphas for value in alpha.values()], lr=1e-2)
    theta = {name: value.clone() for name, value in start.items()}
    course = Adaptation(mlp, theta, moves, anchors, targets, COURSE)
    for epoch in range(2):
        some = course.everything[order(epoch).permutation(len(course.everything))[:16]]
        course.step(some)
        now = {name: base[name] + sum(a[name] * m[name] for a, m in zip(alphas, moves, strict=True)) for name in base}
        x = torch.stack([anchors[i][j] for i, j in some])
        wanted = torch.stack([targets[i][j] for i, j in some])
        loss = -functional.cosine_similarity(mlp(x, now), wanted, dim=1).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    for name in base:
        wanted = base[name] + sum(a[name].detach() * m[name] for a, m in zip(alphas, moves, strict=True))
        assert error(theta[name].detach() - start[name], (wanted - start[name]).double()) < 2e-2


def test_entries_that_no_merge_moved_stay_to_the_bit():
    base, (tau,), anchors, targets = made()
    tau["gate"][:5] = 0
    theta = {name: base[name] + tau[name] for name in base}
    targets = [-target for target in targets]
    Adaptation(mlp, theta, [tau], anchors, targets, COURSE).run(order, lambda *_: None)
    assert torch.equal(theta["gate"][:5].detach(), base["gate"][:5])
    assert not torch.equal(theta["gate"][5:].detach(), (base["gate"] + tau["gate"])[5:])


def test_held_out_anchors_end_it_and_the_best_weights_are_kept():
    base, _, anchors, targets = made()
    targets = [torch.randn_like(target) for target in targets]  # nothing that generalises
    theta = {name: value.clone() for name, value in base.items()}
    course = Course(lr=1e-2, epochs=200, steps=0, batch=16, held_out=0.25, rows=1024, distance="cosine")
    adaptation = Adaptation(mlp, theta, [], anchors, targets, course)
    losses, tried = adaptation.run(order, lambda *_: None)
    assert len(losses) < 200
    assert len(tried) == len(losses) + 1
    held = slice(N - N // 4, None)
    kept = -functional.cosine_similarity(mlp(anchors[0][held], adaptation.kept), targets[0][held], dim=1).mean()
    assert float(kept) == pytest.approx(min(tried), abs=1e-5)


@pytest.mark.parametrize("count", [10, 200])
def test_the_closed_form_is_ridge_regression(count):
    random = np.random.default_rng(0)
    deltas = [random.standard_normal((12, 32)) for _ in range(2)]
    inputs = [random.standard_normal((count, 32)) for _ in range(2)]
    grams = [x.T @ x for x in inputs]
    scale = 0.1 * np.trace(sum(grams)) / 32
    wanted = sum(d @ c for d, c in zip(deltas, grams, strict=True)) @ np.linalg.inv(sum(grams) + scale * np.eye(32))
    given = [torch.from_numpy(x) for x in inputs]
    moved = [torch.from_numpy(x @ d.T) for x, d in zip(inputs, deltas, strict=True)]
    assert error(closed_form(given, moved, 0.1), torch.from_numpy(wanted)) < 1e-5


# --- how anchors begin ---


def test_noise_is_a_function_of_seed_unit_and_expert():
    def draw(*key):
        return gaussian(random_of(*key), (3, 4), 0.01)

    same = draw(1, "layer.0", 0)
    assert torch.equal(same, draw(1, "layer.0", 0))
    for other in ((2, "layer.0", 0), (1, "layer.1", 0), (1, "layer.0", 1), (1, "layer.0", 0, 1)):
        assert not torch.equal(same, draw(*other))


def test_rows_are_drawn_once_each_and_then_midpoints():
    matrices = [torch.arange(12.0).view(3, 4), torch.zeros(5, 7), 100 + torch.arange(8.0).view(2, 4)]
    rows = {tuple(row.tolist()) for matrix in (matrices[0], matrices[2]) for row in matrix}
    found = [tuple(row.tolist()) for row in rows_of(random_of(0, "u", 0), matrices, (5, 4))]
    assert sorted(found) == sorted(rows)
    more = rows_of(random_of(0, "u", 0), matrices, (2, 4, 4)).view(8, 4)
    assert {tuple(row.tolist()) for row in more[:5]} == rows
    mids = {tuple(((torch.tensor(a) + torch.tensor(b)) / 2).tolist()) for a in rows for b in rows}
    assert all(tuple(row.tolist()) in mids for row in more[5:])
    with pytest.raises(RecipeError, match="no matrix with rows of 9 elements"):
        rows_of(random_of(0, "u", 0), matrices, (5, 9))


@pytest.mark.parametrize("init", ["gaussian", "weights"])
def test_construction_lowers_the_loss_and_keeps_the_best(init):
    base, tau = weights_of("mlp", 0.1)
    random = random_of(0, "u", 0)
    expert = [base[name] + tau[name] for name in NAMES]
    start = gaussian(random, (N, D), 0.01) if init == "gaussian" else rows_of(random, expert, (N, D))
    course = Construction(GatedMlp(base, tau, NAMES, "cosine"), tau, start, 1e-2, 100, 16, {})
    losses = course.run(lambda *_: None)
    assert min(losses) < 0.8 * losses[0]
    course.anchors.copy_(course.best)
    assert float(course.loss()) == pytest.approx(min(losses), abs=1e-6)


# --- the whole of it, on a toy ---


def tuned(base, seed, steps=150):
    """An expert of a family of inputs of rank 8, and inputs of it that it did not see."""
    random = torch.Generator().manual_seed(seed)
    family, target = torch.randn(8, D, generator=random), torch.randn(D, D, generator=random) / 8
    theta = {name: value.clone().requires_grad_() for name, value in base.items()}
    adam = torch.optim.Adam(theta.values(), lr=1e-3)
    for _ in range(steps):
        x = torch.randn(64, 8, generator=random) @ family
        loss = (mlp(x, theta) - mlp(x, base) - x @ target).square().mean()
        adam.zero_grad()
        loss.backward()
        adam.step()
    real = torch.randn(256, 8, generator=random) @ family
    return {name: (value.detach() - base[name]) for name, value in theta.items()}, real


def test_anchors_that_were_optimised_teach_more_and_a_wrong_sign_teaches_nothing():
    base, _ = weights_of("mlp", 0.1)
    experts = [tuned(base, seed) for seed in (11, 12)]

    def score(weights):
        """Error to the experts on their own inputs; the base has 1."""
        found = []
        for tau, real in experts:
            wanted = mlp(real, {name: base[name] + tau[name] for name in base})
            found.append(float((mlp(real, weights) - wanted).norm() / (mlp(real, base) - wanted).norm()))
        return sum(found) / len(found)

    def learn(steps, sign):
        anchors, targets = [], []
        for number, (tau, _) in enumerate(experts):
            network = GatedMlp(base, tau, NAMES, "cosine")
            start = gaussian(random_of(0, "toy", number), (128, D), 0.01)
            course = Construction(network, {n: sign * t for n, t in tau.items()}, start, 1e-2, steps, 128, {})
            course.run(lambda *_: None)
            anchors.append(course.best)
            targets.append(network.outputs(course.best))
        theta = {name: value.clone() for name, value in base.items()}
        course = Course(lr=3e-4, epochs=25, steps=0, batch=128, held_out=0.0, rows=1024, distance="cosine")
        adaptation = Adaptation(mlp, theta, [], anchors, targets, course)
        adaptation.run(order, lambda *_: None)
        return score({name: value.detach() for name, value in theta.items()})

    right, raw, wrong = learn(200, 1), learn(0, 1), learn(200, -1)
    assert right < raw < 1.0
    assert wrong >= 0.999


# --- parameters ---


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"init": "zeros"}, "init is 'zeros'"),
        ({"distance": "l3"}, "distance is 'l3'"),
        ({"anchors": 0}, "anchors is 0; give 1 or more"),
        ({"construct_steps": -1}, "construct_steps is -1"),
        ({"early_stop": 1.0}, "early_stop is 1.0"),
        ({"precision": "fp8"}, "precision is 'fp8'"),
    ],
)
def test_wrong_values_are_named(values, message):
    with pytest.raises(RecipeError, match=message):
        Fda(**values)


def test_presets_fill_what_is_not_given():
    merged, base = {"start": {"merge_method": "task_arithmetic"}}, {"start": "base"}
    found = Fda.fill({"preset": "paper-llama", "anchors": 512}, merged, "r")
    assert (found["anchors"], found["construct_steps"], found["adapt"]) == (512, 200, "coefficients")
    assert Fda.fill({"preset": "paper-vit"}, base, "r")["adapt_lr"] == 1e-5
    assert Fda.fill({"preset": "paper-roberta"}, base, "r")["adapt_lr"] == 5e-5
    for name in PRESETS:
        for keys in (merged, base):
            Fda(**{key: value for key, value in Fda.fill({"preset": name}, keys, "r").items() if key != "unit"})


def test_what_is_left_to_choose_is_settled():
    assert Fda().settled("base").adapt == "weights"
    assert Fda().settled("tsvm").adapt == "coefficients"
    assert Fda(alphas="experts").settled("task_arithmetic").alphas == "experts"
    assert Fda(alphas="experts", preset="paper-vit").settled("tsvm").alphas == "merged"
    with pytest.raises(RecipeError, match="refines a merged start"):
        Fda(adapt="coefficients").settled("base")
    with pytest.raises(RecipeError, match="goes with start: task_arithmetic"):
        Fda(alphas="experts").settled("tsvm")
