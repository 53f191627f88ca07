"""What a run tells while it works, and what it noticed about its inputs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

HARMLESS = 0.1  # by which rounding may change the length of what was merged without a word


@dataclass
class Progress:
    """What a callback sees: bytes that moved and will move, and the tensor at hand."""

    read_bytes: int = 0
    read_total: int = 0
    written_bytes: int = 0
    written_total: int = 0
    tensor: str = ""  # or what is being done
    work: float = 0.0  # where arithmetic counts and not bytes: done, and in all
    work_total: float = 0.0


@dataclass
class Findings:
    """What a run noticed about its inputs."""

    copied: dict[str, None] = field(default_factory=dict)  # names of tensors that are the same bytes in every input
    nonfinite: list[tuple[str, str, str]] = field(default_factory=list)  # tensor, file, "NaN" or "infinity"
    figures: dict[str, dict[str, float]] = field(default_factory=dict)  # of tensors that were solved: how it went
    masked: dict[str, dict[str, float]] = field(default_factory=dict)  # of tensors that were masked: what was kept
    transport: dict[str, Any] = field(default_factory=dict)  # of the masking as a whole
    learned: dict[str, Any] = field(default_factory=dict)  # coefficients, and how they were learned
    rounded: dict[str, dict[str, float]] = field(default_factory=dict)  # what rounding left of them: methods/_rounding
    anchors: dict[str, dict[str, Any]] = field(default_factory=dict)  # by their name in a file: how they were made
    adapted: dict[str, dict[str, Any]] = field(default_factory=dict)  # units, and how they were adapted
    read_bytes: int = 0
    extra_rounds: int = 0
    vram_peak_bytes: int = 0  # that torch reserved; the driver's own come on top

    def take(self, note: dict[str, Any]) -> None:
        """Enter one note, of this run or an earlier one."""
        if "copied" in note:
            self.copied[note["copied"]] = None
        elif "figures" in note:
            name, figures = note["figures"]
            if note.get("section") == "gradfix":
                self.masked.setdefault(name, {}).update(figures)
            elif note.get("section") == "atlas":
                self.rounded[name] = figures
            else:
                self.figures[name] = figures
        elif "anchors" in note or "adapted" in note:
            ((kind, (name, values)),) = note.items()
            getattr(self, kind)[name] = values
        elif "gradfix" in note:
            self.transport.update(note["gradfix"])
        elif tuple(note["nonfinite"]) not in self.nonfinite:
            self.nonfinite.append(tuple(note["nonfinite"]))

    def masking(self) -> dict[str, Any]:
        """What was masked, in total and per tensor; empty if nothing was.

        `slope` is the sum of g m tau over a tensor, g the samples' mean gradient: by how much the loss rises, to first
        order, per alpha. `descent` is how much it falls with the alpha that was used.
        """
        if not self.masked:
            return {}
        rows = self.masked.values()
        for row in rows:
            if "slope" in row and "alpha" in row:
                row["descent"] = -row["alpha"] * row["slope"]
        total = {key: sum(row.get(key, 0) for row in rows) for key in ("elements", "kept", "ties", "unchanged", "nan")}
        total["displacement"] = math.hypot(*(row.get("displacement", 0.0) for row in rows))
        if any("descent" in row for row in rows):
            total["descent"] = math.fsum(row.get("descent", 0.0) for row in rows)
        return {"gradfix": {**self.transport, "total": total, "tensors": self.masked}}

    def learning(self) -> dict[str, Any]:
        """Coefficients, and what a narrow dtype of the output left of the task vectors; empty if there are none."""
        if not self.learned:
            return {}
        rounding = {"rounding": self._rounding()} if self.rounded else {}
        return {"atlas": self.learned | rounding}

    def _rounding(self) -> dict[str, Any]:
        rows = self.rounded.values()
        total = {key: math.fsum(row[key] for row in rows) for key in ("meant", "along", "missed")}
        return {**_slope(total), "tensors": {name: _slope(row) for name, row in self.rounded.items()}}

    def warnings(self) -> list[str]:
        """What a user should know of the result."""
        found = self._rounding() if self.rounded else {"slope": 1.0}
        if abs(found["slope"] - 1) <= HARMLESS:
            return []
        return [
            f"of the merged task vectors {found['slope']:.0%} are left in the output, with errors of "
            f"{found['noise']:.0%} of their length: its dtype is too coarse for steps as small; dtype: float32 keeps "
            "them"
        ]

    def units(self) -> dict[str, Any]:
        """Anchors and adaptation of every unit; empty if there are none.

        "fda" has a row of numbers for each; "fda_curves" what a loss did: kind -> unit -> expert -> [step, loss].
        """
        if not self.adapted:
            return {}
        rows: dict[str, dict[str, float]] = {}
        curves: dict[str, dict[str, dict[str, Any]]] = {"construction": {}, "adaptation": {}, "held_out": {}}
        for name, made in self.anchors.items():
            if "unit" in made:
                unit, expert = made["unit"], name.rpartition(".")[2]
                row = rows.setdefault(unit, {})
                row |= {f"{key}_{expert}": made[key] for key in ("loss", "first", "seconds") if key in made}
                if "curve" in made:
                    curves["construction"].setdefault(unit, {})[expert] = made["curve"]
        for unit, figures in self.adapted.items():
            names = {"loss": "adaptation", "first": "adaptation_first", "seconds": "adaptation_seconds"}
            names |= {"epochs": "epochs", "kept": "kept_epoch"}
            rows.setdefault(unit, {}).update({names[key]: figures[key] for key in names if key in figures})
            for kind, key in (("adaptation", "curve"), ("held_out", "held_out")):
                if figures.get(key):
                    curves[kind].setdefault(unit, {})["0"] = figures[key]
        return {"fda": rows, "fda_curves": {kind: found for kind, found in curves.items() if found}}


def _slope(sums: dict[str, float]) -> dict[str, float]:
    return {"slope": sums["along"] / sums["meant"], "noise": math.sqrt(sums["missed"] / sums["meant"])}
