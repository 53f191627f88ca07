"""Merges under a budget: time against the disk's floor and against mergekit, memory against what was predicted.

    python benchmarks/merge.py                       base + 2 experts of a 1.3B Llama, then with tensors of 1 GiB
    python benchmarks/merge.py --small               the same in about a minute, on 0.2 GB checkpoints
    python benchmarks/merge.py --mergekit PATH       beside mergekit-yaml at PATH (--make-mergekit builds one)
    python benchmarks/merge.py --agreement --identity    and the checks of those two scripts

Every cold run lies between two floors measured for it (floor.py) and is held against their mean. The first run of
each method, on a tiny checkpoint, is not timed: it compiles. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import agreement
import bounds
import click
import floor
import identity
import measure
import peer
import recipes
import tables
from bounds import Row, Verdict
from checkpoints import SHAPES

from streammerge.budget import parse_size

METHODS = {
    "1.3b": ("linear", "task_arithmetic", "slerp", "ties", "dare_ties"),
    "small": ("linear", "task_arithmetic", "slerp", "ties", "dare_ties"),
    "wide": ("task_arithmetic", "slerp", "ties"),
}


@dataclass
class Runs:
    """What the repeats of one method in one state gave."""

    usages: list[measure.Usage] = field(default_factory=list)
    reports: list[dict[str, Any]] = field(default_factory=list)
    floors: list[floor.Floor] = field(default_factory=list)

    def row(self, shape: str, method: str, who: str, state: str, sizes: tuple[int, int]) -> Row:
        floors = self._floors() if self.reports else {}
        return Row.of((shape, method, who, state), self.usages, sizes, self.reports, **floors)

    def _floors(self) -> dict[str, dict[str, float]]:
        """Each cold run against the floors before and after it."""
        if not self.floors:
            return {}
        pairs = list(zip(self.floors, self.floors[1:], strict=False))
        near = [(a.seconds + b.seconds) / 2 for a, b in pairs]
        wall = [u.wall_seconds / n for u, n in zip(self.usages, near, strict=True)]
        own = [r["seconds"] / n for r, n in zip(self.reports, near, strict=True)]
        return {
            "floor_seconds": measure.spread([f.seconds for f in self.floors]),
            "floor_read_seconds": measure.spread([f.read_seconds for f in self.floors]),
            "floor_ratio": measure.spread(wall),
            "reported_floor_ratio": measure.spread(own),
        }


@dataclass(frozen=True)
class Bench:
    """One shape's checkpoints, and where the outputs go."""

    shape: str
    work: Path
    ram: str
    repeat: int

    def ours(self, recipe: Path) -> tuple[measure.Usage, dict[str, Any], int]:
        """One merge: what it took, its report, and the bytes that it left (and that are removed again)."""
        out = self.work / "out"
        options = ("--ram", self.ram, "--json", "--overwrite", "--no-resume")
        usage = measure.run(recipes.command("merge", str(recipe), str(out), *options))
        written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
        shutil.rmtree(out)
        measure.settle(self.work)
        return usage, json.loads(usage.output), written

    def compile(self, about: dict[str, Any]) -> None:
        """A merge of tiny checkpoints, so that no timed one compiles."""
        tiny = recipes.case(about, *recipes.trio(self.work, recipes.TINY))
        self.ours(tiny.write(self.work / "recipes" / "tiny"))

    def streammerge(self, case: recipes.Case) -> Iterator[Row]:
        recipe = case.write(self.work / "recipes" / self.shape)
        size = case.models[0]  # the output has the base's size
        written = sum(path.stat().st_size for path in size.glob("*.safetensors"))
        cold, warm = Runs(), Runs()
        cold.floors.append(floor.measure(case.files, written, self.work))
        for _ in range(self.repeat):
            measure.settle(self.work)
            measure.make_cold(case.files)
            self._once(cold, recipe)
            cold.floors.append(floor.measure(case.files, written, self.work))
        for _ in range(self.repeat):
            _warm(case)
            self._once(warm, recipe)
        for state, runs in (("cold", cold), ("warm", warm)):
            yield runs.row(self.shape, case.method, "streammerge", state, (case.input_bytes, written))

    def _once(self, runs: Runs, recipe: Path) -> None:
        usage, report, _ = self.ours(recipe)
        runs.usages.append(usage)
        runs.reports.append(report)

    def mergekit(self, case: recipes.Case, binary: Path, repeat: int, ours: Sequence[Row]) -> Iterator[Row]:
        recipe, out = case.write(self.work / "recipes" / self.shape), self.work / "mergekit-out"
        for state, prepare in (("cold", _cold), ("warm", _warm)):
            runs, written = Runs(), 0
            for _ in range(repeat):
                prepare(case)
                runs.usages.append(peer.merge(binary, recipe, out))
                written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
                shutil.rmtree(out)
                measure.settle(self.work)
            row = runs.row(self.shape, case.method, "mergekit", state, (case.input_bytes, written))
            mine = next((r.wall_seconds["p50"] for r in ours if r.state == state), None)
            yield Row(**{**asdict(row), "speedup": row.wall_seconds["p50"] / mine if mine else None})


