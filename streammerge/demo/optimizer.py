"""Muon for the matrices of the layers, AdamW for the rest: in as many steps, a short training gets further.

    M <- 0.95 M + 0.05 G;   step = rate * sqrt(max(1, rows / columns)) * orthogonal(0.95 M + 0.05 G)

orthogonal(X) pushes all singular values of X to about one by five steps of the odd polynomial 3.4445 X -
4.7750 (X X^T) X + 2.0315 (X X^T)^2 X. Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/.
Matrices of one shape are stacked and multiplied in one batch.
"""

from __future__ import annotations

from collections import defaultdict
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

MOMENTUM = 0.95
POLYNOMIAL = (3.4445, -4.7750, 2.0315)
ITERATIONS = 5


class Optimizer:
    """Steps a model's weights along their gradients. Final."""

    def __init__(self, model: Any, matrix_rate: float, other_rate: float) -> None:
        import torch

        matrices = [w for name, w in model.named_parameters() if ".layers." in name and w.ndim == 2]
        chosen = {id(weight) for weight in matrices}
        self.weights: list[torch.Tensor] = list(model.parameters())
        others = [weight for weight in self.weights if id(weight) not in chosen]
        self.adam: Any = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0)
        self.matrix_rate, self.other_rate = matrix_rate, other_rate
        by_shape: dict[tuple[int, ...], list[torch.Tensor]] = defaultdict(list)
        for weight in matrices:
            by_shape[tuple(weight.shape)].append(weight)
        self.stacks = [(stack, torch.zeros(len(stack), *shape)) for shape, stack in by_shape.items()]

    def step(self, factor: float) -> None:
        """One step at `factor` times the highest rates; clears the gradients."""
        import torch

        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        for group in self.adam.param_groups:
            group["lr"] = self.other_rate * factor
        self.adam.step()
        with torch.no_grad():
            for stack, momentum in self.stacks:
                gradient = torch.stack([weight.grad for weight in stack if weight.grad is not None])
                momentum.lerp_(gradient, 1 - MOMENTUM)
                steps = orthogonal(gradient.lerp_(momentum, MOMENTUM))
                rows, columns = momentum.shape[1:]
                rate = self.matrix_rate * factor * max(1.0, rows / columns) ** 0.5
                for weight, change in zip(stack, steps, strict=True):
                    weight.sub_(change, alpha=rate)
        for weight in self.weights:
            weight.grad = None


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """[n, rows, columns]: each matrix with its singular values brought near one (0.7 to 1.2)."""
    a, b, c = POLYNOMIAL
    tall = matrices.shape[1] > matrices.shape[2]
    x = matrices.transpose(1, 2) if tall else matrices
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x
