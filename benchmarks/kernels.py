"""Speed of the GPU kernels, beside their formula in torch, eager and compiled, and a plain copy. First: are they right?

    python benchmarks/kernels.py [--only NAME] [--json FILE] [--seconds 140]
    python benchmarks/kernels.py --check              without a GPU: tests alone, in Triton's interpreter

Every row is tested before it is timed, on fresh random numbers and poisoned outputs, against the kernel's reference:
to the bit, or, where matrices are multiplied, within a stated error. A row that is wrong gets no time, and the exit
status is 1; slow ones show in the table of bounds and nowhere else. Tests, and torch.compile, run first, in processes
of their own side by side: what they compile is found in the caches later, and a kernel that crashes takes no other
along. Then rows are timed one after the other, with nothing else running.

Times are those of the launches alone, between events on the stream, caches emptied before each (do_bench): medians
with 20 % and 80 % quantiles. GB/s counts inputs and outputs once; `copy` is what this GPU reads plus writes in a
copy. Of a matrix product, TFLOP/s are those needed (of a symmetric result one half); `% mm` is the rate of all that it
multiplies, three products for one in tf32x3 and bf16x3, over the rate of torch.mm in the same format. The last line
of stdout is one JSON document.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import kernel_report as report
import kernel_tests as tests
import tables
import torch
from kernel_cases import Source
from kernel_report import MISSING, OK, SKIPPED, WRONG, Outcome
from kernel_rows import Row, rows
from torch import Tensor

from streammerge import kernel
from streammerge.kernels import reference

ELEMENTS = 1 << 28  # of a tensor that is timed: half a gigabyte in bf16
EAGER_BYTES = 96  # per element, what eager torch needs at most, temporaries included
COMPILED_BYTES = 56  # the same of what is compiled, or of making a row's inputs
TESTS = 0.6  # of the time, tests may take
STATE, WORK = 256 << 20, 64 << 20  # bytes of a queue's memory


class Tape:
    """The stream that do_bench times; `again` repeats what ran on it, without what led to that."""

    def __init__(self) -> None:
        self.works: list[Callable[[], Any]] = []

    def copy(self, target: Tensor, source: Tensor) -> None:
        target.copy_(source, non_blocking=True)

    def run(self, work: Callable[[], Any]) -> None:
        self.works.append(work)
        work()

    def again(self) -> None:
        for work in self.works:
            work()


def milliseconds(work: Callable[[], Any], longest: int = 60) -> report.Spread:
    """Of one run, by events; `longest` is how many milliseconds of runs are timed."""
    from triton.testing import do_bench

    quantiles = do_bench(work, warmup=longest // 4, rep=longest, quantiles=[0.2, 0.5, 0.8])
    return dict(zip(("p20", "p50", "p80"), (float(q) for q in quantiles), strict=True))


def copy_rate(elements: int) -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.randn(elements, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() * source.element_size() / milliseconds(lambda: target.copy_(source), 200)["p50"] * 1e3


def timed(row: Row, seed: int, elements: int) -> Outcome:
    """Our launches, then torch's formula, eager and compiled, then the library's products."""
    from streammerge.kernels.queue import Queue

    case, module, tape = row.make(Source("cuda", seed, elements)), kernel.find(row.kernel), Tape()
    queue = Queue.on("cuda", STATE, max(WORK, case.scratch))
    queue.stream = tape
    for call in case.calls:
        module.launch(queue, *reference.spans(call, queue))
    queue.flush()
    moved = sum(module.bytes_moved(*call) for call in case.calls)
    found: Outcome = {"bytes": moved, "flops": case.flops, "ms": milliseconds(tape.again)}
    torch.set_float32_matmul_precision(case.setting)
    for name, make in (("eager", lambda: case.formula), ("compile", lambda: tests.compiled(case))):
        try:
            formula = make()
            found[f"{name}_ms"] = milliseconds(lambda f=formula: [f(*operands) for operands in case.operands], 40)
        except Exception as error:
            found[f"{name}_note"] = tests.reason(error)
    if case.library:
        spent = {kind: milliseconds(multiply, 40) for kind, (multiply, _) in case.library.items()}
        rate = case.library[case.unit][1] / spent[case.unit]["p50"]
        found["library_ms"], found["library"] = spent, case.unit
        found["share_of_library"] = case.products * case.flops / found["ms"]["p50"] / rate
    torch.cuda.synchronize()
    return found


def measured(chosen: Sequence[Row], seed: int, jobs: int, began: float, seconds: float) -> dict[str, Any]:
    """The copy's bytes per second, how many elements tensors have, and what is known of each row."""
    free, elements = torch.cuda.mem_get_info()[0], ELEMENTS
    while EAGER_BYTES * elements > free:
        elements //= 2
    jobs = min(jobs, max(free // (COMPILED_BYTES * elements), 1))
    outcomes = tests.side_by_side(chosen, seed, elements, jobs, began + TESTS * seconds) if jobs else {}
    rate, found, stop = copy_rate(elements), [], ""
    print(f"copy: {rate / 1e9:.0f} GB/s, {elements} elements, tests took {time.perf_counter() - began:.0f} s")
    for row in chosen:
        if not stop and time.perf_counter() - began > seconds:
            stop = f"skipped, {seconds:.0f} s were over"
        outcome = outcomes.get(row.name) or ({"test": SKIPPED} if stop else tests.outcome_of(row, "cuda", seed))
        if outcome["test"] == OK and not stop:
            try:
                outcome |= report.rated(timed(row, seed, elements), rate)
            except Exception as error:
                outcome = {"test": WRONG, "detail": tests.reason(error)}
        elif outcome["test"] != WRONG:
            outcome = {"detail": stop, **outcome}
        found.append(said(row, outcome))
        if tests.lost():
            stop = stop or f"skipped, the GPU was lost in {row.name}"
        else:
            tests.release()
    return {"copy_gigabytes_per_second": rate / 1e9, "elements": elements, "rows": found}


def said(row: Row, outcome: Outcome) -> Outcome:
    """The row's entry in the document, once it was printed."""
    entry = {"row": row.name, "kernel": row.kernel, "judged": row.judged, **outcome}
    print(report.line(entry), flush=True)
    return entry


def without_rows(only: Sequence[str]) -> list[Outcome]:
    """Kernels that the table of rows has forgotten."""
    known = {row.kernel for row in rows()}
    lost = [name for name in kernel.names() if name not in known and (not only or any(word in name for word in only))]
    detail = "this kernel has no row in benchmarks/kernel_rows.py"
    found = [{"row": name, "kernel": name, "judged": (), "test": MISSING, "detail": detail} for name in lost]
    for entry in found:
        print(report.line(entry))
    return found


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--only", multiple=True, help="Rows whose name contains this; may be repeated.")
@click.option("--check", is_flag=True, help="Test the rows in Triton's interpreter, on the CPU; time nothing.")
@click.option("--seconds", default=140.0, show_default=True, help="Begin no further row after so long.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the document here too.")
@click.option("--jobs", default=min(os.cpu_count() or 1, 12), show_default=True, help="Processes that test; 0: none.")
@click.option("--seed", default=None, type=int, help="Of the random numbers; by default another one each time.")
def main(
    only: tuple[str, ...],
    check: bool,
    seconds: float,
    target: Path | None,
    jobs: int,
    seed: int | None,
) -> None:
    began, seed = time.perf_counter(), secrets.randbits(31) if seed is None else seed
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")  # processes are side by side already
    if check:
        os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    elif not torch.cuda.is_available():
        click.echo("no GPU: no figures. --check tests the rows in Triton's interpreter.", err=True)
        sys.exit(2)
    elif os.environ.get("TRITON_INTERPRET") == "1":
        click.echo("TRITON_INTERPRET=1: no figures. Unset it, or pass --check.", err=True)
        sys.exit(2)
    chosen, forgotten = rows(only), without_rows(only)
    if not chosen and not forgotten:
        raise click.UsageError(f"no row has {' or '.join(map(repr, only))} in its name")
    if check:
        figures: dict[str, Any] = {"rows": [said(row, tests.outcome_of(row, "cpu", seed)) for row in chosen]}
    else:
        figures = measured(chosen, seed, jobs, began, seconds)
    found = figures["rows"] = forgotten + figures["rows"]
    document = {"benchmark": "kernels", "checked_only": check, "machine": report.machine(check), "seed": seed}
    document |= {"seconds": round(time.perf_counter() - began, 1), **figures}
    verdicts = [] if check else list(report.judge(found))
    document |= tables.plain(verdicts)
    if not check:
        tables.console().print(report.table(found), tables.verdicts(verdicts))
    if target:
        target.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))
    sys.exit(any(outcome["test"] in (WRONG, MISSING) for outcome in found))


if __name__ == "__main__":
    main()
