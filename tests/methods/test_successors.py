"""The data-free successors against fp64 oracles that restate their authors' arithmetic with full decompositions."""

import build as files
import methods.falling as falling
import numpy as np
import pytest
from merging import run

import streammerge as sm
from streammerge import method as methods
from streammerge.errors import RecipeError
from streammerge.methods._matrices import MatrixMethod

SHAPES = [(24, 40), (40, 24), (30, 30)]


def build(name, **values):
    return methods.build(methods.find(name), values)


def material(shape, experts=3, seed=0, size=0.02):
    return falling.material(shape, [size] * experts, seed)


def wide(base, experts):
    """The task vectors as the package sees them, fp32 differences, in fp64."""
    return [(e - base).astype(np.float64) for e in experts]


def moved(name, base, experts, **values):
    """What the package adds to the base, in fp64, beside fp32's rounding of the sum."""
    out, _ = run(build(name, **values), base, experts)
    return out.astype(np.float64) - base


def close(found, wanted, base, tolerance=3e-6):
    """`tolerance` of the merged task vector's norm, and the rounding of the sum with the base."""
    limit = tolerance * np.linalg.norm(wanted) + 1e-7 * np.linalg.norm(base)
    assert np.linalg.norm(found - wanted) <= limit, (np.linalg.norm(found - wanted), limit)


# --- emr, consensus_ta ---


def emr(taus):
    total = sum(taus)
    sign = np.where(total > 0, 1, -1)
    return sign * np.max([np.abs(t) * (t * sign > 0) for t in taus], 0)


def consensus(taus, threshold, agree):
    total = sum(taus)
    masks = [np.abs(t) > c * np.abs(total - t) for t, c in zip(taus, threshold, strict=True)]
    return total * (np.sum(masks, 0) >= agree)


@pytest.mark.parametrize("shape", [(24, 40), (70_001,), ()])
@pytest.mark.parametrize("experts", [1, 2, 4])
def test_elementwise(shape, experts):
    rng = np.random.default_rng(1)
    base = rng.normal(0, 0.05, shape).astype(np.float32)
    found = [(base + rng.normal(0, 0.01, shape)).astype(np.float32) for _ in range(experts)]
    taus = wide(base, found)
    limit = 2e-7  # rounding of values below 0.3 in fp32, a few times
    wrong = np.abs(moved("emr", base, found, **{"lambda": 0.5}) - 0.5 * emr(taus)) > limit
    assert wrong.mean() <= 1e-4  # where a sum is zero up to rounding, either sign is right
    shares = tuple(np.linspace(0.2, 0.6, experts))
    mine = moved("consensus_ta", base, found, threshold=shares)
    wrong = np.abs(mine - consensus(taus, shares, min(2, experts))) > limit
    assert wrong.mean() <= 1e-4


def test_weights_come_before_the_election():
    base, experts = material((20, 20))
    weighted = [base + np.float32(w) * (e - base) for w, e in zip((2.0, -1.0, 0.5), experts, strict=True)]
    for name in ("emr", "consensus_ta"):
        mine = moved(name, base, experts, weight=(2.0, -1.0, 0.5))
        np.testing.assert_allclose(mine, moved(name, base, weighted), atol=1e-7)


def test_agree_must_not_be_negative():
    with pytest.raises(RecipeError, match="agree"):
        build("consensus_ta", agree=-1)


# --- cart ---


def truncated(matrix, rank):
    u, s, v = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ v[:rank]


def cart(taus, rho, factor=1.0):
    mean = sum(taus) / len(taus)
    rank = max(1, int(rho * min(mean.shape)))
    return mean + factor * sum(truncated(t - mean, rank) for t in taus)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rho", [0.01, 0.08, 0.3, 1.0])
def test_cart(shape, rho):
    base, experts = material(shape)
    close(moved("cart", base, experts, rho=rho, **{"lambda": 0.7}), cart(wide(base, experts), rho, 0.7), base)


@pytest.mark.parametrize("count", [1, 2])
def test_cart_of_one_or_two_experts_is_their_mean(count):
    base, experts = material((24, 40), count)
    close(moved("cart", base, experts), sum(wide(base, experts)) / count, base)


@pytest.mark.parametrize("rho", [0.0, -1.0, 1.5])
def test_cart_refuses_shares_outside_one(rho):
    with pytest.raises(RecipeError, match="rho"):
        build("cart", rho=rho)


# --- the cap on the displacement ---


