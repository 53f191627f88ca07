"""What the demo prints: a bar while training, one table at the end, one paragraph about it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

Row = Mapping[str, Any]
MIB = 1 << 20


@contextmanager
def training_bar(console: Console, name: str, steps: int) -> Iterator[Callable[[int, float], None]]:
    """A function to call after each step; the bar is shown on terminals only."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[loss]} bits/byte"))
    bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal)
    with bar:
        task = bar.add_task(escape(name), total=steps, loss="-.--")
        yield lambda step, loss: bar.update(task, completed=step, loss=f"{loss:.2f}")


def print_results(console: Console, results: Mapping[str, Any]) -> None:
    """The table, what it shows, and the continued prompt."""
    say(console, "")
    console.print(table(results["rows"], results["domains"], results["best"]))
    say(console, results["finding"])
    sample = results["sample"]
    say(console, f"\n{results['best']}, loaded by transformers, continues {sample['prompt']!r}:")
    say(console, sample["text"])


def say(console: Console, text: str) -> None:
    """Text as it is: no markup, no highlighting."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def printable(text: str) -> str:
    """Text without what would steer a terminal."""
    return "".join(letter if letter.isprintable() or letter in "\n\t" else "\ufffd" for letter in text)


def table(rows: Sequence[Row], domains: Sequence[str], best: str) -> Table:
    """Bits per byte on held-out text; the best merge carries a star."""
    drawn = Table(title="bits per byte on held-out text (lower is better)", title_justify="left")
    drawn.caption = "peak: the merge's process; seconds: of training or merging"
    drawn.add_column("model", no_wrap=True)
    for name in (*domains, "mean", "peak MiB", "seconds"):
        drawn.add_column(name, justify="right", no_wrap=True)
    for at, row in enumerate(rows):
        last_of_kind = at + 1 < len(rows) and rows[at + 1]["kind"] != row["kind"]
        chosen = row["name"] == best
        drawn.add_row(*_cells(row, domains, chosen), end_section=last_of_kind, style="bold" if chosen else None)
    return drawn


def _cells(row: Row, domains: Sequence[str], chosen: bool) -> list[str]:
    peak = row["ram_peak_bytes"]
    return [
        escape(row["name"]) + (" *" if chosen else ""),
        *(f"{row['bits'][domain]:.3f}" for domain in domains),
        f"{row['mean']:.3f}",
        "" if peak is None else f"{peak / MIB:.0f}",
        f"{row['seconds']:.2f}" if row["seconds"] < 10 else f"{row['seconds']:.0f}",
    ]


def finding(rows: Sequence[Row], domains: Sequence[str], best: str) -> str:
    """What the numbers say, good or bad."""
    by_name = {row["name"]: row for row in rows}
    base, merges = by_name["base"], [row for row in rows if row["kind"] == "merge"]
    experts = [row for row in rows if row["kind"] == "expert"]
    at_home = [d for d in domains if by_name[f"expert:{d}"]["bits"][d] < base["bits"][d]]
    ahead = [d for d in domains if min(rows, key=lambda row: row["bits"][d])["name"] == f"expert:{d}"]
    better = sum(row["mean"] < base["mean"] for row in merges)
    chosen, expert = by_name[best], min(experts, key=lambda row: float(row["mean"]))
    than_expert = "below" if chosen["mean"] < expert["mean"] else "not below"
    merging = (
        f"{better} of {len(merges)} merges beat the base on the mean of all domains; the best, {best} (*), "
        f"takes {chosen['mean']:.3f} bits per byte to the base's {base['mean']:.3f}, "
        f"{than_expert} the best single expert's {expert['mean']:.3f}."
    )
    return (
        f"{merging} {len(at_home)} of {len(domains)} experts beat the base on their own domain, "
        f"and on {len(ahead)} of {len(domains)} domains the expert stays ahead of every merge."
    )
