"""Disks that fill or fail, inputs that change, files at odd places: one line, work kept, the same bytes afterwards."""

import errno
import hashlib
import os
import shutil
import subprocess
from collections import namedtuple
from pathlib import Path

import build
import numpy as np
import pytest

import streammerge as sm
from streammerge.errors import CheckpointError, MachineError
from streammerge.planner import cutting
from streammerge.store import reader, writer

NAME = "model.safetensors"
RAM = "2GiB"
SHAPES = {"embed": (1501, 1001), "odd": (7,), "large": (2000, 1111), **{f"small.{i}": (5, i) for i in range(20)}}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    dice = np.random.default_rng(4)
    return [
        build.checkpoint(
            folder / name, {NAME: {key: dice.standard_normal(shape, np.float32) for key, shape in SHAPES.items()}}
        )
        for name in "ab"
    ]


@pytest.fixture(scope="module")
def recipe(models, tmp_path_factory):
    return build.recipe(tmp_path_factory.mktemp("recipe") / "r.json", "linear", models, weight=[1.0, 2.0])


@pytest.fixture(scope="module")
def wanted(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("wanted") / "out"
    sm.merge(recipe, out, ram=RAM)
    return (out / NAME).read_bytes()


@pytest.fixture(autouse=True)
def small_steps(monkeypatch):
    """So that a run has a beginning, a middle and an end."""
    monkeypatch.setattr(cutting, "TILE", 1 << 18)
    monkeypatch.setattr(writer, "SYNC_EVERY", 1 << 20)


def failing(number, after, real=None):
    """Works so many times, then fails."""
    left = [after]

    def call(*arguments, **named):
        left[0] -= 1
        if left[0] >= 0 and real is not None:
            return real(*arguments, **named)
        raise OSError(number, os.strerror(number))

    return call


@pytest.mark.parametrize(
    ("call", "number", "after"),
    [
        ("pwrite", errno.ENOSPC, 12),
        ("pwrite", errno.EIO, 0),
        ("fdatasync", errno.EIO, 2),
        ("preadv", errno.EIO, 30),
        ("rename", errno.EIO, 0),
    ],
)
@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_a_machine_that_fails(tmp_path, recipe, models, wanted, monkeypatch, call, number, after, mode):
    out = tmp_path / "out"
    for model in models:
        reader.evict(model / NAME)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing(number, after, getattr(os, call)))
        with pytest.raises(MachineError) as caught:
            sm.merge(recipe, out, ram=RAM, reader=mode)
    line = str(caught.value)
    assert "\n" not in line
    assert caught.value.exit_code == 4
    assert not out.exists()
    assert (tmp_path / "out.partial").is_dir(), "what was done is gone"
    report = sm.merge(recipe, out, ram=RAM)
    assert (out / NAME).read_bytes() == wanted
    if (call, number) == ("pwrite", errno.ENOSPC):
        assert "the disk is full; make room and run the same command again" in line
        assert report["write_bytes"] < len(wanted), "nothing was taken up"
    if call == "preadv":
        assert line.startswith(str(models[0].parent))
        assert "Input/output error" in line
    if call == "rename":
        assert report["write_bytes"] == len(wanted), "the report of the run that did the work"


