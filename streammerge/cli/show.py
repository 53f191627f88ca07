"""What people see: plans, progress, reports and tables; colour on a terminal, plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from streammerge.budget import human

WIDTH = 200  # columns of a table in a pipe, at least


def console() -> Console:
    """Standard output; as wide as it needs to be in a pipe. Names of files and tensors are never markup."""
    return Console(soft_wrap=not sys.stdout.isatty(), highlight=False, markup=False, emoji=False)


def table(title: str | None, columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[int] = ()) -> None:
    """A plain table; columns listed in `right` are numbers."""
    grid = Table(title=title, box=None, title_justify="left", pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        grid.add_column(name, justify="right" if number in right else "left", overflow="fold", no_wrap=number in right)
    for row in rows:
        grid.add_row(*map(Text, row))
    out = console()
    if not sys.stdout.isatty():
        widths = [max(map(len, cells)) for cells in zip(columns, *rows, strict=True)]
        out = Console(width=max(WIDTH, sum(widths) + 2 * len(widths)))
    out.print(grid)


def lines(rows: Sequence[tuple[str, str, str]]) -> None:
    """Rows of a word, a figure and what it rests on."""
    out = console()
    width = max(len(figure) for _, figure, _ in rows)
    for word, figure, note in rows:
        out.print(Text.assemble(f"{word:<7}{figure:<{width + 3}}", (note, "dim")))


def note(text: str) -> None:
    """Something the user should know."""
    console().print(Text.assemble(("note   ", "yellow"), text))


def count(number: int, noun: str, many: str = "") -> str:
    """1 shard, 2 shards."""
    return f"{number} {noun if number == 1 else many or noun + 's'}"


def duration(seconds: float) -> str:
    """90 s as 1:30."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02} h" if hours else f"{minutes}:{rest:02} min"


def plan(made: Any) -> None:
    """A plan in four lines."""
    body = made.as_dict()
    inputs = len(made.inputs)
    many = {1: "one", 2: "two", 3: "three", 4: "four"}.get(body["passes"], str(body["passes"]))
    passes = "one pass" if body["passes"] == 1 else f"{many} passes where inputs do not fit"
    if body.get("sweeps") and "samples" in body:
        passes = f"{many} passes over the layers, {count(body['samples'], 'sample')}"
    elif body.get("sweeps"):
        passes = f"{body['units']} of {count(body['units_of'], 'unit')}, one at a time"
    kernels = ", ".join(f"{name} ({how})" for name, how in body["kernels"].items())
    lines(
        [
            (
                body["method"],
                "",
                f"{count(inputs, 'checkpoint')}, {count(body['tensors'], 'tensor')}, plan {body['digest'][:12]}",
            ),
            (
                "read",
                human(body["read_bytes"]),
                f"{passes}, {count(body['steps'], 'step')} of up to {human(body['step_bytes'])}",
            ),
            ("hold", human(body["ram_peak_bytes"]), f"at most, budget {human(body['ram_budget_bytes'])}"),
            *_vram(body, body, "at most"),
            (
                "write",
                human(body["write_bytes"]),
                f"{count(body['shards'], 'shard')}, {duration(body['seconds'])} at 1 GB/s",
            ),
            ("with", kernels, f"on {body['device']}, {count(made.threads, 'thread')}"),
            *_solvers(body),
            *_lessons(body.get("learn")),
        ]
    )
    for warning in body["warnings"]:
        note(warning)


