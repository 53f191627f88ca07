"""What a run noticed survives it: findings of the part that was done before a kill or a stop."""

import threading

import build
import numpy as np
import pytest

import streammerge as sm
from streammerge.errors import CheckpointError, Interrupted
from streammerge.planner import cutting
from streammerge.store import writer


class StopAt:
    """Asks to stop after so many progress calls."""

    def __init__(self, count):
        self.left, self.event = count, threading.Event()

    def __call__(self, progress):
        self.left -= 1
        if self.left == 0:
            self.event.set()

    def is_set(self):
        return self.event.is_set()


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Two models: one tensor with a NaN in its first element, one that is the same in both, four others."""
    monkeypatch.setattr(cutting, "TILE", 1 << 16)
    monkeypatch.setattr(writer, "SYNC_EVERY", 1 << 17)
    dice = np.random.default_rng(0)
    shapes = {"a": (64, 1024), "b": (64, 1024), "c": (256, 1024), "d": (64, 1024), "e": (64, 1024)}
    first = {name: dice.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    second = {name: dice.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    second["b"] = first["b"].copy()
    second["c"][0, 0] = np.nan
    folders = [build.checkpoint(tmp_path / n, {"model.safetensors": t}) for n, t in (("x", first), ("y", second))]
    return build.recipe(tmp_path / "r.json", "linear", folders, None, weight=[1.0, 1.0])


@pytest.mark.parametrize("stop", [12, 20, 24, 30, 36])
def test_findings_of_an_interrupted_run_are_in_the_report(recipe, tmp_path, stop):
    token = StopAt(stop)
    with pytest.raises(Interrupted):
        sm.merge(recipe, tmp_path / "out", ram="1GiB", progress=token, cancel=token)
    report = sm.merge(recipe, tmp_path / "out", ram="1GiB")
    assert [(found["tensor"], found["holds"]) for found in report["nonfinite"]] == [("c", "NaN")]
    assert report["nonfinite"][0]["file"] == str(tmp_path / "y" / "model.safetensors")
    assert report["copied_tensors"] <= 1


def test_a_copied_tensor_is_counted_once(recipe, tmp_path):
    token = StopAt(30)
    with pytest.raises(Interrupted):
        sm.merge(recipe, tmp_path / "out", ram="1GiB", progress=token, cancel=token)
    assert sm.merge(recipe, tmp_path / "out", ram="1GiB")["copied_tensors"] == 1


def test_strict_refuses_what_an_earlier_run_noticed(recipe, tmp_path):
    token = StopAt(36)
    with pytest.raises(Interrupted):
        sm.merge(recipe, tmp_path / "out", ram="1GiB", progress=token, cancel=token)
    with pytest.raises(CheckpointError, match=r"tensor 'c' holds NaN; mend it, or merge without --strict"):
        sm.merge(recipe, tmp_path / "out", ram="1GiB", strict=True)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