def test_a_disk_too_small_is_found_before_the_start(tmp_path, recipe, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1 << 20))
    monkeypatch.setattr(os, "preadv", failing(errno.EIO, 0))
    with pytest.raises(MachineError, match=r"the output needs 14\.2 MiB more, 1 MiB are free on this disk"):
        sm.merge(recipe, tmp_path / "out", ram=RAM)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def tiny_disk(tmp_path):
    """A file system of 4 MiB, and how to make it larger."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("mounting takes root")
    made = subprocess.run([mount, "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder], capture_output=True)
    if made.returncode:
        pytest.skip("may not mount")
    yield folder, lambda: subprocess.run([mount, "-o", "remount,size=64m", folder], check=True)
    subprocess.run([shutil.which("umount"), folder], check=True)


def test_a_disk_that_is_full_at_the_start(tiny_disk, recipe, wanted):
    folder, enlarge = tiny_disk
    with pytest.raises(MachineError, match=r"needs 14\.2 MiB more, 4(\.0)? MiB are free on this disk; make room"):
        sm.merge(recipe, folder / "out", ram=RAM)
    assert list(folder.iterdir()) == []
    enlarge()
    sm.merge(recipe, folder / "out", ram=RAM)
    assert (folder / "out" / NAME).read_bytes() == wanted


def test_a_disk_that_fills_up_on_the_way(tiny_disk, recipe, wanted, monkeypatch):
    """The file system could not promise room, and somebody else took what there was."""
    folder, enlarge = tiny_disk
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 1 << 40))
        patch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP, 0))
        with pytest.raises(MachineError, match="the disk is full; make room and run the same command again"):
            sm.merge(recipe, folder / "out", ram=RAM)
    assert not (folder / "out").exists()
    enlarge()
    report = sm.merge(recipe, folder / "out", ram=RAM)
    assert (folder / "out" / NAME).read_bytes() == wanted
    assert report["write_bytes"] < len(wanted)


@pytest.mark.parametrize(("limit", "promised"), [(5 << 20, True), (5 << 20, False), ((5 << 20) + 777, False)])
def test_a_limit_on_the_size_of_files(tmp_path, recipe, wanted, limit, promised):
    """A write past the limit comes back short, and the one after it fails."""
    before = f"""
import errno, os, resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
from streammerge.planner import cutting
from streammerge.store import writer
cutting.TILE, writer.SYNC_EVERY = 1 << 18, 1 << 20
if not {promised}:
    def lacking(file, begin, size):
        raise OSError(errno.EOPNOTSUPP, "")
    os.posix_fallocate, real = lacking, os.ftruncate
    os.ftruncate = lambda file, size: real(file, min(size, {limit}))
"""
    child = build.command("merge", recipe, tmp_path / "out", "--ram", "1GiB", "--quiet", before=before)
    assert child.returncode == 4, child.stderr
    assert child.stderr.count("\n") == 1
    assert "File too large" in child.stderr
    assert child.stdout == ""
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists() != promised, "kept if something was done"
    sm.merge(recipe, tmp_path / "out", ram=RAM)
    assert (tmp_path / "out" / NAME).read_bytes() == wanted


def test_the_command_line_says_it_in_one_line_and_with_4(tmp_path, recipe, wanted):
    before = """
