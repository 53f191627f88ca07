"""What people type and what they read: help, figures, JSON, one line for every failure, exit codes."""

import json
import re
import sys
from pathlib import Path

import build
import numpy as np
import pytest

from streammerge import cli
from streammerge.cli import COMMANDS

pytestmark = pytest.mark.usefixtures("fresh_process")
WHOLE = "model.safetensors"
W = np.arange(12, dtype=np.float32).reshape(3, 4)


class Ran:
    """A command line, run in this process."""

    def __init__(self, capsys, monkeypatch):
        self.capsys, self.monkeypatch = capsys, monkeypatch

    def __call__(self, *words):
        """(exit code, standard output, standard error)."""
        self.monkeypatch.setattr(sys, "argv", ["streammerge", *map(str, words)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = self.capsys.readouterr()
        assert "\x1b" not in out + err, "escape codes in a pipe"
        return stop.value.code, out, err

    def fails(self, *words, code=2):
        """The one line of a failure, which --json says too."""
        found, out, err = self(*words)
        assert (found, out) == (code, ""), err
        assert err.startswith("streammerge: ")
        assert err.count("\n") == 1
        line = err.removeprefix("streammerge: ").strip()
        found, out, err = self(*words, "--json")
        assert found == code
        (body,) = [json.loads(out)]
        assert out.count("\n") == 1
        assert set(body) == {"error"}
        assert body["error"]["exit_code"] == code
        assert err == f"streammerge: {body['error']['message']}\n"
        return line, body["error"]


@pytest.fixture
def run(capsys, monkeypatch):
    return Ran(capsys, monkeypatch)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Two checkpoints, a recipe, and we are there."""
    monkeypatch.chdir(tmp_path)
    for name, weights in (("a", W), ("b", W + 3)):
        tensors = {"w": weights, "same": np.ones(5, np.float32), "ids": np.arange(2)}
        build.checkpoint(Path(name), {WHOLE: tensors}, config={"architectures": ["Tiny"]})
    build.recipe(Path("r.yml"), "linear", [Path("a"), Path("b")], weight=[1.0, 2.0])
    return tmp_path


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"], *([name, "--help"] for name in COMMANDS)])
def test_help(run, words):
    code, out, err = run(*words)
    assert (code, err) == (0, "")
    assert out.startswith("Usage: streammerge")
    if len(words) == 2:
        assert all(re.search(r"  (-\w, )?--\S+( .*)?\n?  +\S", line) for line in re.findall(r"^  --.*\n.*", out, re.M))
        assert "--json" in out
        assert len(out.split("Options:")[0].strip().splitlines()) >= 3, "a sentence on what it does"
    else:
        assert all(f"  {name} " in out for name in COMMANDS)


def test_help_of_merge_says_how_to_go_on(run):
    _, out, _ = run("merge", "--help")
    assert "the same command takes it up again" in " ".join(out.split())
    assert "--no-resume" in out


def test_version(run):
    from streammerge import __version__

    assert run("--version") == (0, f"streammerge, version {__version__}\n", "")


def test_plan_and_merge(run, here):
    code, out, err = run("plan", "r.yml", "--ram", "1GiB")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].startswith("linear ")
    assert "2 checkpoints, 3 tensors, plan " in out
    assert "budget 1 GiB" in out
    code, merged, err = run("merge", "r.yml", "out", "--ram", "1GiB")
    assert (code, err) == (0, "")
    assert merged.splitlines()[:2] == out.splitlines()[:2], "the plan comes first"
    assert "1 shard in out" in merged
    assert "1 tensor the same in all inputs, copied" in merged
    assert (here / "out" / WHOLE).exists()


def test_json_is_one_object(run, here):
    keys = {}
    for name, words in (
        ("plan", ["plan", "r.yml"]),
        ("merge", ["merge", "r.yml", "out"]),
        ("quiet", ["merge", "r.yml", "out2", "--quiet"]),
        ("inspect", ["inspect", "a"]),
        ("diff", ["diff", "a", "b"]),
        ("verify", ["verify", "out"]),
        ("methods", ["methods"]),
        ("method", ["methods", "ties"]),
    ):
        code, out, err = run(*words, "--json")
        assert (code, err) == (0, "")
        assert out.count("\n") == 1
        keys[name] = json.loads(out)
        assert isinstance(keys[name], dict)
    assert keys["plan"]["digest"] == keys["merge"]["digest"] == keys["merge"]["predicted"]["digest"]
    assert keys["inspect"]["dtypes"] == {"F32": 17, "I64": 2}
    assert keys["inspect"]["entries"][0] == {"name": "w", "dtype": "F32", "shape": [3, 4], "bytes": 48, "shard": WHOLE}
    size = (here / "out" / WHOLE).stat().st_size
    assert {key: keys["verify"][key] for key in ("shards", "bytes", "bad")} == {"shards": 1, "bytes": size, "bad": []}
    assert [row["name"] for row in keys["methods"]["methods"]] == sorted(r["name"] for r in keys["methods"]["methods"])
    assert keys["method"]["name"] == "ties"
    assert {
        key: next(p for p in keys["method"]["parameters"] if p["name"] == "density")[key]
        for key in ("name", "default", "required")
    } == {"name": "density", "default": 1.0, "required": False}


def test_quiet_prints_nothing(run, here):
    assert run("merge", "r.yml", "out", "--quiet") == (0, "", "")
    assert run("merge", "r.yml", "out", "--quiet", "--overwrite") == (0, "", "")
    code, out, err = run("merge", "r.yml", "out", "--quiet")
    assert (code, out) == (2, "")
    assert err == "streammerge: out: exists; --overwrite replaces it\n"


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["bogus"], "No such command 'bogus'"),
        (["plan"], "Missing argument 'RECIPE'; streammerge plan --help lists what there is"),
        (["merge", "r.yml"], "Missing argument 'OUT'; streammerge merge --help lists what there is"),
        (["plan", "r.yml", "--rma", "1GiB"], "no option --rma; did you mean --ram?"),
        (["plan", "r.yml", "more"], "Got unexpected extra argument (more); streammerge plan --help"),
        (["plan", "r.yml", "--threads", "many"], "Invalid value for '--threads': 'many' is not a valid integer"),
        (["plan", "r.yml", "--threads", "-2"], "--threads -2: give the number of threads, 0 for all processors"),
        (["plan", "r.yml", "--ram", "banana"], "--ram: 'banana' is not a size; write it as 4GiB, 4GB or 500M"),
        (["plan", "r.yml", "--device", "cuda"], "--device cuda: "),
        (["merge", "r.yml", "out", "--reader", "psychic"], "Invalid value for '--reader'"),
        (["plan", "."], "Invalid value for 'RECIPE': File '.' is a directory"),
        (["plan", "gone.yml"], "Invalid value for 'RECIPE': File 'gone.yml' does not exist"),
        (["plan", "latin1.yml"], "latin1.yml: not UTF-8 text (byte 16)"),
        (["plan", "a/model.safetensors"], "a/model.safetensors"),
        (["merge", "r.yml", "r.yml"], "Invalid value for 'OUT': Directory 'r.yml' is a file"),
        (["merge", "r.yml", "r.yml/out"], "r.yml/out: "),
        (["merge", "r.yml", "a"], "a: exists; --overwrite replaces it"),
        (["merge", "r.yml", "a", "--overwrite"], "a: --overwrite replaces what streammerge wrote and nothing else"),
        (["merge", "r.yml", "busy", "--quiet"], "{here}/busy.partial: holds unfinished work of another recipe"),
        (["inspect", "./gone"], "no model './gone': looked at {here}/gone"),
        (["inspect", "r.yml"], "{here}/r.yml: not a safetensors file"),
        (["diff", "a", "./gone"], "no model './gone': looked at {here}/gone"),
        (["verify", "a"], "a: has no streammerge.json; only folders that streammerge wrote can be verified"),
        (["verify", "gone"], "gone: "),
        (["methods", "tie"], "unknown merge_method 'tie'; did you mean 'ties'?"),
        (["methods", "xyzzy"], "unknown merge_method 'xyzzy'; known: "),
        (["demo", "r.yml"], "Invalid value for '[FOLDER]': Directory 'r.yml' is a file"),
    ],
)
def test_failures_are_one_line_and_exit_with_2(run, here, words, line):
    (here / "latin1.yml").write_bytes(b"merge_method: \xe9t\xe9".replace(b": ", b":   "))
    (here / "busy.partial").mkdir()
    (here / "busy.partial" / "journal.jsonl").write_text('{"digest": "of another", "version": 1}\n')
    before = sorted(path for path in here.rglob("*"))
    found, _ = run.fails(*words)
    assert found.startswith(line.replace("{here}", str(here))), found
    assert sorted(path for path in here.rglob("*")) == before, "something was written"


def test_too_small_a_budget_exits_with_3(run, here):
    line, error = run.fails("merge", "r.yml", "out", "--ram", "1MiB", code=3)
    assert error["kind"] == "BudgetTooSmall"
    least = error["least_bytes"]
    assert f"--ram {least >> 20}MiB" in error["message"]
    assert "1 MiB are allowed" in line
    assert run("plan", "r.yml", "--ram", f"{(least >> 20) + 2}MiB")[0] == 0


def test_a_machine_that_fails_exits_with_4(run, here, monkeypatch):
    import errno
    import os

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    line, error = run.fails("merge", "r.yml", "out", "--quiet", code=4)
    assert line.startswith(f"{here}/out.partial: the disk is full; make room and run the same command again")
    assert error["kind"] == "MachineError"
    monkeypatch.undo()


def test_a_bug_is_one_line_too(run, here, monkeypatch):
    from streammerge import api

    monkeypatch.setattr(api, "plan", lambda *_, **__: 1 // 0)
    line, error = run.fails("plan", "r.yml", code=1)
    assert line == "internal error: ZeroDivisionError: integer division or modulo by zero; --debug shows where"
    assert error["kind"] == "InternalError"


@pytest.mark.parametrize("words", [["plan", "r.yml", "--ram", "1MiB"], ["methods", "tie"], ["verify", "a"]])
def test_debug_shows_where(run, here, words):
    code, _, err = run(*words)
    found, out, more = run(*words, "--debug", "--json")
    assert (found, list(json.loads(out))) == (code, ["error"])
    assert more.startswith("Traceback (most recent call last):")
    assert more.splitlines()[-1].startswith("streammerge: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("moment", ["plan", "merge"])
def test_interrupts(run, here, monkeypatch, moment):
    from streammerge import api

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(api, moment, stopped)
    line, error = run.fails("merge", "r.yml", "out", "--quiet", code=130)
    assert line == "stopped"
    assert error["kind"] == "Interrupted"


def test_verify_finds_one_bit(run, here):
    assert run("merge", "r.yml", "out", "--quiet", "--shard-size", "50")[0] == 0
    code, out, _ = run("verify", "out")
    assert code == 0
    assert out.startswith("out: 2 shards, ")
    path = here / "out" / "model-00001-of-00002.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    code, out, err = run("verify", "out")
    assert (code, out) == (2, "")
    assert err == f"streammerge: out: shard {path.name} is missing or differs from its manifest; merge again\n"
    (here / "out" / "model-00002-of-00002.safetensors").unlink()
    code, out, err = run("verify", "out", "--json")
    assert code == 2
    assert json.loads(out)["bad"] == [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert err.count("\n") == 2


def test_inspect_and_diff(run, here):
    code, out, _ = run("inspect", "a")
    assert code == 0
    assert [line.split() for line in out.splitlines()] == [
        ["tensor", "dtype", "shape", "size", "shard"],
        ["w", "F32", "3x4", "48", "bytes", WHOLE],
        ["same", "F32", "5", "20", "bytes", WHOLE],
        ["ids", "I64", "2", "16", "bytes", WHOLE],
        ["3", "tensors,", "17", "F32,", "2", "I64,", "84", "bytes", "in", "1", "shard"],
    ]
    code, out, _ = run("diff", "a", "b")
    assert code == 0
    relative = np.sqrt(9 * 12 / (W**2).sum())
    assert out.splitlines()[1].split() == ["w", "100.00", "%", f"{relative:.3g}", "3"]
    assert out.splitlines()[-1] == "1 tensor changed, 2 the same, 0 without a match"
    assert run("diff", "a", "a")[1] == "0 tensors changed, 3 the same, 0 without a match\n"


def test_names_are_never_markup(run, here):
    """Tensors and folders may be called what a terminal library takes for colours and pictures."""
    long = "long." * 60 + "w"
    tensors = {"w[/b] :smile: [red]": W, "ids[/i]": np.arange(2), long: W}
    tensors["nan[/]"] = np.array([1, np.nan], np.float32)
    for name in ("m[1]", "n[/]"):
        build.checkpoint(Path(name), {WHOLE: {k: v + (name == "n[/]") for k, v in tensors.items()}})
    build.recipe(Path("odd.yml"), "linear", [Path("m[1]"), Path("n[/]")], weight=[1.0, 2.0])
    code, out, err = run("merge", "odd.yml", "o[/b]")
    assert (code, err) == (0, "")
    assert "copied from m[1] (ids[/i])" in out
    assert "1 shard in o[/b]" in out
    assert "n[/]/model.safetensors: tensor 'nan[/]' holds NaN" in out
    for words in (["inspect", "m[1]"], ["diff", "m[1]", "n[/]"]):
        code, out, err = run(*words)
        assert (code, err) == (0, "")
        assert "w[/b] :smile: [red]" in out
        assert f"{long} " in out, "a name in a pipe is one word on one line"


def test_json_holds_no_nan(run, here):
    for name, values in (("x", [0.0, 0.0]), ("y", [1.0, np.nan])):
        build.checkpoint(
            Path(name), {WHOLE: {"w": np.array(values, np.float32), "z": np.array(values[:1], np.float32)}}
        )
    code, out, _ = run("diff", "x", "y", "--json")
    assert code == 0

    def refuse(text):
        raise AssertionError(f"{text} is not JSON")

    rows = {row["name"]: row for row in json.loads(out, parse_constant=refuse)["rows"]}
    assert (rows["w"]["relative"], rows["w"]["largest"]) == (None, None)
    assert (rows["z"]["relative"], rows["z"]["largest"]) == (None, 1.0)


def test_a_hundred_gigabytes_are_planned_from_headers(run, tmp_path, monkeypatch):
    import os

    monkeypatch.chdir(tmp_path)
    shapes = {f"model.layers.{i}.w": ("BF16", (8192, 28672)) for i in range(214)}
    for name in "abc":
        path = build.sparse(Path(name) / WHOLE, shapes)
        assert path.stat().st_size > 100 * 10**9
    build.recipe(Path("r.yml"), "ties", [Path("b"), Path("c")], Path("a"), weight=1.0, density=0.3)
    run("methods")  # whatever is loaded once is loaded now
    counts = Path("/proc/self/io")
    before = int(re.search(r"rchar: (\d+)", counts.read_text())[1]) if counts.exists() else 0
    if hasattr(os, "preadv"):
        monkeypatch.setattr(os, "preadv", lambda *_: pytest.fail("a weight was read"))
    code, out, err = run("plan", "r.yml", "--ram", "512MiB", "--json")
    assert code == 0, err
    if counts.exists():
        assert int(re.search(r"rchar: (\d+)", counts.read_text())[1]) - before < 16 << 20
    plan = json.loads(out)
    assert plan["ram_peak_bytes"] <= 512 << 20
    assert plan["passes"] == 2
    assert plan["read_bytes"] >= 6 * 100 * 10**9
    assert plan["write_bytes"] > 100 * 10**9
