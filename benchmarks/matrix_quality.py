"""Merges of six real experts: their accuracy on every task, beside the time and memory that the merge took.

    python benchmarks/matrix_quality.py --data DIR           fine-tunes the experts (minutes) unless they are in --dir
    python benchmarks/matrix_quality.py --data DIR --rival-steps 10      without the eight minutes of the authors' WUDI
    python benchmarks/matrix_quality.py --data DIR --quick   two barely trained experts, everything in about a minute

The experts and what judges them are those of encoder.py. Every merge is a process of its own, from the page cache. Four
of them stand beside the plain routes of matrix_rivals.py on the same matrices. The last line of stdout is JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import encoder
import measure
import recipes
import tables
import torch
from bounds import Row, Verdict
from matrix_scores import Score, judge, table
from safetensors.torch import load_file

from streammerge.budget import parse_size

RIVALS = {
    "tsvm_svd": "tsvm 1.0",
    "wudi_gram_adam": "wudi adam",
    "wudi_spectral_eigh": "wudi spectral t=300",
    "wudi_autograd": "wudi adam",
}
STEPS = 300  # of Adam
NARROW, WIDE = 384, 1536  # columns of MiniLM's matrices: all but one per layer are narrow


@dataclass(frozen=True)
class Case:
    """A method and its parameters, by the name of a row."""

    label: str
    method: str
    parameters: Mapping[str, Any]
    post: str | None = None

    def write(self, suite: encoder.Suite, folder: Path) -> Path:
        recipe: dict[str, Any] = {
            "merge_method": self.method,
            "base_model": str(suite.base.resolve()),
            "models": [{"model": str(path.resolve()), "parameters": {"weight": 1}} for path in suite.experts.values()],
            "parameters": dict(self.parameters),
            "dtype": "float32",
        }
        if self.post:
            recipe["post"] = self.post
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.label.replace(' ', '_')}.yml"
        path.write_text(json.dumps(recipe, indent=1))
        return path


def cases(experts: int, steps: int = STEPS) -> list[Case]:
    """All rows, with so many steps of Adam; two scales for methods whose authors choose it on validation sets."""
    spectral = {"solver": "spectral", "time": flow(300, experts)}
    return [
        *(Case(f"task_arithmetic {x}", "task_arithmetic", {"lambda": x}) for x in (0.3, 0.5, 0.8)),
        Case("ties", "ties", {"density": 0.2}),
        *(Case(f"consensus_ta {x}", "consensus_ta", {"lambda": x}) for x in (0.5, 1.0)),
        *(Case(f"emr {x}", "emr", {"lambda": x}) for x in (0.5, 1.0)),
        Case("pcb", "pcb", {}),
        *(Case(f"tsvm {x}", "tsvm", {"scale": x}) for x in (1.0, 1.3)),
        Case("wudi adam", "wudi", {"iterations": steps}),
        Case("wudi spectral t=300", "wudi", spectral),
        Case("wudi spectral default", "wudi", {"solver": "spectral"}),
        Case("wudi closed_form", "wudi", {"solver": "closed_form"}),
        *(Case(f"iso_c {x}", "iso_c", {"scale": x}) for x in (1.0, 1.6)),
        *(Case(f"iso_cts {x}", "iso_cts", {"scale": x}) for x in (1.0, 1.6)),
        Case("cart", "cart", {}),
        Case("ace", "ace", {}),
        Case("knots", "knots", {}),
        *(Case(f"task_arithmetic {x} + svc", "task_arithmetic", {"lambda": x}, "svc") for x in (0.3, 1.0)),
        Case("ties + svc", "ties", {"density": 0.2}, "svc"),
        *(Case(f"tsvm {x} + svc", "tsvm", {"scale": x}, "svc") for x in (1.0, 1.3)),
    ]


def flow(t: float, experts: int) -> list[dict[str, Any]]:
    """`time` for the papers' t: in units of 1 / mean eigenvalue of C, which is experts / columns."""
    narrow, wide = (t * experts / columns for columns in (NARROW, WIDE))
    return [
        {"filter": "attention.output.dense", "value": narrow},
        {"filter": "output.dense", "value": wide},
        {"value": narrow},
    ]


