"""GradFix's decoder: a byte-level Llama of two million weights in two pre-trainings. A part of transport.py.

A and B see the same code and prose of the Python installation, from other random weights and in another order. A's
fine-tuned model, and B's own, learn tables of numbers, which neither has seen. A sample is a window of a table's text;
what is judged is held-out tables, in bits per byte. Merges go by recipes and files of samples, as on the command line.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transport_rows import ALPHAS, Weights

import streammerge as sm
from streammerge.demo import corpus, evaluate, train

ARCHITECTURE = train.Architecture()
PRETRAINING = {name: train.Schedule(400, 0.02, 3e-3, seed=seed) for seed, name in enumerate(("a", "b"))}
FINE_TUNING = train.Schedule(120, 0.004, 5e-4, seed=2)
GENERAL, SPECIAL = ("code", "prose"), "tables"
SAMPLES, TRIED, WINDOW = 32, 16, 256  # samples, those to choose alpha by, bytes of each
FEW = {"steps": 30, "warmup": 5, "batch": 2, "window": 128}  # of a quick run


@cache
def text() -> dict[str, corpus.Domain]:
    """That of the Python installation, by domain."""
    return corpus.gather()


def models(work: Path, quick: bool, told: Callable[[str], None]) -> dict[str, Path]:
    """a, b, and both fine-tuned: fp32 checkpoints, those that are missing are trained."""
    suffix = "-quick" if quick else ""
    found = {name: work / f"{name}{suffix}" for name in ("a", "b", "a-tuned", "b-tuned")}
    for name, folder in found.items():
        if (folder / "config.json").exists():
            continue
        before, _, tuned = name.partition("-")
        schedule = FINE_TUNING if tuned else PRETRAINING[before]
        if quick:
            schedule = train.Schedule(**{**vars(schedule), **FEW})
        model = train.load_model(found[before]) if tuned else train.new_model(ARCHITECTURE, schedule.seed)
        texts = [text()[each].train for each in ((SPECIAL,) if tuned else GENERAL)]
        losses: list[float] = []
        train.train(model, texts, schedule, lambda step, loss, losses=losses: losses.append(loss))
        part = folder.with_name(f"{folder.name}.part")
        with train.quiet():
            model.save_pretrained(part)
        part.rename(folder)
        told(f"{folder.name}: {schedule.steps} steps, last loss {losses[-1]:.3f} bits per byte")
    return found


class Tables:
    """Held-out tables at a target, with samples in files."""

    figure = "bits per byte"

    def __init__(self, target: Path, work: Path, samples: int = SAMPLES) -> None:
        self.target, self.samples, self._work = target, samples, work
        domain = text()[SPECIAL]
        self._held_out = domain.held_out
        every = evaluate.windows(domain.train, samples + TRIED, WINDOW)
        apart = torch.randperm(len(every), generator=torch.Generator().manual_seed(0))
        self._train, self._tried = every[apart[:samples]], every[apart[samples:]]
        self._model = train.load_model(target)
        work.mkdir(parents=True, exist_ok=True)

    def put(self, weights: Weights) -> None:
        """The network with these weights from now on."""
        self._model.load_state_dict(dict(weights))

    @torch.no_grad()
    def validate(self) -> float:
        return float(self._loss(self._tried))

    def test(self) -> float:
        return evaluate.bits_per_byte(self._model, self._held_out)

    def gradients(self, sample: int) -> Weights:
        """Of one sample's loss, by whole-model autograd."""
        self._model.zero_grad()
        self._loss(self._train[sample : sample + 1]).backward()
        return {name: parameter.grad.clone() for name, parameter in self._model.named_parameters()}

    def _loss(self, windows: Tensor) -> Tensor:
        logits = self._model(input_ids=windows, use_cache=False).logits[:, :-1]
        return cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())

    def merge(
        self, source: Path, tuned: Path, out: Path, samples: int, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        """GradFix by a recipe; its report."""
        recipe = {
            "merge_method": "gradfix",
            "base_model": str(self.target),
            "source_base": str(source),
            "models": [{"model": str(tuned)}],
            "data": {
                "train": self._file(f"{samples}.jsonl", self._train[:samples]),
                "validation": self._file("validation.jsonl", self._tried),
            },
            "parameters": {"alpha": list(ALPHAS), **parameters},
        }
        return sm.merge(recipe, out, device="cpu", resume=False, overwrite=True)

    def _file(self, name: str, windows: Tensor) -> str:
        """Windows as a file of samples."""
        path = self._work / name
        path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in windows.tolist()))
        return str(path)
