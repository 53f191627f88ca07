"""What a run tells while it works, and what it noticed about its inputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Progress:
    """What a callback sees: bytes that moved and will move, and the tensor at hand."""

    read_bytes: int = 0
    read_total: int = 0
    written_bytes: int = 0
    written_total: int = 0
    tensor: str = ""


@dataclass
class Findings:
    """What a run noticed about its inputs."""

    copied: dict[str, None] = field(default_factory=dict)  # names of tensors that are the same bytes in every input
    nonfinite: list[tuple[str, str, str]] = field(default_factory=list)  # tensor, file, "NaN" or "infinity"
    figures: dict[str, dict[str, float]] = field(default_factory=dict)  # of tensors that were solved: how it went
    read_bytes: int = 0
    extra_rounds: int = 0
    vram_peak_bytes: int = 0  # that torch reserved; the driver's own come on top

    def take(self, note: dict[str, Any]) -> None:
        """Enter one note, of this run or an earlier one."""
        if "copied" in note:
            self.copied[note["copied"]] = None
        elif "figures" in note:
            name, figures = note["figures"]
            self.figures[name] = figures
        elif tuple(note["nonfinite"]) not in self.nonfinite:
            self.nonfinite.append(tuple(note["nonfinite"]))