@dataclass(frozen=True)
class Bench:
    """The experts, and where the outputs go."""

    suite: encoder.Suite
    work: Path
    ram: str
    repeat: int
    steps: int = STEPS

    def compile(self, case: Case, about: dict[str, Any]) -> None:
        """A merge of tiny checkpoints, so that no measured one compiles."""
        tiny = recipes.case(about, *recipes.trio(self.work, recipes.TINY))
        if case.post:
            tiny.recipe["post"] = case.post
        path, out = tiny.write(self.work / "recipes" / "tiny"), self.out("tiny")
        measure.run(recipes.command("merge", str(path), str(out), "--overwrite", "--no-resume", "--quiet"))

    def ours(self, case: Case) -> tuple[Score, list[str]]:
        """A method's merge, and the names of its matrices; its output stays where a plain route is to be compared."""
        recipe, out = case.write(self.suite, self.work / "recipes"), self.out(case.label)
        options = ("--ram", self.ram, "--json", "--overwrite", "--no-resume")
        usages = [measure.run(recipes.command("merge", str(recipe), str(out), *options)) for _ in range(self.repeat)]
        reports = [json.loads(usage.output) for usage in usages]
        row = self._row(case.label, "streammerge", usages, reports)
        found = Score(case.label, self.suite.accuracies(out), row)
        if case.label not in RIVALS.values():
            shutil.rmtree(out)
        return found, list(reports[-1]["matrices"])

    def plain(self, route: str, matrices: Sequence[str], steps: int) -> Score:
        """A plain route on the same matrices, once; with fewer steps than ours its seconds are extrapolated."""
        out, case = self.work / "out" / route, RIVALS[route]
        shutil.rmtree(out, ignore_errors=True)
        script = Path(__file__).with_name("matrix_rivals.py")
        argv = [sys.executable, *map(str, (script, route, self.suite.base, out))]
        argv += [word for path in self.suite.experts.values() for word in ("--expert", str(path))]
        argv += [word for name in matrices for word in ("--matrix", name)]
        usage = measure.run([*argv, "--steps", str(steps)])
        whole = steps == self.steps
        seconds = json.loads(usage.output)["seconds"] * self.steps / steps
        row = self._row(route, "plain", [usage], reported_seconds=measure.spread([seconds]))
        found = Score(
            f"plain {route}",
            self.suite.accuracies(out) if whole else None,
            row,
            case,
            None if whole else steps,
            self._distances(self.out(case), out, matrices) if whole else None,
        )
        shutil.rmtree(out)
        return found

    def out(self, label: str) -> Path:
        return self.work / "out" / label.replace(" ", "_")

    def _row(
        self, label: str, who: str, usages: Sequence[measure.Usage], reports: Sequence[Any] = (), **more: Any
    ) -> Row:
        size = (self.suite.base / "model.safetensors").stat().st_size
        sizes = size * (1 + len(self.suite.experts)), size
        return Row.of(("minilm", label, who, "warm"), usages, sizes, reports, **more)

    def _distances(self, ours: Path, theirs: Path, matrices: Sequence[str]) -> dict[str, float]:
        """Per matrix |ours - plain| / |plain task vector|, the largest last."""
        mine, other, base = (load_file(path / "model.safetensors") for path in (ours, theirs, self.suite.base))
        moved = {name: float((other[name] - base[name]).norm()) for name in matrices}
        found = {name: float((mine[name] - other[name]).norm()) / norm for name, norm in moved.items() if norm}
        return dict(sorted(found.items(), key=lambda each: each[1]))


def references(suite: encoder.Suite) -> Iterator[Score]:
    """What there is without merging: the base, and each expert on its own task."""
    yield Score("zero-shot", suite.accuracies(suite.base))
    own = [suite.accuracies(path, name) for name, path in suite.experts.items()]
    yield Score("experts", {name: value for each in own for name, value in each.items()})


