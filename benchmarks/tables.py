"""The rows of a benchmark as tables for people; the same figures leave as JSON."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bounds import Row, Verdict
from rich.console import Console
from rich.table import Table

COLOURS = {"PASS": "green", "FAIL": "bold red", "n/a": "dim"}
HEADINGS = (
    "shape method",
    "cache",
    "wall s",
    "own s",
    "CPU s",
    "peak MiB",
    "predicted",
    "p/m",
    "HWM MiB",
    "GB/s",
    "disk read",
    "floor s",
    "x floor",
    "own x",
    "mergekit: wall s",
    "CPU s",
    "anon GB",
    "RSS GB",
    "ratio",
)


def console() -> Console:
    """Wide enough for the tables where stdout is no terminal."""
    return Console(width=max(200, shutil.get_terminal_size().columns), highlight=False)


def _middle(spread: dict[str, float] | None, form: str = ".2f") -> str:
    return "" if spread is None else format(spread["p50"], form)


def _mib(size: int | None) -> str:
    return "" if size is None else f"{size / (1 << 20):.0f}"


def _ours(row: Row) -> list[str]:
    ratio = f"{row.predicted_bytes / row.demand_bytes:.2f}" if row.predicted_bytes else ""
    return [
        f"{row.shape} {row.method}",
        row.state,
        _middle(row.wall_seconds),
        _middle(row.reported_seconds),
        _middle(row.cpu_seconds),
        _mib(row.demand_bytes),
        _mib(row.predicted_bytes),
        ratio,
        _mib(row.resident_bytes),
        f"{row.rate / 1e9:.2f}",
        f"{row.disk_read_bytes / 1e9:.2f}",
        _middle(row.floor_seconds),
        _middle(row.floor_ratio),
        _middle(row.reported_floor_ratio),
    ]


def _theirs(row: Row | None) -> list[str]:
    if row is None:
        return ["", "", "", "", ""]
    return [
        _middle(row.wall_seconds, ".1f"),
        _middle(row.cpu_seconds, ".1f"),
        f"{row.demand_bytes / 1e9:.2f}",
        f"{row.resident_bytes / 1e9:.2f}",
        f"{row.speedup:.1f} x" if row.speedup else "",
    ]


def timings(rows: Sequence[Row]) -> Table:
    """Ours, the disk's floor and mergekit side by side."""
    table = Table(title="medians; memory is the worst of the repeats; GB/s counts inputs and output once")
    for at, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if at < 2 else "right", overflow="fold")
    peers = {(row.shape, row.method, row.state): row for row in rows if row.who == "mergekit"}
    for row in rows:
        if row.who == "streammerge":
            table.add_row(*_ours(row), *_theirs(peers.get((row.shape, row.method, row.state))))
    return table


def verdicts(found: Iterable[Verdict]) -> Table:
    table = Table(title="bounds")
    for heading in ("what", "figure", "bound", ""):
        table.add_column(heading)
    for each in found:
        table.add_row(each.what, each.figure, each.bound, f"[{COLOURS[each.word]}]{each.word}")
    return table


def plain(found: Iterable[Verdict]) -> dict[str, Any]:
    """Verdicts for a document."""
    return {"bounds": [{**asdict(each), "word": each.word} for each in found]}


def finish(document: dict[str, Any], save: bool, name: str) -> None:
    """The document as the last line of stdout, and as a row of benchmarks/results/<name>.jsonl."""
    line = json.dumps(document)
    if save:
        path = Path(__file__).parent / "results" / f"{name}.jsonl"
        path.parent.mkdir(exist_ok=True)
        with open(path, "a") as file:
            file.write(line + "\n")
    print(line)
