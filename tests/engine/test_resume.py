"""Killed at any moment: the output is absent or complete, and the same command again ends in the same bytes."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import time

import build
import numpy as np
import pytest

import streammerge as sm
from streammerge.errors import OutputExists
from streammerge.store import journal
from streammerge.store.verify import verify
from streammerge.store.writer import MANIFEST

SHARDS = [f"model-{i:05}-of-00002.safetensors" for i in (1, 2)]
# Many small steps, a journal line for every few, and a disk that takes its time.
SLOW = """
import os, time
from streammerge.planner import cutting
from streammerge.store import writer
cutting.TILE = 1 << 17
writer.SYNC_EVERY = 1 << 18
real = os.pwrite
def slow(*arguments):
    time.sleep(0.01)
    return real(*arguments)
os.pwrite = slow
"""
DIE = "os.kill(os.getpid(), 9)"
METHODS = {
    "linear": {"weight": [1.0, 2.0]},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": [0.4, 0.7], "lambda": 0.9},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two models of two shards, six million weights each, with odd and empty tensors."""
    folder = tmp_path_factory.mktemp("models")
    dice = np.random.default_rng(3)
    made = []
    for name in "ab":

        def random_tensor(*shape):
            return dice.standard_normal(shape, np.float32)

        shards = {
            SHARDS[0]: {
                "embed": random_tensor(1501, 1001),
                "odd": random_tensor(7),
                "none": random_tensor(0, 4),
                "head": random_tensor(1000, 1000).astype(np.float16),
            },
            SHARDS[1]: {"large": random_tensor(3000, 1111), **{f"small.{i}": random_tensor(5, i) for i in range(50)}},
        }
        made.append(build.checkpoint(folder / name, shards, config={"model_type": "x"}))
    return made


def written(folder, models, method):
    base = None if method == "linear" else models[0]
    experts = models[1:] if method == "slerp" else models
    return build.recipe(folder / f"{method}.json", method, experts, base, **METHODS[method])


@pytest.fixture(scope="module")
def wanted(models, tmp_path_factory):
    """For each method, the shards that a run makes that nobody disturbs."""
    folder = tmp_path_factory.mktemp("wanted")
    found = {}
    for method in METHODS:
        sm.merge(written(folder, models, method), folder / method, ram="2GiB")
        found[method] = {name: (folder / method / name).read_bytes() for name in SHARDS}
    return found


def check(out, expected):
    """The folder is whole, verified, and byte for byte that of an undisturbed run."""
    assert {name: (out / name).read_bytes() == data for name, data in expected.items()} == dict.fromkeys(SHARDS, True)
    assert verify(out)["bad"] == []
    names = {entry.name for entry in out.iterdir()}
    assert names == {*SHARDS, "model.safetensors.index.json", "config.json", MANIFEST}
    assert not out.with_name(out.name + ".partial").exists()