def scores(
    bench: Bench, chosen: Sequence[Case], rival_steps: int, failed: list[Verdict], compile_first: bool
) -> Iterator[Score]:
    """Every row; a merge that fails becomes a verdict, and the rest goes on."""
    yield from references(bench.suite)
    about = recipes.described()
    compiled = set() if compile_first else {(case.method, case.post) for case in chosen}
    matrices: dict[str, list[str]] = {}
    for case in chosen:
        try:
            if (case.method, case.post) not in compiled:
                bench.compile(case, about[case.method])
                compiled.add((case.method, case.post))
            found, matrices[case.label] = bench.ours(case)
        except measure.ProcessFailed as error:
            click.echo(f"  {error}", err=True)
            failed.append(Verdict(f"{case.label}: runs", error.status, "exit code 0", False))
            continue
        click.echo(f"  {case.label}: {found.mean:.4f}, {found.seconds:.2f} s", err=True)
        yield found
    for route, label in RIVALS.items():
        steps = min(rival_steps, bench.steps) if route == "wudi_autograd" else bench.steps
        if label in matrices and steps:
            found = bench.plain(route, matrices[label], steps)
            click.echo(f"  {found.label}: {found.seconds:.2f} s", err=True)
            yield found


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--data", default="build/clinc150", show_default=True, type=click.Path(path_type=Path),
              help="CLINC150: a file for each domain, or data_full.json and domains.json as published.")  # fmt: skip
@click.option("--dir", "work", default="build/benchmarks/minilm", show_default=True, type=click.Path(path_type=Path),
              help="Checkpoints and outputs; experts that are there are used again.")  # fmt: skip
@click.option("--method", "names", multiple=True, help="These methods only, or these rows.")
@click.option("--ram", default="512MiB", show_default=True, help="The budget.")
@click.option("--repeat", default=3, show_default=True, help="Runs per merge.")
@click.option("--rival-steps", default=STEPS, show_default=True,
              help="Steps of the authors' WUDI; its time is extrapolated from fewer. 0 leaves it out.")  # fmt: skip
@click.option(
    "--quick",
    is_flag=True,
    help="A check: two experts of 4 steps, 20 steps of Adam, one query of five, one scale each, no repeats.",
)
@click.option("--save", is_flag=True, help="Append to benchmarks/results/matrix_quality.jsonl.")
def main(
    data: Path, work: Path, names: tuple[str, ...], ram: str, repeat: int, rival_steps: int, quick: bool, save: bool
) -> None:
    parse_size(ram)
    work.mkdir(parents=True, exist_ok=True)
    about = measure.machine(work)
    domains = encoder.DOMAINS[:2] if quick else encoder.DOMAINS
    suite = encoder.suite(work, data, domains, 4 if quick else encoder.STEPS)
    bench = Bench(suite, work, ram, repeat)
    if quick:
        few = [replace(domain, test=domain.test[::5]) for domain in suite.domains]
        bench = Bench(replace(suite, domains=few), work, ram, 1, steps=20)
        rival_steps = min(rival_steps, 2)
    wanted = cases(len(domains), bench.steps)
    chosen = [case for case in wanted if not names or case.method in names or case.label in names]
    if quick:  # a row for each way of merging
        first = {(case.method, case.post, case.parameters.get("solver")): case for case in reversed(chosen)}
        chosen = list(reversed(first.values()))
    failed: list[Verdict] = []
    rows = list(scores(bench, chosen, rival_steps, failed, compile_first=not quick))
    found = [*failed, *judge(rows, not quick)]
    out = tables.console()
    out.print(" ".join(f"{key} {value};" for key, value in about.items()), soft_wrap=True)
    out.print(table(rows, domains))
    out.print(tables.verdicts(found))
    shutil.rmtree(work / "out")
    head = {"benchmark": "matrix_quality", "machine": about, "threads": torch.get_num_threads(), "ram": ram}
    tables.finish(
        {**head, "quick": quick, "rows": [asdict(row) for row in rows], **tables.plain(found)}, save, "matrix_quality"
    )
    sys.exit(any(v.kept is False for v in found))


if __name__ == "__main__":
    main()
