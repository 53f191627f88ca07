"""Learned coefficients on trained models, beside search, one scalar per expert, and a loop with everything resident.

    python benchmarks/compose.py --data DIR            encoder and decoder; experts are trained unless they are in --dir
    python benchmarks/compose.py --data DIR --quick    small experts, few steps, a check

    zero-shot   the base                            searched    task arithmetic, the factor of the least few-shot loss
    scalars     one learned coefficient per expert, by plain autograd
    plain K=1   one per tensor, by plain autograd with base and task vectors resident
    K=1, 8      one per tensor, or eight by hash, streamed: `sm.atlas` under --ram
    experts     each on its own domain

All learn from the same few samples in the same order, AdamW at RATE from 0 with a cosine. Losses and figures are of
text that nobody learned from. The last line of stdout is JSON.
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click
import measure
import tables
import torch
from bounds import Verdict
from compose_plain import Resident, tensors
from compose_subjects import Intents, Subject, Texts
from rich.table import Table

import streammerge as sm
from streammerge.budget import parse_size

STEPS, RATE, DECAY = 60, 0.1, 0.1
SEARCHED = [0.05 * at for at in range(1, 21)]
GROUPS = (1, 8)
CLOSE = 0.01  # of accuracy, between streamed and plain
NEAR = 0.01  # bits per byte
HEADINGS = (
    "model",
    "way",
    "loss",
    "figure",
    "few-shot loss",
    "seconds",
    "of plain",
    "peak MiB",
    "predicted",
    "read GB",
)


@dataclass(frozen=True)
class Row:
    """One way, judged. Seconds are those of learning; `whole_seconds` of the call, planning, merge and all."""

    model: str
    way: str
    loss: float
    figure: float
    few_shot: float | None = None
    seconds: float | None = None
    whole_seconds: float | None = None
    peak_bytes: int | None = None
    predicted_bytes: int | None = None
    read_bytes: int | None = None
    about: str = ""


def rows(subject: Subject, work: Path, ram: str, steps: int) -> Iterator[Row]:
    resident = Resident(subject)

    def judged(way: str, weights: Any, **more: Any) -> Row:
        model = resident.put(weights)
        loss, figure = subject.judge(model)
        return Row(subject.name, way, loss, figure, subject.few_shot(model), **more)

    yield judged("zero-shot", resident.base)
    best = min(SEARCHED, key=lambda factor: subject.few_shot(resident.put(resident.added(factor))))
    yield judged("searched", resident.added(best), about=f"factor {best:.2f}")
    for way, scope in (("scalars", "expert"), ("plain K=1", "block")):
        found = resident.learn(steps, scope, RATE, DECAY)
        yield judged(way, found.weights, seconds=found.seconds)
    for groups in GROUPS:
        weights, more = streamed(subject, work, ram, steps, groups)
        yield judged(f"K={groups}", weights, **more)
    own = []
    for name, folder in subject.experts.items():
        own.append(subject.judge(resident.put(tensors(folder)), name))
    loss, figure = (sum(column) / len(own) for column in zip(*own, strict=True))
    yield Row(subject.name, "experts", loss, figure)


def streamed(subject: Subject, work: Path, ram: str, steps: int, groups: int) -> tuple[Any, dict[str, Any]]:
    """`sm.atlas`: its weights, and what it took."""
    batches, out = subject.steps(steps), work / "out"
    shapes = {each["name"]: each["shape"] for each in sm.inspect(subject.base)["entries"]}
    began = time.perf_counter()
    stack = sm.Stack.from_transformers(subject.base, shapes, batches[0], model=subject.model_class)
    report = sm.atlas(
        stack, batches, subject.loss, base_model=subject.base, models=list(subject.experts.values()), out=out,
        parameters={"steps": steps, "batch": 1, "lr": RATE, "weight_decay": DECAY, "partitions": groups},
        ram=ram, device="cpu", resume=False, overwrite=True,
    )  # fmt: skip
    whole = time.perf_counter() - began
    found = tensors(out)
    shutil.rmtree(out)
    stages = report["predicted"]["learn"]["stages"]
    return found, {
        "seconds": report["atlas"]["seconds"],
        "whole_seconds": whole,
        "peak_bytes": report["ram_peak_bytes"],
        "predicted_bytes": report["predicted"]["ram_peak_bytes"],
        "read_bytes": report["read_bytes"],
        "about": ", ".join(f"{count} {place}" for place, count in stages.items()),
    }


def verdicts(found: list[Row], subject: Subject, judge: bool) -> Iterator[Verdict]:
    """Streamed is as good as plain and not slower; per tensor beats one searched factor on held-out loss."""
    by = {row.way: row for row in found if row.model == subject.name}
    ours, plain, at = by["K=1"], by["plain K=1"], subject.name
    apart = abs(ours.figure - plain.figure)
    most = CLOSE if subject.higher else NEAR
    yield Verdict(f"{at}: {subject.figure}, streamed against plain", f"{apart:.4f}", f"<= {most}", apart <= most)
    for groups in GROUPS:
        row, factor = by[f"K={groups}"], by["searched"].loss
        kept = row.loss < factor if judge else None
        yield Verdict(f"{at}: held-out loss, K={groups} against searched", f"{row.loss:.4f}", f"< {factor:.4f}", kept)
        assert row.peak_bytes is not None
        assert row.predicted_bytes is not None
        held = row.peak_bytes <= row.predicted_bytes
        yield Verdict(f"{at}: peak, K={groups}", f"{row.peak_bytes >> 20} MiB", f"<= {row.predicted_bytes >> 20}", held)
    assert ours.seconds is not None
    assert plain.seconds is not None
    ratio = ours.seconds / plain.seconds
    kept = ratio <= 1 if judge and subject.higher else None
    yield Verdict(f"{at}: seconds, streamed over plain", f"{ratio:.2f}", "<= 1", kept)


def table(found: list[Row]) -> Table:
    shown = Table(title="learned coefficients, held-out text")
    for number, heading in enumerate((*HEADINGS, "about")):
        shown.add_column(heading, justify="left" if number < 2 or heading == "about" else "right")
    for row in found:
        plain = next((r.seconds for r in found if r.model == row.model and r.way == "plain K=1"), None)
        share = f"{row.seconds / plain:.2f}" if row.seconds and plain else ""
        sizes = (row.peak_bytes, row.predicted_bytes)
        shown.add_row(
            row.model, row.way, f"{row.loss:.4f}", f"{row.figure:.4f}",
            "" if row.few_shot is None else f"{row.few_shot:.4f}", "" if row.seconds is None else f"{row.seconds:.1f}",
            share, *("" if size is None else f"{size / 2**20:.0f}" for size in sizes),
            "" if row.read_bytes is None else f"{row.read_bytes / 1e9:.2f}", row.about,
        )  # fmt: skip
    return shown


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--data", default="build/clinc150", show_default=True, type=click.Path(path_type=Path),
              help="CLINC150: a file for each domain, or data_full.json and domains.json as published.")  # fmt: skip
@click.option("--dir", "work", default="build/benchmarks/minilm", show_default=True, type=click.Path(path_type=Path),
              help="Checkpoints and outputs; experts that are there are used again.")  # fmt: skip
@click.option("--ram", default="3GiB", show_default=True, help="The budget of the streamed rows.")
@click.option("--only", type=click.Choice(["encoder", "decoder"]), help="One of the two.")
@click.option("--quick", is_flag=True, help="Small experts and few steps, a check.")
@click.option("--save", is_flag=True, help="Append to benchmarks/results/compose.jsonl.")
def main(data: Path, work: Path, ram: str, only: str | None, quick: bool, save: bool) -> None:
    parse_size(ram)
    work.mkdir(parents=True, exist_ok=True)
    about, steps = measure.machine(work), 4 if quick else STEPS
    subjects: list[Subject] = []
    if only != "decoder":
        subjects.append(Intents.make(work, data, quick))
    if only != "encoder":
        subjects.append(Texts.make(work, quick, lambda text: click.echo(f"  {text}", err=True)))
    found: list[Row] = []
    for subject in subjects:
        for row in rows(subject, work, ram, steps):
            click.echo(f"  {row.model} {row.way}: {row.loss:.4f}, {row.figure:.4f}", err=True)
            found.append(row)
    judged = [verdict for subject in subjects for verdict in verdicts(found, subject, not quick)]
    out = tables.console()
    out.print(" ".join(f"{key} {value};" for key, value in about.items()), soft_wrap=True)
    out.print(table(found), tables.verdicts(judged))
    head = {"benchmark": "compose", "machine": about, "threads": torch.get_num_threads(), "ram": ram, "steps": steps}
    body = {**head, "quick": quick, "rows": [asdict(row) for row in found], **tables.plain(judged)}
    tables.finish(body, save, "compose")
    sys.exit(any(verdict.kept is False for verdict in judged))


if __name__ == "__main__":
    main()
