"""GradFix's encoder: MiniLM-L6 as A, two targets B, and what judges them. A part of transport.py.

    permuted       B computes what A does, its units in another order: residual stream, feed-forward units, heads, and
                   units within heads (one order for queries and keys, one for values). So the task vector that B would
                   need is known: A's, its entries moved as the weights were
    pre-trained    B is A, trained further on sentences of Python's documentation: a sentence and itself under another
                   dropout mask shall be nearest within their batch (SimCSE, Gao et al. 2021, arXiv:2104.08821)

The classifier is the target's: its own embeddings of the intents' names. A sample is one query, its loss cross-entropy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import encoder
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize
from transport_rows import ALPHAS, Weights

import streammerge as sm

PER_INTENT = 3  # labelled queries
TRIED = 10  # validation queries for each intent
AT_ONCE = 50
SENTENCES, TEMPERATURE = 32, 0.05  # of one step of further pre-training; of its softmax
FURTHER = 120  # steps of it
LR = 3e-5
LENGTHS = (40, 240)  # characters of a sentence


@dataclass(frozen=True)
class Order:
    """New places of units: entry i of the permuted vector is entry `order[i]` of the old one."""

    hidden: Tensor
    inner: tuple[Tensor, ...]  # of each layer
    queries: tuple[Tensor, ...]  # and keys
    values: tuple[Tensor, ...]

    @classmethod
    def draw(cls, config: Any, seed: int) -> Order:
        """Permutations that a BERT of this config computes the same function under."""
        random = torch.Generator().manual_seed(seed)
        heads, hidden = config.num_attention_heads, config.hidden_size
        inner, queries, values = list[Tensor](), list[Tensor](), list[Tensor]()
        for _ in range(config.num_hidden_layers):
            inner.append(torch.randperm(config.intermediate_size, generator=random))
            order = torch.randperm(heads, generator=random)
            queries.append(within(order, hidden // heads, random))
            values.append(within(order, hidden // heads, random))
        return cls(torch.randperm(hidden, generator=random), tuple(inner), tuple(queries), tuple(values))

    def apply(self, weights: Weights) -> Weights:
        """Weights of BertModel, or their differences, in the new order. What the pooler returns keeps the old one."""
        return {name: self._move(name, value) for name, value in weights.items()}

    def _move(self, name: str, value: Tensor) -> Tensor:
        rows, columns = self._sides(name)
        if rows is not None:
            value = value[rows]
        return value if columns is None else value[:, columns]

    def _sides(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        """The orders of a tensor's rows and columns."""
        matrix = name.endswith(".weight") and "LayerNorm" not in name
        if name.startswith("embeddings."):
            return (None, self.hidden) if matrix else (self.hidden, None)
        if name.startswith("pooler."):
            return None, self.hidden if matrix else None
        _, _, number, part = name.split(".", 3)
        layer = int(number)
        if part.startswith("attention.self."):
            units = (self.values if ".value." in part else self.queries)[layer]
            return units, self.hidden if matrix else None
        if part.startswith("intermediate."):
            return self.inner[layer], self.hidden if matrix else None
        if matrix:  # attention.output.dense, output.dense
            return self.hidden, self.values[layer] if part.startswith("attention.") else self.inner[layer]
        return self.hidden, None


def within(heads: Tensor, size: int, random: torch.Generator) -> Tensor:
    """Units of heads in a new order, the units of each in one of their own."""
    return torch.cat([head * size + torch.randperm(size, generator=random) for head in heads])


def permuted(source: Path, folder: Path, order: Order) -> Path:
    """A checkpoint in the new order, unless it is there."""
    if not (folder / "config.json").exists():
        network = encoder.Encoder(source)
        network.model.load_state_dict(order.apply(network.model.state_dict()))
        encoder.save(network, source, folder)
    return folder


def further(source: Path, folder: Path, steps: int, told: Callable[[str], None]) -> Path:
    """A checkpoint trained further on sentences, unless it is there."""
    if (folder / "config.json").exists():
        return folder
    texts = sentences()
    torch.manual_seed(0)
    network = encoder.Encoder(source)
    adam = torch.optim.AdamW(network.model.parameters(), lr=LR)
    network.model.train()
    own, loss = torch.arange(SENTENCES), torch.zeros(())
    order = torch.Generator().manual_seed(0)
    for _ in range(steps):
        some = [texts[at] for at in torch.randint(len(texts), (SENTENCES,), generator=order).tolist()]
        loss = cross_entropy(network.embed(some) @ network.embed(some).T / TEMPERATURE, own)
        adam.zero_grad()
        loss.backward()
        adam.step()
    network.model.eval()
    encoder.save(network, source, folder)
    told(f"{folder.name}: {steps} steps on {len(texts)} sentences, last loss {float(loss.detach()):.3f}")
    return folder


