"""What is done stays done: every stage leaves a marker with the digest of what it was made from.

    DIR/stages/<name>.json     {"digest": ..., "facts": {...}}

A stage works in `<output>.making`, which is renamed to `<output>` when complete; the marker is written
after that. Killed at any moment, a stage is therefore either done or done again, and nothing half-made
carries a final name.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FORMAT = 1  # raise it when a stage would make something else from the same settings

Facts = dict[str, Any]


def digest(value: Any) -> str:
    """SHA-256 of a value's JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Stages:
    """The stages of one folder. `fresh` does all of them again."""

    folder: Path
    fresh: bool = False
    reused: list[str] = field(default_factory=list)  # names of the stages that were there

    def key(self, name: str, settings: Mapping[str, Any]) -> str:
        """What names the stage's result, for the settings of stages that build on it."""
        return digest({"format": FORMAT, "stage": name, **settings})

    def run(
        self,
        name: str,
        settings: Mapping[str, Any],
        make: Callable[[Path], Facts],
        output: str | None = None,
    ) -> Facts:
        """Facts of the stage, by `make(folder to fill)` unless its marker, digest and output are there."""
        key = self.key(name, settings)
        marker = self.folder / "stages" / f"{name}.json"
        final = None if output is None else self.folder / output
        known = None if self.fresh else _read(marker, key)
        if known is not None and (final is None or final.is_dir()):
            self.reused.append(name)
            return known
        marker.unlink(missing_ok=True)
        marker.parent.mkdir(parents=True, exist_ok=True)
        facts = _make_folder(final, make) if final is not None else make(marker.parent)
        write_json(marker, {"digest": key, "facts": facts})
        return facts


def write_json(path: Path, value: Any) -> None:
    """A JSON file that is there whole or not at all."""
    temporary = path.with_name(path.name + ".making")
    temporary.write_text(json.dumps(value, indent=1) + "\n", "utf-8")
    temporary.replace(path)


def _read(marker: Path, key: str) -> Facts | None:
    """The facts in the marker; None if it is absent, damaged or about something else."""
    try:
        content = json.loads(marker.read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return None
    if not isinstance(content, dict) or content.get("digest") != key:
        return None
    facts = content.get("facts")
    return facts if isinstance(facts, dict) else None


def _make_folder(final: Path, make: Callable[[Path], Facts]) -> Facts:
    """Fills a temporary folder beside `final`, then takes its place."""
    temporary = final.with_name(final.name + ".making")
    for leftover in (temporary, final):
        if leftover.exists():
            shutil.rmtree(leftover)
    temporary.parent.mkdir(parents=True, exist_ok=True)
    facts = make(temporary)
    temporary.rename(final)
    return facts