@pytest.mark.parametrize("cap", [0.0, 0.5, 1.0, 100.0])
@pytest.mark.parametrize("scale", [1.0, -3.0])
def test_norm_guard(cap, scale):
    base, experts = material((24, 40))
    free = moved("cart", base, experts, scale=scale)
    mine = moved("cart", base, experts, scale=scale, norm_guard=cap)
    limit = cap * max(np.linalg.norm(t) for t in wide(base, experts)) if cap else np.inf
    wanted = free * min(1, limit / np.linalg.norm(free))
    close(mine, wanted, base)


def test_norm_guard_counts_task_vectors_without_their_weights():
    base, experts = material((24, 40), 1)
    mine = moved("cart", base, experts, weight=(5.0,), norm_guard=1.0)
    close(mine, wide(base, experts)[0], base)


def test_figures_tell_displacement_and_norms(monkeypatch):
    base, experts = material((24, 40))
    seen = []
    monkeypatch.setattr(MatrixMethod, "merge", lambda self, tile, survey: seen.append(survey) or survey.flags)
    for cap in (0.0, 0.1):
        run(build("cart", norm_guard=cap, scale=2.0), base, experts)
        found = seen.pop().figures
        for i, tau in enumerate(wide(base, experts), 1):
            assert found[f"norm_{i}"] == pytest.approx(np.linalg.norm(tau))
        moved = 2 * np.linalg.norm(cart(wide(base, experts), 0.08))
        limit = cap * max(np.linalg.norm(tau) for tau in wide(base, experts)) if cap else np.inf
        assert found["displacement"] == pytest.approx(min(moved, limit), rel=1e-5)


def test_norm_guard_must_not_be_negative():
    with pytest.raises(RecipeError, match="norm_guard"):
        build("cart", norm_guard=-1.0)


# --- pcb ---


def minmax(x):
    low, high = x.min(), x.max()
    return (x - low) / (high - low) if high > low else 0 * x


def clamped(x, low, high):
    """Clipped at the elements that stand at these shares of the sorted ones."""
    ranked = np.sort(x, axis=None)
    return np.clip(x, ranked[int(x.size * low)], ranked[max(0, int(x.size * (1 - high) - 1))])


def pcb(taus, ratio):
    sizes = [clamped(np.abs(t), 1e-4, 1e-4) for t in taus]
    total = sum(taus)
    scores = [np.exp(len(taus) * minmax(a) ** 2) * np.tanh(t * total) for a, t in zip(sizes, taus, strict=True)]
    masks = [minmax(clamped(score, 1 - ratio, 0)) for score in scores]
    top = sum(m * np.sign(t) * a for m, t, a in zip(masks, taus, sizes, strict=True))
    return top / np.maximum(sum(masks), 1e-12)


@pytest.mark.parametrize("shape", [(24, 40), (150, 200)])
@pytest.mark.parametrize("ratio", [0.05, 0.1, 1.0])
@pytest.mark.parametrize("experts", [1, 3])
def test_pcb(shape, ratio, experts):
    base, found = material(shape, experts, size=3.0)
    close(moved("pcb", base, found, ratio=ratio), 1.2 * pcb(wide(base, found), ratio), base, 2e-5)


def test_pcb_without_anything_to_compete():
    base, experts = material((20, 30))
    assert not moved("pcb", base, [base, base]).any()
    alone = moved("pcb", base, [experts[0], base], ratio=0.5)
    assert np.isfinite(alone).all()
    assert 0 < (alone != 0).mean() <= 0.5


# --- ace ---


def ace(taus, eps=1e-2, limit=0.3, share=0.3):
    traces = np.array([np.trace(t.T @ t) for t in taus])
    logs = np.log(traces + 1e-12)
    differ = len(taus) > 1 and np.var(logs, ddof=1) / (logs.mean() ** 2 + 1e-12) > limit
    n = taus[0].shape[1]
    plain, ridged, product = [], 0, 0
    for t in taus:
        centred = t - t.mean(0)
        s, e = centred.T @ centred, eps
        if differ:
            s, e = s / (np.trace(s) + 1e-12), eps / (np.trace(s) + 1e-12)
        plain.append(s)
        ridged = ridged + s + e * np.eye(n)
        product = product + centred @ (s + e * np.eye(n))
    row = sum(plain).mean(0) / (traces.mean() + 1e-12 if differ else 1)
    merged = product @ np.linalg.inv(ridged + row)
    if differ:
        residual = sum(t @ (s - ridged / len(taus)) for t, s in zip(taus, plain, strict=True))
        u, sigma, v = np.linalg.svd(merged + residual, full_matrices=False)
        k = int(share * len(sigma))
        merged = merged + sigma[:k].mean() * u[:, :k] @ v[:k]
    return merged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sizes", [(1.0, 1.0, 1.0), (1.0, 9.0, 0.4)])
