"""What GradFix and its controls make of one task vector at one target. A part of transport.py.

    B                   the target as it is
    B + tau             the task vector as it is
    vote, mean          GradFix as streamed: each layer read, voted on and written; its own choice of alpha
    shuffled            GradFix with the same samples on a task vector whose entries changed places within each tensor:
                        they mean nothing now, so what it gains is the gradients' doing
    random signs        mode: random of GradFix
    random mask         half of the task vector, drawn
    one step            no task vector: down the samples' mean gradient, or down its signs, with the norm of tau
    oracle sign         the task vector where its sign is that of the target's own
    oracle              the target's own task vector

alpha is the one of least loss on validation samples, in all rows alike; test samples choose nothing.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Weights: TypeAlias = Mapping[str, Tensor]
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.5, 2.0, 3.0)
STEPS = (
    0.005,
    0.01,
    0.02,
    0.05,
    *ALPHAS,
)  # alphas of a single step: it has the norm of tau, which is no size of its own


class Subject(Protocol):
    """A target with the samples of one task, and a network to run weights in."""

    figure: str  # what `test` is
    target: Path
    samples: int

    def put(self, weights: Weights) -> None: ...
    def validate(self) -> float: ...
    def test(self) -> float: ...
    def gradients(self, sample: int) -> Weights: ...
    def merge(
        self, source: Path, tuned: Path, out: Path, samples: int, parameters: Mapping[str, Any]
    ) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Row:
    """One way to the target's weights, judged. `figure` is of the test set, `loss` of the validation samples."""

    label: str
    figure: float
    loss: float
    alpha: float | None = None
    samples: int | None = None
    seconds: float | None = None  # of a streamed run: sweep, trial and merge
    kept: float | None = None  # share of the elements where the task vector is not zero
    ties: float | None = None
    norm: float | None = None  # of the displacement, over that of tau


@dataclass(frozen=True)
class Task:
    """A task vector, from A to A's fine-tuned model, and the target's own one."""

    source: Path
    tuned: Path
    aligned: Weights  # the target's own task vector
    work: Path  # for outputs


def judged(subject: Subject, weights: Weights, label: str) -> Row:
    """Weights without an alpha."""
    subject.put(weights)
    return Row(label, subject.test(), subject.validate())


def stepped(subject: Subject, target: Weights, delta: Weights, label: str, alphas: Sequence[float] = ALPHAS) -> Row:
    """The target plus alpha times a step, alpha by the validation samples."""
    losses = []
    for alpha in alphas:
        subject.put(added(target, delta, alpha))
        losses.append(subject.validate())
    best = min(range(len(alphas)), key=lambda at: losses[at] if math.isfinite(losses[at]) else math.inf)
    subject.put(added(target, delta, alphas[best]))
    return Row(label, subject.test(), losses[best], alphas[best])


def streamed(
    subject: Subject, task: Task, label: str, samples: int, tuned: Path | None = None, **parameters: Any
) -> tuple[Row, Weights]:
    """GradFix layer by layer, and the weights that it wrote."""
    out, began = task.work / "out", time.perf_counter()
    report = subject.merge(task.source, tuned or task.tuned, out, samples, parameters)
    seconds = time.perf_counter() - began
    found, about = load_file(out / "model.safetensors"), report["gradfix"]
    shutil.rmtree(out)
    subject.put(found)
    total, tau = about["total"], vector(load(task.source), load(tuned or task.tuned))
    moving = sum(int(each.count_nonzero()) for each in tau.values())
    row = Row(
        label,
        subject.test(),
        dict(map(tuple, about["curve"]))[about["alpha"]],
        about["alpha"],
        samples,
        seconds,
        total["kept"] / moving,
        total["ties"] / moving,
        total["displacement"] / norm(tau),
    )
    return row, found


