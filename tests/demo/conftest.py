"""A demo small enough for a test: two layers, a handful of steps, a runner that averages instead of merging."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from streammerge.demo import Settings, corpus, train


@pytest.fixture(scope="session")
def architecture() -> train.Architecture:
    return train.Architecture(hidden=16, layers=2, heads=2, intermediate=24, positions=64)


@pytest.fixture(scope="session")
def schedule() -> train.Schedule:
    return train.Schedule(steps=3, matrix_rate=0.02, other_rate=3e-3, batch=2, window=32, warmup=2)


@pytest.fixture
def tiny_settings(architecture, schedule) -> Settings:
    return Settings(architecture=architecture, base=schedule, expert=schedule, windows=2, methods=("linear", "slerp"))


@pytest.fixture
def small_corpus(monkeypatch):
    """Text that needs no walk through the library; counts how often it is gathered."""
    calls = []

    def gather():
        calls.append(1)
        texts = {"code": b"def f(x):\n    return x\n", "prose": b"The quick brown fox. ", "tables": b" 1 2 3\n"}
        return {name: corpus.Domain(name, text * 200, text[::-1] * 200) for name, text in texts.items()}

    monkeypatch.setattr(corpus, "gather", gather)
    return calls


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=120)


class FakeRunner:
    """Averages the models that the recipe lists, in fp32, and keeps count."""

    def __init__(self) -> None:
        self.recipes: list[str] = []

    def __call__(self, recipe: Path, out: Path, ram: str) -> dict:
        from safetensors.torch import load_file, save_file

        self.recipes.append(recipe.stem)
        models = [recipe.parent / entry["model"] for entry in yaml.safe_load(recipe.read_text())["models"]]
        shutil.copytree(models[0], out)
        for shard in out.glob("*.safetensors"):
            parts = [load_file(model / shard.name) for model in models]
            mean = {name: (sum(part[name].float() for part in parts) / len(parts)).bfloat16() for name in parts[0]}
            save_file(mean, shard, metadata={"format": "pt"})
        report = {"ram_peak_bytes": 50 << 20, "seconds": 0.25}
        return {**report, "predicted": {"ram_peak_bytes": 60 << 20}}


@pytest.fixture
def runner() -> FakeRunner:
    return FakeRunner()
