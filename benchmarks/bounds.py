"""The figures that streammerge promises, and whether a measurement keeps them.

    peak          measured demand <= --ram
    prediction    measured <= predicted <= 1.25 x measured
    disk          cold linear, task_arithmetic <= 1.15 x floor; ties <= 2.2 x where most
                  is read twice because it does not fit the budget, 1.4 x where it is read once
    mergekit      at least 3 x faster, cold and warm

A floor shorter than FLOOR_COUNTS is not judged: starting an interpreter would decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from measure import Usage, spread

SLACK = 1.25
ELEMENTWISE = 1.15
TWICE, ONCE = 2.2, 1.4
MOSTLY = 1.5  # bytes read over bytes of the inputs from which inputs count as read twice
FASTER = 3.0
FLOOR_COUNTS = 3.0  # seconds


@dataclass(frozen=True)
class Row:
    """One method in one state of the page cache. Times are quantiles over the repeats, memory is the worst of them."""

    shape: str
    method: str
    who: str
    state: str
    wall_seconds: dict[str, float]
    cpu_seconds: dict[str, float]
    demand_bytes: int
    resident_bytes: int
    disk_read_bytes: int
    input_bytes: int
    output_bytes: int
    reported_seconds: dict[str, float] | None = None
    predicted_bytes: int | None = None
    budget_bytes: int | None = None
    passes: int | None = None
    read_bytes: int | None = None
    floor_seconds: dict[str, float] | None = None
    floor_read_seconds: dict[str, float] | None = None
    floor_ratio: dict[str, float] | None = None
    reported_floor_ratio: dict[str, float] | None = None
    speedup: float | None = None  # of streammerge over mergekit, in mergekit's rows

    @classmethod
    def of(
        cls,
        what: tuple[str, str, str, str],
        usages: Sequence[Usage],
        sizes: tuple[int, int],
        reports: Sequence[dict[str, Any]] = (),
        **more: Any,
    ) -> Row:
        """Runs of `what` (shape, method, who, state), bytes of inputs and output, and reports of runs of ours."""
        if reports:
            more["reported_seconds"] = spread([report["seconds"] for report in reports])
            more["predicted_bytes"] = reports[-1]["predicted"]["ram_peak_bytes"]
            more["budget_bytes"] = reports[-1]["ram_budget_bytes"]
            more |= {key: reports[-1][key] for key in ("passes", "read_bytes")}
        return cls(
            *what,
            spread([usage.wall_seconds for usage in usages]),
            spread([usage.cpu_seconds for usage in usages]),
            max(usage.demand_bytes for usage in usages),
            max(usage.resident_bytes for usage in usages),
            max(usage.disk_read_bytes for usage in usages),
            *sizes,
            **more,
        )

    @property
    def rate(self) -> float:
        """Checkpoint bytes per second: inputs once, output once."""
        return (self.input_bytes + self.output_bytes) / self.wall_seconds["p50"]

    @property
    def reads(self) -> float:
        """How often the inputs were read, from the page cache too."""
        return (self.read_bytes or self.input_bytes) / self.input_bytes


@dataclass(frozen=True)
class Verdict:
    """A promise, the figure, the bound; `kept` is None where the figure could not be judged."""

    what: str
    figure: str
    bound: str
    kept: bool | None

    @property
    def word(self) -> str:
        return {True: "PASS", False: "FAIL", None: "n/a"}[self.kept]


def judge(rows: Iterable[Row]) -> Iterator[Verdict]:
    """Every promise that a row can keep or break."""
    for row in rows:
        at = f"{row.shape} {row.method} {row.state}"
        if row.speedup is not None:
            yield Verdict(
                f"{at}: against mergekit", f"{row.speedup:.1f} x", f">= {FASTER:.0f} x", row.speedup >= FASTER
            )
        if row.predicted_bytes is None or row.budget_bytes is None:
            continue
        peak, predicted, budget = (x / (1 << 20) for x in (row.demand_bytes, row.predicted_bytes, row.budget_bytes))
        yield Verdict(f"{at}: peak", f"{peak:.0f} MiB", f"<= {budget:.0f} MiB", peak <= budget)
        yield Verdict(
            f"{at}: prediction",
            f"{predicted:.0f} / {peak:.0f} MiB = {predicted / peak:.2f}",
            f"1 to {SLACK}",
            peak <= predicted <= SLACK * peak,
        )
        yield from _disk(row, at)


def _disk(row: Row, at: str) -> Iterator[Verdict]:
    bound = {"linear": ELEMENTWISE, "task_arithmetic": ELEMENTWISE}.get(row.method)
    if row.method == "ties":
        bound = TWICE if row.reads >= MOSTLY else ONCE
    if bound is None or row.floor_ratio is None or row.floor_seconds is None:
        return
    ratio, floor = row.floor_ratio["p50"], row.floor_seconds["p50"]
    counts = floor >= FLOOR_COUNTS
    reads = f", inputs read {row.reads:.2f} x" if row.method == "ties" else ""
    what = f"{at}: disk, whole process{reads}"
    yield Verdict(what, f"{ratio:.2f} x {floor:.1f} s", f"<= {bound} x", ratio <= bound if counts else None)
