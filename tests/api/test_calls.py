"""The calls themselves: plans, budgets, reports, progress, cancelling, NaN, and what is refused."""

import dataclasses
import json
import threading
from collections import UserDict

import build
import numpy as np
import pytest
import torch
from reading import WHOLE, family, read, rounded, write

import streammerge as sm
from streammerge import api
from streammerge.errors import CheckpointError, Interrupted, OutputExists, RecipeError
from streammerge.planner import cutting
from streammerge.planner import plan as planning

RAM = "1GiB"
KEYS = {  # stable in `plan --json` and in the report
    "ram_budget_bytes": int, "ram_peak_bytes": int, "vram_budget_bytes": int, "vram_peak_bytes": int,
    "read_bytes": int, "write_bytes": int, "passes": int, "tensors": int, "shards": int, "steps": int,
    "seconds": float, "digest": str, "device": str,
}  # fmt: skip
LARGE = {f"layers.{i}.w": (257, 300) for i in range(8)}


@pytest.fixture
def folders(tmp_path):
    return write(tmp_path, family(2))


@pytest.fixture
def recipe(tmp_path, folders):
    return build.recipe(tmp_path / "r.yml", "linear", folders, weight=[1.0, 2.0, 3.0])


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A recipe of many steps."""
    monkeypatch.setattr(cutting, "TILE", 1 << 16)
    root, *near = write(tmp_path / "large", family(2, shapes=LARGE))
    return build.recipe(tmp_path / "large.yml", "task_arithmetic", near, root, weight=[0.5, 0.7])


def body(recipe):
    return json.loads(recipe.read_text())


def test_plan_and_report_have_the_stable_keys(tmp_path, recipe):
    plan = sm.plan(recipe, ram=RAM)
    report = sm.merge(recipe, tmp_path / "out", ram=RAM)
    for found in (plan.as_dict(), report, report["predicted"]):
        assert set(KEYS) <= set(found)
        assert json.loads(json.dumps(found)) == found
        assert {key: type(found[key]) for key in KEYS} == KEYS
        assert found["ram_budget_bytes"] == 1 << 30
        assert found["tensors"] == 5
    assert (plan.passes, plan.read_bytes) == (1, 3 * sum(len(each.data) for each in read(tmp_path / "0").values()))
    assert report["predicted"]["ram_peak_bytes"] >= report["ram_peak_bytes"] > 0
    assert report["digest"] == plan.digest
    assert report["write_bytes"] == plan.write_bytes == (tmp_path / "out" / WHOLE).stat().st_size
    assert report["read_bytes"] >= plan.read_bytes, "direct reads are whole pages"
    assert report["version"] == sm.__version__


def test_a_recipe_may_be_a_path_a_text_of_one_a_mapping_a_recipe_or_a_plan(tmp_path, recipe):
    from streammerge.planner.recipe import load

    forms = [recipe, str(recipe), body(recipe), UserDict(body(recipe)), load(recipe), sm.plan(recipe, ram=RAM)]
    found = []
    for number, form in enumerate(forms):
        options = {} if isinstance(form, planning.Plan) else {"ram": RAM}
        sm.merge(form, str(tmp_path / f"out{number}"), **options)
        found.append(read(tmp_path / f"out{number}"))
    assert all(each == found[0] for each in found)
    with pytest.raises(TypeError, match="a plan has its ram already"):
        sm.merge(forms[-1], tmp_path / "again", ram=RAM)


def test_budgets_are_bytes_or_text(recipe):
    for ram in (1 << 30, "1GiB", "1048576KiB", "1.0 gib"):
        assert sm.plan(recipe, ram=ram).ram_budget_bytes == 1 << 30
    assert sm.plan(recipe, ram="2GB").ram_budget_bytes == 2 * 10**9
    assert sm.plan(recipe).ram_budget_bytes > 1 << 26, "what is free"


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"ram": "banana"}, "--ram: 'banana' is not a size; write it as 4GiB, 4GB or 500M"),
        ({"ram": "-1GiB"}, "--ram: '-1GiB' is not a size"),
        ({"ram": 0}, "--ram 0: must be more than nothing"),
        ({"vram": "8 apples"}, "--vram: '8 apples' is not a size"),
        ({"shard_size": "0GB"}, "--shard-size 0GB: must be more than nothing"),
        ({"threads": -1}, "--threads -1: give the number of threads, 0 for all processors"),
        ({"seed": -1}, "--seed -1: give a number from 0 to 2^64 - 1"),
        ({"seed": 1 << 64}, "--seed 18446744073709551616: give a number"),
        ({"device": "tpu"}, "--device tpu: "),
    ],
)
def test_options_that_make_no_sense(recipe, options, line):
    with pytest.raises(RecipeError) as caught:
        sm.plan(recipe, **options)
    assert str(caught.value).startswith(line)


@pytest.mark.parametrize("method", ["linear", "ties", "slerp"])
def test_the_least_budget_named_works(tmp_path, folders, method):
    near = folders[1:2] if method == "slerp" else folders[1:]
    options = {"t": 0.3} if method == "slerp" else {"weight": [0.4, 0.5]}
    recipe = build.recipe(tmp_path / "r.yml", method, near, None if method == "linear" else folders[0], **options)
    with pytest.raises(sm.BudgetTooSmall) as caught:
        sm.plan(recipe, ram="1MiB")
    assert caught.value.exit_code == 3
    least = caught.value.least
    assert f"--ram {least >> 20}MiB" in str(caught.value)
    slack = 2 << 20  # what this process took meanwhile
    report = sm.merge(recipe, tmp_path / "out", ram=least + slack)
    assert report["predicted"]["ram_peak_bytes"] <= least + slack
    with pytest.raises(sm.BudgetTooSmall):
        sm.merge(recipe, tmp_path / "other", ram=least - (8 << 20))
    assert not (tmp_path / "other.partial").exists()


def test_progress_reaches_the_totals(tmp_path, large):
    seen = []
    sm.merge(large, tmp_path / "out", ram=RAM, progress=lambda now: seen.append(dataclasses.replace(now)))
    plan = sm.plan(large, ram=RAM)
    tensors = sum(4 * a * b for a, b in LARGE.values())
    assert {(now.read_total, now.written_total) for now in seen} == {(plan.read_bytes, tensors)}
    assert [now.read_bytes for now in seen] == sorted(now.read_bytes for now in seen)
    assert {now.tensor for now in seen} <= set(LARGE)
    assert (seen[-1].read_bytes, seen[-1].written_bytes) == (plan.read_bytes, tensors)
    assert len(seen) > 20


@pytest.mark.parametrize("after", [1, 9, 25])
def test_a_cancelled_merge_goes_on_where_it_was(tmp_path, large, after):
    sm.merge(large, tmp_path / "plain", ram=RAM)
    token, calls = threading.Event(), []

    def count(now):
        calls.append(now.written_bytes)
        if len(calls) == after:
            token.set()

    with pytest.raises(Interrupted, match=r"out.partial: run the same command again to go on") as caught:
        sm.merge(large, tmp_path / "out", ram=RAM, progress=count, cancel=token)
    assert caught.value.exit_code == 130
    assert len(calls) <= after + 2
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    report = sm.merge(large, tmp_path / "out", ram=RAM)
    assert read(tmp_path / "out") == read(tmp_path / "plain")
    assert not (tmp_path / "out.partial").exists()
    if after == 25:
        assert report["write_bytes"] < report["predicted"]["write_bytes"], "what was done is not done again"


def test_unfinished_work_of_another_recipe_is_left_alone(tmp_path, large, recipe):
    token = threading.Event()
    token.set()
    with pytest.raises(Interrupted):
        sm.merge(large, tmp_path / "out", ram=RAM, cancel=token)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").iterdir()}
    with pytest.raises(OutputExists, match=r"out.partial: holds unfinished work of another recipe"):
        sm.merge(recipe, tmp_path / "out", ram=RAM)
    assert {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out.partial").iterdir()} == before
    sm.merge(recipe, tmp_path / "out", ram=RAM, resume=False)
    assert len(read(tmp_path / "out")) == 5


def test_a_folder_that_only_looks_like_unfinished_work_is_not_discarded(tmp_path, recipe):
    thesis = tmp_path / "out.partial" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("the only copy")
    for resume in (True, False):
        with pytest.raises(OutputExists, match=r"out.partial: "):
            sm.merge(recipe, tmp_path / "out", ram=RAM, resume=resume)
    assert thesis.read_text() == "the only copy"
    thesis.unlink()
    sm.merge(recipe, tmp_path / "out", ram=RAM, resume=False)


def test_a_stream_can_be_left_and_cancelled(large):
    stream = sm.stream(large, ram=RAM)
    assert next(stream)[0] == "layers.0.w"
    stream.close()
    token = threading.Event()
    found = []

    def drain():
        for name, _ in sm.stream(large, ram=RAM, cancel=token):
            found.append(name)
            token.set()

    with pytest.raises(Interrupted):
        drain()
    assert found == ["layers.0.w"]
    threads = {thread.name for thread in threading.enumerate()}
    assert not {"feed", "watch"} & threads


def test_streamed_tensors_are_the_callers_own(large):
    kept = dict(sm.stream(large, ram=RAM))
    for tensor in kept.values():
        tensor.mul_(2)  # writable, and no one's buffer
    again = dict(sm.stream(large, ram=RAM))
    assert all(torch.equal(kept[name], 2 * again[name]) for name in again)


@pytest.mark.parametrize("worst", [np.nan, np.inf, -np.inf])
def test_nonfinite_inputs_are_told_and_refused_if_asked(tmp_path, worst):
    base, expert, other = family(2)
    for model in (base, expert, other):
        model["small"] = rounded(np.ones(10), "F32")
    expert["layers.1.w"] = rounded(np.where(np.arange(65) == 7, worst, 1.0) * np.ones((64, 1)), "F32")
    root, *near = write(tmp_path, [base, expert, other])
    recipe = build.recipe(tmp_path / "r.yml", "task_arithmetic", near, root, weight=0.5)
    kind = "NaN" if np.isnan(worst) else "an infinity"
    report = sm.merge(recipe, tmp_path / "out", ram=RAM)
    file = str(near[0] / WHOLE)
    assert report["nonfinite"] == [{"tensor": "layers.1.w", "file": file, "holds": kind}]
    with pytest.raises(CheckpointError) as caught:
        sm.merge(recipe, tmp_path / "strict", ram=RAM, strict=True)
    assert str(caught.value) == f"{file}: tensor 'layers.1.w' holds {kind}; mend it, or merge without --strict"
    assert caught.value.exit_code == 2
    assert not list(tmp_path.glob("strict*"))
    clean = build.recipe(tmp_path / "clean.yml", "task_arithmetic", near[1:], root, weight=0.5)
    assert sm.merge(clean, tmp_path / "clean", ram=RAM, strict=True)["nonfinite"] == []


def test_overwrite_replaces_merges_and_nothing_else(tmp_path, recipe, folders):
    out = tmp_path / "out"
    sm.merge(recipe, out, ram=RAM)
    with pytest.raises(OutputExists, match="out: exists; --overwrite replaces it"):
        sm.merge(recipe, out, ram=RAM)
    sm.merge(recipe, out, ram=RAM, overwrite=True)
    (tmp_path / "empty").mkdir()
    sm.merge(recipe, tmp_path / "empty", ram=RAM, overwrite=True)
    thesis = tmp_path / "work" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("the only copy")
    for target in (tmp_path, thesis.parent, thesis, folders[0]):
        with pytest.raises(OutputExists, match="replaces what streammerge wrote and nothing else"):
            sm.merge(recipe, target, ram=RAM, overwrite=True)
    assert thesis.read_text() == "the only copy"
    again = build.recipe(tmp_path / "again.yml", "linear", [out, folders[0]], weight=[1.0, 1.0])
    with pytest.raises(RecipeError, match="lies there; choose another folder"):
        sm.merge(again, out, ram=RAM, overwrite=True)
    assert len(read(out)) == 5


@pytest.mark.parametrize("place", ["", "/", "a/file/out", "file/out", "x" * 300])
def test_places_where_no_folder_can_be(tmp_path, recipe, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "file").touch()
    (tmp_path / "file").touch()
    with pytest.raises(RecipeError, match=r"name the folder to make|choose another folder"):
        sm.merge(recipe, place, ram=RAM)


def test_out_may_lie_deep(tmp_path, recipe):
    sm.merge(recipe, tmp_path / "not" / "there" / "yet", ram=RAM)
    assert len(read(tmp_path / "not" / "there" / "yet")) == 5


def state(seed, **more):
    dice = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(4, 5, generator=dice), "b": torch.randn(3, generator=dice), **more}


def test_state_dicts_of_odd_tensors():
    """Views, gradients, integers, complex numbers, empty ones, and dtypes that no file holds."""
    ids = torch.arange(4)
    odd = {
        "ids": ids,
        "z": torch.ones(2, dtype=torch.complex128),
        "none": torch.empty(0, 3),
        "flag": torch.tensor(True),
    }
    one, two = state(0, **odd), state(1, **odd)
    two["w"] = torch.nn.Parameter(two["w"].t().contiguous()).t()
    out = sm.merge_state_dicts([one, two], method="linear", parameters={"weight": [1, 3]}, threads=1)
    torch.testing.assert_close(out["w"], (one["w"] + 3 * two["w"].detach()) / 4)
    assert list(out) == list(one)
    for name, each in odd.items():
        assert torch.equal(out[name], each)
        assert out[name].dtype == each.dtype
    assert out["ids"].data_ptr() != ids.data_ptr(), "the result is the caller's own"
    assert not out["w"].requires_grad
    low = sm.merge_state_dicts([one, two], method="linear", parameters={"weight": 1}, dtype="bfloat16")
    assert low["w"].dtype == torch.bfloat16
    assert low["ids"].dtype == torch.int64


@pytest.mark.parametrize(
    ("call", "line"),
    [
        ({"method": "tie"}, "unknown merge_method 'tie'; did you mean 'ties'?"),
        ({"method": "ties"}, "ties needs the parameter 'weight'"),
        ({"method": "ties", "parameters": {"weight": 1}}, "ties needs a base"),
        ({"method": "linear", "parameters": {"wieght": 1}}, "linear has no parameter 'wieght'; did you mean 'weight'?"),
        ({"method": "linear", "parameters": {"weight": [1]}}, "linear: weight has 1 values for 2 models"),
        ({"method": "linear", "parameters": {"weight": "x"}}, "weight: 'x' is not a finite number"),
        ({"method": "linear", "parameters": {"weight": 1}, "dtype": "int8"}, "unknown dtype 'int8'; use one of"),
        ({"method": "linear", "parameters": {"weight": 1}, "seed": -1}, "--seed -1"),
        ({"method": "linear", "parameters": {"weight": 1}, "base": state(2)}, "linear takes no base; give it as one"),
        ({"method": "slerp", "parameters": {"t": 0.5}, "base": state(2)}, "slerp takes 1 to 1 models, 2 were given"),
    ],
)
def test_state_dicts_that_cannot_be_merged(call, line):
    with pytest.raises(RecipeError) as caught:
        sm.merge_state_dicts([state(0), state(1)], **call)
    assert str(caught.value).startswith(line)


def test_state_dicts_that_do_not_fit():
    one = state(0)
    call = {"method": "linear", "parameters": {"weight": 1}}
    with pytest.raises(CheckpointError, match="model 1 has no tensor 'b'"):
        sm.merge_state_dicts([one, {"w": one["w"]}], **call)
    with pytest.raises(CheckpointError, match=r"model 1: tensor 'b' has shape \[2\], another \[3\]"):
        sm.merge_state_dicts([one, {**one, "b": torch.ones(2)}], **call)
    with pytest.raises(CheckpointError, match=r"model 1: tensor 'b' is torch.int64, no arithmetic"):
        sm.merge_state_dicts([one, {**one, "b": torch.ones(3, dtype=torch.int64)}], **call)


def test_diff_figures(tmp_path):
    base = {name: rounded(each, "F32") for name, each in {"w": np.ones(100), "same": np.ones(3)}.items()}
    base |= {"ids": build.tensor(np.arange(4)), "none": rounded(np.ones(0), "F32"), "nan": rounded([1, 2, 3], "F32")}
    base |= {"zero": rounded(np.zeros(4), "F32"), "form": rounded([1], "F32"), "gone": rounded([1], "F32")}
    changed = np.ones(100)
    changed[[3, 50]] += 3, -4
    other = {**base, "w": rounded(changed, "F32"), "ids": build.tensor(np.array([0, 1, 7, 3]))}
    other |= {"zero": rounded([0, 0, 0, 2], "F32"), "nan": rounded([1, np.nan, 4], "F32")}
    other |= {"form": rounded([1], "BF16"), "new": rounded([1], "F32")}
    del other["gone"]
    one, two = write(tmp_path, [base, other])
    found = {row["name"]: row for row in api.diff(one, two)}
    assert {name: row["state"] for name, row in found.items() if row["state"] != "same"} == {
        "w": "changed",
        "ids": "changed",
        "nan": "changed",
        "zero": "changed",
        "form": "F32 [1] against BF16 [1]",
        "gone": "only in the first",
        "new": "only in the second",
    }
    assert set(found) == set(base) | set(other)
    row = found["w"]
    assert (row["changed"], row["numel"], row["shape"], row["largest"]) == (2, 100, [100], 4.0)
    assert row["relative"] == pytest.approx(5 / 10)
    assert (found["ids"]["changed"], found["ids"]["relative"], found["ids"]["largest"]) == (1, None, None)
    assert (found["same"]["relative"], found["same"]["largest"]) == (0.0, 0.0)
    assert (found["zero"]["relative"], found["zero"]["largest"]) == (np.inf, 2.0)
    assert np.isnan([found["nan"]["relative"], found["nan"]["largest"]]).all()