import errno, os
def fail(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
os.pwrite = fail
"""
    child = build.command("merge", recipe, tmp_path / "out", "--ram", "1GiB", "--quiet", before=before)
    assert child.returncode == 4
    partial = tmp_path / "out.partial"
    line = (
        f"streammerge: {partial}: the disk is full; make room and run the same command again to go on with what is done"
    )
    assert child.stderr.strip() == line
    sm.merge(recipe, tmp_path / "out", ram=RAM)
    assert (tmp_path / "out" / NAME).read_bytes() == wanted


@pytest.mark.parametrize("mode", ["direct", "buffered", "mmap"])
@pytest.mark.parametrize("change", ["shorter", "gone"])
def test_an_input_that_changed_after_planning(tmp_path, models, mode, change):
    copies = [Path(shutil.copytree(model, tmp_path / model.name)) for model in models]
    recipe = build.recipe(tmp_path / "r.json", "linear", copies, weight=[1.0, 2.0])
    plan = sm.plan(recipe, ram=RAM)
    path = copies[1] / NAME
    if change == "gone":
        path.unlink()
    else:
        os.truncate(path, 3_000_001)
    with pytest.raises(CheckpointError) as caught:
        sm.merge(plan, tmp_path / "out", reader=mode)
    line = str(caught.value)
    assert line.startswith(f"{path}: ")
    assert "\n" not in line
    assert ("ended at byte 3000001" if change == "shorter" else "gone since the merge was planned") in line
    assert not (tmp_path / "out").exists()


def test_side_files_that_cannot_be_copied(tmp_path, recipe, models, wanted, monkeypatch):
    side = models[0] / "tokenizer.json"
    side.write_text("{}")
    monkeypatch.setattr(shutil, "copyfile", failing(errno.EIO, 0))
    try:
        with pytest.raises(MachineError, match="Input/output error; mend it and run the same command again"):
            sm.merge(recipe, tmp_path / "out", ram=RAM)
        assert not (tmp_path / "out").exists()
        monkeypatch.undo()
        report = sm.merge(recipe, tmp_path / "out", ram=RAM)
    finally:
        side.unlink()
    assert report["write_bytes"] == 0, "the shards were complete"
    assert (tmp_path / "out" / NAME).read_bytes() == wanted


def shifted(source, target, lead):
    """The same model with its data `lead` bytes further on: legal, and off every alignment."""
    raw = (source / NAME).read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    target.mkdir()
    header = raw[8:start] + b" " * lead
    (target / NAME).write_bytes(len(header).to_bytes(8, "little") + header + raw[start:])
    return target


METHODS = {
    "linear": {"weight": [1.0, 2.0]},
    "slerp": {"t": 0.3},
    "task_arithmetic": {"weight": [0.4, 0.7]},
}


@pytest.mark.parametrize("lead", [1, 2])
@pytest.mark.parametrize("method", list(METHODS))
@pytest.mark.parametrize("tight", [False, True])
def test_inputs_off_their_alignment_give_the_same_bytes(tmp_path, models, method, lead, tight):
    found = []
    for number, pair in enumerate((models, [shifted(m, tmp_path / m.name, lead) for m in models])):
        base = None if method == "linear" else pair[0]
        experts = [pair[1]] if method == "slerp" else [pair[1], pair[0]]  # the base named twice is read once
        recipe = build.recipe(tmp_path / "r.json", method, experts, base, **METHODS[method])
        ram = least(recipe) if tight and number else RAM
        sm.merge(recipe, tmp_path / f"out{number}", ram=ram)
        found.append(hashlib.sha256((tmp_path / f"out{number}" / NAME).read_bytes()).hexdigest())
    assert found[0] == found[1]


def least(recipe):
    with pytest.raises(sm.BudgetTooSmall) as caught:
        sm.plan(recipe, ram="1MiB")
    return caught.value.least


@pytest.mark.parametrize("method", list(METHODS))
def test_neither_budget_nor_threads_nor_reader_change_a_byte(tmp_path, models, method):
    base = None if method == "linear" else models[0]
    experts = models[1:] if method == "slerp" else models
    recipe = build.recipe(tmp_path / "r.json", method, experts, base, **METHODS[method])
    found = set()
    for number, (more, threads, mode) in enumerate(
        [(1 << 30, 1, "direct"), (1 << 30, 3, "mmap"), (0, 0, "buffered"), (9 << 20, 2, "auto")]
    ):
        sm.merge(recipe, tmp_path / f"{number}", ram=least(recipe) + more, threads=threads, reader=mode)
        found.add(hashlib.sha256((tmp_path / f"{number}" / NAME).read_bytes()).hexdigest())
    assert len(found) == 1


def test_the_last_page_is_a_file_of_its_own_size(tmp_path, recipe, wanted):
    """What safetensors makes of the output is what was merged."""
    from safetensors import safe_open

    sm.merge(recipe, tmp_path / "out", ram=RAM)
    with safe_open(tmp_path / "out" / NAME, "np") as file:
        assert set(file.keys()) == set(SHAPES)
        assert file.metadata() == {"format": "pt"}
        for key, shape in SHAPES.items():
            assert file.get_tensor(key).shape == shape


def test_the_numbers_are_right(tmp_path, recipe, models):
    from safetensors.numpy import load_file

    sm.merge(recipe, tmp_path / "out", ram=RAM)
    a, b = (load_file(model / NAME) for model in models)
    for key, value in load_file(tmp_path / "out" / NAME).items():
        exact = (a[key].astype(np.float64) + 2 * b[key].astype(np.float64)) / 3
        bound = 2**-22 * (np.abs(a[key]) + np.abs(b[key]))  # four roundings of fp32
        assert (np.abs(value - exact) <= bound).all()
