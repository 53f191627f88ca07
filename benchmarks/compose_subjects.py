"""What compose.py learns coefficients for: an encoder with experts on intents, a decoder with experts on texts.

encoder   MiniLM-L6 and its experts on six domains of CLINC150 (encoder.py). A batch has PER_STEP labelled queries of
          every domain, drawn from FEW for each intent; the loss is cross-entropy over the domain's own intents
decoder   the demo's Llama of two million weights, trained on code, prose and tables; an expert for each. A batch has
          windows of every domain; the loss is in nats for each byte

A batch is a step. Both judge a model by its mean loss on text that nobody learned from, and by a figure of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import encoder
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from streammerge.demo import corpus, evaluate, train

FEW, PER_STEP = 4, 16  # queries for each intent; of each domain in a step
TEXTS, WINDOW = 16, 257  # windows of each domain to learn from; bytes of each, the first is context
WINDOWS = 2  # of each domain in a step
BASE = train.Schedule(steps=340, matrix_rate=0.02, other_rate=3e-3)
EXPERT = train.Schedule(steps=90, matrix_rate=0.004, other_rate=5e-4, seed=1)
HELD_OUT = 64  # windows of each domain
QUICK = {"steps": 20, "warmup": 4, "batch": 2, "window": 128}

Batch = Mapping[str, Any]


class Subject(Protocol):
    """A base, its experts, and what they are learned and judged by."""

    name: str
    figure: str  # what `judge` gives beside the loss
    higher: bool  # whether more of it is better
    base: Path
    experts: Mapping[str, Path]
    model_class: str | None  # of transformers; None: the config's

    def load(self) -> Any: ...
    def steps(self, count: int) -> list[Batch]: ...
    def loss(self, output: Any, batch: Batch) -> Tensor: ...
    def judge(self, model: Any, only: str | None = None) -> tuple[float, float]: ...
    def few_shot(self, model: Any) -> float: ...


def _orders(sizes: Sequence[int], each: int, count: int) -> list[list[list[int]]]:
    """For every step and domain, which samples: every epoch all of them, in an order of its own."""
    random = torch.Generator().manual_seed(0)
    found: list[list[list[int]]] = [[] for _ in range(count)]
    for size in sizes:
        waiting: list[int] = []
        for step in range(count):
            if len(waiting) < each:
                waiting = waiting + torch.randperm(size, generator=random).tolist()
            found[step].append(waiting[:each])
            waiting = waiting[each:]
    return found


@dataclass(frozen=True)
class Intents:
    """MiniLM-L6 and its experts."""

    suite: encoder.Suite
    tokenizer: encoder.Encoder

    name, figure, higher, model_class = "encoder", "accuracy", True, "AutoModel"

    @classmethod
    def make(cls, work: Path, data: Path, quick: bool) -> Intents:
        names = encoder.DOMAINS[:3] if quick else encoder.DOMAINS
        suite = encoder.suite(work, data, names, 4 if quick else encoder.STEPS)
        if quick:
            suite = replace(suite, domains=[replace(each, test=each.test[::10]) for each in suite.domains])
        return cls(suite, encoder.Encoder(suite.base))

    @property
    def base(self) -> Path:
        return self.suite.base

    @property
    def experts(self) -> Mapping[str, Path]:
        return self.suite.experts

    def load(self) -> Any:
        return encoder.Encoder(self.base).model

    @property
    def _few(self) -> list[list[tuple[str, int]]]:
        """The labelled queries of every domain: the first of each intent."""
        found = []
        for domain in self.suite.domains:
            intents = range(len(domain.intents))
            found.append([pair for at in intents for pair in [p for p in domain.train if p[1] == at][:FEW]])
        return found

    def steps(self, count: int) -> list[Batch]:
        few = self._few
        orders = _orders([len(each) for each in few], PER_STEP, count)
        return [self._batch([[few[at][i] for i in o] for at, o in enumerate(order)]) for order in orders]

    def _batch(self, chosen: Sequence[Sequence[tuple[str, int]]]) -> Batch:
        texts = [query for some in chosen for query, _ in some]
        domains = [at for at, some in enumerate(chosen) for _ in some]
        labels = [label for some in chosen for _, label in some]
        numbers = {"labels": torch.tensor(labels), "domains": torch.tensor(domains)}
        return {**self.tokenizer.tokens(texts), **numbers}

    def loss(self, output: Any, batch: Batch) -> Tensor:
        mask = batch["attention_mask"][..., None]
        embedded = normalize((output.last_hidden_state * mask).sum(1) / mask.sum(1), dim=1)
        total = embedded.new_zeros(())
        for at, domain in enumerate(self.suite.domains):
            mine = batch["domains"] == at
            if bool(mine.any()):
                logits = encoder.SCALE * embedded[mine] @ self.suite.classifiers[domain.name].T
                total = total + cross_entropy(logits, batch["labels"][mine], reduction="sum")
        return total / len(batch["labels"])

    @torch.no_grad()
    def judge(self, model: Any, only: str | None = None) -> tuple[float, float]:
        self.tokenizer.model, rows = model, []
        for domain in self.suite.domains:
            if only in (None, domain.name):
                queries, labels = zip(*domain.test, strict=True)
                logits = encoder.SCALE * self.tokenizer.embedded(queries) @ self.suite.classifiers[domain.name].T
                wanted = torch.tensor(labels)
                rows.append((float(cross_entropy(logits, wanted)), float((logits.argmax(1) == wanted).double().mean())))
        loss, figure = (sum(column) / len(rows) for column in zip(*rows, strict=True))
        return loss, figure

    @torch.no_grad()
    def few_shot(self, model: Any) -> float:
        batch = self._batch(self._few)
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "token_type_ids") if name in batch}
        return float(self.loss(model(**inputs), batch))


@dataclass(frozen=True)
class Texts:
    """The demo's decoder with an expert for each kind of text."""

    base: Path
    experts: Mapping[str, Path]
    texts: Mapping[str, corpus.Domain]

    name, figure, higher, model_class = "decoder", "bits per byte", False, None

    @classmethod
    def make(cls, work: Path, quick: bool, told: Callable[[str], None]) -> Texts:
        texts, suffix = corpus.gather(), "-quick" if quick else ""
        plans = {"base": (BASE, list(texts))} | {name: (EXPERT, [name]) for name in texts}
        for name, (schedule, domains) in plans.items():
            folder = work / f"decoder-{name}{suffix}"
            if (folder / "config.json").exists():
                continue
            schedule = train.Schedule(**{**vars(schedule), **QUICK}) if quick else schedule
            before = work / f"decoder-base{suffix}"
            model = train.new_model(train.Architecture(), 0) if name == "base" else train.load_model(before)
            losses: list[float] = []
            train.train(
                model, [texts[each].train for each in domains], schedule, lambda _, x, all=losses: all.append(x)
            )
            part = folder.with_name(f"{folder.name}.part")
            with train.quiet():
                model.save_pretrained(part)
            part.rename(folder)
            told(f"{folder.name}: {schedule.steps} steps, last loss {losses[-1]:.3f} bits per byte")
        found = {name: work / f"decoder-{name}{suffix}" for name in texts}
        return cls(work / f"decoder-base{suffix}", found, texts)

    def load(self) -> Any:
        return train.load_model(self.base)

    def _few(self) -> list[Tensor]:
        return [evaluate.windows(text.train, TEXTS, WINDOW) for text in self.texts.values()]

    def steps(self, count: int) -> list[Batch]:
        few, orders = self._few(), _orders([TEXTS] * len(self.texts), WINDOWS, count)
        return [{"input_ids": torch.cat([w[o] for w, o in zip(few, order, strict=True)])} for order in orders]

    def loss(self, output: Any, batch: Batch) -> Tensor:
        return cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())

    def judge(self, model: Any, only: str | None = None) -> tuple[float, float]:
        names = [name for name in self.texts if only in (None, name)]
        bits = sum(evaluate.bits_per_byte(model, self.texts[name].held_out, HELD_OUT) for name in names) / len(names)
        return bits / train.BITS, bits

    @torch.no_grad()
    def few_shot(self, model: Any) -> float:
        windows = torch.cat(self._few())
        return float(self.loss(model(input_ids=windows), {"input_ids": windows}))
