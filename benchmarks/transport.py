"""GradFix on trained models: task vectors carried to another pre-training, beside the controls that say why they help.

    python benchmarks/transport.py --data DIR                           all cases, minutes
    python benchmarks/transport.py --data DIR --case "permuted home"    one of them
    python benchmarks/transport.py --data DIR --quick                   barely trained models, a check

    permuted   MiniLM-L6; B computes the same with its units in another order           one domain of CLINC150 each
    further    MiniLM-L6; B trained further on other text                               one domain of CLINC150 each
    decoder    a byte-level Llama; B from other random weights, text in another order   tables of numbers
    samples    the same by the number of samples

Rows are those of transport_rows.py. Models are kept in --dir and used again. The last line of stdout is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import click
import encoder
import measure
import tables
import torch
import transport_decoder as decoder
import transport_rows as ways
from transport_encoder import FURTHER, Order, Queries, further, permuted
from transport_report import DOMAINS, Found, judge, says, table
from transport_rows import Row, Subject, Task

NEARBY = DOMAINS[:2]  # domains of the encoder that was trained further
COUNTS = {"encoder": (1, 2, 4, 8, 16, 32, 45), "decoder": (1, 2, 4, 8, 16, 32)}
QUICK = (1, 4)
FEW = 4  # steps of a quick run
NAMES = (
    *(f"permuted {name}" for name in DOMAINS),
    "permuted banking samples",
    *(f"further {name}" for name in NEARBY),
    "decoder tables",
    "decoder tables samples",
)


def told(line: str) -> None:
    click.echo(f"  {line}", err=True)


@dataclass(frozen=True)
class Bench:
    """Where things are, and how small."""

    data: Path
    work: Path
    quick: bool

    def subject(self, case: str, name: str) -> tuple[Subject, Task]:
        """A target with its task, trained or read."""
        return {"permuted": self.permuted, "further": self.further, "decoder": self.decoder}[case](name)

    def permuted(self, name: str) -> tuple[Subject, Task]:
        """The target's own task vector is A's in the new order."""
        suite = self._suite("encoder", name)
        order = Order.draw(encoder.Encoder(suite.base).model.config, seed=0)
        target = permuted(suite.base, self.work / "encoder" / "permuted", order)
        queries = Queries(target, self._domain(suite, name))
        same_function(suite.base, target, order, suite.domains[0])
        source, tuned = ways.load(suite.base), ways.load(suite.experts[name])
        return queries, Task(suite.base, suite.experts[name], order.apply(ways.vector(source, tuned)), self._out)

    def further(self, name: str) -> tuple[Subject, Task]:
        """The target's own task vector is that of its own fine-tuning."""
        suite, steps = self._suite("encoder", name), FEW if self.quick else FURTHER
        place = f"further-{steps}"
        target = further(suite.base, self.work / place / "base", steps, told)
        own = self._suite(place, name)
        aligned = ways.vector(ways.load(own.base), ways.load(own.experts[name]))
        queries = Queries(target, self._domain(suite, name))
        return queries, Task(suite.base, suite.experts[name], aligned, self._out)

    def decoder(self, name: str) -> tuple[Subject, Task]:
        found = decoder.models(self.work / "decoder", self.quick, told)
        subject = decoder.Tables(found["b"], self.work / "decoder" / "samples", 5 if self.quick else decoder.SAMPLES)
        aligned = ways.vector(ways.load(found["b"]), ways.load(found["b-tuned"]))
        return subject, Task(found["a"], found["a-tuned"], aligned, self._out)

    @property
    def _out(self) -> Path:
        return self.work / "runs"

    def _suite(self, place: str, name: str) -> encoder.Suite:
        return encoder.suite(self.work / place, self.data, (name,), FEW if self.quick else encoder.STEPS)

    def _domain(self, suite: encoder.Suite, name: str) -> encoder.Domain:
        domain = next(each for each in suite.domains if each.name == name)
        return replace(domain, test=domain.test[::5]) if self.quick else domain

    def found(self, label: str) -> Found:
        """A case's rows."""
        case, name, by_samples = (*label.split(), "")[:3]
        subject, task = self.subject(case, name)
        apart = distance(subject.target, task)
        if by_samples:
            counts = QUICK if self.quick else COUNTS["decoder" if case == "decoder" else "encoder"]
            return Found(
                case, f"{name}, by samples", subject.figure, list(shown(by_count(subject, task, counts))), apart
            )
        rows = list(shown(ways.rows(subject, task)))
        return Found(case, name, subject.figure, rows, apart, ways.compared(subject, task))


