"""What a merge of real experts is judged by, and how its figures are shown: parts of matrix_quality.py.

Yardsticks: accuracies measured with the authors' code on experts that were made in this way (other seeds), and how long
their code took beside ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import bounds
from bounds import Row, Verdict
from rich.table import Table

NEAR = 0.01  # accuracy
YARDSTICKS = {
    "zero-shot": 0.718,
    "experts": 0.967,
    "task_arithmetic 0.3": 0.902,
    "task_arithmetic 0.5": 0.927,
    "task_arithmetic 0.8": 0.898,
    "tsvm 1.0": 0.947,
    "tsvm 1.3": 0.962,
    "wudi adam": 0.959,
    "wudi spectral t=300": 0.961,
    "iso_c 1.6": 0.925,
}
SLOWEST = {"tsvm 1.0": 3.0, "wudi spectral t=300": 4.0}  # seconds
AUTOGRAD = 20.0  # times as long as ours


@dataclass(frozen=True)
class Score:
    """One checkpoint judged. `row` has what the merge took; a plain route's has no prediction."""

    label: str
    accuracies: Mapping[str, float] | None
    row: Row | None = None
    beside: str | None = None  # of a plain route: the merge of ours that it stands beside
    steps: int | None = None  # of a plain route: fewer than the whole, whose time is extrapolated from them
    distances: Mapping[str, float] | None = None  # |ours - plain| over a matrix's plain task vector, the largest last

    @property
    def mean(self) -> float:
        assert self.accuracies is not None
        return sum(self.accuracies.values()) / len(self.accuracies)

    @property
    def seconds(self) -> float:
        """Of the merge with its reading and writing; of a plain route, its arithmetic."""
        assert self.row is not None
        assert self.row.reported_seconds is not None
        return self.row.reported_seconds["p50"]


def judge(scores: Sequence[Score], whole: bool) -> Iterator[Verdict]:
    """The promises; accuracies and seconds of a quick run are not those that they are about."""
    by_label = {score.label: score for score in scores}
    yield from bounds.judge(score.row for score in scores if score.row is not None)
    for label, wanted in YARDSTICKS.items():
        if label in by_label:
            got = by_label[label].mean
            good = abs(got - wanted) <= NEAR if whole else None
            yield Verdict(f"{label}: mean accuracy", f"{got:.4f}", f"{wanted} +- {NEAR}", good)
    for label, limit in SLOWEST.items():
        if label in by_label:
            seconds = by_label[label].seconds
            yield Verdict(
                f"{label}: merge", f"{seconds:.2f} s", f"<= {limit:.0f} s", seconds <= limit if whole else None
            )
    for score in scores:
        if score.beside is None:
            continue
        ours = by_label[score.beside]
        if score.accuracies is not None:
            apart = abs(ours.mean - score.mean)
            yield Verdict(
                f"{score.beside}: accuracy against {score.label}", f"{apart:.4f}", f"<= {NEAR}", apart <= NEAR
            )
        if score.label == "plain wudi_autograd":
            ratio = score.seconds / ours.seconds
            yield Verdict(
                f"{score.beside}: faster than {score.label}",
                f"{ratio:.1f} x",
                f">= {AUTOGRAD:.0f} x",
                ratio >= AUTOGRAD if whole else None,
            )


def table(scores: Sequence[Score], names: Sequence[str]) -> Table:
    found = Table(title="test accuracy; s: the merge with its I/O, of a plain route its arithmetic alone; medians")
    for heading in (
        "",
        "mean",
        *names,
        "s",
        "process s",
        "CPU s",
        "peak MiB",
        "predicted",
        "ratio",
        "from plain: median, worst",
    ):
        found.add_column(heading, justify="right" if heading else "left")
    for score in scores:
        judged = score.accuracies
        shown = ["", *("" for _ in names)] if judged is None else [f"{x:.4f}" for x in (score.mean, *judged.values())]
        found.add_row(score.label, *shown, *_took(score))
    return found


def _took(score: Score) -> list[str]:
    row = score.row
    if row is None:
        return [""] * 7
    about = f" (from {score.steps} steps)" if score.steps else ""
    predicted = row.predicted_bytes
    return [
        f"{score.seconds:.2f}{about}",
        f"{row.wall_seconds['p50']:.2f}",
        f"{row.cpu_seconds['p50']:.2f}",
        f"{row.demand_bytes / (1 << 20):.0f}",
        f"{predicted / (1 << 20):.0f}" if predicted else "",
        f"{predicted / row.demand_bytes:.2f}" if predicted else "",
        _spread(score.distances),
    ]


def _spread(distances: Mapping[str, float] | None) -> str:
    """The median and the two largest."""
    if not distances:
        return ""
    found = list(distances.values())
    return " ".join(f"{x:.0e}" for x in (median(found), *found[-2:]))
