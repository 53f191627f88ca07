"""Matrices solved side by side: the same bytes, in memory that the plan has counted, with nothing left running."""

import json
import threading

import build
import numpy as np
import pytest

import streammerge as sm
from streammerge.engine.lanes import Lanes

SHAPES = {
    f"layers.{i}.{name}.weight": shape for i in range(3) for name, shape in (("up", (860, 770)), ("q", (300, 400)))
}
SHAPES["norm.weight"] = (300,)


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("lanes"), np.random.default_rng(3)
    base = {name: rng.standard_normal(shape).astype(np.float32) for name, shape in SHAPES.items()}
    experts = [
        {name: value + 0.01 * rng.standard_normal(value.shape).astype(np.float32) for name, value in base.items()}
        for _ in range(3)
    ]
    paths = [
        build.checkpoint(folder / name, {"model.safetensors": tensors}, config={"model_type": "test"})
        for name, tensors in zip(("base", "a", "b", "c"), (base, *experts), strict=True)
    ]
    return folder, paths


def written(recipe, method, post=None, **parameters):
    folder, (base, *experts) = recipe
    path = build.recipe(folder / f"{method}.yml", method, experts, base, **parameters)
    if post is not None:
        path.write_text(json.dumps({**json.loads(path.read_text()), "post": post}))
    return path


def merged(recipe, out, **options):
    sm.merge(recipe, out, **options)
    return (out / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("tsvm", {}),
        ("wudi", {"iterations": 3}),
        ("wudi", {"solver": "closed_form", "ridge": 1e-9}),
        ("knots", {}),
        ("task_arithmetic", {"weight": 1.0, "post": "svc"}),
        pytest.param("iso_cts", {}, marks=pytest.mark.slow),
        pytest.param("ace", {}, marks=pytest.mark.slow),
    ],
)
def test_the_same_bytes_however_many_at_once(tmp_path, recipe, method, parameters, fresh_process):
    made = written(recipe, method, **parameters)
    with pytest.raises(sm.BudgetTooSmall) as refused:
        sm.plan(made, ram="64MiB")
    least = refused.value.least
    alone, many = (sm.plan(made, ram=ram, threads=4) for ram in (least, "3GiB"))
    busy = method == "wudi" and "solver" not in parameters  # with products of large matrices
    assert (many.at_once, many.at_once > alone.at_once) == ((1, False) if busy else (4, True))
    assert busy or alone.ram_peak_bytes < many.ram_peak_bytes
    for ram in range(least, least + (400 << 20), 12 << 20):
        assert sm.plan(made, ram=ram, threads=4).ram_peak_bytes <= ram
    found = [
        sm.merge(made, tmp_path / name, ram=ram, threads=threads)
        and (tmp_path / name / "model.safetensors").read_bytes()
        for name, ram, threads in (
            ("alone", least + (64 << 20), 2),
            ("two", "3GiB", 2),
            ("four", "3GiB", 4),
            ("one", "3GiB", 1),
        )
    ]
    assert len(set(found)) == 1


def test_a_matrix_that_cannot_be_solved_stops_all(tmp_path, recipe):
    base, a, *_ = recipe[1]
    broken = build.checkpoint(
        tmp_path / "broken",
        {"model.safetensors": {name: np.full(shape, np.nan, np.float32) for name, shape in SHAPES.items()}},
        config={"model_type": "test"},
    )
    made = build.recipe(tmp_path / "r.yml", "tsvm", [a, broken], base)
    with pytest.raises(sm.CheckpointError, match=r"layers\.0\..* of expert 2 holds a NaN"):
        sm.merge(made, tmp_path / "out", ram="3GiB", threads=4)
    assert not (tmp_path / "out").exists()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]


def test_asked_to_stop(tmp_path, recipe):
    stop = threading.Event()
    made = written(recipe, "tsvm")
    with pytest.raises(sm.Interrupted):
        sm.merge(made, tmp_path / "out", ram="3GiB", threads=4, cancel=stop, progress=lambda seen: stop.set())
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("lane")]
    sm.merge(made, tmp_path / "out", ram="3GiB", threads=4)  # takes up what is there
    sm.merge(made, tmp_path / "whole", ram="3GiB", threads=4)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_lanes_give_torch_its_cores_back():
    import torch

    torch.set_num_threads(3)
    try:
        lanes, found = Lanes(2), []
        for each in [lanes.do(lambda: found.append(torch.get_num_threads())) for _ in range(4)]:
            each.result()
        lanes.close()
        assert found == [1, 1, 1, 1]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(2)
