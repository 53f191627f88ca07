"""What a method does in a sweep over the layers, and what it is shown there.

    every layer's weights are resident once per direction; while they are:
    weights   they may be replaced by composed ones                      (aTLAS)
    learn     a tensor's gradient, as soon as the backward pass has it   (GradFix: one vote per sample; aTLAS: dots)
    emit      the stage is finished; write, or work on the layer alone   (GradFix, aTLAS; FDA)
    step      the sweep is over                                          (aTLAS: the next one uses other weights)

Names are the checkpoint's. Nothing that a sweep computes depends on what `emit` writes elsewhere: all of it is
evaluated at the weights as they were loaded or composed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from streammerge.method import Cost
from streammerge.models.stage import Stage

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Loaded:
    """A stage whose weights are resident. The memory is used again for another stage: keep copies, no references."""

    stage: Stage
    parameters: dict[str, Tensor]  # what the model runs with, by its own names
    weights: dict[str, Tensor]  # the same memory as the checkpoint's tensors, in the dtype that is computed in
    fresh: tuple[str, ...]  # those of the weights that were loaded, or are to be composed, for this visit
    raw: dict[int, dict[str, Tensor]] = field(default_factory=dict)  # checkpoint k's tensors, in their own dtype


class Hooks:
    """Does nothing at any stage. Subclasses say what they need and override what they do."""

    gradients: Literal["none", "sum", "each"] = "none"  # of every tensor: none, over all batches, or of each batch
    panels = False  # for the weights of linear layers inside layers call `panel`, not `learn`

    def reads(self, stage: Stage, backward: bool) -> Sequence[int]:
        """Which of the run's checkpoints are wanted beside the weights, as they are stored (`Loaded.raw`)."""
        return ()

    def composes(self, stage: Stage) -> bool:
        """Whether `weights` writes all of this stage's weights, so that none are read for it."""
        return False

    def wants(self, stage: Stage, source: int, names: Sequence[str], backward: bool) -> Sequence[str]:
        """Which of these tensors of a checkpoint that `reads` names are read."""
        return names

    def cost(self, stage: Stage, backward: bool) -> Cost:
        """Bytes that the method itself holds while this stage is resident."""
        return Cost()

    def weights(self, loaded: Loaded, backward: bool) -> None:
        """The stage was loaded. If it is composed, all of `loaded.fresh` must be written now; else nothing may be."""

    def passes(self, loaded: Loaded, batch: int) -> None:
        """A batch is about to run through a stage, if no gradients are wanted; batches come in rising order.

        Weights that are composed may be written anew.
        """

    def turned(self, losses: Sequence[float]) -> None:
        """All losses are known, and nothing was emitted yet."""

    def learn(self, stage: Stage, name: str, gradient: Tensor, batch: int | None) -> None:
        """A gradient of the loss, shaped like the tensor; its memory is free again afterwards.

        `batch` is the number of the batch for "each", in the dtype of the weights; None for "sum", fp32 at least.
        Batches come in rising order for every tensor. A tensor without a gradient (an expert that no token was sent
        to) is not shown, or shows zeros if it is run as a part of a stacked one.
        """

    def panel(self, stage: Stage, name: str, inputs: Tensor, outputs: Tensor, batch: int) -> None:
        """A linear layer's inputs [tokens, columns] and the gradient of its outputs [tokens, rows]:
        the gradient of its weight [rows, columns] is outputs^T inputs. Layers that read the same input (queries, keys,
        values) are shown the same tensor.
        """

    def emit(self, loaded: Loaded) -> None:
        """All gradients of the stage's tensors were shown: head first, layers from the last to the first, embedding."""

    def step(self, losses: Sequence[float]) -> None:
        """The sweep is over; one loss per batch."""
