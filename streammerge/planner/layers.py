"""Which tensors form the layer stack, read from their names alone.

    model.layers.12.mlp.experts.3.up_proj.weight      stack model.layers, layer 12, the rest mlp.experts.3...
    encoder.block.2.layer.0.SelfAttention.q.weight    stack encoder.block, layer 2
    transformer.h.0.attn.bias                         stack transformer.h, layer 0
    model.embed_tokens.weight                         in no stack

A stack is a prefix followed by every number from 0 to count - 1. Of nested ones the outermost is meant, so
that experts inside a layer are part of it. A model with two stacks or more (encoder and decoder) has a depth
in each. Depth, as mergekit counts it: layer i of n lies at t = i / (n - 1), the only layer of a stack at
t = 1, and a tensor outside any stack at t = 0, whether it comes before the layers or after them.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from streammerge.errors import CheckpointError

# The last word before the number, where a repository says "this is the stack". It decides between candidates.
WORDS = {"layers", "layer", "h", "block", "blocks", "resblocks", "encoder_layers", "decoder_layers"}
WORDS |= {"transformer_blocks", "single_transformer_blocks"}
_AFTER = re.compile(r"head|embed_out|predictions|classifier|score|pooler|final|project_out|\bln_f\b|\boutput\b")
_BEFORE = re.compile(
    r"embed|\bwte\b|\bwpe\b|posi?tion|\bpos_|\btok_|token|patch|\bclass_|\bcls_token|\bshared\b"
    r"|project_in|\bpre_?lay|feature_(extractor|projection)|\bconv\d|\bstem\b"
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where a tensor lies: stack, layer, and its name inside the layer."""

    stack: str
    layer: int
    rest: str


class Layers:
    """The stacks of one checkpoint, and the place of each of its tensors."""

    def __init__(self, names: Iterable[str]) -> None:
        self.names = tuple(names)
        found: dict[str, set[int]] = defaultdict(set)
        for name in self.names:
            for split in _candidates(name):
                found[split.stack].add(split.layer)
        whole = {stack: len(layers) for stack, layers in found.items() if max(layers) == len(layers) - 1}
        self._places = {name: place for name in self.names if (place := _outermost(name, whole)) is not None}
        used = dict.fromkeys(place.stack for place in self._places.values())
        self.stacks: dict[str, int] = {stack: whole[stack] for stack in used}

    def place(self, name: str) -> Place | None:
        """Where the tensor lies; None outside any stack."""
        return self._places.get(name)

    def depth(self, name: str) -> float:
        """t of the tensor in [0, 1]."""
        place = self.place(name)
        return 0.0 if place is None else layer_depth(place.layer, self.stacks[place.stack])

    def main(self, where: str) -> str:
        """The one stack whose layers can be sliced.

        Raises:
            CheckpointError: there is none, or more than one.
        """
        named = [stack for stack in self.stacks if _word(stack) in WORDS]
        stacks = named or list(self.stacks)
        if len(stacks) == 1:
            return stacks[0]
        if not stacks:
            raise CheckpointError(f"{where}: no layer stack in its tensor names; slices need one, use 'models'")
        shown = ", ".join(f"{stack} ({self.stacks[stack]} layers)" for stack in stacks)
        raise CheckpointError(f"{where}: {len(stacks)} layer stacks, slices need one: {shown}; use 'models'")

    def split(self, stack: str) -> tuple[list[str], dict[int, list[str]]]:
        """Names outside the stack, and per layer those inside it without prefix and number; in file order."""
        outside: list[str] = []
        inside: dict[int, list[str]] = defaultdict(list)
        for name in self.names:
            place = self.place(name)
            if place is None or place.stack != stack:
                outside.append(name)
            else:
                inside[place.layer].append(place.rest)
        return outside, inside


def layer_depth(layer: int, count: int) -> float:
    """t of layer `layer` of `count`."""
    return layer / (count - 1) if count > 1 else 1.0


def comes_before(name: str) -> bool:
    """Whether a tensor outside the stack feeds the first layer (embeddings); else it follows the last."""
    return _AFTER.search(name) is None and _BEFORE.search(name) is not None


def _word(stack: str) -> str:
    return stack.rpartition(".")[2]


def _candidates(name: str) -> Iterator[Place]:
    """Every split of the name at a number, outermost first."""
    parts = name.split(".")
    for i in range(1, len(parts) - 1):
        text = parts[i]
        if text.isascii() and text.isdigit() and text == str(int(text)):
            yield Place(".".join(parts[:i]), int(text), ".".join(parts[i + 1 :]))


def _outermost(name: str, whole: dict[str, int]) -> Place | None:
    for place in _candidates(name):
        named = _word(place.stack) in WORDS
        if place.stack in whole and (named or whole[place.stack] > 1):
            return place
        if named:  # a stack with holes: what is nested in it is no stack of the model either
            return None
    return None
