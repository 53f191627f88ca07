"""A byte-level Llama and three experts of it: code, prose, tables. A part of anchors.py.

They are those of the demo: the base sees all three, each expert one of them more. What is judged is held-out text, in
bits per byte. Units are the MLPs of its layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import click

from streammerge.demo import corpus, evaluate, train
from streammerge.demo.pipeline import ARCHITECTURE, BASE, EXPERT

FEW = {"steps": 20, "warmup": 5, "batch": 2, "window": 128}  # of a quick run


class Bytes:
    """Base and experts in a folder; those that are missing are trained, two minutes."""

    figure = "bits per byte"

    def __init__(self, work: Path, quick: bool) -> None:
        self._domains = corpus.gather()
        suffix = "-quick" if quick else ""
        self.base = work / f"decoder-base{suffix}"
        self.experts = [work / f"decoder-{name}{suffix}" for name in self._domains]
        texts = [domain.train for domain in self._domains.values()]
        self._make(self.base, None, texts, BASE, quick)
        for folder, text in zip(self.experts, texts, strict=True):
            self._make(folder, self.base, [text], EXPERT, quick)

    def _make(
        self, folder: Path, start: Path | None, texts: list[bytes], schedule: train.Schedule, quick: bool
    ) -> None:
        if (folder / "config.json").exists():
            return
        if quick:
            schedule = train.Schedule(**{**vars(schedule), **FEW})
        model = train.new_model(ARCHITECTURE, schedule.seed) if start is None else train.load_model(start)
        losses: list[float] = []
        train.train(model, texts, schedule, lambda step, loss: losses.append(loss))
        part = folder.with_name(f"{folder.name}.part")
        with train.quiet():
            train.save_model(model, part)
        part.rename(folder)
        click.echo(f"  {folder.name}: {schedule.steps} steps, last loss {losses[-1]:.3f} bits per byte", err=True)

    def judge(self, folder: Path) -> Mapping[str, float]:
        model = train.load_model(folder)
        return {name: evaluate.bits_per_byte(model, domain.held_out) for name, domain in self._domains.items()}
