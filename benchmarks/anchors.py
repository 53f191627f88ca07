"""FDA on trained models: starts and what anchors make of them, beside a plain loop of double backward.

    python benchmarks/anchors.py --data DIR                          encoder and loop, hours on one core
    python benchmarks/anchors.py --data DIR --case loop              one (layer, expert) beside the plain loop
    python benchmarks/anchors.py --data DIR --row "task_arithmetic 0.5"      starts by name, with what refines them
    python benchmarks/anchors.py --case decoder                      a byte-level Llama and three experts, MLPs as units
    python benchmarks/anchors.py --case unit --ram 4GiB              one unit of the 13B shape on the CPU, 64 anchors
    python benchmarks/anchors.py --case unit --device cuda --vram 8GiB       8192 anchors, 200 steps, as published
    python benchmarks/anchors.py --data DIR --quick                  few steps, a check

The encoder and its six experts are those of encoder.py, its layers are units of 64 anchors x 5 tokens. Merges are
processes of their own with one thread. A row that --dir keeps from an earlier run is not run again. The last line of
stdout is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import anchor_cost
import anchor_loop
import click
import encoder
import measure
import tables
from anchor_rows import Bench, Found, Subject, rows, table, verdicts
from bounds import Verdict

CASES = ("encoder", "loop", "decoder", "unit")


@dataclass(frozen=True)
class Sentences:
    """Six domains of CLINC150, judged by accuracy."""

    suite: encoder.Suite
    figure: str = "accuracy"

    @property
    def base(self) -> Path:
        return self.suite.base

    @property
    def experts(self) -> list[Path]:
        return list(self.suite.experts.values())

    def judge(self, folder: Path) -> dict[str, float]:
        return self.suite.accuracies(folder)


def measured(bench: Bench, subject: Subject, names: tuple[str, ...]) -> Iterator[Found]:
    for row in rows(bench.quick):
        if not names or row.name in names:
            found = bench.found(subject, row)
            told = f"{found.mean:.4f}, {found.seconds:.1f} s, {found.peak_bytes / 2**20:.0f} MiB"
            click.echo(f"  {row.name}: {told}", err=True)
            yield found


@click.command()
@click.option("--data", type=click.Path(path_type=Path), help="Folder of CLINC150, as encoder.py says.")
@click.option("--dir", "work", type=click.Path(path_type=Path), default="build/anchors", show_default=True)
@click.option("--case", "cases", multiple=True, type=click.Choice(CASES), help="Encoder and loop if left out.")
@click.option("--row", "names", multiple=True, help="Rows by name; all if left out.")
@click.option("--ram", default="2GiB", show_default=True, help="Host memory of a merge.")
@click.option("--device", default="cpu", show_default=True, help="Of the case unit.")
@click.option("--vram", help="Memory of the GPU, for the case unit.")
@click.option("--quick", is_flag=True, help="Few steps.")
@click.option("--save", is_flag=True, help="Append the document to benchmarks/results.")
def main(
    data: Path | None,
    work: Path,
    cases: tuple[str, ...],
    names: tuple[str, ...],
    ram: str,
    device: str,
    vram: str | None,
    quick: bool,
    save: bool,
) -> None:
    """Rows of FDA."""
    cases = cases or ("encoder", "loop")
    work.mkdir(parents=True, exist_ok=True)
    console = tables.console()
    document: dict[str, Any] = {
        "benchmark": "anchors",
        "cases": {},
        "commit": measure.commit(),
        "machine": measure.machine(work),
    }
    judged: list[Verdict] = []
    if {"encoder", "loop"} & set(cases) and data is None:
        raise click.ClickException("--data names the folder of CLINC150")
    suite = encoder.suite(work, data) if data is not None else None
    for case in cases:
        if case == "unit":
            result = anchor_cost.unit(work, device, ram, vram, quick)
            console.print(anchor_cost.table(result))
            judged += anchor_cost.verdicts(result)
            document["cases"][case] = asdict(result)
        elif case == "loop":
            assert suite is not None
            result = anchor_loop.compare(suite.base, suite.experts["banking"], 5 if quick else 40)
            console.print(anchor_loop.table(result))
            judged += anchor_loop.verdicts(result, not quick)
            document["cases"][case] = result
        else:
            from anchor_decoder import Bytes

            subject: Subject = Sentences(suite) if case == "encoder" and suite is not None else Bytes(work, quick)
            found = list(measured(Bench(work / case, ram, quick), subject, names))
            console.print(table(case, found))
            judged += verdicts(found, case == "encoder" and not quick)
            document["cases"][case] = [asdict(each) for each in found]
    console.print(tables.verdicts(judged))
    document |= tables.plain(judged)
    tables.finish(document, save, "anchors")
    sys.exit(any(each.kept is False for each in judged))


if __name__ == "__main__":
    main()
