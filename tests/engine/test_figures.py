"""What solvers say of their matrices: in the plan before, in the report after, and kept over an interruption."""

import json

import build
import numpy as np
import pytest
from safetensors.numpy import load_file

import streammerge as sm
from streammerge.errors import Interrupted

NAMES = ("layer.0.weight", "layer.1.weight")


@pytest.fixture
def recipe(tmp_path):
    rng = np.random.default_rng(5)
    shapes = {NAMES[0]: (24, 40), "norm": (9,), NAMES[1]: (33, 17)}
    base = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    models = {"base": base}
    for i in "ab":
        models[i] = {name: (w + 0.1 * rng.normal(size=w.shape)).astype(np.float32) for name, w in base.items()}
    for name, tensors in models.items():
        build.checkpoint(tmp_path / name, {"model.safetensors": tensors})
    experts = [tmp_path / "a", tmp_path / "b"]
    return build.recipe(tmp_path / "r.json", "wudi", experts, tmp_path / "base", scale=0.5, iterations=20)


def test_a_plan_names_solvers_and_a_report_tells_how_it_went(recipe, tmp_path):
    plan = sm.plan(recipe)
    assert plan.as_dict()["solvers"] == {"wudi adam": 2}
    report = sm.merge(plan, tmp_path / "out")
    assert set(report["matrices"]) == set(NAMES)
    for name in NAMES:
        found = report["matrices"][name]
        tensors = {
            model: load_file(tmp_path / model / "model.safetensors")[name] for model in ("base", "a", "b", "out")
        }
        for i, expert in enumerate("ab", 1):
            assert found[f"norm_{i}"] == pytest.approx(np.linalg.norm(tensors[expert] - tensors["base"]), rel=1e-5)
        assert found["displacement"] == pytest.approx(np.linalg.norm(tensors["out"] - tensors["base"]), rel=1e-5)
        assert 0 < found["residual"] < 1
        assert found["travelled"] > 0
    manifest = json.loads((tmp_path / "out" / "streammerge.json").read_bytes())
    assert manifest["report"]["matrices"] == report["matrices"]


def test_figures_outlive_an_interruption(recipe, tmp_path):
    whole = sm.merge(recipe, tmp_path / "whole", shard_size="4KB")

    with pytest.raises(Interrupted):  # one core settles a matrix before it asks for the next; lanes may not have begun
        sm.merge(recipe, tmp_path / "out", shard_size="4KB", threads=1, cancel=build.After(2))
    rest = sm.merge(recipe, tmp_path / "out", shard_size="4KB")
    assert rest["read_bytes"] < whole["read_bytes"], "what was done is not done again"
    assert rest["matrices"] == whole["matrices"]
