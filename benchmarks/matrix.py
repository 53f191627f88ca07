"""TSVM and WUDI on single matrices, ours beside a plain restatement of the authors' arithmetic, in one run.

    python benchmarks/matrix.py [--size 2048x1024] [--method tsvm] [--json FILE]
    python benchmarks/matrix.py --device cuda [--seconds 150]
    python benchmarks/matrix.py --check [--device cuda]      tiny matrices: is ours right? Nothing is timed

Three task vectors, the same for all. Ours are the solvers of `tsvm`, `wudi` by Adam and `wudi` by gradient flow, driven
directly; the reference is matrix_rivals.py: whole SVDs, Adam on the loss with its T products of m x m, an
eigendecomposition. On a CPU every measurement is a process of its own (matrix_work.py), its peak the anonymous memory
seen from outside; on a GPU the methods of one matrix share a process, and peaks are what torch reserved. What the
columns mean: matrix_report.py. The reference's Adam takes all its 300 steps up to 1024 x 1024, else 10 of them. The
exit status is 1 if ours is wrong. The last line of stdout is one JSON document.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click
import matrix_report as report
import measure
import tables
from matrix_report import Row
from matrix_work import EXPERTS, STEPS, Case, Outcome

METHODS = ("tsvm", "adam", "spectral")
REDUCED = [(method, precision) for precision in ("tf32x3", "bf16x3") for method in ("tsvm", "adam")]  # on a GPU
SIZES = {
    "cpu": ((1024, 1024), (2048, 1024), (1024, 2048), (2048, 2048)),
    "cuda": ((2048, 2048), *report.WHOLE),
}
TINY, TINY_STEPS = ((96, 64), (64, 96), (80, 80)), 20  # where nothing is timed
ALL = 1 << 20  # elements up to which the reference's Adam takes all its steps
FEW = 10  # steps it takes otherwise
TRUTH = 1 << 22  # elements up to which the truth in fp64 is computed
RATES = {"cpu": 2048, "cuda": 5120}  # rows of the square matrices that torch.mm is timed on
STOPPED = f"exit code {-signal.SIGALRM}"  # of a process whose time was over
BUSY = 0.5  # load of the minute before, from which figures come with a warning
REPEATS = 3  # of what takes less than some seconds
WORK = str(Path(__file__).with_name("matrix_work.py"))

Size = tuple[int, int]
Found = dict[str, Outcome]  # by the case's name


@dataclass(frozen=True)
class Suite:
    """What is run: the cases of every matrix size."""

    sizes: Sequence[Size]
    ways: Sequence[tuple[str, str]]  # method and precision of ours
    check: bool

    @property
    def methods(self) -> list[str]:
        return list(dict.fromkeys(method for method, _ in self.ways))

    def steps(self, who: str, method: str, size: Size) -> int:
        if method != "adam":
            return 0
        if self.check:
            return TINY_STEPS
        return FEW if who == "reference" and size[0] * size[1] > ALL else STEPS

    def ours(self, size: Size) -> list[Case]:
        return [
            Case("ours", method, *size, self.steps("ours", method, size), precision) for method, precision in self.ways
        ]

    def reference(self, size: Size) -> list[Case]:
        return [
            Case("reference", method, *size, self.steps("reference", method, size))
            for method in sorted(self.methods)  # tsvm last: its SVDs may take any time
        ]

    def truth(self, size: Size) -> list[Case]:
        """Of Adam one for every number of steps that somebody takes; none where it would take too long."""
        if size[0] * size[1] > TRUTH:
            return []
        cases = [replace(case, who="truth", precision="fp32") for case in (*self.ours(size), *self.reference(size))]
        return list(dict.fromkeys(cases))


class Bench:
    """Runs cases in child processes; answers and figures lie in a folder."""

    def __init__(self, folder: Path, device: str, seconds: float, check: bool) -> None:
        self.folder, self.device, self.found = folder, device, Found()
        self.failed = False  # something ended for another reason than time
        self._seconds, self._check, self._began = seconds, check, time.perf_counter()

    def run(self, group: Sequence[Case], share: float = 1.0) -> None:
        """The cases of one process, in this order; it may take a share of the time that is left. What fails or lasts
        too long has no figure."""
        limit = 0
        if self._seconds:
            limit = int(share * (self._seconds - (time.perf_counter() - self._began)))
            if limit < 1:
                return click.echo(f"  {', '.join(case.name for case in group)}: skipped, time is over", err=True)
        repeats, text = str(1 if self._check else REPEATS), json.dumps([asdict(case) for case in group])
        command = [sys.executable, WORK, str(self.folder), self.device, str(limit), repeats, text]
        interpreter = {"TRITON_INTERPRET": "1"} if self._check and self.device == "cpu" else {}
        usage, stopped = None, False
        try:
            usage = measure.run(command, interpreter)
        except measure.ProcessFailed as error:
            stopped = error.status == STOPPED
            self.failed = self.failed or not stopped
            why = f"stopped after {limit} s" if stopped else error
            click.echo(f"  {', '.join(case.name for case in group)}: {why}", err=True)
        for case in group:
            path, began = (self.folder / f"{case.name}.{kind}" for kind in ("json", "began"))
            if not path.exists():
                if stopped and began.exists():
                    self.found[case.name] = {"at_least_seconds": float(began.read_text())}
                continue
            outcome = self.found[case.name] = json.loads(path.read_text())
            if usage and "before_bytes" in outcome and "peak_bytes" not in outcome and len(group) == 1:
                outcome["peak_bytes"] = usage.demand_bytes - outcome["before_bytes"]
            if "seconds" in outcome and not self._check:
                click.echo(f"  {case.name}: {min(outcome['seconds']):.3f} s", err=True)

    def rates(self) -> dict[str, float]:
        case = Case("rates", "mm", RATES[self.device], RATES[self.device])
        self.run([case])
        rates: dict[str, float] = self.found.get(case.name, {}).get("rates", {})
        return rates

    def row(self, suite: Suite, size: Size, mine: Case, rates: dict[str, float]) -> Row:
        (theirs,) = (case for case in suite.reference(size) if case.method == mine.method)

        def apart(a: Case, b: Case) -> float | None:
            return report.distance(*(self.folder / f"{case.name}.npy" for case in (a, b)))

        errors = {
            "ours_error": apart(mine, replace(mine, who="truth", precision="fp32")),
            "reference_error": apart(theirs, replace(theirs, who="truth")),
            "apart": apart(mine, theirs) if mine.steps == theirs.steps else None,
        }
        found = report.row(mine, self.found.get(mine.name), self.found.get(theirs.name), errors, rates)
        judged = self.device == "cpu" or size in report.WHOLE
        return {**found, "shape": size, "judged": judged, "truth": bool(suite.truth(size))}


def measured(bench: Bench, suite: Suite, rates: dict[str, float]) -> Iterator[Row]:
    """Ours first, and the truth where it is computed; then the reference, each size with its share of what is left."""
    together = bench.device == "cuda"  # a process on a GPU costs seconds before it does anything
    for size in suite.sizes:
        for group in (suite.ours(size), suite.truth(size)):
            for part in [group] if together and group else [[case] for case in group]:
                bench.run(part)
    for left, size in zip(range(len(suite.sizes), 0, -1), suite.sizes, strict=True):
        group = suite.reference(size)
        for part in [group] if together else [[case] for case in group]:
            bench.run(part, 1 / left)
    for size in suite.sizes:
        for mine in suite.ours(size):
            yield bench.row(suite, size, mine, rates)


def checked(bench: Bench, suite: Suite) -> Iterator[Row]:
    """All in one process, without figures: ours and the reference against the truth."""
    bench.run(
        [case for size in suite.sizes for case in (*suite.ours(size), *suite.reference(size), *suite.truth(size))]
    )
    for size in suite.sizes:
        for mine in suite.ours(size):
            found = bench.row(suite, size, mine, {})
            kept = {
                k: v
                for k, v in found.items()
                if k in ("matrix", "method", "precision", "apart") or k.endswith("_error")
            }
            ok = "ours_error" in found and report.right(found)
            yield {**kept, "test": "ok" if ok else "WRONG"}


def size_of(text: str) -> Size:
    rows, _, columns = text.partition("x")
    if not (rows.isdigit() and columns.isdigit()):
        raise click.BadParameter(f"{text}: ROWSxCOLUMNS is wanted")
    return int(rows), int(columns)


def about(device: str) -> dict[str, Any]:
    found: dict[str, Any] = measure.machine(Path(__file__).parent)
    if device == "cuda":
        import torch

        found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    return found


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--device", default="cpu", show_default=True, type=click.Choice(["cpu", "cuda"]))
@click.option("--size", "sizes", multiple=True, help="ROWSxCOLUMNS; may be repeated.")
@click.option("--method", "methods", multiple=True, type=click.Choice(METHODS), help="These only.")
@click.option("--check", is_flag=True, help="Tiny matrices; time nothing.")
@click.option("--seconds", default=0.0, help="Begin nothing after so long, and end what runs; 0: never.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the document here too.")
@click.option("--save", is_flag=True, help="Append the document to benchmarks/results/matrix.jsonl.")
def main(
    device: str,
    sizes: tuple[str, ...],
    methods: tuple[str, ...],
    check: bool,
    seconds: float,
    target: Path | None,
    save: bool,
) -> None:
    began, given = time.perf_counter(), tuple(map(size_of, sizes)) or (TINY if check else SIZES[device])
    ways = [(method, "fp32") for method in METHODS] + (REDUCED if check or device == "cuda" else [])
    suite = Suite(given, [way for way in ways if not methods or way[0] in methods], check)
    machine = about(device)
    if machine["load"] > BUSY and not check:
        click.echo(f"  load {machine['load']}: other processes take time from these measurements", err=True)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), device, seconds, check)
        rates = {} if check else bench.rates()
        rows = list(checked(bench, suite) if check else measured(bench, suite, rates))
    document: dict[str, Any] = {"benchmark": "matrix", "checked_only": check, "machine": machine, "device": device}
    document |= {"experts": EXPERTS, "rates": rates, "rows": rows, "seconds": round(time.perf_counter() - began, 1)}
    if check:
        for row in rows:
            click.echo(
                f"{row['matrix']} {report.name(row)}: {row['test']}, error {row.get('ours_error', float('nan')):.1e}"
            )
        wrong = any(row["test"] != "ok" for row in rows)
    else:
        verdicts, wrong = list(report.judge(rows, device)), not all(map(report.right, rows))
        out, speed = tables.console(), ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in rates.items())
        out.print(report.table(rows, f"{EXPERTS} task vectors on {device}; torch.mm GFLOP/s: {speed}"))
        if extrapolated := report.whole(rows):
            out.print(report.whole_table(extrapolated))
            document["whole_model"] = extrapolated
        out.print(tables.verdicts(verdicts))
        document |= tables.plain(verdicts)
    wrong = wrong or bench.failed
    if target:
        target.write_text(json.dumps(document, indent=1))
    tables.finish(document, save, "matrix")
    sys.exit(wrong)


if __name__ == "__main__":
    main()