def until(condition, child, seconds=60):
    """Wait for a condition, or for the child's end; whether the condition came."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if condition():
            return True
        if child.poll() is not None:
            return False
        time.sleep(0.002)
    raise AssertionError("nothing happens")


def kill_at(recipe, out, ram, delay):
    """Start a run, kill it `delay` seconds after it made its folder; what it was told to do stays undone or is done."""
    child = build.start("merge", recipe, out, "--ram", ram, "--quiet", before=SLOW)
    partial = out.with_name(out.name + ".partial")
    until(partial.exists, child)
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(delay)
    child.kill()
    _, err = child.communicate()
    assert child.returncode in (0, -signal.SIGKILL), err
    if out.exists():
        assert verify(out)["bad"] == [], "the folder is there and is not whole"
    return child.returncode


def rounds(tmp_path, models, wanted, kills, seed, methods, rams):
    dice = random.Random(seed)
    out, progress = tmp_path / "out", []
    for number in range(kills):
        method = methods[number // 3 % len(methods)]
        recipe = written(tmp_path, models, method)
        if kill_at(recipe, out, rams[number % len(rams)], dice.uniform(0, 1.6)) == 0 or out.exists():
            check(out, wanted[method])
            shutil.rmtree(out)
        else:
            progress.append(journal.read(out.with_name("out.partial")))
        if number % 3 == 2 or number == kills - 1:
            sm.merge(recipe, out, ram="2GiB")
            check(out, wanted[method])
            shutil.rmtree(out)
    return progress


def test_three_kills(tmp_path, models, wanted):
    progress = rounds(tmp_path, models, wanted, 3, 11, ["task_arithmetic"], ["1GiB", "300MiB"])
    assert progress, "no kill hit a run"


@pytest.mark.slow
def test_twelve_kills(tmp_path, models, wanted):
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    tight = build.command("plan", written(tmp_path, models, "slerp"), "--ram", "1MiB", "--json")
    least = json.loads(tight.stdout)["error"]["least_bytes"] + (8 << 20)  # reads the large tensors twice
    rams = ["1GiB", str(least)]
    progress = rounds(tmp_path, models, wanted, 12, seed, ["slerp", "linear", "task_arithmetic", "slerp"], rams)
    assert sum(bool(found.done or found.finished) for found in progress) >= 3, "the kills came too early to mean much"


# Where a kill is worst: what runs instead of a call, and whether the output is there afterwards.
MOMENTS = {
    "before the journal's first line": ("journal.Journal._put = lambda *_: DIE", False),
    "within the journal's first line": ("journal.Journal._put = lambda s, d: (os.write(s._file, d[:9]), DIE)", False),
    "before the shards have room": ("writer.allocate = lambda *_: DIE", False),
    "before the last page of a shard": ("shardfile.ShardFile.finish = lambda *_: DIE", False),
    "before the manifest": ("os.replace = lambda *_: DIE", False),
    "between the manifest and the rename": ("os.rename = lambda *_: DIE", False),
    "after the rename": ("r = os.rename; os.rename = lambda *a: (r(*a), DIE)", True),
}


@pytest.mark.parametrize("moment", list(MOMENTS))
def test_killed_at_the_worst_moment(tmp_path, models, wanted, moment):
    code, there = MOMENTS[moment]
    recipe, out = written(tmp_path, models, "linear"), tmp_path / "out"
    prelude = f"import os\nfrom streammerge.store import journal, shardfile, writer\n{code.replace('DIE', DIE)}"
    child = build.command("merge", recipe, out, "--ram", "1GiB", "--quiet", before=prelude)
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert out.exists() == there
    if there:
        with pytest.raises(OutputExists):
            sm.merge(recipe, out, ram="2GiB")
    else:
        report = sm.merge(recipe, out, ram="2GiB")
        assert report["tensors"] == 55
    check(out, wanted["linear"])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_asked_to_stop(tmp_path, models, wanted, number, code):
    """One line says how to go on; until then the folder belongs to the run that writes it."""
    recipe, out = written(tmp_path, models, "linear"), tmp_path / "out"
    partial = tmp_path / "out.partial"
    child = build.start("merge", recipe, out, "--ram", "1GiB", "--quiet", before=SLOW)
    assert until(lambda: journal.read(partial).done, child), child.communicate()
    for resume in (True, False):
        with pytest.raises(OutputExists, match="another run is writing here"):
            sm.merge(recipe, out, ram="2GiB", resume=resume)
    assert child.poll() is None
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code
    assert err == f"streammerge: stopped; what is done is kept in {partial}: run the same command again to go on\n"
    assert not out.exists()
    kept = journal.read(partial)
    durable = sum(kept.done.get(name, 0) for name in SHARDS)
    report = sm.merge(recipe, out, ram="2GiB")
    check(out, wanted["linear"])
    total = sum(len(data) for data in wanted["linear"].values())
    assert report["write_bytes"] < total, "nothing was taken up"
    if not kept.finished:
        assert report["write_bytes"] <= total - durable + 4096 * (1 + len(kept.done))


def test_a_token_stops_an_embedded_run(tmp_path, models, wanted):
    """At the first, second, ... question whether to stop; each run goes on where the one before was stopped."""

    recipe, out = written(tmp_path, models, "slerp"), tmp_path / "out"
    codes = []
    for after in range(20):
        try:
            sm.merge(recipe, out, ram="2GiB", cancel=build.After(after))
            break
        except sm.Interrupted as stop:
            codes.append(stop.exit_code)
        assert not out.exists()
    assert set(codes) == {130}
    assert len(codes) > 1
    check(out, wanted["slerp"])


def test_unfinished_work_of_another_recipe(tmp_path, models, wanted):
    out = tmp_path / "out"
    with pytest.raises(sm.Interrupted):
        sm.merge(written(tmp_path, models, "slerp"), out, ram="2GiB", cancel=build.After(0))
    linear = written(tmp_path, models, "linear")
    with pytest.raises(OutputExists) as caught:
        sm.merge(linear, out, ram="2GiB")
    assert str(caught.value).startswith(f"{out}.partial: holds unfinished work of another recipe")
    assert "--no-resume discards it" in str(caught.value)
    sm.merge(linear, out, ram="2GiB", resume=False)
    check(out, wanted["linear"])


def test_an_existing_output_is_left_alone_unless_asked(tmp_path, models, wanted):
    recipe, out = written(tmp_path, models, "linear"), tmp_path / "out"
    sm.merge(written(tmp_path, models, "slerp"), out, ram="2GiB")
    with pytest.raises(OutputExists, match="--overwrite replaces it"):
        sm.merge(recipe, out, ram="2GiB")
    check(out, wanted["slerp"])
    sm.merge(recipe, out, ram="2GiB", overwrite=True)
    check(out, wanted["linear"])


def test_a_folder_of_somebody_else_is_never_replaced(tmp_path, models):
    recipe, out = written(tmp_path, models, "linear"), tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("mine")
    for overwrite in (False, True):
        with pytest.raises(OutputExists):
            sm.merge(recipe, out, ram="2GiB", overwrite=overwrite)
    assert os.listdir(out) == ["mine"]
