"""The GPU pipeline on a simulated device: the bytes of the CPU, whatever the order in which streams get on."""

from __future__ import annotations

import hashlib
from dataclasses import replace

import build
import numpy as np
import pytest
import torch
from engine.simulated import REAL

import streammerge as sm
from streammerge.errors import BudgetTooSmall, CheckpointError, Interrupted, RecipeError
from streammerge.planner import cutting
from streammerge.planner import device as placing

SHARDS = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
METHODS = {
    "linear": {"weight": [1.0, 2.0]},
    "task_arithmetic": {"weight": [0.4, 0.7], "lambda": 0.9},
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": [1.0, 2.0], "nuslerp_flatten": False},
    "nuslerp columns": {"weight": [1.0, 2.0], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "model_stock": {"filter_wise": True},
    "ties": {"weight": [0.5, 0.8], "density": 0.3},
    "breadcrumbs_ties": {"weight": [0.5, 0.8], "density": 0.6, "gamma": 0.05, "rescale": True},
    "dare_ties": {"weight": [0.5, 0.8], "density": 0.4},
    "dare_linear": {"weight": [0.5, 0.8], "density": 0.4, "rescale": False},
    "della": {"weight": [0.5, 0.8], "density": 0.4},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base and two experts of two shards: large, small, odd, empty, 16-bit, frozen and integer tensors."""
    folder = tmp_path_factory.mktemp("models")
    dice = np.random.default_rng(3)
    frozen = dice.standard_normal((40, 400), np.float32)
    frozen[0, 0] = np.nan
    made = []
    for name in "abc":

        def some(*shape):
            return dice.standard_normal(shape, np.float32)

        half = some(51, 177).astype(np.float16)
        half[2, 3] = np.inf if name == "b" else 1
        mixed = frozen.copy()
        mixed[20:] = some(20, 400)
        shards = {
            SHARDS[0]: {
                "embed": some(101, 301),
                "odd": some(7),
                "none": some(0, 4),
                "half": half,
                "ids": np.arange(1000),
                "frozen": frozen,
                "partly": mixed,
            },
            SHARDS[1]: {"large": some(100, 311), **{f"small.{i}": some(5, i) for i in range(12)}},
        }
        made.append(build.checkpoint(folder / name, shards, config={"model_type": "x"}))
    return made


def written(folder, models, method):
    name = method.split()[0]
    needs_base = name != "linear"
    experts = models[1:] if needs_base else models[:2]
    experts = experts[:1] if name == "slerp" else experts
    return build.recipe(folder / "r.yml", name, experts, models[0] if needs_base else None, **METHODS[method])


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("tile", [1 << 15, 1 << 18])
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_the_cpu(tmp_path, monkeypatch, gpu, models, method, tile):
    recipe = written(tmp_path, models, method)
    expected = sm.merge(recipe, tmp_path / "cpu", ram="1GiB", device="cpu", seed=5)
    gpu(tile)
    monkeypatch.setattr(cutting, "TILE", tile)
    report = sm.merge(recipe, tmp_path / "gpu", ram="4GiB", vram="2GiB", device="cuda", seed=5)
    assert digest(tmp_path / "gpu") == digest(tmp_path / "cpu")
    assert report["nonfinite"] == expected["nonfinite"]
    assert report["copied_tensors"] == expected["copied_tensors"]
    assert report["device"] == "cuda:0"
    assert report["predicted"]["vram_peak_bytes"] <= 2 << 30
    assert set(report["kernels"].values()) == {"triton"}


@pytest.mark.parametrize("method", ["slerp", "ties", "breadcrumbs_ties", "nuslerp columns"])
def test_a_tensor_that_the_device_cannot_hold_is_read_again(tmp_path, monkeypatch, gpu, models, method):
    recipe = written(tmp_path, models, method)
    sm.merge(recipe, tmp_path / "cpu", ram="1GiB", device="cpu")
    gpu(1)
    monkeypatch.setattr(cutting, "TILE", 1 << 14)
    monkeypatch.setattr(placing, "SLOTS", 3)
    plan = sm.plan(recipe, ram="4GiB", vram="2GiB", device="cuda")
    least = replace(plan.device_layout, slots=3).peak_bytes
    plan = sm.plan(recipe, ram="4GiB", vram=least, device="cuda")
    assert plan.passes > 1
    assert plan.vram_peak_bytes <= least
    sm.merge(plan, tmp_path / "gpu")
    assert digest(tmp_path / "gpu") == digest(tmp_path / "cpu")


def test_too_little_device_memory_is_refused_by_what_would_do(tmp_path, gpu, models):
    recipe = written(tmp_path, models, "linear")
    gpu()
    with pytest.raises(BudgetTooSmall, match=r"needs at least .* of device memory and 1 MiB are allowed; give --vram"):
        sm.plan(recipe, ram="4GiB", vram="1MiB", device="cuda")
    with pytest.raises(BudgetTooSmall) as refused:
        sm.plan(recipe, ram="4GiB", vram="1MiB", device="cuda")
    plan = sm.plan(recipe, ram="4GiB", vram=refused.value.least, device="cuda")
    assert plan.vram_peak_bytes <= refused.value.least
    with pytest.raises(BudgetTooSmall, match="of memory and"):
        sm.plan(recipe, ram="8MiB", vram="2GiB", device="cuda")


def test_stopped_on_a_gpu_and_finished_on_the_cpu(tmp_path, monkeypatch, gpu, models):
    recipe = written(tmp_path, models, "task_arithmetic")
    sm.merge(recipe, tmp_path / "cpu", ram="1GiB", device="cpu")
    gpu(2)
    monkeypatch.setattr(cutting, "TILE", 1 << 14)
    seen = []

    class Stop:
        def is_set(self):
            return len(seen) > 8

    with pytest.raises(Interrupted):
        sm.merge(recipe, tmp_path / "out", ram="4GiB", vram="2GiB", device="cuda", progress=seen.append, cancel=Stop())
    assert (tmp_path / "out.partial").exists()
    sm.merge(recipe, tmp_path / "out", ram="1GiB", device="cpu")
    assert digest(tmp_path / "out") == digest(tmp_path / "cpu")


def test_strict_refuses_what_the_device_finds(tmp_path, gpu, models):
    gpu()
    with pytest.raises(CheckpointError, match=r"holds (NaN|an infinity); mend it"):
        sm.merge(
            written(tmp_path, models, "linear"), tmp_path / "out", ram="4GiB", vram="2GiB", device="cuda", strict=True
        )
    assert not (tmp_path / "out").exists()


def test_stream_hands_out_the_same_tensors(tmp_path, monkeypatch, gpu, models):
    recipe = written(tmp_path, models, "task_arithmetic")
    wanted = dict(sm.stream(recipe, ram="1GiB", device="cpu"))
    gpu(3)
    monkeypatch.setattr(cutting, "TILE", 1 << 14)
    found = dict(sm.stream(recipe, ram="4GiB", vram="2GiB", device="cuda"))
    assert list(found) == list(wanted)
    for name, tensor in found.items():
        assert torch.equal(tensor.view(torch.uint8), wanted[name].view(torch.uint8)), name


@pytest.mark.skipif(REAL, reason="there is a GPU")
def test_no_gpu_is_said_in_one_line(tmp_path, models):
    with pytest.raises(RecipeError, match=r"--device cuda: torch sees no GPUs here; use --device cpu"):
        sm.plan(written(tmp_path, models, "linear"), device="cuda")
    with pytest.raises(RecipeError, match="--device cuda:x: use auto, cpu, cuda or cuda:N"):
        sm.plan(written(tmp_path, models, "linear"), device="cuda:x")
    assert sm.plan(written(tmp_path, models, "linear"), device="auto").device == "cpu"
