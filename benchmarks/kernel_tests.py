"""The tests that come before the times of benchmarks/kernels.py, in this process or in several side by side.

    python benchmarks/kernel_tests.py SEED ELEMENTS ROW ...

tests rows on the GPU, and has torch.compile make what will be timed with tensors of so many elements: whoever comes
later finds it, and the kernels' machine code, in the caches on disk. Prints a JSON line as a row begins and one when
its test has ended. A kernel that crashes takes its own process along and nothing else.
"""

from __future__ import annotations

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from kernel_cases import Case, Source
from kernel_report import OK, SKIPPED, WRONG, Outcome
from kernel_rows import Row, rows
from torch import Tensor

from streammerge import kernel
from streammerge.kernels import reference

TOGETHER = 5  # rows of a kernel that one process takes
NEAR = 0.01  # relative error between a reference and torch's formula, which is to be the same one
LOST = 3  # exit status of a process that has no use for its GPU any more


def cloned(value: Any) -> Any:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.clone() if isinstance(value, Tensor) else value.copy()
    return type(value)(map(cloned, value)) if type(value) in (list, tuple) else value


def error_of(found: Tensor, expected: Tensor) -> float:
    """Relative, by the Frobenius norm."""
    wide = expected.double()
    return float((found.double() - wide).norm() / wide.norm().clamp(min=1e-300))


def differences(found: Any, expected: Any, tolerance: float, name: str) -> Iterator[str]:
    """What is wrong with a result, or with an argument after the call, part by part."""
    if isinstance(expected, (list, tuple)):
        for i, (one, two) in enumerate(zip(found, expected, strict=True)):
            yield from differences(one, two, tolerance, f"{name} {i}")
    elif isinstance(expected, np.ndarray):
        if not np.array_equal(found, expected, equal_nan=expected.dtype.kind == "f"):
            yield f"{name}: {int((found != expected).sum())} of {expected.size} entries differ"
    elif isinstance(expected, Tensor) and tolerance:
        if not (error := error_of(found, expected)) <= tolerance:
            yield f"{name}: relative error {error:.2g}, allowed are {tolerance:.2g}"
    elif isinstance(expected, Tensor) and not torch.equal(
        one := reference.bits(found), two := reference.bits(expected)
    ):
        yield f"{name}: {int((one != two).sum())} of {expected.numel()} elements differ"


def test(row: Row, device: str, seed: int) -> None:
    """Launch and reference on copies of the same arguments; then torch's formula, whose time is to mean something.

    Raises:
        AssertionError: something differs.
    """
    from streammerge.kernels.queue import Queue

    case, module = row.make(Source(device, seed)), kernel.find(row.kernel)
    ours, theirs = cloned(case.calls), cloned(case.calls)
    queue = Queue.on(device)
    torch.set_float32_matmul_precision("highest")
    with np.errstate(all="ignore"):  # the interpreter computes with numpy
        answers = [module.launch(queue, *reference.spans(call, queue)) for call in ours]
        queue.end().wait()
    queue.finish()
    expected = [module.reference(*call) for call in theirs]
    wrong = [*differences(answers, expected, 0, "flags"), *differences(ours, theirs, row.tolerance, "argument")]
    assert not wrong, "; ".join(wrong)
    assert all(module.bytes_moved(*call) for call in case.calls), "it moves no bytes"
    torch.set_float32_matmul_precision(case.setting)
    for call, operands in zip(theirs, case.operands, strict=True):
        plain = case.formula(*operands)
        error = 0.0 if case.answer is None else error_of(plain, case.answer(*call).to(plain.device))
        assert error <= NEAR, f"torch's formula is another one: relative error {error:.2g}"


def outcome_of(row: Row, device: str, seed: int) -> Outcome:
    try:
        test(row, device, seed)
    except Exception as error:
        return {"test": WRONG, "detail": reason(error)}
    return {"test": OK}


def reason(error: Exception) -> str:
    """Its kind, its first line that says something, and where it was raised."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    place = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''} ({Path(place.filename).name}, {place.lineno})"


def lost() -> bool:
    """Whether a kernel has left the GPU unusable for this process."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False


def compiled(case: Case) -> Callable[..., Tensor]:
    """The formula by torch.compile, which compiles when it is first called."""
    torch.compiler.reset()
    torch.set_float32_matmul_precision(case.setting)
    made: Callable[..., Tensor] = torch.compile(case.formula, dynamic=False)
    for operands in case.operands:
        made(*operands)
    return made


def release() -> None:
    """Give memory back between rows."""
    gc.collect()
    torch.compiler.reset()
    torch.cuda.empty_cache()


# --- side by side ---


def side_by_side(chosen: Sequence[Row], seed: int, elements: int, jobs: int, until: float) -> dict[str, Outcome]:
    """Outcomes by row, from `jobs` processes at a time; what was not tested in time is skipped."""
    parts: list[list[str]] = []
    for at, row in enumerate(chosen):
        if not at or row.kernel != chosen[at - 1].kernel or len(parts[-1]) == TOGETHER:
            parts.append([])
        parts[-1].append(row.name)
    with ThreadPoolExecutor(jobs) as pool:
        every = pool.map(lambda names: _outcomes(names, seed, elements, until), parts)
        return {name: outcome for found in every for name, outcome in found.items()}


def _outcomes(names: list[str], seed: int, elements: int, until: float) -> dict[str, Outcome]:
    """Of rows in one process, and in another for those behind one that crashed."""
    found: dict[str, Outcome] = {}
    while missing := [name for name in names if name not in found]:
        command = [sys.executable, __file__, str(seed), str(elements), *missing]
        try:
            done = subprocess.run(command, capture_output=True, timeout=max(until - time.perf_counter(), 1))
        except subprocess.TimeoutExpired as error:
            found |= _reported(error.stdout)
            return found | {
                name: {"test": SKIPPED, "detail": "not tested in time"} for name in names if name not in found
            }
        reported = _reported(done.stdout)
        found |= reported
        begun = [line["begun"] for line in _lines(done.stdout) if "begun" in line]
        if done.returncode and (not begun or begun[-1] not in reported):
            words = done.stderr.decode(errors="replace").strip().splitlines()
            detail = f"its process ended with {done.returncode}: {words[-1] if words else ''}"
            found[begun[-1] if begun else missing[0]] = {"test": WRONG, "detail": detail}
    return found


def _lines(output: bytes | None) -> list[dict[str, Any]]:
    lines = (output or b"").decode(errors="replace").split("\n")[:-1]  # the last may be half a line
    return [json.loads(line) for line in lines if line.startswith("{")]


def _reported(output: bytes | None) -> dict[str, Outcome]:
    return {line["row"]: line["outcome"] for line in _lines(output) if "row" in line}


def main(seed: int, elements: int, names: Sequence[str]) -> None:
    for row in (row for row in rows() if row.name in names):
        print(json.dumps({"begun": row.name}), flush=True)
        outcome = outcome_of(row, "cuda", seed)
        print(json.dumps({"row": row.name, "outcome": outcome}), flush=True)
        if outcome["test"] == OK:
            try:
                compiled(row.make(Source("cuda", seed, elements)))
            except Exception as error:  # whoever times the row meets it again, and says so
                print(reason(error), file=sys.stderr)
        if lost():
            sys.exit(LOST)
        release()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