def rows(subject: Subject, task: Task) -> Iterator[Row]:
    """All ways, with all samples."""
    target, tau, most = load(subject.target), vector(load(task.source), load(task.tuned)), subject.samples
    yield judged(subject, target, "B")
    yield stepped(subject, target, tau, "B + tau")
    yield streamed(subject, task, "vote", most)[0]
    yield streamed(subject, task, "mean", most, vote="mean")[0]
    yield streamed(subject, task, "shuffled", most, moved(task, tau))[0]
    yield streamed(subject, task, "random signs", most, mode="random")[0]
    yield stepped(subject, target, half(tau), "random mask")
    subject.put(target)
    down = downhill(subject, most)
    yield stepped(subject, target, sized(down, tau), "one step, gradient", STEPS)
    yield stepped(subject, target, sized(signs(down), tau), "one step, signs", STEPS)
    yield stepped(subject, target, agreeing(tau, task.aligned), "oracle sign")
    yield stepped(subject, target, task.aligned, "oracle")


def compared(subject: Subject, task: Task) -> dict[str, float]:
    """One streamed run beside whole-model autograd with a vote for each sample: weights that differ, of all."""
    row, found = streamed(subject, task, "vote", subject.samples)
    target, tau = load(subject.target), vector(load(task.source), load(task.tuned))
    subject.put(target)
    votes = {name: torch.zeros_like(value) for name, value in target.items()}
    for sample in range(subject.samples):
        for name, gradient in subject.gradients(sample).items():
            votes[name] -= gradient.sign()
    assert row.alpha is not None
    wanted = added(target, agreeing(tau, votes), row.alpha)
    different = sum(int((found[name] != value).sum()) for name, value in wanted.items())
    return {"differing": different, "weights": sum(value.numel() for value in wanted.values())}


# --- arithmetic on all tensors of a model ---


def load(folder: Path) -> dict[str, Tensor]:
    """All tensors, fp32."""
    return {
        name: value.float() for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()
    }


def vector(source: Weights, tuned: Weights) -> dict[str, Tensor]:
    return {name: tuned[name] - value for name, value in source.items()}


def added(target: Weights, delta: Weights, alpha: float) -> dict[str, Tensor]:
    return {name: value + alpha * delta[name] for name, value in target.items()}


def signs(values: Weights) -> dict[str, Tensor]:
    return {name: value.sign() for name, value in values.items()}


def norm(values: Weights) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values.values()))


def sized(values: Weights, like: Weights) -> dict[str, Tensor]:
    """The same direction with another's norm."""
    factor = norm(like) / norm(values)
    return {name: value * factor for name, value in values.items()}


def agreeing(tau: Weights, other: Weights) -> dict[str, Tensor]:
    """The task vector where its sign is another's."""
    return {name: torch.where(value.sign() == other[name].sign(), value, 0) for name, value in tau.items()}


def half(tau: Weights, seed: int = 0) -> dict[str, Tensor]:
    """Half of its entries, drawn."""
    random = torch.Generator().manual_seed(seed)
    return {name: value * torch.randint(0, 2, value.shape, generator=random) for name, value in tau.items()}


def downhill(subject: Subject, samples: int) -> dict[str, Tensor]:
    """Minus the mean gradient of the samples, at the weights that the subject has."""
    total: dict[str, Tensor] = {}
    for sample in range(samples):
        for name, gradient in subject.gradients(sample).items():
            total[name] = total[name] - gradient / samples if name in total else -gradient / samples
    return total


def shuffled(tau: Weights, seed: int = 0) -> dict[str, Tensor]:
    """Its entries in another order, within each tensor."""
    random = torch.Generator().manual_seed(seed)
    return {
        name: value.reshape(-1)[torch.randperm(value.numel(), generator=random)].view_as(value)
        for name, value in tau.items()
    }


def moved(task: Task, tau: Weights) -> Path:
    """A checkpoint whose task vector is the shuffled one."""
    return write(added(load(task.source), shuffled(tau), 1.0), task.source, task.work / "shuffled")


def write(weights: Weights, like: Path, folder: Path) -> Path:
    """A checkpoint of other weights, with the config of one that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    save_file(
        {name: value.contiguous() for name, value in weights.items()}, folder / "model.safetensors", {"format": "pt"}
    )
    return folder
