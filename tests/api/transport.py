"""Tiny Llamas of two pre-trainings with samples, and GradFix in plain torch: whole models, one vote per sample."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import torch
import transformers

import streammerge as sm

os.environ.setdefault("TQDM_DISABLE", "1")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

WORDS = 61
ALPHAS = [0.1, 0.4, 1.0]
RAM = "2GiB"
MOST = 2e-3  # share of weights that may differ from plain autograd
SMALL = {
    "vocab_size": WORDS,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def llama(folder, seed, near=None, dtype=torch.float32, **changes):
    """A Llama with random weights, norms included; `near` another one if that is given. Saved and returned."""
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**SMALL, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(parameter + 0.1 * noise if near is None else near.get_parameter(name) + 0.05 * noise)
    model = model.to(dtype).eval()
    model.save_pretrained(folder)
    return model


def samples(path, lengths, seed=0):
    """Rows of random tokens, the first of each not supervised; written, and as lists."""
    random = torch.Generator().manual_seed(seed)
    rows = []
    for length in lengths:
        ids = torch.randint(0, WORDS, (length,), generator=random).tolist()
        rows.append({"input_ids": ids, "labels": [-100, -100, *ids[2:]]})
    path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    return rows


def loss_of(model, row):
    ids, labels = (torch.tensor([row[key]]) for key in ("input_ids", "labels"))
    return model(input_ids=ids, labels=labels).loss


def gradients(model, rows):
    """Per sample: name -> gradient."""
    for row in rows:
        model.zero_grad()
        loss_of(model, row).backward()
        yield {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def voted(model, rows, mean=False):
    """Signs of the step downhill, by the majority of the samples or by their sum; and the mean gradient."""
    votes, total = {}, {}
    for each in gradients(model, rows):
        for name, gradient in each.items():
            votes[name] = votes.get(name, 0) - gradient.sign()
            total[name] = total.get(name, 0) + gradient
    signs = {name: -total[name].sign() if mean else vote.sign() for name, vote in votes.items()}
    return signs, {name: value / len(rows) for name, value in total.items()}


def vectors(source, *tuned):
    """Task vectors, name by name, in fp32."""
    return [
        {name: p.detach().float() - source.get_parameter(name).detach().float() for name, p in each.named_parameters()}
        for each in tuned
    ]


def mask(tau, signs):
    return {name: torch.where(value.sign() == signs[name], value, 0) for name, value in tau.items()}


def added(target, delta, alpha):
    """The target with alpha * delta added, rounded once to its own dtype."""
    return {
        name: (p.detach().float() + alpha * delta[name]).to(p.dtype) if bool(delta[name].any()) else p.detach()
        for name, p in target.named_parameters()
    }


def recipe(folder, **changes):
    """The recipe of the models in a folder; None takes a key away."""
    body = {
        "merge_method": "gradfix",
        "base_model": str(folder / "target"),
        "source_base": str(folder / "source"),
        "models": [{"model": str(folder / "tuned")}],
        "data": {"train": str(folder / "train.jsonl")},
        **changes,
    }
    return {key: value for key, value in body.items() if value is not None}


def tensors(folder):
    from safetensors.torch import load_file

    return {
        name: value for path in sorted(folder.glob("model*.safetensors")) for name, value in load_file(path).items()
    }


def differing(found, wanted):
    """Weights that are not the same, and all weights."""
    assert set(found) == set(wanted)
    different = sum(int((found[name] != wanted[name]).sum()) for name in wanted)
    return different, sum(value.numel() for value in wanted.values())


def made(folder, dtype=torch.float32, **changes):
    """Target, source and two fine-tuned models in a folder, with samples of two tasks and some to choose by."""
    target = llama(folder / "target", 0, dtype=dtype, **changes)
    source = llama(folder / "source", 1, dtype=dtype, **changes)
    tuned = llama(folder / "tuned", 2, source, dtype=dtype, **changes)
    other = llama(folder / "other", 3, source, dtype=dtype, **changes)
    train = samples(folder / "train.jsonl", (7, 12, 9, 5, 8), 1)
    second = samples(folder / "second.jsonl", (6, 11, 10), 2)
    validation = samples(folder / "validation.jsonl", (9, 14), 3)
    return SimpleNamespace(
        folder=folder, target=target, source=source, tuned=tuned, other=other,
        train=train, second=second, validation=validation,
    )  # fmt: skip


def merge(world, out, options=None, **changes):
    body = recipe(world.folder, **changes)
    return sm.merge(body, out, ram=RAM, device="cpu", **(options or {}))
