"""The GPU pipeline on a simulated device: the bytes of the CPU, whatever the order in which streams get on."""

from __future__ import annotations

import hashlib

import build
import numpy as np
import pytest
from engine import simulated

import streammerge as sm
from streammerge.planner import plan as planning

SHARDS = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
METHODS = {
    "linear": {"weight": [1.0, 2.0]},
    "task_arithmetic": {"weight": [0.4, 0.7], "lambda": 0.9},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base and two experts of two shards: large, small, odd, empty, 16-bit, frozen and integer tensors."""
    folder = tmp_path_factory.mktemp("models")
    dice = np.random.default_rng(3)
    frozen = dice.standard_normal((100, 400), np.float32)
    frozen[0, 0] = np.nan
    made = []
    for name in "abc":

        def some(*shape):
            return dice.standard_normal(shape, np.float32)

        half = some(101, 377).astype(np.float16)
        half[2, 3] = np.inf if name == "b" else 1
        mixed = frozen.copy()
        mixed[50:] = some(50, 400)
        shards = {
            SHARDS[0]: {
                "embed": some(201, 501),
                "odd": some(7),
                "none": some(0, 4),
                "half": half,
                "ids": np.arange(1000),
                "frozen": frozen,
                "partly": mixed,
            },
            SHARDS[1]: {"large": some(200, 511), **{f"small.{i}": some(5, i) for i in range(20)}},
        }
        made.append(build.checkpoint(folder / name, shards, config={"model_type": "x"}))
    return made


def written(folder, models, method):
    needs_base = method != "linear"
    experts = models[1:] if needs_base else models[:2]
    experts = experts[:1] if method == "slerp" else experts
    return build.recipe(folder / "r.yml", method, experts, models[0] if needs_base else None, **METHODS[method])


def digest(folder):
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize("tile", [1 << 16, 1 << 18])
@pytest.mark.parametrize("method", METHODS)
def test_the_bytes_of_the_cpu(tmp_path, monkeypatch, models, method, tile):
    recipe = written(tmp_path, models, method)
    expected = sm.merge(recipe, tmp_path / "cpu", ram="1GiB", device="cpu", seed=5)
    for seed in range(2):
        simulated.install(monkeypatch, seed)
        monkeypatch.setattr(planning, "TILE", tile)
        out = tmp_path / f"gpu{seed}"
        report = sm.merge(recipe, out, ram="4GiB", vram="2GiB", device="cuda", seed=5)
        assert digest(out) == digest(tmp_path / "cpu")
        assert report["nonfinite"] == expected["nonfinite"]
        assert report["copied_tensors"] == expected["copied_tensors"]
        assert report["device"] == "cuda:0"
        assert report["predicted"]["vram_peak_bytes"] <= 2 << 30
        assert set(report["kernels"].values()) == {"triton"}
