"""One process measured from outside, files made cold or warm before it, and what a figure needs beside it.

    demand     RssAnon + RssShmem summed over the process tree, looked at every 10 ms: what the machine must hold
    resident   VmHWM, the kernel's own high-water mark, file-backed pages included
    disk       bytes that the tree made the device read and write (the page cache serves the rest)

Nothing runs inside the measured process; a look costs the machine about 1 % of a core. Cold means that mincore finds
none of the pages in the page cache, warm that it finds all of them.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
import os
import platform
import re
import select
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import numpy as np

from streammerge.cli import spare_cores
from streammerge.store.reader import evict

PERIOD = 0.01  # seconds between two looks
RELIST = 10  # looks between two listings of the process tree
KIB = 1 << 10
TAIL = 2000  # characters of a failed process that the error repeats

spare_cores()  # as the command line does, for everything that a benchmark runs: before torch is loaded
_libc = ctypes.CDLL(None, use_errno=True)


class ProcessFailed(RuntimeError):
    """A measured process ended with an error; its last words are in the message, `status` can be published."""

    def __init__(self, argv: Sequence[str], code: int, words: str) -> None:
        super().__init__(f"{' '.join(argv)}: exit code {code}\n{words[-TAIL:]}")
        self.status = f"exit code {code}"


@dataclass(frozen=True)
class Usage:
    """What one process tree took."""

    wall_seconds: float
    cpu_seconds: float
    demand_bytes: int
    resident_bytes: int
    disk_read_bytes: int
    disk_write_bytes: int
    output: str


def descendants(pid: int) -> list[int]:
    """A process and its children's children; those that end meanwhile are left out."""
    found, queue = [], [pid]
    while queue:
        at = queue.pop()
        found.append(at)
        try:
            threads = os.listdir(f"/proc/{at}/task")
        except OSError:
            continue
        for thread in threads:
            try:
                queue += map(int, Path(f"/proc/{at}/task/{thread}/children").read_text().split())
            except OSError:
                continue
    return found


def memory(pid: int) -> tuple[int, int]:
    """RssAnon + RssShmem of a process, and VmHWM."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0, 0
    found = {key: int(value) * KIB for key, value in re.findall(r"^(Rss\w+|VmHWM):\s*(\d+) kB", text, re.M)}
    return found.get("RssAnon", 0) + found.get("RssShmem", 0), found.get("VmHWM", 0)


def run(argv: Sequence[str], environment: Mapping[str, str] | None = None) -> Usage:
    """Run a command to its end and measure it.

    Raises:
        ProcessFailed: it ended with another status than 0.
    """
    demand = resident = looks = 0
    with (
        open(os.devnull, "rb") as nothing,
        _scratch() as out,
        _scratch() as err,
    ):
        began = time.perf_counter()
        child = subprocess.Popen(argv, stdin=nothing, stdout=out, stderr=err, env={**os.environ, **(environment or {})})
        handle = os.pidfd_open(child.pid)
        tree = [child.pid]
        try:
            while not select.select([handle], [], [], PERIOD)[0]:
                looks += 1
                if looks % RELIST == 0:
                    tree = descendants(child.pid)
                seen = [memory(pid) for pid in tree]
                demand = max(demand, sum(now for now, _ in seen))
                resident = max(resident, *(high for _, high in seen))
            wall = time.perf_counter() - began
        finally:
            os.close(handle)
            _, status, spent = os.wait4(child.pid, 0)
            child.returncode = os.waitstatus_to_exitcode(status)
        texts = [_all(file) for file in (out, err)]
    if child.returncode:
        raise ProcessFailed(argv, child.returncode, "".join(texts))
    return Usage(
        wall,
        spent.ru_utime + spent.ru_stime,
        demand,
        resident,
        512 * spent.ru_inblock,
        512 * spent.ru_oublock,
        texts[0],
    )


class _scratch:
    """An unnamed file for a child's output: a pipe would have to be drained while we look."""

    def __enter__(self) -> int:
        self.file = os.memfd_create("output")
        return self.file

    def __exit__(self, *exc: object) -> None:
        os.close(self.file)


def _all(file: int) -> str:
    return os.pread(file, os.fstat(file).st_size, 0).decode(errors="replace")


def cached_bytes(path: Path) -> int:
    """How much of a file the page cache holds."""
    size = path.stat().st_size
    if not size:
        return 0
    pages = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
    with open(path, "rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) as window:
        view = np.frombuffer(window, np.uint8)
        args = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), ctypes.c_void_p(pages.ctypes.data)
        failed = _libc.mincore(*args)
        del view
    if failed:
        raise OSError(ctypes.get_errno(), "mincore", str(path))
    return min(size, int((pages & 1).sum()) * mmap.PAGESIZE)


def make_cold(files: Sequence[Path]) -> None:
    """Evict files from the page cache.

    Raises:
        RuntimeError: something keeps them there.
    """
    for _ in range(5):
        for path in files:
            evict(path)
        if not (left := sum(map(cached_bytes, files))):
            return
        time.sleep(0.2)
    raise RuntimeError(f"{left} bytes of the inputs stay in the page cache: is another process reading them?")


def make_warm(files: Sequence[Path]) -> float:
    """Read files into the page cache; the fraction of them that stayed."""
    buffer, size = bytearray(16 << 20), sum(path.stat().st_size for path in files)
    for _ in range(3):  # a machine that reclaims idle pages may have taken some meanwhile
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass
        if (held := sum(map(cached_bytes, files)) / size) == 1:
            break
    return held


def settle(folder: Path) -> None:
    """Finish what the file system still has to write or to free, so that the next figure does not pay for it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        _libc.syncfs(handle)
    finally:
        os.close(handle)


def spread(values: Sequence[float]) -> dict[str, float]:
    """20 %, 50 % and 80 % quantiles, and how many values there were."""
    cuts = quantiles(values, n=10, method="inclusive") if len(values) > 1 else [values[0]] * 9
    p20, p50, p80 = (float(f"{cuts[i]:.4g}") for i in (1, 4, 7))
    return {"p20": p20, "p50": p50, "p80": p80, "n": len(values)}


def machine(folder: Path) -> dict[str, str | int | float]:
    """What a figure depends on."""
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [(at, kind) for at, kind in mounts if folder.resolve().is_relative_to(at)]
    cpu = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return {
        "kernel": platform.release(),
        "cpu": cpu[1] if cpu else platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "ram_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "file_system": max(inside, key=lambda item: len(item[0]))[1],
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in ("torch", "numba", "numpy")},
        "commit": commit(),
        "load": round(os.getloadavg()[0], 2),  # of the minute before: what else the processors had to do
    }


def commit() -> str:
    """The checkout's commit, with a plus sign if files differ from it."""
    at = Path(__file__).parent
    head = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=at, capture_output=True, text=True)
    if head.returncode:
        return "none"
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=at, capture_output=True, text=True)
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")
