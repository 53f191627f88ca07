"""One merge in a process of its own, as a user would run it: its peak is the merge's and nothing else's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from streammerge.errors import StreamMergeError

Report = dict[str, Any]
Runner = Callable[[Path, Path, str], Report]  # recipe, output folder, budget -> report

NEEDED = ("ram_peak_bytes", "seconds")
PACKAGE_PARENT = Path(__file__).resolve().parents[2]


def merge_in_child(recipe: Path, out: Path, ram: str) -> Report:
    """`streammerge merge RECIPE OUT --ram RAM --json`, started in the recipe's folder."""
    command = [sys.executable, "-m", "streammerge", "merge", recipe.name, str(out), "--ram", ram, "--json"]
    search = [str(PACKAGE_PARENT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run(
        command,
        cwd=recipe.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        lines = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()
        failure = StreamMergeError(f"demo: merging {recipe} failed: {lines[-1]}")
        failure.exit_code = done.returncode if done.returncode > 0 else 1
        raise failure
    return read_report(done.stdout, recipe)


def read_report(printed: str, recipe: Path) -> Report:
    """The JSON object that is all of stdout, or its last line."""
    last = printed.strip().splitlines()[-1:]
    for text in (printed, *last):
        try:
            report = json.loads(text)
        except ValueError:
            continue
        if isinstance(report, dict) and all(isinstance(report.get(key), (int, float)) for key in NEEDED):
            return report
    raise StreamMergeError(f"demo: merging {recipe} printed no report with {' and '.join(NEEDED)}")
