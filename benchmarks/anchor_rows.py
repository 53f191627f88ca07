"""Rows of anchors.py: starts, FDA from each, other anchors; each a merge in a process of its own. A part of it.

Yardsticks were measured with a plain loop of double backward on experts that were made in the same way (other seeds):
64 anchors x 5 tokens, noise of 0.01, 200 steps; from the base 100 epochs at 5e-5, from task arithmetic 25 at 1e-2.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import measure
import recipes
from bounds import Verdict
from rich.table import Table

NEAR = 0.01  # accuracy
YARDSTICKS = {
    "task_arithmetic 0.5": 0.927,
    "tsvm": 0.947,
    "wudi": 0.959,
    "fda of base": 0.941,
    "fda of task_arithmetic 0.5": 0.945,
}
AFTER = 3.2  # the largest construction loss of the plain loop; it came from 12 to 16
STARTS: dict[str, dict[str, Any]] = {
    "task_arithmetic 0.5": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}},
    "tsvm": {"merge_method": "tsvm"},
    "wudi": {"merge_method": "wudi"},
}
FEW = {"construct_steps": 5, "adapt_epochs": 1}  # of a quick run
ONE = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class Subject(Protocol):
    """A base and experts, and what judges a merge of them."""

    figure: str

    @property
    def base(self) -> Path: ...
    @property
    def experts(self) -> Sequence[Path]: ...
    def judge(self, folder: Path) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Row:
    """A merge: another method's, or FDA's with parameters; `anchors` names the set that it makes or takes up."""

    name: str
    start: Mapping[str, Any] | None
    fda: bool
    parameters: Mapping[str, Any] = field(default_factory=dict)
    anchors: str = "gaussian"


def rows(quick: bool) -> Iterator[Row]:
    """Starts, FDA of each, then what the anchors are made from, how many there are, and for how many steps."""
    few = FEW if quick else {}
    for name, start in STARTS.items():
        yield Row(name, start, False)
    for name, start in (("base", None), *STARTS.items()):
        yield Row(f"fda of {name}", start, True, few)
    short = {**few, "precision": "bf16"}
    yield Row("fda of base, bf16", None, True, short, "bf16")
    yield Row("fda of base, weights", None, True, {**few, "init": "weights"}, "weights")
    yield Row("fda of tsvm, weights", STARTS["tsvm"], True, {**few, "init": "weights"}, "weights")
    for count in (128, 256):
        yield Row(f"fda of base, {count} anchors, bf16", None, True, {**short, "anchors": count}, str(count))
    for steps in (40, 1200):
        values = {"construct_steps": steps} | short
        yield Row(f"fda of base, {steps} steps, bf16", None, True, values, f"{steps} steps")


@dataclass(frozen=True)
class Found:
    """What a row came to. Losses are of all units and experts, seconds those of one unit and expert."""

    name: str
    figure: str
    scores: Mapping[str, float]
    seconds: float
    peak_bytes: int
    predicted_bytes: int
    made: bool = False  # its anchors; else they were there
    first: tuple[float, float] | None = None
    last: tuple[float, float] | None = None
    construct_seconds: float | None = None
    adapt_seconds: float | None = None
    commit: str | None = None

    @property
    def mean(self) -> float:
        return sum(self.scores.values()) / len(self.scores)


@dataclass(frozen=True)
class Bench:
    """Where things go."""

    work: Path
    ram: str
    quick: bool

    def found(self, subject: Subject, row: Row) -> Found:
        """What a row came to, now or in an earlier run with this folder: all of them take hours."""
        kept = self.work / "rows" / f"{row.name}, {self.ram}{' quick' if self.quick else ''}.json"
        if kept.exists():
            found = Found(**json.loads(kept.read_text()))
            print(f"  {row.name}: kept from commit {found.commit}, {kept}", file=sys.stderr)
            return found
        found = self._run(subject, row)
        kept.parent.mkdir(parents=True, exist_ok=True)
        kept.write_text(json.dumps(asdict(found), indent=1))
        return found

    def _run(self, subject: Subject, row: Row) -> Found:
        folder = self.work / f"anchors {row.anchors}{' quick' if self.quick else ''}"
        there = (folder / "anchors.json").exists()
        path, out = self._write(subject, row, folder, there), self.work / "out"
        options = ("--ram", self.ram, "--threads", "1", "--device", "cpu", "--json", "--overwrite")
        usage = measure.run(recipes.command("merge", str(path), str(out), *options), ONE)
        report = json.loads(usage.output)
        found = {
            "name": row.name,
            "figure": subject.figure,
            "scores": dict(subject.judge(out)),
            "seconds": report["seconds"],
            "peak_bytes": usage.demand_bytes,
            "predicted_bytes": report["predicted"]["ram_peak_bytes"],
            "commit": measure.commit(),
        }
        units = report.get("fda", {}).values()
        if not units:
            return Found(**found)
        first, last, seconds = (
            [unit[key] for unit in units for key in unit if key.startswith(stem) and key[len(stem) :].isdigit()]
            for stem in ("first_", "loss_", "seconds_")
        )
        return Found(
            **found,
            made=not there,
            first=(min(first), max(first)) if first else None,
            last=(min(last), max(last)),
            construct_seconds=median(seconds),
            adapt_seconds=sum(unit["adaptation_seconds"] for unit in units),
        )

    def _write(self, subject: Subject, row: Row, anchors: Path, there: bool) -> Path:
        models = [{"model": str(path.resolve())} for path in subject.experts]
        recipe: dict[str, Any] = {"base_model": str(subject.base.resolve()), "models": models}
        if row.fda:
            recipe |= {"merge_method": "fda", "parameters": dict(row.parameters)}
            recipe |= {} if row.start is None else {"start": dict(row.start)}
            recipe["anchors_from" if there else "save_anchors"] = str(anchors.resolve())
        else:
            assert row.start is not None
            given = {"weight": 1.0} if row.start["merge_method"] == "task_arithmetic" else {}
            recipe |= {"merge_method": row.start["merge_method"]}
            recipe["parameters"] = given | row.start.get("parameters", {})
        self.work.mkdir(parents=True, exist_ok=True)
        path = self.work / "recipe.yml"
        path.write_text(json.dumps(recipe, indent=1))
        return path


def table(case: str, found: Sequence[Found]) -> Table:
    shown = Table(title=f"{case}: {found[0].figure if found else ''}; s of one unit and expert, and of all adaptation")
    names = list(found[0].scores) if found else []
    for heading in ("", "mean", *names, "loss before", "after", "s each", "adapt s", "all s", "peak MiB", "predicted"):
        shown.add_column(heading, justify="right" if heading else "left")
    for each in found:
        spans = ("" if pair is None else f"{pair[0]:.2f} to {pair[1]:.2f}" for pair in (each.first, each.last))
        took = (each.construct_seconds if each.made else None, each.adapt_seconds, each.seconds)
        shown.add_row(
            each.name,
            *(f"{value:.4f}" for value in (each.mean, *each.scores.values())),
            *spans,
            *("" if value is None else f"{value:.1f}" for value in took),
            *(f"{size / 2**20:.0f}" for size in (each.peak_bytes, each.predicted_bytes)),
        )
    return shown


def verdicts(found: Sequence[Found], whole: bool) -> Iterator[Verdict]:
    """Accuracies and losses of the yardstick; memory always."""
    for each in found:
        good = each.peak_bytes <= each.predicted_bytes
        figure, bound = (f"{size / 2**20:.0f} MiB" for size in (each.peak_bytes, each.predicted_bytes))
        yield Verdict(f"{each.name}: peak", figure, f"<= {bound}", good)
        if whole and each.name in YARDSTICKS:
            wanted = YARDSTICKS[each.name]
            yield Verdict(
                f"{each.name}: accuracy", f"{each.mean:.4f}", f"{wanted} +- {NEAR}", abs(each.mean - wanted) <= NEAR
            )
        if whole and each.name == "fda of base" and each.last is not None:
            good = each.last[1] <= AFTER
            yield Verdict("construction losses", f"{each.last[0]:.2f} to {each.last[1]:.2f}", f"<= {AFTER}", good)