def _lessons(found: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """The line on coefficients that are to be learned."""
    if found is None:
        return []
    words = {"twice": "read twice", "memory": "composed in memory", "disk": "composed on disk", "pinned": "pinned"}
    kept = ", ".join(f"{number} {words[place]}" for place, number in found["stages"].items())
    read = f"{human(found['step_read_bytes'])} read in each; {kept} of {sum(found['stages'].values())} stages"
    return [("learn", f"{found['coefficients']:,}", f"coefficients, {count(found['steps'], 'step')}, {read}")]


def _learned(found: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """The line on coefficients that were learned."""
    if found is None or "loss" not in found:
        return []
    first, last = found["loss"][0], found["loss"][-1]
    told = [count(found["steps"], "step"), "coefficients.json beside the manifest"]
    if "validation" in found:
        best = next(loss for step, loss in found["validation"] if step == found["kept"])
        before = found["validation"][0][1]
        told.insert(1, f"validation {before:.4g} to {best:.4g}, kept those of step {found['kept']}")
    if "rounding" in found:
        told.append(f"rounded: slope {found['rounding']['slope']:.3f}, noise {found['rounding']['noise']:.3f}")
    return [("loss", f"{first:.4g} to {last:.4g}", ", ".join(told))]


def _solvers(body: dict[str, Any]) -> list[tuple[str, str, str]]:
    """The line on matrices that are seen whole, where there are any."""
    if not body["solvers"]:
        return []
    how = ", ".join(body["solvers"])
    many = count(sum(body["solvers"].values()), "matrix", "matrices")
    return [("solve", how, many + (f", {body['solved_at_once']} at once" if body["solved_at_once"] > 1 else ""))]


def _vram(body: dict[str, Any], promised: dict[str, Any], how: str) -> list[tuple[str, str, str]]:
    """The line on a GPU's memory, where there is one."""
    if not promised["vram_budget_bytes"]:
        return []
    budget = human(promised["vram_budget_bytes"])
    return [(body["device"], human(body["vram_peak_bytes"]), f"{how}, budget {budget}")]


def report(body: dict[str, Any], out: str) -> None:
    """What was done, promised against measured."""
    promised = body["predicted"]
    rate = f"{body['bytes_per_second'] / 1e9:.2f} GB/s read and written"
    rows = [
        ("read", human(body["read_bytes"]), f"{human(promised['read_bytes'])} planned"),
        (
            "held",
            human(body["ram_peak_bytes"]),
            f"{human(promised['ram_peak_bytes'])} predicted, budget {human(body['ram_budget_bytes'])}",
        ),
        *_vram(body, promised, f"{human(promised['vram_peak_bytes'])} predicted, with the driver's own"),
        ("wrote", human(body["write_bytes"]), f"{count(body['shards'], 'shard')} in {out}"),
        ("took", duration(body["seconds"]), rate),
    ]
    rows += [*_matrices(body["matrices"]), *_masked(body.get("gradfix")), *_learned(body.get("atlas"))]
    lines([*rows, *_units(body.get("fda"))])
    for warning in body["warnings"]:
        if warning not in promised["warnings"]:  # shown with the plan
            note(warning)
    if copied := body["copied_tensors"]:
        note(f"{count(copied, 'tensor')} the same in all inputs, copied")
    for found in body["nonfinite"]:
        note(f"{found['file']}: tensor {found['tensor']!r} holds {found['holds']}")


def _matrices(figures: dict[str, dict[str, float]]) -> list[tuple[str, str, str]]:
    """The line on matrices that were solved: how far the merge moved them, beside what their experts did."""
    longest = {name: max(each[key] for key in each if key.startswith("norm_")) for name, each in figures.items()}
    shares = {name: figures[name]["displacement"] / norm for name, norm in longest.items() if norm}
    if not shares:
        return []
    most = max(shares, key=lambda name: shares[name])
    text = f"{count(len(figures), 'matrix', 'matrices')}, at most {shares[most]:.2f} x its longest task vector: {most}"
    return [("moved", "", text)]


def _masked(figures: dict[str, Any] | None) -> list[tuple[str, str, str]]:
    """The line on task vectors that were masked: what was kept of them, and what that promises."""
    if figures is None:
        return []
    total = figures["total"]
    shares = [
        f"{total[key] / max(1, total['elements']):.1%} {word}" for key, word in (("ties", "tied"), ("nan", "NaN"))
    ]
    told = [f"alpha {figures['alpha']:g}"] if "alpha" in figures else []
    told += [shares[0], *(shares[1:] if total["nan"] else ()), f"{total['unchanged']} lost to rounding"]
    if "descent" in total:
        told.append(f"loss to fall by {total['descent']:.3g} to first order")
    return [("kept", f"{total['kept'] / max(1, total['elements']):.1%}", ", ".join(told))]


def _units(figures: dict[str, dict[str, float]] | None) -> list[tuple[str, str, str]]:
    """The line on units that learned from anchors: how far each loss came."""
    if not figures:
        return []
    rows = figures.values()
    made = [row[key] for row in rows for key in row if key.startswith("loss_")]
    told = [f"construction loss {min(made):.3g} to {max(made):.3g}"] if made else []
    adapted = [row["adaptation"] for row in rows if "adaptation" in row]
    told += [f"adaptation loss {min(adapted):.4g} to {max(adapted):.4g}"] if adapted else []
    return [("units", str(len(figures)), ", ".join(told))]


@contextmanager
def progress(made: Any, silent: bool) -> Iterator[Callable[[Any], None] | None]:
    """A progress bar on a terminal: bytes written, GB/s moved, time left; nothing in a pipe."""
    if silent or not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bar = Progress(
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%  {task.fields[moved]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[tensor]}", style="dim", markup=False),
        console=Console(stderr=True),
        transient=True,
    )
    with bar:
        task = bar.add_task("merge", total=sum(t.end - t.begin for t in made.tensors), moved="", tensor="")

        def tell(now: Any) -> None:
            elapsed = bar.tasks[0].elapsed or 1e-9
            moved = now.read_bytes + now.written_bytes
            text = f"{human(now.written_bytes)} of {human(now.written_total)}, {moved / elapsed / 1e9:.2f} GB/s"
            done = now.written_bytes
            if now.work_total:  # arithmetic tells the time that is left, bytes do not
                done = round((bar.tasks[0].total or 0) * min(1.0, now.work / now.work_total))
            bar.update(task, completed=done, moved=text, tensor=now.tensor)

        yield tell