def distance(target: Path, task: Task) -> float:
    """Of B from A, in norms of the task vector."""
    source = ways.load(task.source)
    tau = ways.vector(source, ways.load(task.tuned))
    return ways.norm(ways.vector(source, ways.load(target))) / ways.norm(tau)


def same_function(source: Path, target: Path, order: Order, domain: encoder.Domain) -> None:
    """A permuted model gives the embeddings of the first, in the new order, but for fp32's rounding."""
    queries = [query for query, _ in domain.test[:32]]
    one, other = (encoder.Encoder(folder).embedded(queries) for folder in (source, target))
    apart = float((one[:, order.hidden] - other).abs().max())
    assert apart < 1e-5, f"the permuted encoder computes something else: {apart}"


def by_count(subject: Subject, task: Task, counts: tuple[int, ...]) -> Iterator[Row]:
    """GradFix and its shuffled control at several numbers of samples."""
    target, tau = ways.load(subject.target), ways.vector(ways.load(task.source), ways.load(task.tuned))
    yield ways.judged(subject, target, "B")
    other = ways.moved(task, tau)
    for count in counts:
        yield ways.streamed(subject, task, "vote", count)[0]
        yield ways.streamed(subject, task, "shuffled", count, other)[0]


def shown(rows: Iterator[Row]) -> Iterator[Row]:
    for row in rows:
        told(f"{row.label}: {row.figure:.4f}, alpha {row.alpha}")
        yield row


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--data", default="build/clinc150", show_default=True, type=click.Path(path_type=Path),
              help="CLINC150: a file for each domain, or data_full.json and domains.json as published.")  # fmt: skip
@click.option("--dir", "work", default="build/benchmarks/transport", show_default=True,
              type=click.Path(path_type=Path), help="Models; those that are there are used again.")  # fmt: skip
@click.option("--case", "chosen", multiple=True, type=click.Choice(NAMES), help="These only.")
@click.option("--quick", is_flag=True, help="A check: models of few steps, one query of five.")
@click.option("--save", is_flag=True, help="Append to benchmarks/results/transport.jsonl.")
def main(data: Path, work: Path, chosen: tuple[str, ...], quick: bool, save: bool) -> None:
    work = work / "quick" if quick else work
    work.mkdir(parents=True, exist_ok=True)
    machine = measure.machine(work) | {"transformers": version("transformers")}
    bench, found = Bench(data, work, quick), list[Found]()
    for label in chosen or NAMES:
        told(f"{label}:")
        found.append(bench.found(label))
    verdicts = [verdict for each in found for verdict in judge(each, not quick)]
    lines = [line for each in found for line in says(each)]
    out = tables.console()
    out.print(" ".join(f"{key} {value};" for key, value in machine.items()), soft_wrap=True)
    out.print(*map(table, found), tables.verdicts(verdicts), *lines, sep="\n")
    head = {"benchmark": "transport", "machine": machine, "threads": torch.get_num_threads(), "quick": quick}
    cases = [asdict(each) for each in found]
    tables.finish({**head, "cases": cases, **tables.plain(verdicts), "says": lines}, save, "transport")
    sys.exit(any(verdict.kept is False for verdict in verdicts))


if __name__ == "__main__":
    main()
