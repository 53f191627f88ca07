"""Measurements of benchmarks/matrix.py, in a process of their own: task vectors made, merged, and written down.

    python benchmarks/matrix_work.py FOLDER DEVICE SECONDS CASES      (FOLDER/NAME.json and .npy of every case)

Ours is the Solver of a method, driven as the engine drives it: one task vector at a time, gone after `take`. The
reference (matrix_rivals.py) gets all of them at once, as it wants them. `truth` is its arithmetic in fp64. Clocks run
during the solver's calls alone. Before them a small matrix goes the same way, so that libraries are loaded.

Task vectors have a standard deviation of 1e-3: half of the variance is noise, half a matrix of rank 16.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import matrix_flops as flops
import matrix_rivals as rivals
import measure
import numpy as np
import torch
from torch import Tensor

from streammerge.methods import _wudi_flow as flows
from streammerge.methods._matrices import give_back
from streammerge.methods._precision import exact_products
from streammerge.methods.tsvm import Directions, Tsvm
from streammerge.methods.wudi import Wudi

EXPERTS = 3
STEPS = 300  # of Adam, as published
TIME = 3.0  # of the gradient flow, in units of 1 / mean eigenvalue
STD, RANK = 1e-3, 16
ENOUGH = 5.0  # seconds of runs after which a measurement is not repeated
SMALL = {"cpu": (48, 64), "cuda": (512, 768)}  # the small matrix; on a GPU as divisible as large ones: kernels compile


@dataclass(frozen=True)
class Case:
    """One measurement."""

    who: str  # ours, reference, truth; or rates, of torch.mm
    method: str  # tsvm, adam, spectral
    rows: int
    columns: int
    steps: int = 0  # of adam that are run
    precision: str = "fp32"  # of ours: see streammerge/methods/_precision.py

    @property
    def name(self) -> str:
        return f"{self.who}-{self.method}-{self.rows}x{self.columns}-{self.steps}-{self.precision}"


Outcome = dict[str, Any]  # seconds (one per run), before_bytes, and what else is known
Run = tuple[float, Tensor, Outcome]


class Stopwatch:
    """Seconds of the parts that are timed, a device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.seconds, self._device = 0.0, device

    @contextmanager
    def __call__(self) -> Iterator[None]:
        self._wait()
        began = time.perf_counter()
        yield
        self._wait()
        self.seconds += time.perf_counter() - began

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def task_vector(case: Case, expert: int, device: torch.device) -> Tensor:
    """fp32 [rows, columns], the same for whoever gets it."""
    source = torch.Generator(device).manual_seed(expert + 1)
    left, right, noise = (
        torch.randn(shape, generator=source, device=device)
        for shape in ((case.rows, RANK), (RANK, case.columns), (case.rows, case.columns))
    )
    return noise.addmm_(left, right, alpha=RANK**-0.5).mul_(STD * 0.5**0.5)


def ours(case: Case, device: torch.device) -> Run:
    """A solver from its first task vector to its answer."""
    method = {
        "tsvm": Tsvm(precision=case.precision),
        "adam": Wudi(iterations=case.steps, precision=case.precision),
        "spectral": Wudi(solver_="spectral", time=TIME),
    }
    solver, watch = method[case.method].solver(case.rows, case.columns, EXPERTS), Stopwatch(device)
    if device.type == "cuda" or case.precision != "fp32":
        solver.queue = queue_on(device)
    with (
        exact_products(),
        solver.queue.current() if solver.queue else nullcontext(),
        mock.patch.object(flows, "_twice", wraps=flows._twice) as twice,  # called once a doubling
    ):
        for expert in range(EXPERTS):
            delta = task_vector(case, expert, device)
            with watch():
                solver.take(expert, delta)
            del delta
        with watch():
            answer = solver.finish()
    shape = case.rows, case.columns, EXPERTS
    if isinstance(solver, Directions):
        work = flops.tsvm(*shape, solver.routes)
    elif case.method == "adam":
        work = flops.adam(*shape, case.steps)
    else:
        work = flops.doubling(*shape, twice.call_count)
    return watch.seconds, answer, {"flop": work._asdict(), "routes": getattr(solver, "routes", [])}


