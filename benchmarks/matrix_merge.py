"""Whole merges by TSVM and WUDI under a small budget: seconds, GB/s, peak memory, and where the time goes.

    python benchmarks/matrix_merge.py --dir DIR [--method tsvm]      base + 3 experts of a 1.3B Llama, 11 GB in DIR
    python benchmarks/matrix_merge.py --small                        0.2 GB each; about three minutes

On the CPU, by the command line, inputs cold. Three ways: `tsvm`, `wudi` by gradient flow, `wudi` by Adam with 30 of its
300 steps. GB/s counts what was read and written; a matrix that does not fit the budget is read expert by expert, and
the base again each time.

Shares are of the time of all cores, measured in the merge itself (matrix_clocks.py) rather than derived from FLOP: a
product on a block of rows is slower than the large one that a rate would be taken from. Beside the share of products
stands the rate within them, over that of a large torch.mm on all cores, fp32 and fp64 in proportion. The last line of
stdout is one JSON document.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import bounds
import click
import matrix
import matrix_clocks as clocks
import measure
import recipes
import tables
from bounds import Row, Verdict
from checkpoints import SHAPES, make
from rich.table import Table

from streammerge.budget import parse_size

STEPS = 30
KNOWN = {**SHAPES, "tiny": recipes.TINY}
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "tsvm": ("tsvm", {}),
    "wudi spectral": ("wudi", {"solver": "spectral"}),
    "wudi adam": ("wudi", {"solver": "adam", "iterations": STEPS}),
}
EXPERTS = ("a", "b", "c")
CLOCKS = str(Path(__file__).with_name("matrix_clocks.py"))
HEADINGS = ("method", "wall s", "own s", "CPU s", "read GB", "written", "GB/s", "peak MiB", "predicted", "p/m")
SHARES = (
    *("products", "decompositions", "adam", "rest of solvers", "norms", "task vectors", "additions", "other tensors"),
    *("waiting for reads", "rest"),
)


def case(way: str, folder: Path, shape: str) -> recipes.Case:
    """The recipe of a way on a base and three experts, made unless they are there."""
    method, parameters = WAYS[way]
    names = ("base", *EXPERTS)
    base, *experts = (make(folder / shape / name, KNOWN[shape], k) for k, name in enumerate(names))
    recipe = {
        "merge_method": method,
        "base_model": str(base.resolve()),
        "models": [{"model": str(expert.resolve())} for expert in experts],
        "parameters": parameters,
        "dtype": "bfloat16",
    }
    return recipes.Case(way.replace(" ", "-"), recipe, (base, *experts))


def merged(given: recipes.Case, work: Path, ram: str) -> tuple[measure.Usage, dict[str, Any], dict[str, Any]]:
    """One merge: what it took, its report, its clocks."""
    recipe, out, target = given.write(work / "recipes" / "matrix"), work / "matrix-out", work / "clocks.json"
    measure.settle(work)
    measure.make_cold(given.files)
    options = ("--ram", ram, "--json", "--overwrite", "--no-resume", "--device", "cpu")
    usage = measure.run([sys.executable, CLOCKS, str(target), "merge", str(recipe), str(out), *options])
    shutil.rmtree(out)
    return usage, json.loads(usage.output), json.loads(target.read_text())


def shares(found: dict[str, Any], seconds: float, cores: int) -> dict[str, float]:
    """Of all cores' time; solvers and waiting are the main thread's, and keep all cores."""
    part = {kind: clock["core_seconds"] / seconds / cores for kind, clock in found.items()}
    part["waiting for reads"] *= cores
    part["rest of solvers"] = part.pop("solvers") * cores - sum(part[kind] for kind in clocks.INSIDE)
    part["rest"] = 1 - sum(part.values())
    return {kind: part[kind] for kind in SHARES}


def speed(products: dict[str, float], rates: dict[str, float], cores: int) -> float:
    """Time that torch.mm would take for the products, over the time they took."""
    ideal = products["single_flop"] / rates["single"] + products["double_flop"] / rates["double"]
    return ideal * cores / max(products["core_seconds"], 1e-9)


def row(way: str, shape: str, given: recipes.Case, usage: measure.Usage, report: dict[str, Any]) -> Row:
    sizes = given.input_bytes, report["write_bytes"]
    return Row.of((shape, way, "streammerge", "cold"), [usage], sizes, [report])


def figures(rows: Sequence[Row]) -> Table:
    table = Table(title="whole processes, one run each, inputs cold")
    for heading in HEADINGS:
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for each in rows:
        wall, own, cpu = (each.wall_seconds["p50"], (each.reported_seconds or {})["p50"], each.cpu_seconds["p50"])
        read, predicted = each.read_bytes or 0, each.predicted_bytes or 0
        table.add_row(
            f"{each.shape} {each.method}",
            *(f"{seconds:.1f}" for seconds in (wall, own, cpu)),
            *(f"{size / 1e9:.2f}" for size in (read, each.output_bytes)),
            f"{(read + each.output_bytes) / own / 1e9:.3f}",
            *(f"{size / (1 << 20):.0f}" for size in (each.demand_bytes, predicted)),
            f"{predicted / each.demand_bytes:.2f}",
        )
    return table


def spent(found: dict[str, dict[str, Any]]) -> Table:
    table = Table(title="shares of all cores' time; % mm: the rate within products over torch.mm's")
    for heading in ("method", *SHARES, "% mm"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for way, each in found.items():
        table.add_row(way, *(f"{each['shares'][kind]:.1%}" for kind in SHARES), f"{each['share_of_mm']:.0%}")
    return table


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--shape", default="1.3b", show_default=True, type=click.Choice(sorted(KNOWN)))
@click.option("--small", is_flag=True, help="The small shape.")
@click.option("--method", "ways", multiple=True, type=click.Choice(list(WAYS)), help="These only.")
@click.option("--ram", default="1GiB", show_default=True, help="The budget.")
@click.option("--dir", "work", default="build/benchmarks", show_default=True, type=click.Path(path_type=Path))
@click.option("--no-save", is_flag=True, help="Append nothing to benchmarks/results/matrix_merge.jsonl.")
def main(shape: str, small: bool, ways: tuple[str, ...], ram: str, work: Path, no_save: bool) -> None:
    parse_size(ram)
    work.mkdir(parents=True, exist_ok=True)
    shape, machine, cores = "small" if small else shape, measure.machine(work), len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        rates = matrix.Bench(Path(folder), "cpu", 0, check=False).rates()
    rows, found, verdicts = list[Row](), dict[str, dict[str, Any]](), list[Verdict]()
    for way in ways or tuple(WAYS):
        given = case(way, work, shape)
        try:
            usage, report, clocks_ = merged(given, work, ram)
        except measure.ProcessFailed as error:
            click.echo(f"  {error}", err=True)
            verdicts.append(Verdict(f"{shape} {way}: runs", error.status, "exit code 0", False))
            continue
        rows.append(row(way, shape, given, usage, report))
        parts = shares(clocks_, report["seconds"], cores)
        found[way] = {"shares": parts, "share_of_mm": speed(clocks_["products"], rates, cores), "clocks": clocks_}
        click.echo(f"  {way}: {usage.wall_seconds:.1f} s, {parts['products']:.0%} in products", err=True)
    verdicts += bounds.judge(rows)
    tables.console().print(figures(rows), spent(found), tables.verdicts(verdicts))
    document: dict[str, Any] = {
        "benchmark": "matrix_merge",
        "machine": machine,
        "shape": shape,
        "ram": ram,
        "rates": rates,
    }
    document |= {"rows": [asdict(each) for each in rows], "spent": found, **tables.plain(verdicts)}
    tables.finish(document, not no_save, "matrix_merge")
    sys.exit(any(verdict.kept is False for verdict in verdicts))


if __name__ == "__main__":
    main()
