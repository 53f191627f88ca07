"""Every method against its float64 oracle."""

import zlib

import numpy as np
import oracles
import pytest
from merging import run
from test_contract import make, material

from streammerge.errors import RecipeError

SHAPES = [(64, 129), (4097,), (1, 3, 5)]


def close(out, wanted, base, experts):
    """Within a few units of fp32 rounding of the largest operand."""
    scale = max(np.abs(x).max(initial=0.0) for x in [*experts, *([] if base is None else [base]), wanted])
    np.testing.assert_allclose(out, wanted, rtol=0, atol=4e-7 * scale)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("linear", {"normalize": False}),
        ("passthrough", {"scale": 0.3}),
        ("slerp", {}),
        ("slerp", {"t": 1.0}),
        ("nuslerp", {}),
        ("nuslerp", {"nuslerp_flatten": False}),
        ("nuslerp", {"nuslerp_flatten": False, "nuslerp_row_wise": True}),
        ("model_stock", {}),
        ("model_stock", {"filter_wise": True}),
    ],
)
def test_means_and_arcs(name, options, shape):
    if len(shape) > 2 and ("nuslerp_flatten" in options or "filter_wise" in options):
        shape = (6, 50)
    base, experts = material(name, shape, "f32")
    out, _ = run(make(name, **options), base, experts)
    wide = [e.astype(np.float64) for e in experts]
    root = None if base is None else base.astype(np.float64)
    more = {"weight": (0.6, 0.4)} if name in ("linear", "nuslerp") else {"t": 0.3} if name == "slerp" else {}
    close(out, getattr(oracles, name)(root, wide, **{**more, **options}), root, wide)


def test_nuslerp_of_task_vectors():
    _, experts = material("nuslerp", (30, 40), "f32")
    base = np.random.default_rng(1).normal(0, 0.02, (30, 40)).astype(np.float32)
    for options in ({}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}):
        out, _ = run(make("nuslerp", **options), base, experts)
        wide = [e.astype(np.float64) for e in experts]
        close(out, oracles.nuslerp(base.astype(np.float64), wide, (0.6, 0.4), **options), base, wide)


FAMILY = {
    "task_arithmetic": {},
    "ties": {"elect": True, "normalize": True},
    "breadcrumbs": {},
    "breadcrumbs_ties": {"elect": True},
    "dare_linear": {"rescale": True},
    "dare_ties": {"elect": True, "rescale": True},
    "della": {"elect": True, "normalize": True, "rescale": True},
    "della_linear": {"rescale": True},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "options", [{}, {"lambda_": 1.7}, {"normalize": True}, {"rescale": True}, {"weight": (0.8, -0.3)}]
)
@pytest.mark.parametrize("name", FAMILY)
def test_task_vectors(name, options, shape):
    if options.get("rescale") and name == "task_arithmetic":
        pytest.skip("nothing is dropped")
    base, experts = material(name, shape, "f32", seed=3)
    recipe = {("lambda" if k == "lambda_" else k): v for k, v in options.items()}
    out, _ = run(make(name, **recipe), base, experts, seed=77)
    deltas = [e - base for e in experts]  # thresholds are taken on fp32 differences
    if name == "ties":
        masks = [oracles.largest(d, p) for d, p in zip(deltas, (0.5, 0.3), strict=True)]
    elif name.startswith("breadcrumbs"):
        masks = [oracles.crumbs(d, p, 0.01) for d, p in zip(deltas, (0.5, 0.3), strict=True)]
    elif name.startswith("dare"):
        tensor = zlib.crc32(b"tensor")
        masks = [oracles.dropped(shape, p, 77, tensor, k) for k, p in enumerate((0.5, 0.3))]
    elif name.startswith("della"):
        tensor = zlib.crc32(b"tensor")
        masks = [
            oracles.dropped_by_rank(d, p, 0.15, 77, tensor, k)
            for k, (d, p) in enumerate(zip(deltas, (0.5, 0.3), strict=True))
        ]
    else:
        masks = [np.ones(shape)] * 2
    wide = [e.astype(np.float64) for e in experts]
    root = base.astype(np.float64)
    wanted = oracles.vectors(root, wide, masks=masks, **{"weight": (0.6, 0.4), **FAMILY[name], **options})
    votes = [np.abs(w * d) for w, d in zip(options.get("weight", (0.6, 0.4)), deltas, strict=True)]
    unclear = np.zeros(shape, bool)
    if FAMILY[name].get("elect"):  # where the vote is a draw up to rounding, either sign is right
        signed = sum(w * d * m for w, d, m in zip(options.get("weight", (0.6, 0.4)), deltas, masks, strict=True))
        cast = sum(v * m for v, m in zip(votes, masks, strict=True))
        unclear = (np.abs(signed) < 1e-5 * cast) & (cast > 0)
    close(np.where(unclear, 0, out), np.where(unclear, 0, wanted), root, wide)
    assert unclear.mean() < 0.01 or np.prod(shape) < 100


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
@pytest.mark.parametrize("density", [0.0, 1e-9, 0.1, 0.5, 0.999, 1.0])
def test_exact_counts_with_ties_everywhere(name, density):
    """All magnitudes equal: which elements stay is then decided by index alone."""
    shape = (3, 5000)
    base = np.zeros(shape, np.float32)
    signs = np.where(np.random.default_rng(0).random(shape) < 0.5, -1, 1).astype(np.float32)
    out, _ = run(make(name, density=(density, density)), base, [signs, signs], tile=4096, threads=2)
    kept = (out != 0).reshape(-1)
    if name == "ties":
        count = signs.size if density >= 1 else max(1, int(density * signs.size)) if density > 0 else 0
        assert kept.sum() == count
        assert kept[:count].all()
    else:
        mask = oracles.crumbs(signs, density, 0.01).reshape(-1)
        assert np.array_equal(kept, mask.astype(bool))


@pytest.mark.parametrize(("density", "epsilon"), [(0.9, 0.15), (0.1, 0.15), (0.5, 0.5), (0.5, -0.5), (float("nan"), 0)])
def test_della_refuses_chances_that_are_none(density, epsilon):
    with pytest.raises(RecipeError, match="epsilon"):
        make("della", density=(density, 0.5), epsilon=(epsilon, 0.1))
    make("della", density=(1.0, 0.0), epsilon=(0.3, 0.3))  # nothing is drawn there


@pytest.mark.parametrize("shape", [(96, 700), (30011,), (4500, 3, 5), (9000, 1)])
@pytest.mark.parametrize("options", [{"rescale": False}, {"density": (1.0, 0.3)}, {"epsilon": (0.0, 0.29)}])
def test_della_keeps_rows_whole(options, shape):
    base, experts = material("della", shape)
    instance = make("della", **options)
    whole, _ = run(instance, base, experts)
    for tile, threads in ((1, 1), (9000, 2)):
        cut, _ = run(instance, base, experts, tile=tile, threads=threads, streamed=threads == 2)
        assert np.array_equal(whole, cut), (tile, threads)
