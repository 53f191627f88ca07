"""Synthetic checkpoints for benchmarks: a Llama's tensor names and shapes, a base and its experts, written in pieces.

Weights are normal with standard deviation 0.02, task vectors normal with 0.002 in one of five elements and 0.0002 in
the rest (trained deltas are heavy-tailed); all stored in bf16, so that neither arithmetic nor I/O can profit from
regular data.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from streammerge.formats.header import build_header
from streammerge.formats.index import build_index

PIECE = 1 << 22
SHARD = 1 << 30


@dataclass(frozen=True)
class Shape:
    """A Llama's size."""

    name: str
    layers: int
    hidden: int
    inner: int
    vocabulary: int
    heads: int

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for i in range(self.layers):
            at = f"model.layers.{i}."
            for part in ("q", "k", "v", "o"):
                yield f"{at}self_attn.{part}_proj.weight", (self.hidden, self.hidden)
            yield f"{at}mlp.gate_proj.weight", (self.inner, self.hidden)
            yield f"{at}mlp.up_proj.weight", (self.inner, self.hidden)
            yield f"{at}mlp.down_proj.weight", (self.hidden, self.inner)
            yield f"{at}input_layernorm.weight", (self.hidden,)
            yield f"{at}post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
        }


SHAPES = {
    "1.3b": Shape("1.3b", 24, 2048, 5504, 32000, 16),
    "small": Shape("small", 4, 1024, 2816, 32000, 8),
    "wide": Shape("wide", 2, 2048, 5504, 262144, 16),  # embedding and head of 1 GiB each
}


def bits(values: np.ndarray) -> np.ndarray:
    """fp32 to bf16, to nearest even."""
    raw = values.view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


def pieces(seed: int, expert: int, tensor: int, numel: int) -> Iterator[np.ndarray]:
    """A tensor's bf16 bits. Base weights are the same for every expert."""
    for at in range(0, numel, PIECE):
        size = min(PIECE, numel - at)
        base = np.random.default_rng((seed, tensor, at)).standard_normal(size, np.float32) * np.float32(0.02)
        if expert:
            rng = np.random.default_rng((seed, tensor, at, expert))
            delta = rng.standard_normal(size, np.float32)
            base = base + delta * np.where(rng.random(size, np.float32) < 0.2, np.float32(2e-3), np.float32(2e-4))
        yield bits(base)


def make(folder: Path, shape: Shape, expert: int, seed: int = 0) -> Path:
    """Write a checkpoint (expert 0 is the base) unless it is there."""
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    groups: list[list[tuple[int, str, tuple[int, ...]]]] = [[]]
    size = 0
    for number, (name, form) in enumerate(shape.tensors()):
        nbytes = 2 * int(np.prod(form))
        if size + nbytes > SHARD and groups[-1]:
            groups.append([])
            size = 0
        groups[-1].append((number, name, form))
        size += nbytes
    weight_map = {}
    for count, group in enumerate(groups, 1):
        file = f"model-{count:05}-of-{len(groups):05}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(build_header([(name, "BF16", form) for _, name, form in group], {"format": "pt"}))
            for number, name, form in group:
                weight_map[name] = file
                for piece in pieces(seed, expert, number, int(np.prod(form))):
                    out.write(piece.tobytes())
    total = sum(2 * int(np.prod(form)) for _, form in shape.tensors())
    (folder / "model.safetensors.index.json").write_bytes(build_index(weight_map, total))
    (folder / "config.json").write_text(json.dumps(shape.config()))
    return folder
