"""The bytes a run may hold, and the account of who holds them.

What counts is what the process makes the machine hold: anonymous and shared memory (RssAnon + RssShmem, pinned
memory included), the interpreter and its libraries too. File-backed pages are the kernel's to drop; they are
reported apart. Every large buffer is taken here before it is allocated and given back after; taking more than is
free is refused, so the sum of what is held never passes the limit.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from streammerge.errors import BudgetTooSmall, RecipeError

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30
_UNITS = {
    "": 1,
    "K": 10**3,
    "M": 10**6,
    "G": 10**9,
    "T": 10**12,
    "KI": KIB,
    "MI": MIB,
    "GI": GIB,
    "TI": 1 << 40,
}


def parse_size(text: str | int) -> int:
    """Bytes of `4GiB`, `4GB`, `500M`, `1.5G`, `1048576`.

    Raises:
        RecipeError: not a size.
    """
    if isinstance(text, int):
        return text
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]?I?)B?\s*", text.upper())
    if not match or match[2] == "I":
        raise RecipeError(f"{text!r} is not a size; write it as 4GiB, 4GB or 500M")
    return int(float(match[1]) * _UNITS[match[2]])


def human(size: float) -> str:
    """Bytes as people write them: 512 MiB, 7.9 GiB."""
    for unit, scale in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size) >= scale:
            value = size / scale
            return f"{value:.0f} {unit}" if value >= 100 or value == int(value) else f"{value:.1f} {unit}"
    return f"{size:.0f} bytes"


@dataclass(frozen=True, slots=True)
class Resident:
    """What this process holds now, in bytes. `demand` is what a budget bounds."""

    anonymous: int
    shared: int
    file_backed: int

    @property
    def demand(self) -> int:
        return self.anonymous + self.shared


def resident(pid: int | str = "self") -> Resident:
    """Resident memory of one process by kind; where there is no /proc, all of it counts as anonymous."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        import psutil

        return Resident(psutil.Process(None if pid == "self" else int(pid)).memory_info().rss, 0, 0)
    found = {key: int(value) * KIB for key, value in re.findall(r"^(Rss\w+):\s*(\d+) kB", text, re.M)}
    return Resident(found.get("RssAnon", 0), found.get("RssShmem", 0), found.get("RssFile", 0))


def default_ram() -> int:
    """80 % of what is free: of the machine, and of the control group if that is tighter."""
    import psutil

    free = psutil.virtual_memory().available
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            free = min(free, int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such control group, or no limit ("max")
    return max(free, 0) * 8 // 10


class Budget:
    """An account of bytes: `limit` in all, `taken` now, `peak` at most so far."""

    def __init__(self, limit: int, taken: int = 0) -> None:
        self.limit = limit
        self.taken = taken
        self.peak = taken
        self._lock = threading.Lock()

    @property
    def free(self) -> int:
        return self.limit - self.taken

    def take(self, size: int, what: str) -> None:
        """Enter `size` bytes into the account.

        Raises:
            BudgetTooSmall: they are not free.
        """
        with self._lock:
            if size > self.free:
                raise BudgetTooSmall(
                    f"{what} needs {human(size)}, {human(self.free)} of {human(self.limit)} are free; "
                    f"give at least {human(self.taken + size)}",
                    self.taken + size,
                )
            self.taken += size
            self.peak = max(self.peak, self.taken)

    def give(self, size: int) -> None:
        with self._lock:
            assert 0 <= size <= self.taken
            self.taken -= size

    @contextmanager
    def lease(self, size: int, what: str) -> Iterator[None]:
        """Hold `size` bytes while the block runs."""
        self.take(size, what)
        try:
            yield
        finally:
            self.give(size)


def cores() -> int:
    """Processors this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
