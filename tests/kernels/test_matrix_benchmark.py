"""benchmarks/matrix.py and matrix_merge.py on what takes no time: right is right, wrong fails the run, clocks count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
BROKEN = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import matrix, matrix_work
from streammerge.methods.tsvm import Directions
finish = Directions.finish
Directions.finish = lambda solver: finish(solver).mul_(1.001)
matrix.WORK = __file__
if "--check" in sys.argv:
    matrix.main()
matrix_work.main(sys.argv[1:])
"""

CLOCKS = f"""
import sys
sys.path.insert(0, {str(FOLDER)!r})
import json, torch, matrix_clocks
clocks = matrix_clocks.Clocks()
clocks.install()
a, b = torch.ones(3, 4), torch.ones(4, 5)
torch.mm(a, b), torch.addmm(torch.ones(3, 5), a, b, beta=0.5), a.double() @ b.double()
torch.ones(3, 5).addmm_(a, b), torch.linalg.eigh(torch.eye(3))
print(json.dumps({{kind: (clock.calls, clock.single_flop, clock.double_flop) for kind, clock in clocks.found.items()}}))
"""


def run(*command: object) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    words = [str(word) for word in (sys.executable, *command)]
    return subprocess.run(words, env=environment, capture_output=True, text=True, check=False)


def test_ours_is_right_at_every_precision():
    done = run(FOLDER / "matrix.py", "--check", "--size", "40x56")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    names = [f"{row['method']} {row['precision']}" for row in document["rows"]]
    assert names == [
        *("tsvm fp32", "adam fp32", "spectral fp32"),
        *("tsvm tf32x3", "adam tf32x3", "tsvm bf16x3", "adam bf16x3"),
    ]
    for row in document["rows"]:
        assert row["test"] == "ok", row
        assert 0 < row["reference_error"] < 1e-4
        assert "ours_seconds" not in row, "a time without a measurement"


def test_a_wrong_solver_fails_the_run(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text(BROKEN)
    done = run(broken, "--check", "--size", "40x56", "--method", "tsvm")
    assert done.returncode == 1, done.stderr[-2000:]
    row = json.loads(done.stdout.splitlines()[-1])["rows"][0]
    assert row["test"] == "WRONG"
    assert row["ours_error"] == pytest.approx(1e-3, rel=0.01)


@pytest.mark.slow
def test_a_measured_row_has_all_its_figures():
    done = run(FOLDER / "matrix.py", "--size", "48x40", "--method", "adam")
    assert done.returncode == 0, done.stderr[-2000:]
    document = json.loads(done.stdout.splitlines()[-1])
    (row,) = document["rows"]
    assert row["reference_steps"] == 300
    assert row["ratio"] == row["reference_seconds"] / row["ours_seconds"]
    assert {"ours_peak_bytes", "reference_peak_bytes", "peak_share", "share_of_mm"} <= row.keys()
    assert [bound["what"].partition(": ")[2] for bound in document["bounds"]] == [
        *("against the reference", "peak memory", "error"),
    ]


def judged(monkeypatch, **figures) -> list[tuple[str, bool | None]]:
    monkeypatch.syspath_prepend(str(FOLDER))
    import matrix_report

    row = {"matrix": "1 x 1", "method": "tsvm", "precision": "fp32", "judged": True, "truth": True, **figures}
    return [(verdict.figure, verdict.kept) for verdict in matrix_report.judge([row], "cuda")]


def test_bounds_are_those_of_the_device_and_a_stopped_reference_counts_for_what_it_took(monkeypatch):
    good = judged(monkeypatch, ratio=10.0, peak_share=0.5, ours_error=1e-4)
    assert good == [("10.0 x", True), ("0.50 of the reference's", True), ("1.0e-04", True)]
    bad = judged(monkeypatch, ratio=9.9, peak_share=0.51, ours_error=1.1e-4)
    assert [kept for _, kept in bad] == [False] * 3
    assert judged(monkeypatch, ratio_at_least=11.0) == [("> 11.0 x", True), *[("no figure", None)] * 2]
    assert judged(monkeypatch, ratio_at_least=9.0)[0] == ("> 9.0 x", None)


def test_the_whole_model_is_counted_by_its_shapes(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import matrix_report

    rows = [
        {"method": "adam", "precision": "fp32", "shape": shape, "ours_seconds": 1.0, "reference_seconds": seconds}
        for shape, seconds in {(5120, 5120): 2.0, (13824, 5120): 3.0, (5120, 13824): 5.0}.items()
    ]
    (whole,) = matrix_report.whole(rows)
    assert whole["ours_seconds"] == 40 * 7
    assert whole["reference_seconds"] == 40 * (4 * 2 + 2 * 3 + 5)
    assert not whole["at_least"]
    del rows[2]["reference_seconds"]
    assert "ratio" not in matrix_report.whole(rows)[0]
    rows[2] |= {"reference_at_least_seconds": 4.0, "ratio_at_least": 4.0}
    assert matrix_report.whole(rows)[0]["reference_seconds"] == 40 * (4 * 2 + 2 * 3 + 4)
    assert matrix_report.whole(rows)[0]["at_least"]
    assert matrix_report.whole(rows[1:]) == []


def test_clocks_know_the_engine_and_count_products():
    done = run("-c", CLOCKS)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["products"] == [4, 3 * 120.0, 120.0]
    assert found["decompositions"] == [1, 0.0, 0.0]
    assert found["solvers"] == [0, 0.0, 0.0]


@pytest.mark.slow
def test_a_tiny_merge_has_its_figures(tmp_path):
    done = run(FOLDER / "matrix_merge.py", "--shape", "tiny", "--method", "wudi adam", "--no-save", "--dir", tmp_path)
    document = json.loads(done.stdout.splitlines()[-1])
    (row,), spent = document["rows"], document["spent"]["wudi adam"]
    assert row["read_bytes"] > 0
    assert row["method"] == "wudi adam"
    assert spent["clocks"]["solvers"]["calls"] == 7 * 4  # matrices, times three experts and the end
    assert spent["clocks"]["adam"]["calls"] >= 7 * 30
    assert 0 < spent["shares"]["products"] < 1
    assert sum(spent["shares"].values()) == pytest.approx(1)
