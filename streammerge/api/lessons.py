"""What is learned from, step by step: rows of files, or batches of a caller's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge import samples
from streammerge.api.files import find_file
from streammerge.api.planning import Request
from streammerge.engine.layers_loss import CrossEntropy, Loss
from streammerge.engine.objectives import entropy, pseudo_label, trusted
from streammerge.errors import RecipeError
from streammerge.method import build, find

if TYPE_CHECKING:
    from streammerge.models.stack import Batch

METHOD = "atlas"
WORDS = 1 << 15  # of the vocabulary whose logits are there at a time
TOKENS = 1 << 11  # of a batch that runs through a layer at once
SHARE = 4  # one sample in so many of a step is a trusted one, where labels are the model's own
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
    looks: Sequence[int]
    digest: str
    own: dict[int, samples.Sample] = field(default_factory=dict)  # trusted samples with the model's own labels
    now: list[int] = field(default_factory=list)  # the step of the last look

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
        own = method.objective == "pseudo_label"
        if own and len(given["train"]) > 1:
            raise RecipeError(f"{recipe.where}: objective pseudo_label takes one file under data.train")
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
        losses: dict[str, Loss] = {"entropy": entropy, "pseudo_label": pseudo_label}
        loss = losses.get(method.objective, CrossEntropy(chunk=WORDS))
        return cls(
            tuple(tasks), tuple(orders), tried, max(1, TOKENS // longest), loss, CrossEntropy(chunk=WORDS),
            trials_of(steps, epoch) if tried else (), range(0, steps, epoch) if own else (), named,
        )  # fmt: skip

    @property
    def steps(self) -> int:
        return len(self.orders[0])

    @property
    def count_all(self) -> int:
        return sum(len(task) for task, _ in self.tasks)

    def label(self, step: int, tokens: Sequence[Sequence[int]], confidence: Sequence[float]) -> None:
        """What the model predicted at the labels of every sample, those of `every` one after the other."""
        ((task, _),) = self.tasks
        ranked = sorted(range(len(task)), key=lambda at: len(task[at]), reverse=True)
        self.own.clear()
        for place in trusted([tuple(each) for each in tokens], confidence):
            sample, found = task[ranked[place]], iter(tokens[place])
            rest = (label if label == samples.IGNORED else next(found) for label in sample.labels[1:])
            self.own[ranked[place]] = samples.Sample(sample.input_ids, (samples.IGNORED, *rest))
        self.now[:] = [step]

    def _labelled(self, chosen: Sequence[int], number: int) -> list[Batch]:
        """A step: a quarter of trusted samples, in their order and over again, of the others as many as are left."""
        ((task, _),) = self.tasks
        sure = sorted(self.own)
        count = max(1, len(chosen) // SHARE)
        first = [self.own[sure[at % len(sure)]] for at in range(number * count, (number + 1) * count)]
        rest = [task[at] for at in chosen if at not in self.own][: len(chosen) - count]
        divisor = sum(sample.supervised for sample in [*first, *rest])
        epoch = self.looks[1] if len(self.looks) > 1 else self.steps
        bar = 0.9 + 0.1 * (self.now[0] // epoch) / len(self.looks)
        found: list[Batch] = list(samples.padded(first, self.count, divisor))
        return found + [{**batch, "threshold": bar} for batch in samples.padded(rest, self.count, divisor)]

    def step(self, number: int) -> list[Batch]:
        if self.looks:
            return self._labelled(self.orders[0][number], number)
        both = zip(self.tasks, self.orders, strict=True)
        return self._batches([[task[at] for at in order[number]] for (task, _), order in both])

    @property
    def widest(self) -> list[Batch]:
        """The longest samples of every task, as if each batch had some to fill up."""
        sizes = [max(map(len, order)) for order in self.orders]
        chosen = [sorted(task, key=len)[-size:] for (task, _), size in zip(self.tasks, sizes, strict=True)]
        if self.looks:  # trusted ones are batches of their own
            chosen = [[*chosen[0], *chosen[0][-max(1, sizes[0] // SHARE) :]]]
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
    looks: Sequence[int] = ()

    def label(self, step: int, tokens: Sequence[Sequence[int]], confidence: Sequence[float]) -> None:
        raise AssertionError("the labels are the caller's")

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