def sentences() -> list[str]:
    """Sentences of the documentation that every Python installation carries."""
    from streammerge.demo import corpus

    prose = corpus.gather()["prose"].train.decode("utf-8", "replace").replace("\0", "\n\n")
    paragraphs = (" ".join(paragraph.split()) for paragraph in prose.split("\n\n"))
    found = (sentence for paragraph in paragraphs for sentence in paragraph.split(". "))
    return list(dict.fromkeys(each for each in found if LENGTHS[0] <= len(each) <= LENGTHS[1]))


@dataclass(frozen=True)
class Nearest:
    """The loss of queries: cross-entropy of their cosines to the names of the intents [intents, hidden]."""

    names: Tensor

    def __call__(self, output: Any, batch: Mapping[str, Any]) -> Tensor:
        states, mask = output.last_hidden_state, batch["attention_mask"][..., None]
        found = normalize((states * mask).sum(1) / mask.sum(1), dim=1)
        return cross_entropy(encoder.SCALE * found @ self.names.T, batch["labels"])


class Queries:
    """One domain at one target: labelled queries, those to choose alpha by, and the test set."""

    figure = "accuracy"

    def __init__(self, target: Path, domain: encoder.Domain, tried: int = TRIED) -> None:
        self.target, self._network = target, encoder.Encoder(target)
        self._domain = domain
        self.loss = Nearest(encoder.classifier(self._network, domain))
        self._tried = self._batches(_per_intent(domain.val, tried), AT_ONCE)
        self.train = self._batches(_per_intent(domain.train, PER_INTENT), 1)
        self.samples = len(self.train)

    def _batches(self, queries: Sequence[tuple[str, int]], size: int) -> list[dict[str, Tensor]]:
        """Equally large ones, those of a length together if there are several in one."""
        ordered = sorted(queries, key=lambda each: len(each[0])) if size > 1 else queries
        parts = [ordered[at : at + size] for at in range(0, len(ordered) - size + 1, size)]
        return [
            {**self._network.tokens([text for text, _ in part]), "labels": torch.tensor([label for _, label in part])}
            for part in parts
        ]

    def put(self, weights: Weights) -> None:
        """The network with these weights from now on."""
        self._network.model.load_state_dict(dict(weights))

    @torch.no_grad()
    def validate(self) -> float:
        losses = [float(self.loss(self._run(batch), batch)) for batch in self._tried]
        return sum(losses) / len(losses)

    def test(self) -> float:
        return encoder.accuracy(self._network, self._domain, self.loss.names)

    def gradients(self, sample: int) -> Weights:
        """Of one sample's loss, by whole-model autograd; a weight without any has zeros."""
        self._network.model.zero_grad()
        batch = self.train[sample]
        self.loss(self._run(batch), batch).backward()
        named = self._network.model.named_parameters()
        return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in named}

    def _run(self, batch: Mapping[str, Any]) -> Any:
        return self._network.model(**{name: value for name, value in batch.items() if name != "labels"})

    def merge(
        self, source: Path, tuned: Path, out: Path, samples: int, parameters: Mapping[str, Any]
    ) -> dict[str, Any]:
        """GradFix, layer by layer; its report."""
        shapes = {each["name"]: tuple(each["shape"]) for each in sm.inspect(self.target)["entries"]}
        batches = self.train[:samples]
        stack = sm.Stack.from_transformers(self.target, shapes, batches[0])
        given = {"alpha": list(ALPHAS), **parameters}
        return sm.gradfix(
            stack,
            batches,
            self.loss,
            target=self.target,
            source_base=source,
            models=[tuned],
            out=out,
            validation=self._tried,
            parameters=given,
            device="cpu",
            resume=False,
            overwrite=True,
        )


def _per_intent(queries: Sequence[tuple[str, int]], count: int) -> list[tuple[str, int]]:
    """The first so many of each intent, in turns: every multiple of the intents has equally many of each."""
    seen: dict[int, int] = {}
    turns = []
    for query, intent in queries:
        seen[intent] = turn = seen.get(intent, 0) + 1
        if turn <= count:
            turns.append((turn, intent, query))
    return [(query, intent) for _, intent, query in sorted(turns)]
