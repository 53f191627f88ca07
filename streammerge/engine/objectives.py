"""What coefficients are learned for, beside cross-entropy: objectives that need no labels.

    entropy    - sum_v p_v log p_v, the mean over the positions that have a label: they say where, not what

A batch's "divisor" is what its sum is divided by: the positions of a whole step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from streammerge.engine.layers_loss import IGNORED, CrossEntropy
from streammerge.models.stack import Batch

if TYPE_CHECKING:
    from torch import Tensor


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
