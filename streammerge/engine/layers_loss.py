"""Cross-entropy of a language model, whole or in parts of the vocabulary.

    loss = sum_t (log sum_v exp z_tv - z_t,label) / tokens          z = logits of the supervised tokens, in fp32

Whole, it is the ordinary one, to the bit. In parts, the logits of `chunk` words are there at a time: a first pass over
the vocabulary adds up the sums of exponentials, a second one, in the backward pass, makes each part again and turns it
into its gradient. What the model does to its logits (scaling, soft capping) is done by the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.models.stack import Batch, Stack
from streammerge.models.stage import Values

if TYPE_CHECKING:
    from torch import Tensor

IGNORED = -100  # a label that is not supervised


@dataclass(frozen=True)
class CrossEntropy:
    """Next-token cross-entropy of `batch["labels"]`, [samples, tokens] beside input_ids; -100 is not supervised.

    `tokens` is what the sum is divided by: None for the batch's own supervised tokens (the mean of one batch), or their
    number over all batches (the mean over all); a batch may name its own under "divisor". `shift=False` for labels that
    belong to their own position (masked language models).
    """

    tokens: int | None = None
    chunk: int | None = None
    shift: bool = True

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        """The loss of a model's output, all logits at once."""
        import torch

        labels = self.labels(batch)
        logits = output.logits.float()
        total = torch.nn.functional.cross_entropy(
            logits.view(-1, logits.shape[-1]), labels.view(-1), ignore_index=IGNORED, reduction="sum"
        )
        return total / self._divisor(labels, batch)

    def run(self, stack: Stack, weights: Values, batch: Batch, hidden: Tensor) -> Tensor:
        """The loss from the last layer's hidden state; in parts if the vocabulary is larger than `chunk`."""
        words = 0 if stack.vocabulary is None else stack.vocabulary.out_features
        if self.chunk is None or words <= self.chunk:
            return self(stack.leave(weights, batch, hidden), batch)
        final = stack.before_vocabulary(weights, batch, hidden)
        labels = self.labels(batch)
        wanted = labels != IGNORED
        weight, bias = (None if name is None else weights[name] for name in stack.vocabulary_names)
        parts = _Parts(lambda scores: stack.logits(batch, scores), self.chunk, labels[wanted])
        return _chunked().apply(final[wanted], weight, bias, parts) / self._divisor(labels, batch)

    def labels(self, batch: Batch) -> Tensor:
        """What each position is to predict."""
        import torch

        if "labels" not in batch:
            raise RecipeError("a batch has no labels; give them, or a loss of your own")
        labels: Tensor = batch["labels"]
        return torch.nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous() if self.shift else labels

    def _divisor(self, labels: Tensor, batch: Batch) -> Any:
        given = batch.get("divisor", self.tokens)
        return (labels != IGNORED).sum() if given is None else given


Loss = CrossEntropy | Callable[[Any, Batch], "Tensor"]  # of what a model returns for a batch, a scalar


@dataclass(frozen=True)
class _Parts:
    logits: Callable[[Tensor], Tensor]  # [1, tokens, words] -> the same shape
    chunk: int
    labels: Tensor  # [tokens]

    def each(self, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
        """Scores of a part of the vocabulary: [tokens, words]."""
        import torch

        for first in range(0, weight.shape[0], self.chunk):
            words = slice(first, min(first + self.chunk, weight.shape[0]))
            yield words, torch.nn.functional.linear(rows, weight[words], None if bias is None else bias[words])

    def final(self, scores: Tensor) -> Tensor:
        return self.logits(scores[None])[0].float()


def _chunked() -> Any:
    """The sum of losses as an operation with a gradient of its own; a class of torch's, so made when torch is there."""
    import torch

    class Chunked(torch.autograd.Function):  # type: ignore[misc]  # torch is untyped here
        @staticmethod
        def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None, parts: _Parts) -> Tensor:
            most = rows.new_full(rows.shape[:1], -torch.inf, dtype=torch.float32)
            total, chosen = torch.zeros_like(most), torch.zeros_like(most)
            for words, scores in parts.each(rows, weight, bias):
                logits = parts.final(scores)
                higher = torch.maximum(most, logits.amax(1))
                total = total * (most - higher).exp() + (logits - higher[:, None]).exp().sum(1)
                most = higher
                inside = _inside(parts.labels, words)
                chosen[inside] = logits[inside, parts.labels[inside] - words.start]
            ctx.save_for_backward(rows, weight, bias, most + total.log())
            ctx.parts = parts
            return (most + total.log() - chosen).sum()

        @staticmethod
        def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
            rows, weight, bias, log_total = ctx.saved_tensors
            to_rows = torch.zeros_like(rows, dtype=torch.float32)
            to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
            to_bias = torch.empty_like(bias) if bias is not None and ctx.needs_input_grad[2] else None
            for words, scores in ctx.parts.each(rows, weight, bias):
                leaf = scores.detach().requires_grad_()
                with torch.enable_grad():
                    logits = ctx.parts.final(leaf)
                gradient = (logits.detach() - log_total[:, None]).exp_()
                inside = _inside(ctx.parts.labels, words)
                gradient[inside, ctx.parts.labels[inside] - words.start] -= 1
                (scores,) = torch.autograd.grad(logits, leaf, gradient.mul_(upstream))
                to_rows += scores @ weight[words]
                if to_weight is not None:
                    torch.mm(scores.T, rows, out=to_weight[words])
                if to_bias is not None:
                    to_bias[words] = scores.sum(0)
            return to_rows.to(rows.dtype), to_weight, to_bias, None

    return Chunked


def _inside(labels: Tensor, words: slice) -> Tensor:
    """The positions whose label is one of these words."""
    return ((labels >= words.start) & (labels < words.stop)).nonzero()[:, 0]