@pytest.mark.parametrize("eps", [1e-2, 1e-5])
def test_ace(shape, sizes, eps):
    base, experts = material(shape)
    experts = [(base + np.float32(20 * w) * (e - base)).astype(np.float32) for w, e in zip(sizes, experts, strict=True)]
    close(moved("ace", base, experts, eps=eps), ace(wide(base, experts), eps), base, 1e-5)


def test_ace_leaves_out_what_has_no_covariance():
    base, experts = material((24, 40))
    row = base + np.linspace(0, 1, 40, dtype=np.float32)
    for more in (base, row):
        mine = moved("ace", base, [*experts, more])
        assert np.isfinite(mine).all()
    close(moved("ace", base, [*experts, base]), moved("ace", base, experts), base)
    assert not moved("ace", base, [base, base]).any()


# --- knots ---


def knots(taus, density, tolerance=1e-4):
    n = taus[0].shape[1]
    u, s, v = np.linalg.svd(np.hstack(taus), full_matrices=False)
    kept = s > tolerance
    blocks = []
    for i in range(len(taus)):
        block = s[kept, None] * v[kept, i * n : (i + 1) * n]
        ranked = np.sort(np.abs(block), axis=None)
        blocks.append(block * (np.abs(block) >= ranked[block.size - max(1, int(density * block.size))]))
    agree = [b * np.where(sum(blocks) >= 0, 1, -1) > 0 for b in blocks]
    merged = sum(b * a for b, a in zip(blocks, agree, strict=True)) / np.maximum(1, sum(agree))
    return u[:, kept] @ merged


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("density", [0.1, 0.2, 1.0])
def test_knots(shape, density):
    base, experts = material(shape, size=2.0)
    close(moved("knots", base, experts, density=density), knots(wide(base, experts), density), base, 1e-4)


def test_knots_of_low_rank_and_of_nothing():
    rng = np.random.default_rng(5)
    base = np.zeros((40, 30), np.float32)
    experts = [(rng.normal(size=(40, 3)) @ rng.normal(size=(3, 30))).astype(np.float32) for _ in range(2)]
    close(moved("knots", base, experts), knots(wide(base, experts), 0.2), base, 1e-5)
    assert not moved("knots", base, [base, base]).any()


@pytest.mark.parametrize(("name", "key"), [("pcb", "ratio"), ("knots", "density"), ("ace", "eps"), ("ace", "share")])
def test_shares_outside_one_are_refused(name, key):
    with pytest.raises(RecipeError, match=key):
        build(name, **{key: -0.5})


# --- from a recipe ---

RECIPES = {
    "emr": {"lambda": 0.5},
    "consensus_ta": {"threshold": [0.3, 0.4, 0.5]},
    "cart": {"rho": 0.2, "norm_guard": 0.7},
    "pcb": {"other": "base"},
    "ace": {"embeddings": "matrix"},
    "knots": {"density": [0.2, 0.3, 0.4]},
}


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_give_what_arrays_give(tmp_path, name):
    """Through plan and engine, with a matrix, an embedding and a vector."""
    shapes = {"layers.0.w": (96, 130), "model.embed_tokens.weight": (50, 20), "norm": (33,)}
    models = [{}, {}, {}, {}]
    for at, (key, shape) in enumerate(shapes.items()):
        base, experts = material(shape if len(shape) > 1 else (1, *shape), seed=at)
        for model, array in zip(models, [base, *experts], strict=True):
            model[key] = array.reshape(shape)
    folders = [files.checkpoint(tmp_path / f"m{i}", {"model.safetensors": m}) for i, m in enumerate(models)]
    recipe = files.recipe(tmp_path / "r.yml", name, folders[1:], folders[0], **RECIPES[name])
    values = {key: tuple(v) if isinstance(v, list) else v for key, v in RECIPES[name].items()}
    for key, tensor in sm.stream(recipe, ram="1GiB"):
        wanted, _ = run(build(name, **values), models[0][key], [m[key] for m in models[1:]], name=key)
        assert np.array_equal(tensor.numpy(), wanted), key


@pytest.mark.parametrize("kind", falling.DEFICIENT)
@pytest.mark.parametrize("name", RECIPES)
def test_deficient_experts_give_finite_merges(name, kind):
    base, experts = material((20, 33))
    given = falling.deficient(kind, base, experts)
    falling.check_small(kind, moved(name, base, given), base, given)
