"""The same numbers as mergekit, tensor by tensor, in float32.

    python benchmarks/agreement.py --mergekit PATH [--dir DIR] [--method NAME ...]

Inputs are float32 checkpoints of the small shape; both compute and write float32. The difference of a tensor is
|ours - theirs| / |theirs| (Frobenius), and beside it the same over |theirs - base|, which the base's size cannot hide.
Where a method trims by magnitude and several elements have the very magnitude of the threshold, which of them stay is
a matter of rule (ours: the first ones; theirs: whatever topk returns). Such elements are counted and left out of the
difference, if and only if another element of the same task vector has the same magnitude to the bit.
Methods that draw random numbers draw different ones: for them the share of elements left at the base's value is held
against its expectation, (1 - density)^experts.
"""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import click
import measure
import numpy as np
import peer
import recipes
import tables
from bounds import Verdict
from checkpoints import PIECE, SHAPES, Shape
from rich.console import Console
from rich.table import Table

from streammerge.formats.header import TensorSpec, build_header
from streammerge.store.checkpoint import Checkpoint

BOUND = 1e-5
EXACT = ("linear", "slerp", "nuslerp", "task_arithmetic", "ties", "breadcrumbs", "model_stock")
TRIMS = ("ties", "breadcrumbs")
RANDOM = ("dare_linear", "dare_ties")
SIGMAS = 6.0
FEW = 1e-5  # more elements than this fraction at the threshold would not be an accident
RAM = "512MiB"


class Distance(NamedTuple):
    tensor: str
    relative: float  # over the norm of theirs
    of_task_vector: float  # over the norm of theirs minus the base
    equal: int  # elements left out: equal magnitudes at a threshold


@dataclass(frozen=True)
class Difference:
    """One method's tensors: the largest and the median difference, and the tensor of the largest."""

    method: str
    largest: float
    median: float
    of_task_vector: float
    equal: int
    elements: int
    tensor: str


def make(folder: Path, shape: Shape, expert: int) -> Path:
    """A float32 checkpoint in one shard (expert 0 is the base), unless it is there."""
    done = folder / "config.json"
    if done.exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    tensors = list(shape.tensors())
    with open(folder / "model.safetensors", "wb") as out:
        out.write(build_header([(name, "F32", form) for name, form in tensors], {"format": "pt"}))
        for number, (_, form) in enumerate(tensors):
            for at in range(0, math.prod(form), PIECE):
                size = min(PIECE, math.prod(form) - at)
                values = np.random.default_rng((number, at)).standard_normal(size, np.float32) * np.float32(0.02)
                if expert:
                    rng = np.random.default_rng((number, at, expert))
                    values += rng.standard_normal(size, np.float32) * np.float32(2e-3)
                out.write(values.tobytes())
    done.write_text(json.dumps({**shape.config(), "torch_dtype": "float32"}))
    return folder


def values(spec: TensorSpec) -> np.ndarray:
    """A float32 tensor, mapped."""
    assert spec.dtype == "F32", f"{spec.file}: {spec.name} is {spec.dtype}"
    return np.memmap(spec.file, np.float32, "r", spec.begin, (spec.numel,))


def pieces(*specs: TensorSpec) -> Iterator[tuple[np.ndarray, ...]]:
    arrays = [values(spec) for spec in specs]
    for at in range(0, specs[0].numel, PIECE):
        yield tuple(array[at : at + PIECE].astype(np.float64) for array in arrays)


def distances(ours: Path, theirs: Path, base: Path, experts: Sequence[Path]) -> Iterator[Distance]:
    """Per tensor, in the order of our shards; `experts` are those whose equal magnitudes excuse a difference."""
    a, b, c, *others = (Checkpoint.open(path).tensors for path in (ours, theirs, base, *experts))
    assert set(a) == set(b), f"names differ: {sorted(set(a) ^ set(b))[:5]}"
    for name, spec in a.items():
        assert spec.shape == b[name].shape, f"{name}: {spec.shape} against {b[name].shape}"
        sums = np.zeros(3)
        for x, y, z in pieces(spec, b[name], c[name]):
            sums += [((x - y) ** 2).sum(), (y**2).sum(), ((y - z) ** 2).sum()]
        equal = 0
        if others and sums[0] > BOUND**2 * sums[1]:
            excused = equals(values(spec), values(b[name]), values(c[name]), [values(e[name]) for e in others])
            equal = len(excused)
            sums[0] -= ((values(spec)[excused].astype(np.float64) - values(b[name])[excused]) ** 2).sum()
        difference, norm, moved = np.sqrt(np.maximum(sums, 0))
        yield Distance(name, difference / norm, difference / moved if moved else 0.0, equal)


def equals(ours: np.ndarray, theirs: np.ndarray, base: np.ndarray, experts: Sequence[np.ndarray]) -> np.ndarray:
    """Elements that differ and whose magnitude in a task vector is not the only one of its kind."""
    typical = math.sqrt(np.square(theirs - base, dtype=np.float64).mean())
    differ = np.flatnonzero(np.abs(ours - theirs) > 0.01 * typical)  # one keeps it, the other does not
    shared = np.zeros(len(differ), bool)
    for expert in experts:
        magnitudes = np.abs(expert - base)
        found, inverse = np.unique(magnitudes[differ], return_inverse=True)
        at = np.searchsorted(found, magnitudes)
        hits = at[found[np.minimum(at, len(found) - 1)] == magnitudes] if len(found) else at[:0]
        shared |= np.bincount(hits, minlength=len(found))[inverse] > 1
    return differ[shared]


