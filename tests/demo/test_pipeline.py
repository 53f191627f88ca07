"""The demo from end to end in miniature, and what a rerun leaves alone."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest

from streammerge.demo import child, recipes, run, show, train
from streammerge.demo.stages import Stages
from streammerge.errors import StreamMergeError

needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")


@needs_transformers
def test_rerun_uses_what_is_there(tmp_path, tiny_settings, small_corpus, console, runner, monkeypatch):
    def go(**other):
        return run(tmp_path, console=console, settings=tiny_settings, runner=runner, **other)

    first = go()
    assert runner.recipes == ["linear", "slerp"]
    assert [row["name"] for row in first["rows"]] == [
        *("base", "expert:code", "expert:prose", "expert:tables"),
        *("linear", "slerp"),
    ]
    assert first["reused"] == []
    printed = console.file.getvalue()
    assert "linear" in printed
    assert first["finding"] in printed
    assert json.loads((tmp_path / "results.json").read_text()) == json.loads(json.dumps(first))

    training = monkeypatch.setattr(train, "train", lambda *_: pytest.fail("trained again"))
    second = go()
    assert training is None
    assert len(second["reused"]) == 1 + 4 + 2 + 6
    assert second["rows"] == first["rows"]
    assert len(small_corpus) == 1

    (tmp_path / "stages" / "merge-slerp.json").write_text('{"digest": "half a mar')
    go()
    assert runner.recipes == ["linear", "slerp", "slerp"]


@needs_transformers
def test_another_base_makes_everything_after_it_again(tmp_path, tiny_settings, small_corpus, console, runner):
    from dataclasses import replace

    run(tmp_path, console=console, settings=tiny_settings, runner=runner)
    longer = replace(tiny_settings, base=replace(tiny_settings.base, steps=4))
    assert run(tmp_path, console=console, settings=longer, runner=runner)["reused"] == ["corpus"]


@needs_transformers
def test_a_failure_in_training_leaves_no_model(tmp_path, tiny_settings, small_corpus, console, runner, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_model", fail)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, console=console, settings=tiny_settings, runner=runner)
    assert not (tmp_path / "models" / "base").exists()
    assert not (tmp_path / "stages" / "base.json").exists()


def test_without_transformers_one_line_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(StreamMergeError, match=r'^demo needs transformers: pip install "streammerge\[models\]"$'):
        run(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_stage_is_done_once_and_never_half(tmp_path):
    calls = []

    def make(folder):
        folder.mkdir()
        (folder / "a").write_text("a")
        calls.append(folder.name)
        if len(calls) == 1:
            raise OSError("killed")
        return {"figure": 7}

    stages = Stages(tmp_path)
    with pytest.raises(OSError, match="killed"):
        stages.run("x", {"size": 1}, make, "out")
    assert not (tmp_path / "out").exists()
    for _ in range(2):
        assert stages.run("x", {"size": 1}, make, "out") == {"figure": 7}
    assert calls == ["out.making"] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "stages"]
    stages.run("x", {"size": 2}, make, "out")
    (tmp_path / "out" / "a").unlink()
    (tmp_path / "out").rmdir()
    stages.run("x", {"size": 2}, make, "out")
    Stages(tmp_path, fresh=True).run("x", {"size": 2}, make, "out")
    assert len(calls) == 5
    assert stages.reused == ["x"]


def test_every_recipe_is_one_that_we_read(tmp_path):
    """The dialect accepts each recipe, with the experts and parameters that it names."""
    from streammerge.planner.recipe import load

    paths = recipes.write_recipes(tmp_path, ("code", "prose", "tables"), 4, [make.__name__ for make in recipes.METHODS])
    assert len(paths) == 11
    for name, path in paths.items():
        assert load(path).merge_method == name


def test_a_failed_merge_says_which_and_why(tmp_path, monkeypatch):
    program = "import sys; sys.stderr.write('noise\\nties has no parameter weigth\\n'); sys.exit(2)"
    monkeypatch.setattr(child.sys, "executable", _script(tmp_path, program))
    with pytest.raises(StreamMergeError, match=r"merging .*ties.yml failed: ties has no parameter") as error:
        child.merge_in_child(tmp_path / "ties.yml", tmp_path / "out", "1GiB")
    assert error.value.exit_code == 2


def test_the_report_is_all_of_stdout_or_its_last_line(tmp_path):
    report = {"ram_peak_bytes": 5, "seconds": 0.5, "predicted": {"ram_peak_bytes": 6}}
    for printed in (json.dumps(report, indent=2), "working\n" + json.dumps(report) + "\n"):
        assert child.read_report(printed, tmp_path) == report
    for printed in ("", "done", "[1]", '{"seconds": 1}'):
        with pytest.raises(StreamMergeError, match="no report with ram_peak_bytes and seconds"):
            child.read_report(printed, tmp_path)


def test_a_sample_cannot_steer_the_terminal():
    assert show.printable("a\tb\n\x1b[2Jé\x00") == "a\tb\n\ufffd[2Jé\ufffd"


def test_the_finding_follows_the_numbers():
    def row(name, kind, code, prose):
        bits = {"code": code, "prose": prose}
        return {"name": name, "kind": kind, "bits": bits, "mean": (code + prose) / 2}

    rows = [row("base", "base", 3.0, 3.0), row("expert:code", "expert", 2.0, 3.5)]
    rows += [row("expert:prose", "expert", 3.2, 3.1), row("ties", "merge", 2.2, 2.4)]
    rows += [row("slerp", "merge", 4.0, 4.0)]
    text = show.finding(rows, ("code", "prose"), "ties")
    assert "1 of 2 merges beat the base" in text
    assert "takes 2.300 bits per byte to the base's 3.000, below the best single expert's 2.750." in text
    assert "1 of 2 experts beat the base on their own domain" in text
    assert "on 1 of 2 domains the expert stays ahead of every merge" in text


def _script(folder, program: str) -> str:
    """An executable that ignores its arguments and runs the program."""
    path = folder / "python"
    path.write_text(f"#!{sys.executable}\n{program}\n")
    path.chmod(0o755)
    return str(path)
