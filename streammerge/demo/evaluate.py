"""Bits per byte on held-out text, and a prompt continued.

    bits per byte = -1/(ln 2 * N) * sum over N bytes of log p(byte | the bytes before it in its window)

Windows are equally spaced over the held-out text and do not overlap; the first byte of a window is only
context. 8 bits per byte is no knowledge at all; lower is better.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.demo.train import BITS, as_tensor, byte_loss
from streammerge.errors import StreamMergeError

if TYPE_CHECKING:
    import torch

WINDOWS = 32
WINDOW = 257  # bytes: one of context, 256 that count
BATCH = 16


def windows(text: bytes, count: int = WINDOWS, length: int = WINDOW) -> torch.Tensor:
    """[count, length] bytes, evenly spaced over the text."""
    import torch

    if len(text) < count * length:
        raise StreamMergeError(f"demo: {len(text)} bytes of text are too few for {count} windows of {length}")
    stream, stride = as_tensor(text), len(text) // count
    return torch.stack([stream[at * stride : at * stride + length] for at in range(count)]).long()


def bits_per_byte(model: Any, text: bytes, count: int = WINDOWS, length: int = WINDOW) -> float:
    """The mean over all predicted bytes of `count` windows, summed in fp64."""
    import torch

    with torch.inference_mode():
        parts = [byte_loss(model, part).double().sum() for part in windows(text, count, length).split(BATCH)]
    return float(torch.stack(parts).sum()) * BITS / (count * (length - 1))


def continue_prompt(model: Any, prompt: bytes, length: int = 240, seed: int = 0) -> bytes:
    """The bytes that transformers' generate() adds, drawn at a low temperature; the seed decides them."""
    import torch

    tokens = torch.tensor([list(prompt)])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        added = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=length,
            do_sample=True,
            temperature=0.5,
        )
    return bytes(added[0, len(prompt) :].tolist())
