"""What coefficients are learned for, beside cross-entropy: objectives that need no labels.

    entropy        - sum_v p_v log p_v, the mean over the positions that have a label: they say where, not what
    pseudo_label   trusted samples: cross-entropy with the tokens that the model itself predicted there
                   others:  - [max_v q_v > w] sum_v q_v log p_v,   q = p^0.5 / sum p^0.5, without a gradient of its own

Pseudo labels are those of arXiv:2407.02880, App. E, where an image has a class. Here a sample's class is the tokens
that are predicted at its labels, and its confidence their mean log-probability. Before every epoch all samples are
looked at and, of N samples in C classes, the min(N / C, 100) most confident of each class are trusted. A quarter of a
step is of trusted samples; w rises from 0.9 to 1. Text has no weak and strong views: p is both. A batch's "divisor" is
what its sum is divided by: the positions of a whole step, also where few of them pass w.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from streammerge.engine.layers_loss import IGNORED, CrossEntropy
from streammerge.models.stack import Batch

if TYPE_CHECKING:
    from torch import Tensor

MOST = 100  # trusted samples of a class


def scores(output: Any, batch: Batch) -> Tensor:
    """Logarithms of the probabilities at the positions that have a label: [positions, words], fp32."""
    import torch

    wanted = CrossEntropy().labels(batch) != IGNORED
    return torch.log_softmax(output.logits[wanted].float(), -1)


def entropy(output: Any, batch: Batch) -> Tensor:
    """The mean entropy of the predictions."""
    found = scores(output, batch)
    total: Tensor = -(found.exp() * found).sum() / batch.get("divisor", len(found))
    return total


def flatten(p: Tensor) -> Tensor:
    """Probabilities to the power of one half: (0.9, 0.1) becomes (0.75, 0.25)."""
    root = p.sqrt()
    return root / root.sum(-1, keepdim=True)


def pseudo_label(output: Any, batch: Batch) -> Tensor:
    """A trusted batch has the labels of the last look; another one has a "threshold"."""
    if "threshold" not in batch:
        return CrossEntropy()(output, batch)
    found = scores(output, batch)
    q = flatten(found.detach().exp())
    passed = q.amax(-1) > batch["threshold"]
    total: Tensor = -((q * found).sum(-1) * passed).sum() / batch["divisor"]
    return total


def trusted(classes: Sequence[Hashable], confidence: Sequence[float], most: int = MOST) -> list[int]:
    """The samples to trust: of every class the most confident ones, its share of all, but at most `most`."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for number, each in enumerate(classes):
        members[each].append(number)
    share = max(1, min(len(classes) // max(1, len(members)), most))
    found = [sorted(some, key=lambda at: (-confidence[at], at))[:share] for some in members.values()]
    return sorted(number for some in found for number in some)


@dataclass
class Look:
    """As a loss of a forward pass: what the model predicts at the labels of every sample, in the order they come."""

    tokens: list[list[int]] = field(default_factory=list)
    confidence: list[float] = field(default_factory=list)

    def __call__(self, output: Any, batch: Batch) -> Tensor:
        found, sizes = scores(output, batch), (CrossEntropy().labels(batch) != IGNORED).sum(1).tolist()
        best = found.max(-1)
        for values, tokens in zip(best.values.split(sizes), best.indices.split(sizes), strict=True):
            self.tokens.append(tokens.tolist())
            self.confidence.append(float(values.mean()))
        return -best.values.sum() / batch.get("divisor", len(found))