def untouched(out: Path, base: Path) -> tuple[float, int]:
    """The share of elements that have the base's bits, and the number of elements."""
    found, wanted = Checkpoint.open(out).tensors, Checkpoint.open(base).tensors
    same = sum(int((values(spec) == values(wanted[name])).sum()) for name, spec in found.items())
    total = sum(spec.numel for spec in found.values())
    return same / total, total


def both(case: recipes.Case, work: Path, binary: Path) -> tuple[Path, Path]:
    """The case merged by streammerge and by mergekit."""
    recipe, ours, theirs = case.write(work / "recipes" / "float32"), work / "agree-ours", work / "agree-theirs"
    argv = recipes.command("merge", str(recipe), str(ours), "--ram", RAM, "--overwrite", "--no-resume", "--json")
    measure.run(argv)
    peer.merge(binary, recipe, theirs)
    return ours, theirs


def exact(
    case: recipes.Case, outs: tuple[Path, Path], base: Path, experts: Sequence[Path]
) -> tuple[Difference, Verdict]:
    name = case.method
    rows = list(distances(*outs, base, experts if name in TRIMS else ()))
    worst = max(rows, key=lambda row: row.relative)
    median = float(np.median([row.relative for row in rows]))
    equal, elements = sum(row.equal for row in rows), sum(s.numel for s in Checkpoint.open(base).tensors.values())
    moved = max(row.of_task_vector for row in rows)
    found = Difference(name, float(worst.relative), median, float(moved), equal, elements, worst.tensor)
    figure = f"{worst.relative:.1e}" + (f" ({equal} of {elements} elements: equal magnitudes)" if equal else "")
    good = worst.relative <= BOUND and equal <= FEW * elements
    return found, Verdict(f"{name}: differs from mergekit", figure, f"<= {BOUND:.0e}", bool(good))


def drawn(name: str, outs: tuple[Path, Path], base: Path, experts: int) -> tuple[dict[str, Any], Verdict]:
    expected = (1 - recipes.SETTINGS[name]["density"]) ** experts
    (ours, numel), (theirs, _) = (untouched(out, base) for out in outs)
    slack = SIGMAS * math.sqrt(expected * (1 - expected) / numel)
    figure = f"{ours:.5f} (mergekit {theirs:.5f})"
    row = {"method": name, "untouched": ours, "theirs": theirs, "expected": expected}
    good = abs(ours - expected) <= slack
    return row, Verdict(f"{name}: share left at the base", figure, f"{expected:.5f} +- {slack:.5f}", good)


def check(
    work: Path, binary: Path, console: Console, names: Sequence[str] = ()
) -> tuple[list[dict[str, Any]], list[Verdict]]:
    """Every method: rows for the document, verdicts for the table of bounds."""
    shape, about = SHAPES["small"], recipes.described()
    base, *experts = (make(work / "small-float32" / n, shape, k) for k, n in enumerate(("base", "a", "b")))
    table = Table(title=f"against mergekit in float32, {shape.name} shape")
    for heading in (
        "method",
        "largest difference",
        "median",
        "largest over task vector",
        "left out",
        "tensor of the largest",
    ):
        table.add_column(heading)
    rows: list[dict[str, Any]] = []
    verdicts: list[Verdict] = []
    for name in names or (*EXACT, *RANDOM):
        case = recipes.case(about[name], base, experts, "float32")
        try:
            outs = both(case, work, binary)
        except measure.ProcessFailed as error:
            click.echo(f"  {error}", err=True)
            verdicts.append(Verdict(f"{name}: against mergekit", error.status, "exit code 0", False))
            continue
        if name in RANDOM:
            row, verdict = drawn(name, outs, base, len(experts))
        else:
            found, verdict = exact(case, outs, base, experts)
            row = asdict(found)
            figures = (f"{x:.1e}" for x in (found.largest, found.median, found.of_task_vector))
            table.add_row(name, *figures, str(found.equal), found.tensor)
        rows.append(row)
        verdicts.append(verdict)
        for out in outs:
            shutil.rmtree(out)
    console.print(table)
    return rows, verdicts


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--mergekit", "given", help="mergekit-yaml of an environment that has mergekit 0.1.5.")
@click.option("--make-mergekit", is_flag=True, help="Install mergekit into an environment in --dir if there is none.")
@click.option("--dir", "work", default="build/benchmarks", show_default=True, type=click.Path(path_type=Path))
@click.option("--method", "names", multiple=True, help="These methods only.")
@click.option("--save", is_flag=True, help="Append to benchmarks/results/agreement.jsonl.")
def main(given: str | None, make_mergekit: bool, work: Path, names: tuple[str, ...], save: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    about = measure.machine(work)
    binary = peer.find(given, work, make_mergekit, str(about["torch"]))
    if binary is None:
        raise SystemExit("no mergekit: give --mergekit PATH or --make-mergekit")
    out = tables.console()
    rows, found = check(work, binary, out, names)
    out.print(tables.verdicts(found))
    head = {"benchmark": "agreement", "machine": about, "mergekit": peer.versions(binary)}
    tables.finish({**head, "rows": rows, **tables.plain(found)}, save, "agreement")
    sys.exit(any(v.kept is False for v in found))


if __name__ == "__main__":
    main()
