"""What is learned from, step by step: rows of files, or batches of a caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge import samples
from streammerge.api.files import find_file
from streammerge.api.planning import Request
from streammerge.engine.layers_loss import CrossEntropy, Loss
from streammerge.engine.objectives import entropy
from streammerge.errors import RecipeError
from streammerge.method import build, find

if TYPE_CHECKING:
    from streammerge.models.stack import Batch

METHOD = "atlas"
WORDS = 1 << 15  # of the vocabulary whose logits are there at a time
TOKENS = 1 << 11  # of a batch that runs through a layer at once
TRIALS = 10  # times that validation samples are tried while learning, at most


def settings_of(request: Request) -> Any:
    """The method of the first tensor: what is common to all of them is in it."""
    job = next((job for job in request.resolution.jobs if job.method == METHOD), None)
    if job is None:
        raise RecipeError(f"{request.recipe.where}: no tensor of the base model is of a floating dtype")
    return build(find(METHOD), job.parameters)


def trials_of(steps: int, epoch: int) -> list[int]:
    """Before the first step, after epochs, and at the end."""
    every = epoch * max(1, -(-steps // (epoch * TRIALS)))
    return sorted({0, *range(every, steps, every), steps})


@dataclass(frozen=True)
class Rows:
    """Rows of files; every file is a task that gives samples to every step."""

    tasks: tuple[tuple[list[samples.Sample], int], ...]  # with 1, or -1 if its loss is to rise
    orders: tuple[list[list[int]], ...]
    tried: list[samples.Sample]
    count: int  # samples of a batch
    loss: Loss
    trial: Loss
    trials: Sequence[int]
    digest: str

    @classmethod
    def read(cls, request: Request, seed: int) -> Rows:
        recipe, given, method = request.recipe, request.recipe.extra["data"], settings_of(request)
        assert recipe.base_model is not None
        base = request.checkpoints[recipe.base_model]
        tokenizer, words = samples.Tokenizer(base.path), (base.config or {}).get("vocab_size")
        options = {"max_length": given["max_length"], "vocabulary": words if isinstance(words, int) else None}

        def read(file: str) -> list[samples.Sample]:
            return samples.read_samples(find_file(file, request.near), tokenizer, **options)

        negated = method.objective == "negation"
        if negated != bool(given["control"]):
            what = "needs data.control: samples whose loss is to stay" if negated else "reads no data.control"
            raise RecipeError(f"{recipe.where}: objective {method.objective} {what}")
        if negated and given["validation"] is not None:
            raise RecipeError(f"{recipe.where}: data.validation chooses by the least loss; negation has none")
        tasks = [(read(file), -1 if negated else 1) for file in given["train"]]
        tasks += [(read(file), 1) for file in given["control"]]
        tried = [] if given["validation"] is None else read(given["validation"])
        least = min(len(task) for task, _ in tasks)
        epoch = 1 if method.batch == "all" else -(-least // method.batch)
        steps = method.steps or method.epochs * epoch
        orders = []
        for number, (task, _) in enumerate(tasks):
            size = len(task) if method.batch == "all" else min(method.batch, len(task))
            orders.append(samples.step_order(len(task), size, steps, seed + number))
        longest = max(len(sample) for task, _ in [*tasks, (tried, 1)] for sample in task)
        named = " ".join([*(samples.digest(task) for task, _ in tasks), samples.digest(tried)])
        loss: Loss = entropy if method.objective == "entropy" else CrossEntropy(chunk=WORDS)
        return cls(
            tuple(tasks), tuple(orders), tried, max(1, TOKENS // longest), loss, CrossEntropy(chunk=WORDS),
            trials_of(steps, epoch) if tried else (), named,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return len(self.orders[0])

    @property
    def count_all(self) -> int:
        return sum(len(task) for task, _ in self.tasks)

    def step(self, number: int) -> list[Batch]:
        both = zip(self.tasks, self.orders, strict=True)
        return self._batches([[task[at] for at in order[number]] for (task, _), order in both])

    @property
    def widest(self) -> list[Batch]:
        """The longest samples of every task, as if each batch had some to fill up."""
        sizes = [max(map(len, order)) for order in self.orders]
        chosen = [sorted(task, key=len)[-size:] for (task, _), size in zip(self.tasks, sizes, strict=True)]
        return [_gappy(batch) for batch in self._batches(chosen)]

    @property
    def every(self) -> list[Batch]:
        return self._batches([task for task, _ in self.tasks])

    @property
    def validation(self) -> list[Batch]:
        tokens = sum(sample.supervised for sample in self.tried)
        return list(samples.padded(self.tried, self.count, tokens))

    def _batches(self, chosen: Sequence[Sequence[samples.Sample]]) -> list[Batch]:
        found: list[Batch] = []
        for some, (_, sign) in zip(chosen, self.tasks, strict=True):
            found += samples.padded(some, self.count, sign * sum(sample.supervised for sample in some))
        return found


def _gappy(batch: Batch) -> Batch:
    """A batch with something to fill up: models hold masks then."""
    mask = batch["attention_mask"]
    if len(mask) == 1 or mask.shape[1] == 1:
        return batch
    mask = mask.clone()
    mask[-1, -1] = 0
    return {**batch, "attention_mask": mask}


@dataclass(frozen=True)
class Batches:
    """Batches of a caller's, so many to a step, in their order and over again."""

    batches: Sequence[Batch]
    validation: Sequence[Batch]
    steps: int
    each: int
    loss: Loss
    trials: Sequence[int]
    digest: str

    @property
    def count_all(self) -> int:
        return len(self.batches)

    @property
    def trial(self) -> Loss:
        return self.loss

    @property
    def widest(self) -> Sequence[Batch]:
        """Every batch, or as many of the largest as a step has."""
        return sorted(self.batches, key=_numel)[-self.each :]

    @property
    def every(self) -> Sequence[Batch]:
        return self.batches

    def step(self, number: int) -> list[Batch]:
        first = number * self.each
        return [self.batches[at % len(self.batches)] for at in range(first, first + self.each)]


def _numel(batch: Batch) -> int:
    return sum(value.numel() for value in batch.values() if hasattr(value, "numel"))
