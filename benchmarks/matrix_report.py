"""What benchmarks/matrix.py says of its measurements: ratios, errors, bounds, and the whole model that follows.

error     |answer - truth|_F / |truth|_F, the truth being the reference's arithmetic in fp64; `apart` is the same
          between ours and the reference, where both went all the way
% mm      time that torch.mm would take for the useful FLOP, over the time it took; fp32 at the rate of fp32, fp64
          and eigendecompositions at that of fp64
seconds   medians of one to three runs; of the reference's Adam, where it ran fewer steps than all: seconds per
          step times steps
peak      beyond what the process held before the first task vector
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import numpy.typing as npt
from bounds import Verdict
from matrix_work import EXPERTS, STEPS, Case, Outcome
from rich.table import Table

FASTER = {"cpu": {"tsvm": 3.0, "adam": float(EXPERTS)}, "cuda": {"tsvm": 10.0, "adam": 5.0}}
SMALLER = 0.5  # of the reference's peak memory
RIGHT = {"fp32": 1e-4, "tf32x3": 1e-4, "bf16x3": 1e-3}  # error of ours above which it counts as wrong, by precision
WHOLE = {(5120, 5120): 160, (13824, 5120): 80, (5120, 13824): 40}  # matrices of Llama-2-13B's 40 layers, by shape
HEADINGS = (
    *("matrix", "method", "s", "GFLOP/s", "% mm", "peak MiB", "error"),
    *("reference s", "steps", "peak MiB", "error", "x faster", "of its peak", "apart"),
)

Row = dict[str, Any]


def distance(found: Path, wanted: Path) -> float | None:
    """Relative distance of two answers, or None where one of them was not written."""
    if not (found.exists() and wanted.exists()):
        return None
    a, b = (np.load(path, mmap_mode="r") for path in (found, wanted))
    return _norm(a, b) / _norm(b)


def _norm(a: npt.NDArray[Any], b: npt.NDArray[Any] | None = None) -> float:
    """Of a, or of a - b, in fp64, some rows at a time."""
    total = 0.0
    for at in range(0, len(a), 256):
        block = a[at : at + 256].astype(np.float64)
        total += float(np.square(block if b is None else block - b[at : at + 256]).sum())
    return math.sqrt(total)


def row(case: Case, ours: Outcome | None, reference: Outcome | None, errors: Row, rates: dict[str, float]) -> Row:
    """One matrix and method; figures that were not taken are absent."""
    found: Row = {"matrix": f"{case.rows} x {case.columns}", "method": case.method, "precision": case.precision}
    found |= {key: value for key, value in errors.items() if value is not None}
    for who, outcome in (("ours", ours), ("reference", reference)):
        if outcome is not None and "seconds" in outcome:
            found[f"{who}_seconds"], found[f"{who}_runs"] = median(outcome["seconds"]), len(outcome["seconds"])
            if "peak_bytes" in outcome:
                found[f"{who}_peak_bytes"] = outcome["peak_bytes"]
    if "reference_seconds" in found and case.method == "adam" and reference is not None:
        found["reference_steps"] = reference.get("steps_run", reference["steps"])
    if ours is not None and "ours_seconds" in found:
        flop, spent = ours["flop"], found["ours_seconds"]
        found |= {"flop": flop, "flop_per_second": sum(flop.values()) / spent, "routes": ours.get("routes")}
        if rates:
            ideal = flop["single"] / rates["single"] + (flop["double"] + flop["eigen"]) / rates["double"]
            found["share_of_mm"] = ideal / spent
    if {"ours_seconds", "reference_seconds"} <= found.keys():
        found["ratio"] = found["reference_seconds"] / found["ours_seconds"]
    elif "ours_seconds" in found and reference is not None:  # it was stopped
        found["reference_at_least_seconds"] = reference["at_least_seconds"]
        found["ratio_at_least"] = reference["at_least_seconds"] / found["ours_seconds"]
    if {"ours_peak_bytes", "reference_peak_bytes"} <= found.keys():
        found["peak_share"] = found["ours_peak_bytes"] / max(found["reference_peak_bytes"], 1)
    return found


def table(rows: Sequence[Row], title: str) -> Table:
    result = Table(title=title)
    for heading in HEADINGS:
        result.add_column(heading, justify="left" if heading in ("matrix", "method", "steps") else "right")
    for found in rows:
        result.add_row(*_cells(found))
    return result


def _cells(found: Row) -> Iterator[str]:
    def show(key: str, form: str, unit: float = 1, least: str = "") -> str:
        return format(found[key] / unit, form) if key in found else f"> {show(least, form)}" if least in found else ""

    yield found["matrix"]
    yield name(found)
    yield show("ours_seconds", ".3f")
    yield show("flop_per_second", ".0f", 1e9)
    yield show("share_of_mm", ".0%")
    yield show("ours_peak_bytes", ".0f", 1 << 20)
    yield show("ours_error", ".0e")
    yield show("reference_seconds", ".3f", least="reference_at_least_seconds")
    steps = found.get("reference_steps", STEPS)
    yield f"{steps} of {STEPS}, extrapolated" if steps < STEPS else ""
    yield show("reference_peak_bytes", ".0f", 1 << 20)
    yield show("reference_error", ".0e")
    yield show("ratio", ".1f", least="ratio_at_least")
    yield show("peak_share", ".2f")
    yield show("apart", ".0e")


def name(found: Row) -> str:
    """The method as it is called, with its precision where that is less than fp32."""
    return str(found["method"]) + (f" {found['precision']}" if found["precision"] != "fp32" else "")


def judge(rows: Sequence[Row], device: str) -> Iterator[Verdict]:
    """Every bound; a figure that was not taken could not be judged."""
    for found in rows:
        at, method = f"{found['matrix']} {name(found)}", found["method"]
        if (least := FASTER[device].get(method)) and found["judged"]:
            faster, share = found.get("ratio"), found.get("peak_share")
            said, kept = _said(faster, "{:.1f} x"), None if faster is None else faster >= least
            if "ratio_at_least" in found:
                said, kept = f"> {found['ratio_at_least']:.1f} x", found["ratio_at_least"] >= least or None
            yield Verdict(f"{at}: against the reference", said, f">= {least:.0f} x", kept)
            kept = None if share is None else share <= SMALLER
            yield Verdict(f"{at}: peak memory", _said(share, "{:.2f} of the reference's"), f"<= {SMALLER}", kept)
        if found["truth"]:
            error = found.get("ours_error")
            kept = None if error is None else right(found)
            yield Verdict(f"{at}: error", _said(error, "{:.1e}"), f"<= {RIGHT[found['precision']]:.0e}", kept)


def right(found: Row) -> bool:
    """Whether ours is near the truth, as far as it is known."""
    return bool(found.get("ours_error", 0.0) <= RIGHT[found["precision"]])


def _said(value: float | None, form: str) -> str:
    return "no figure" if value is None else form.format(value)


def whole(rows: Sequence[Row]) -> list[Row]:
    """Llama-2-13B's matrices: each shape's seconds times how many of it there are. Nothing of it was run as a whole."""
    found = []
    for method in dict.fromkeys(map(name, rows)):
        mine = {row["shape"]: row for row in rows if name(row) == method}
        if not WHOLE.keys() <= mine.keys():
            continue
        some, one = [mine[shape] for shape in WHOLE], Row(method=method, extrapolated=True)
        for key in ("ours_seconds", "reference_seconds"):
            spent: list[Any] = [row.get(key, row.get(key.replace("_", "_at_least_"), math.nan)) for row in some]
            total = math.fsum(each * count for each, count in zip(spent, WHOLE.values(), strict=True))
            if not math.isnan(total):
                one[key] = total
        one["at_least"] = any("ratio_at_least" in row for row in some)
        if {"ours_seconds", "reference_seconds"} <= one.keys():
            one["ratio"] = one["reference_seconds"] / one["ours_seconds"]
        found.append(one)
    return found


def whole_table(found: Sequence[Row]) -> Table:
    result = Table(title="Llama-2-13B, 280 matrices: EXTRAPOLATED from one of each shape, arithmetic alone")
    for heading in ("method", "ours s", "reference s", "x faster"):
        result.add_column(heading, justify="left" if heading == "method" else "right")
    for one in found:
        shown = [f"{one[key]:.1f}" if key in one else "" for key in ("ours_seconds", "reference_seconds", "ratio")]
        result.add_row(one["method"], shown[0], *(f"> {text}" if one["at_least"] else text for text in shown[1:]))
    return result
