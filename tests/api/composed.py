"""Tiny Llamas with experts near them, and the steps of aTLAS in plain torch: whole models, fp64."""

from __future__ import annotations

import math
from types import SimpleNamespace

import torch
from transport import RAM, llama, samples, tensors

import streammerge as sm

EXPERTS = ("a", "b", "c")


def made(folder, dtype=torch.float32, **changes):
    """A base, three experts, and samples: some to learn from, some of another task, some to choose by."""
    base = llama(folder / "base", 0, dtype=dtype, **changes)
    near = base if dtype == torch.float32 else base.float()
    experts = [llama(folder / name, seed, near, dtype=dtype, **changes) for seed, name in enumerate(EXPERTS, 1)]
    train = samples(folder / "train.jsonl", (7, 12, 9, 5, 8), 1)
    second = samples(folder / "second.jsonl", (6, 11, 10), 2)
    validation = samples(folder / "validation.jsonl", (9, 14), 3)
    base.to(dtype)
    return SimpleNamespace(
        folder=folder, base=base, experts=experts, train=train, second=second, validation=validation
    )  # fmt: skip


def recipe(folder, **changes):
    """The recipe of the models in a folder; None takes a key away."""
    body = {
        "merge_method": "atlas",
        "base_model": str(folder / "base"),
        "models": [{"model": str(folder / name)} for name in EXPERTS],
        "data": {"train": str(folder / "train.jsonl")},
        "parameters": {"steps": 4, "batch": "all"},
        **changes,
    }
    return {key: value for key, value in body.items() if value is not None}


def merge(world, out, options=None, **changes):
    return sm.merge(recipe(world.folder, **changes), out, **{"ram": RAM, "device": "cpu", **(options or {})})


def factor(step, steps):
    return (1 + math.cos(math.pi * step / steps)) / 2


class Plain:
    """Coefficients as leaves of a graph through the whole composed model."""

    def __init__(self, world, init=0.0):
        self.model = llama(world.folder / "x", 0, tie_word_embeddings=world.base.config.tie_word_embeddings).double()
        self.base = {name: p.detach().double() for name, p in world.base.named_parameters()}
        self.model.load_state_dict(self.base, strict=False)
        self.deltas = {
            n: [e.get_parameter(n).detach().double() - p for e in world.experts] for n, p in self.base.items()
        }
        self.leaves = {
            name: torch.full((len(EXPERTS),), init, dtype=torch.float64, requires_grad=True) for name in self.base
        }

    def weights(self):
        return {
            name: base + sum(c * delta for c, delta in zip(self.leaves[name], self.deltas[name], strict=True))
            for name, base in self.base.items()
        }

    def loss(self, rows):
        """Mean cross-entropy over the supervised tokens of all rows."""
        weights, total, tokens = self.weights(), 0, 0
        for row in rows:
            ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
            output = torch.func.functional_call(self.model, weights, (), {"input_ids": ids})
            total = total + torch.nn.functional.cross_entropy(output.logits[0, :-1], labels, reduction="sum")
            tokens += int((labels != -100).sum())
        return total / tokens

    def learn(self, steps, loss, lr=0.1, decay=0.1, clip=0.0):
        """So many steps down `loss(step)`; the losses."""
        adam = torch.optim.AdamW(self.leaves.values(), lr=lr, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: factor(step, steps))
        found = []
        for step in range(steps):
            adam.zero_grad()
            value = loss(step)
            value.backward()
            if clip:
                torch.nn.utils.clip_grad_norm_(self.leaves.values(), clip)
            adam.step()
            schedule.step()
            found.append(float(value.detach()))
        return found

    def merged(self):
        return {name: value.detach() for name, value in self.weights().items()}

    def distance(self, found):
        """|found - merged| beside |merged - base|, over all weights."""
        wanted = self.merged()
        assert set(found) == set(wanted)
        missed = sum(float((found[n].double() - wanted[n]).square().sum()) for n in wanted)
        moved = sum(float((wanted[n] - self.base[n]).square().sum()) for n in wanted)
        return (missed / moved) ** 0.5


def command_line(*words):
    from click.testing import CliRunner

    from streammerge.cli import cli

    return CliRunner().invoke(cli, [str(word) for word in (*words, "--ram", RAM, "--device", "cpu")])


def bytes_of(folder):
    return b"".join(path.read_bytes() for path in sorted(folder.glob("model*.safetensors")))


__all__ = ["EXPERTS", "Plain", "bytes_of", "command_line", "factor", "made", "merge", "recipe", "tensors"]
