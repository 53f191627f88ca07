"""Training of byte-level Llamas: 256 tokens, one for each byte, a few million weights.

The network is transformers' own LlamaForCausalLM, so that what is saved is a checkpoint in Hugging Face's
layout. Training is fp32, windows drawn at random by a seeded generator; storage is bf16, as in large
models. The learning rate rises linearly over the first steps and falls linearly to nothing at the last.
Byte 0 separates documents in the corpus; it stands for beginning, end and padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.demo.optimizer import Optimizer

if TYPE_CHECKING:
    import torch

Tick = Callable[[int, float], None]  # step done (from 1), its loss in bits per byte
BITS = 1.4426950408889634  # bits per nat
SHARD_SIZE = "3MB"  # two or more shards, as large models have


@dataclass(frozen=True)
class Architecture:
    """Sizes of the network; the defaults make two million weights."""

    hidden: int = 192
    layers: int = 4
    heads: int = 4
    intermediate: int = 576
    positions: int = 512  # the longest text it is told about


@dataclass(frozen=True)
class Schedule:
    """How long and how fast."""

    steps: int
    matrix_rate: float  # the highest learning rate of the layers' matrices (Muon)
    other_rate: float  # and of all other weights (AdamW)
    batch: int = 4
    window: int = 256  # bytes
    warmup: int = 20  # steps
    seed: int = 0

    def factor(self, step: int) -> float:
        """Share of the highest rates in step 0, 1, ..., steps - 1."""
        return min((step + 1) / self.warmup, (self.steps - step) / self.steps)


def new_model(architecture: Architecture, seed: int) -> Any:
    """A LlamaForCausalLM with random weights that only the seed decides."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256,
        hidden_size=architecture.hidden,
        intermediate_size=architecture.intermediate,
        num_hidden_layers=architecture.layers,
        num_attention_heads=architecture.heads,
        num_key_value_heads=architecture.heads,
        max_position_embeddings=architecture.positions,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def load_model(folder: Path) -> Any:
    """A saved model, in fp32, ready to run."""
    import torch
    from transformers import AutoModelForCausalLM

    with quiet():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_model(model: Any, folder: Path) -> None:
    """The model in bf16 and a tokenizer of single bytes, both in Hugging Face's layout."""
    import torch

    with quiet():
        model.to(torch.bfloat16).save_pretrained(folder, max_shard_size=SHARD_SIZE)
        byte_tokenizer().save_pretrained(folder)


def byte_tokenizer() -> Any:
    """A transformers tokenizer whose token numbers are the bytes of the text in UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {letter: byte for byte, letter in enumerate(_byte_letters())}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


def _byte_letters() -> list[str]:
    """The letter by which a byte-level BPE writes each byte: itself if Latin-1 prints it, else 256 + n."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


def train(model: Any, texts: Sequence[bytes], schedule: Schedule, tick: Tick) -> None:
    """Trains the model in place on windows of the texts, each text with the same share."""
    import torch

    streams = [as_tensor(text) for text in texts]
    generator = torch.Generator().manual_seed(schedule.seed)
    optimizer = Optimizer(model, schedule.matrix_rate, schedule.other_rate)
    model.train()
    for step in range(schedule.steps):
        loss = byte_loss(model, draw(streams, schedule, step, generator)).mean()
        loss.backward()
        optimizer.step(schedule.factor(step))
        tick(step + 1, loss.item() * BITS)
    model.eval()


def draw(streams: Sequence[torch.Tensor], schedule: Schedule, step: int, generator: torch.Generator) -> torch.Tensor:
    """[batch, window + 1] bytes; the texts take turns, the places are random."""
    import torch

    rows = []
    for row in range(schedule.batch):
        stream = streams[(step * schedule.batch + row) % len(streams)]
        at = int(torch.randint(len(stream) - schedule.window, (), generator=generator))
        rows.append(stream[at : at + schedule.window + 1])
    return torch.stack(rows).long()


def byte_loss(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """[rows, length - 1] nats: what each byte costs after those before it."""
    import torch

    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    nats = torch.nn.functional.cross_entropy(
        logits.float().reshape(-1, logits.shape[-1]), windows[:, 1:].reshape(-1), reduction="none"
    )
    return nats.reshape(windows.shape[0], -1)


def as_tensor(text: bytes) -> torch.Tensor:
    """Bytes as a uint8 tensor of its own memory."""
    import torch

    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its progress bars, which would mix with ours."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


@contextmanager
def few_threads(most: int = 4) -> Iterator[None]:
    """No more threads than such small matrices can use."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(min(before, most))
    try:
        yield
    finally:
        torch.set_num_threads(before)
