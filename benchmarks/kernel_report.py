"""What benchmarks/kernels.py says of its rows: rates and ratios, a table, and the bounds that are promised.

copy       at least 90 % of what a device-to-device copy reads and writes
eager      at least 3 times as fast as torch eager, from 3 models on
library    the multiplication unit at least at 80 % of torch.mm's rate in the same format
compile    every row: not slower than torch.compile
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import measure
import torch
from bounds import Verdict
from rich.table import Table

OK, WRONG, SKIPPED, MISSING = "ok", "WRONG", "skipped", "no row"
COPY, EAGER, LIBRARY = 0.9, 3.0, 0.8
SAME = 0.98  # two times that differ by less are the same: medians of one kernel do so between runs
COLOURS = {OK: "green", WRONG: "bold red", SKIPPED: "yellow", MISSING: "bold red"}
HEADINGS = (
    *("row", "test", "ms", "p20 - p80", "GB/s", "% copy", "eager ms", "x eager", "compile ms", "x compile"),
    *("TFLOP/s", "% mm", "remark"),
)

Spread = dict[str, float]  # 20 %, 50 % and 80 % quantiles
Outcome = dict[str, Any]


def rated(found: Outcome, copy: float) -> Outcome:
    """Times, and what follows from them; `copy` is in bytes per second."""
    ms = found["ms"]
    swap = {"p20": "p80", "p50": "p50", "p80": "p20"}  # a long time is a low rate
    found["gigabytes_per_second"] = {q: found["bytes"] / ms[p] / 1e6 for q, p in swap.items()}
    found["share_of_copy"] = found["bytes"] / ms["p50"] * 1e3 / copy
    if found["flops"]:
        found["teraflops_per_second"] = found["flops"] / ms["p50"] / 1e9
    for name in ("eager", "compile"):
        if f"{name}_ms" in found:
            found[f"{name}_ratio"] = found[f"{name}_ms"]["p50"] / ms["p50"]
    return found


def line(found: Outcome) -> str:
    """A row as it ends: the table comes when all have."""
    if "ms" not in found:
        return f"{found['row']}: {found['test']}{': ' * ('detail' in found)}{found.get('detail', '')}"
    speed = f"{found['ms']['p50']:.3f} ms, {found['gigabytes_per_second']['p50']:.0f} GB/s"
    ratios = [f"{found[f'{name}_ratio']:.2f} x {name}" for name in ("eager", "compile") if f"{name}_ratio" in found]
    return ", ".join([f"{found['row']}: {found['test']}", speed, f"{found['share_of_copy']:.0%} of a copy", *ratios])


def table(rows: Iterable[Outcome]) -> Table:
    result = Table(title="times are medians; GB/s counts inputs and outputs once; x: how many times as long")
    for heading in HEADINGS:
        result.add_column(heading, justify="left" if heading in ("row", "test", "remark") else "right")
    for found in rows:
        result.add_row(found["row"], f"[{COLOURS[found['test']]}]{found['test']}", *_figures(found), _remark(found))
    return result


def _figures(found: Outcome) -> Iterator[str]:
    def show(key: str, form: str, quantile: str = "") -> str:
        value = found.get(key)
        return "" if value is None else format(value[quantile] if quantile else value, form)

    yield show("ms", ".3f", "p50")
    yield f"{show('ms', '.3f', 'p20')} - {show('ms', '.3f', 'p80')}" if "ms" in found else ""
    yield show("gigabytes_per_second", ".0f", "p50")
    yield show("share_of_copy", ".0%")
    for name in ("eager", "compile"):
        yield "n/a" if f"{name}_note" in found else show(f"{name}_ms", ".3f", "p50")
        yield show(f"{name}_ratio", ".2f")
    yield show("teraflops_per_second", ".0f")
    yield show("share_of_library", ".0%")


def _remark(found: Outcome) -> str:
    notes = [f"{name}: {found[f'{name}_note']}" for name in ("eager", "compile") if f"{name}_note" in found]
    spent = found.get("library_ms", {})
    mm = ["torch.mm ms: " + ", ".join(f"{kind} {ms['p50']:.3f}" for kind, ms in spent.items())] if spent else []
    return "; ".join([*([found["detail"]] if "detail" in found else []), *mm, *notes])


def judge(rows: Sequence[Outcome]) -> Iterator[Verdict]:
    """Every bound of every row; one without a figure could not be judged."""
    bounds = (
        ("copy", "share_of_copy", COPY, "{:.0%} of a copy's rate"),
        ("eager", "eager_ratio", EAGER, "{:.1f} x as fast as eager"),
        ("library", "share_of_library", LIBRARY, "{:.0%} of torch.mm's rate"),
        ("compile", "compile_ratio", SAME, "{:.2f} x as fast as torch.compile"),
    )
    for name, figure, least, form in bounds:
        for found in rows:
            if name == "compile" or name in found["judged"]:
                value = found.get(figure)
                said = "no figure" if value is None else form.format(value)
                yield Verdict(found["row"], said, ">= " + form.format(least), None if value is None else value >= least)


def machine(checked_only: bool) -> dict[str, Any]:
    """What a figure depends on."""
    import triton

    found = {**measure.machine(Path(__file__).parent), "triton": triton.__version__, "machine": platform.machine()}
    if checked_only:
        return {**found, "interpreter": os.environ.get("TRITON_INTERPRET") == "1"}
    about = torch.cuda.get_device_properties(0)
    return {
        **found,
        "gpu": about.name,
        "gpu_bytes": about.total_memory,
        "capability": f"{about.major}.{about.minor}",
        "cuda": torch.version.cuda,
        "driver": driver(),
    }


def driver() -> str:
    """The driver's version, as nvidia-smi has it."""
    if not (tool := shutil.which("nvidia-smi")):
        return "unknown"
    command = [tool, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else "unknown"