def _cold(case: recipes.Case) -> None:
    measure.make_cold(case.files)


def _warm(case: recipes.Case) -> None:
    if (held := measure.make_warm(case.files)) < 0.999:
        click.echo(f"  {case.method}: only {held:.1%} of the inputs stay in the page cache", err=True)


def shape_rows(
    bench: Bench, names: Sequence[str], binary: Path | None, mergekit_repeat: int, failed: list[Verdict]
) -> Iterator[Row]:
    """Every method on one shape; one that fails becomes a verdict, and the rest goes on."""
    about = recipes.described()
    base, experts = recipes.trio(bench.work, SHAPES[bench.shape])
    for name in names:
        case = recipes.case(about[name], base, experts)
        ours: list[Row] = []
        try:
            bench.compile(about[name])
            ours += bench.streammerge(case)
            yield from ours
            if binary is not None:
                yield from bench.mergekit(case, binary, mergekit_repeat, ours)
        except measure.ProcessFailed as error:
            click.echo(f"  {error}", err=True)
            failed.append(Verdict(f"{bench.shape} {name}: runs", error.status, "exit code 0", False))
        for row in ours:
            click.echo(f"  {row.shape} {name} {row.state}: {row.wall_seconds['p50']:.2f} s", err=True)


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--shape", "shapes", multiple=True, type=click.Choice(list(METHODS)), help="1.3b and wide if left out.")
@click.option("--small", is_flag=True, help="The small shape alone.")
@click.option("--method", "names", multiple=True, help="These methods only.")
@click.option("--ram", default="512MiB", show_default=True, help="The budget.")
@click.option("--repeat", default=3, show_default=True, help="Runs per method and state.")
@click.option("--dir", "work", default="build/benchmarks", show_default=True, type=click.Path(path_type=Path),
              help="Checkpoints and outputs; must lie on the disk that is to be measured.")  # fmt: skip
@click.option("--mergekit", "given", help="mergekit-yaml of an environment that has mergekit 0.1.5.")
@click.option("--make-mergekit", is_flag=True, help="Install mergekit into an environment in --dir if there is none.")
@click.option("--skip-mergekit", is_flag=True, help="Leave mergekit out.")
@click.option("--mergekit-repeat", default=1, show_default=True, help="Runs of mergekit per method and state.")
@click.option("--agreement", "agree", is_flag=True, help="Also compare with mergekit's numbers (agreement.py).")
@click.option("--identity", "same", is_flag=True, help="Also compare bytes across budgets and threads (identity.py).")
@click.option("--no-save", is_flag=True, help="Append nothing to benchmarks/results/merge.jsonl.")
def main(
    shapes: tuple[str, ...],
    small: bool,
    names: tuple[str, ...],
    ram: str,
    repeat: int,
    work: Path,
    given: str | None,
    make_mergekit: bool,
    skip_mergekit: bool,
    mergekit_repeat: int,
    agree: bool,
    same: bool,
    no_save: bool,
) -> None:
    parse_size(ram)
    work.mkdir(parents=True, exist_ok=True)
    about = measure.machine(work)
    binary = None if skip_mergekit else peer.find(given, work, make_mergekit, str(about["torch"]))
    rows: list[Row] = []
    failed: list[Verdict] = []
    for shape in ("small",) if small else shapes or ("1.3b", "wide"):
        chosen = names or METHODS[shape]
        rows += shape_rows(Bench(shape, work, ram, repeat), chosen, binary, mergekit_repeat, failed)
    found = [*failed, *bounds.judge(rows)]
    document: dict[str, Any] = {"benchmark": "merge", "ram": ram, "machine": about}
    out = tables.console()
    out.print(" ".join(f"{key} {value};" for key, value in about.items()), soft_wrap=True)
    if binary is None:
        out.print("mergekit: skipped; give --mergekit PATH or --make-mergekit")
    else:
        document["mergekit"] = peer.versions(binary)
    out.print(tables.timings(rows))
    if agree and binary is not None:
        document["agreement"], more = agreement.check(work, binary, out)
        found += more
    if same:
        document["identity"], more = identity.check(work, out)
        found += more
    out.print(tables.verdicts(found))
    document |= {"rows": [asdict(row) for row in rows], **tables.plain(found)}
    tables.finish(document, not no_save, "merge")
    sys.exit(any(v.kept is False for v in found))


if __name__ == "__main__":
    main()
