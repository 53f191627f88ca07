"""The budget from outside: what a child process holds, against what was promised and what was allowed."""

import json
from pathlib import Path

import build
import pytest

MIB = 1 << 20
SHAPES = {"embed": ("BF16", (32_000, 1024)), **{f"layer.{i}": ("BF16", (2048, 2049)) for i in range(11)}}
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")


@pytest.fixture(scope="module")
def recipes(tmp_path_factory):
    """Two models of 150 MiB that differ in every tile and take hardly any room on the disk."""
    folder = tmp_path_factory.mktemp("models")
    models = [
        build.sparse(folder / name / "model.safetensors", SHAPES, mark=mark).parent
        for name, mark in (("a", b"\x80\x3f\x00\x40"), ("b", b"\x00\xc0\x80\x3f"))
    ]
    assert sum(path.stat().st_size for path in folder.glob("*/*")) > 300 * MIB
    return {
        "linear": build.recipe(folder / "linear.json", "linear", models, weight=[1.0, 2.0]),
        "slerp": build.recipe(folder / "slerp.json", "slerp", models[1:], models[0], t=0.3),
    }


def watched(*arguments, before=""):
    """Run the command line; its report and the most it held, looked at from outside."""
    child = build.start("merge", *arguments, "--json", before=before)
    out, err, peak = build.watched(child)
    return child.returncode, json.loads(out), err, peak


@pytest.mark.parametrize(("method", "ram"), [("linear", 200), ("slerp", 240)])
def test_measured_is_at_most_predicted_is_at_most_allowed(tmp_path, recipes, method, ram):
    code, report, err, outside = watched(recipes[method], tmp_path / "out", "--ram", f"{ram}MiB")
    assert code == 0, err
    budget, predicted = ram * MIB, report["predicted"]["ram_peak_bytes"]
    measured = max(outside, report["ram_peak_bytes"])
    print(
        f"{method}: outside {outside / MIB:.0f}, inside {report['ram_peak_bytes'] / MIB:.0f}, "
        f"predicted {predicted / MIB:.0f}, budget {ram} MiB"
    )
    assert measured <= predicted <= budget
    assert predicted <= 1.25 * measured, "the promise is too careful to be of use"
    assert abs(outside - report["ram_peak_bytes"]) <= 0.1 * measured, "the report and the kernel disagree"
    assert report["read_bytes"] >= 300 * MIB


def test_a_hard_limit_of_the_same_size_is_never_met(tmp_path, recipes):
    """RLIMIT_DATA counts what is mapped, touched or not: thread stacks are kept small so that it means memory."""
    before = """
import resource, threading
threading.stack_size(1 << 18)
resource.setrlimit(resource.RLIMIT_DATA, (256 << 20, 256 << 20))
"""
    code, report, err, _ = watched(
        recipes["linear"], tmp_path / "out", "--ram", "256MiB", "--threads", "1", before=before
    )
    assert code == 0, (report, err)


def test_too_small_a_budget_is_refused_and_the_named_one_works(tmp_path, recipes):
    out = tmp_path / "out"
    code, said, err, _ = watched(recipes["slerp"], out, "--ram", "16MiB")
    assert code == 3
    least = said["error"]["least_bytes"]
    assert said["error"]["kind"] == "BudgetTooSmall"
    assert err.count("\n") == 1
    assert f"--ram {least // MIB}MiB" in err
    assert list(tmp_path.iterdir()) == [], "a refusal writes nothing"
    for _ in range(3):
        child = build.command("plan", recipes["slerp"], "--ram", f"{least // MIB}MiB", "--json")
        assert child.returncode == 0, child.stdout
    plan = json.loads(child.stdout)
    assert plan["ram_peak_bytes"] <= least
    assert plan["passes"] == 2


@pytest.mark.slow
def test_the_named_budget_is_kept(tmp_path, recipes):
    """At the least budget everything is read in its smallest tiles, and still the peak is what was promised."""
    for method, recipe in recipes.items():
        least = json.loads(build.command("plan", recipe, "--ram", "1MiB", "--json").stdout)["error"]["least_bytes"]
        code, report, err, outside = watched(recipe, tmp_path / method, "--ram", str(least))
        assert code == 0, err
        assert max(outside, report["ram_peak_bytes"]) <= report["predicted"]["ram_peak_bytes"] <= least
