"""Promised against measured: what a run did, for the terminal, `--json` and the manifest.

A watcher thread samples what the process holds; the figures are the kernel's own (RssAnon + RssShmem), so they hold
the interpreter and every library too.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from streammerge import __version__
from streammerge.budget import resident
from streammerge.engine.findings import Findings
from streammerge.planner.plan import Plan

PERIOD = 0.02  # seconds between two looks


class Watcher:
    """Samples this process's memory while a block runs; `peak` is what a budget bounds, in bytes."""

    def __init__(self) -> None:
        self.peak = 0
        self.file_peak = 0
        self.seconds = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def _look(self) -> None:
        now = resident()
        self.peak = max(self.peak, now.demand)
        self.file_peak = max(self.file_peak, now.file_backed)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD):
            self._look()

    def __enter__(self) -> Watcher:
        self._began = time.perf_counter()
        self._look()
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()
        self._look()
        self.seconds = time.perf_counter() - self._began


def make_report(plan: Plan, findings: Findings, watcher: Watcher, written: int) -> dict[str, Any]:
    """The report's stable keys: measured figures, the plan's own under `predicted`."""
    seconds = watcher.seconds
    moved = findings.read_bytes + written
    return {
        **plan.as_dict(),
        "ram_peak_bytes": watcher.peak,
        "file_backed_peak_bytes": watcher.file_peak,
        "vram_peak_bytes": findings.vram_peak_bytes,
        "read_bytes": findings.read_bytes,
        "write_bytes": written,
        "seconds": round(seconds, 3),
        "bytes_per_second": round(moved / seconds) if seconds else 0,
        "extra_rounds": findings.extra_rounds,
        "copied_tensors": len(findings.copied),
        "nonfinite": [{"tensor": t, "file": f, "holds": k} for t, f, k in findings.nonfinite],
        "matrices": findings.figures,
        **findings.masking(),
        **findings.units(),
        **findings.learning(),
        "warnings": [*plan.warnings, *findings.warnings()],
        "predicted": plan.as_dict(),
        "version": __version__,
    }