@cache
def queue_on(device: torch.device) -> Any:
    """Where the engine would have the solver work: a stream of its own. On the CPU: in Triton's interpreter."""
    from streammerge.kernels.queue import Queue

    return Queue.on(device, 1 << 20, 1 << 20)


def reference(case: Case, device: torch.device, dtype: torch.dtype = torch.float32) -> Run:
    """The authors' arithmetic. Fewer steps than STEPS stand for all: the first is paid once, the others many times."""
    deltas = [task_vector(case, expert, device) for expert in range(EXPERTS)]
    watch = Stopwatch(device)
    if case.method == "adam":
        compute = rivals.wudi_autograd if case.who == "reference" else rivals.wudi_gram_adam
        if case.who == "truth" or case.steps == STEPS or case.steps < 2:
            with watch():
                answer = compute(deltas, case.steps, dtype=dtype)
            return watch.seconds, answer, {}
        with watch():
            compute(deltas, 1, dtype=dtype)
        first, watch.seconds = watch.seconds, 0.0
        with watch():
            answer = compute(deltas, case.steps, dtype=dtype)
        step = (watch.seconds - first) / (case.steps - 1)
        return first + (STEPS - 1) * step, answer, {"step_seconds": step, "steps_run": case.steps}
    with watch():
        if case.method == "tsvm":
            answer = rivals.tsvm_svd(deltas, dtype=dtype)
        else:
            answer = rivals.wudi_spectral_eigh(deltas, TIME * case.columns / EXPERTS, dtype=dtype)
    return watch.seconds, answer, {}


def truth(case: Case, device: torch.device) -> Run:
    return reference(case, device, torch.float64)


def rates(case: Case, device: torch.device) -> Outcome:
    """FLOP per second of torch.mm on square matrices, fp32 and fp64."""
    found = {}
    for name, dtype in (("single", torch.float32), ("double", torch.float64)):
        a, watch, best = torch.randn(case.rows, case.rows, dtype=dtype, device=device), Stopwatch(device), 0.0
        out = a @ a
        for _ in range(5):
            watch.seconds = 0.0
            with watch():
                torch.mm(a, a, out=out)
            best = max(best, 2 * case.rows**3 / watch.seconds)
        found[name] = best
    return {"rates": found}


def measured(case: Case, device: torch.device, folder: Path, repeats: int, deadline: float) -> Outcome:
    """Run a case, once or more; its answer goes into the folder, and beforehand how long it has."""
    if case.who == "rates":
        return rates(case, device)
    work: Callable[[Case, torch.device], Run] = {"ours": ours, "reference": reference, "truth": truth}[case.who]
    rows, columns = SMALL[device.type]
    work(replace(case, rows=rows, columns=columns, steps=min(case.steps, 3)), device)
    (folder / f"{case.name}.began").write_text(str(deadline - time.monotonic()))
    before, spent, answer = _before(device), list[float](), None
    while len(spent) < repeats and sum(spent) < ENOUGH:
        answer = None  # so that two of them never coexist
        seconds, answer, more = work(case, device)
        spent.append(seconds)
    assert answer is not None
    found = {**asdict(case), "seconds": spent, **more, **before}
    if device.type == "cuda":
        found["peak_bytes"] = torch.cuda.max_memory_reserved(device) - before["before_bytes"]
    np.save(folder / f"{case.name}.npy", answer.cpu().numpy())
    return found


def _before(device: torch.device) -> dict[str, int]:
    """What the process holds without matrices; a GPU's peak counts from here on."""
    if device.type != "cuda":
        return {"before_bytes": measure.memory(os.getpid())[0]}
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    return {"before_bytes": torch.cuda.memory_reserved(device)}


def main(arguments: Sequence[str]) -> None:
    folder, device, seconds, repeats = Path(arguments[0]), torch.device(arguments[1]), *map(int, arguments[2:4])
    give_back()  # freed matrices do not stay with the C library: as in a merge, and for the reference too
    signal.alarm(seconds)  # 0: never; what was measured until then is in the folder
    deadline = time.monotonic() + seconds
    for fields in json.loads(arguments[4]):
        case = Case(**fields)
        found = measured(case, device, folder, repeats, deadline)
        (folder / f"{case.name}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
