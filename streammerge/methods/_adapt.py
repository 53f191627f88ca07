"""Adaptation: a unit's weights learn what all experts return on their own anchors.

    loss = sum over experts i and their anchors x of the distance between unit(x; theta) and unit_i(x)

    weights       theta itself, by Adam
    coefficients  theta = theta_0 + sum_k alpha_k * move_k, entry by entry, by Adam on alpha: one move, the merged
                  start minus the base, from alpha = 1; or one per expert, its task vector, from its weight there
    closed form   each matrix for itself, with the inputs X_i that it has while expert i runs on its anchors:
                  W = W_0 + (sum_i tau_i X_i^T X_i) (X^T X + lambda I)^-1, X all of them below each other

The distance is minus the cosine of all that a unit returns for one anchor, or the squared or absolute difference.
Adam's steps on alpha are made on theta: an entry that no move has changed stays as it is, to the bit. A tensor's step
is made as soon as its gradient is whole, and the gradient is gone before the next tensor's.

When to stop: after every epoch the same distance is taken on what is not learned from, anchors that are held out or
real inputs (`Trial`). The best weights are kept; PATIENCE epochs without better ones are the end.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from streammerge.errors import RecipeError
from streammerge.methods._anchors import BETAS, EPS
from streammerge.methods._induced import Tensors
from streammerge.methods._precision import exact_products
from streammerge.methods._whole_unit import Run

if TYPE_CHECKING:
    from torch import Tensor

PIECE = 1 << 22  # elements of a tensor that Adam works on at a time
PATIENCE = 3  # epochs without a better trial, after which adaptation stops


Trial = Callable[[], Iterable[tuple["Tensor", Sequence["Tensor"]]]]  # inputs, and what some experts return for them


def distances(y: Tensor, wanted: Tensor, distance: str) -> Tensor:
    """One for each anchor."""
    import torch

    flat, target = y.flatten(1), wanted.flatten(1)
    if distance == "l2":
        return (flat - target).square().sum(1)
    if distance == "l1":
        return (flat - target).abs().sum(1)
    return -torch.nn.functional.cosine_similarity(flat, target, dim=1)


@dataclass(frozen=True)
class Course:
    """How long adaptation goes on, and how far a step is."""

    lr: float
    epochs: int
    steps: int  # instead of epochs, if not 0
    batch: int
    held_out: float  # share of each expert's anchors that only decides when to stop
    rows: int  # tokens of a micro-batch
    distance: str


class Adaptation:
    """One unit's. `theta` is changed in place; `kept` are the best weights where something is tried."""

    def __init__(
        self,
        run: Run,
        theta: dict[str, Tensor],
        moves: Sequence[Tensors],
        anchors: Sequence[Tensor],
        targets: Sequence[Tensor],
        course: Course,
        trial: Trial | None = None,
    ) -> None:
        """`moves` are empty where weights are learned; anchors and targets are one tensor for each expert.

        `trial` decides when to stop, in place of held-out anchors.
        """
        import torch

        self._run, self._course = run, course
        self.theta = {name: value.detach().requires_grad_() for name, value in theta.items()}
        self._steps_now = False  # as soon as a tensor's gradient is whole, so that no two need be kept
        me = weakref.ref(self)  # a cycle through a tensor's hook would never be freed
        for name, value in self.theta.items():
            value.register_post_accumulate_grad_hook(partial(_take, me, name))
        self._moves = moves
        sets: Sequence[Tensors] = moves or [theta]
        self._moments = [
            {name: (torch.zeros_like(theta[name]), torch.zeros_like(theta[name])) for name in each} for each in sets
        ]
        self._anchors, self._targets = anchors, targets
        held = [math.ceil(course.held_out * len(x)) if course.held_out else 0 for x in anchors]
        pairs = [np.column_stack([np.full(len(x), i), np.arange(len(x))]) for i, x in enumerate(anchors)]
        self._train = np.concatenate([some[: len(some) - held[i]] for i, some in enumerate(pairs)])
        self._held = np.concatenate([some[len(some) - held[i] :] for i, some in enumerate(pairs)])
        self._micro = max(1, course.rows // max(1, math.prod(anchors[0].shape[1:-1])))
        self._step = 0
        self._trial = trial or (self._held_out if len(self._held) else None)
        self.kept = {name: value.detach().clone() for name, value in theta.items()} if self._trial else theta

    @property
    def everything(self) -> np.ndarray:
        """(expert, anchor) of all that is learned from."""
        return self._train

    @property
    def total(self) -> int:
        """Steps, unless a trial ends it."""
        return self._course.steps or self._course.epochs * -(-len(self._train) // self._course.batch)

    def run(
        self, order: Callable[[int], np.random.Generator], told: Callable[[int, int, float], None]
    ) -> tuple[list[float], list[float]]:
        """The mean loss of every epoch, and that of the trial before the first and after every epoch.

        `order(epoch)` draws the order of anchors; `told` hears the number of steps done, of all, and a loss.

        Raises:
            RecipeError: the loss is no number.
        """
        course, count = self._course, len(self._train)
        total = self.total
        losses: list[float] = []
        tried = [self.look()] if self._trial else []
        while self._step < total:
            chosen = order(len(losses)).permutation(count)
            seen = loss = 0.0
            for at in range(0, count, course.batch):
                if self._step == total:
                    break
                some = self._train[chosen[at : at + course.batch]]
                loss += self.step(some)
                seen += len(some)
                told(self._step, total, loss / seen)
            losses.append(loss / seen)
            if not math.isfinite(losses[-1]):
                raise RecipeError(f"the adaptation loss is {losses[-1]}; give a smaller adapt_lr")
            if self._trial and self._is_over(tried):
                break
        return losses, tried

    def _is_over(self, tried: list[float]) -> bool:
        tried.append(self.look())
        if tried[-1] <= min(tried):
            for name, value in self.kept.items():
                value.copy_(self.theta[name].detach())
        return len(tried) - 1 - tried.index(min(tried)) >= PATIENCE

    def step(self, some: np.ndarray) -> float:
        """One step of Adam on a batch; the sum of its distances."""
        import torch

        total = 0.0
        self._step += 1
        for at in range(0, len(some), self._micro):
            x, wanted = self._pick(some[at : at + self._micro])
            self._steps_now = at + self._micro >= len(some)
            with torch.enable_grad(), exact_products():
                loss = distances(self._run(x, self.theta), wanted, self._course.distance).sum()
                loss.backward()
            total += 0.0 if loss.is_meta else float(loss.detach())
        return total

    def take(self, name: str, leaf: Tensor) -> None:
        """The gradient of a tensor is there, for one micro-batch or for all."""
        import torch

        if self._steps_now:
            assert leaf.grad is not None
            with torch.no_grad():  # nothing behind this point reads the tensor; others of its block may be read yet
                self._adam(name, leaf.data, leaf.grad)
            leaf.grad = None

    def _adam(self, name: str, value: Tensor, gradient: Tensor) -> None:
        """Adam's step on one tensor, in pieces, so that nothing else takes its size."""
        size = self._course.lr / (1 - BETAS[0] ** self._step)
        scale = 1 - BETAS[1] ** self._step
        pairs = [moments[name] for moments in self._moments]
        for at in range(0, value.numel(), PIECE):
            now, g, *rest = (
                each.view(-1)[at : at + PIECE]
                for each in (
                    value,
                    gradient.contiguous(),
                    *(m[name] for m in self._moves),
                    *(x for p in pairs for x in p),
                )
            )
            moves, moments = rest[: len(self._moves)], rest[len(self._moves) :]
            change = None
            for number, (m, v) in enumerate(zip(moments[::2], moments[1::2], strict=True)):
                slope = g * moves[number] if moves else g
                m.lerp_(slope, 1 - BETAS[0])
                v.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
                step = (v / scale).sqrt_().add_(EPS).reciprocal_().mul_(m).mul_(-size)
                step = step.mul_(moves[number]) if moves else step
                change = step if change is None else change.add_(step)
            now.add_(change)

    def look(self) -> float:
        """The mean distance of a trial."""
        import torch

        assert self._trial is not None
        found, count = 0.0, 0
        with torch.no_grad(), exact_products():
            for x, several in self._trial():
                y = self._run(x, self.theta)
                for wanted in several:
                    far = distances(y, wanted, self._course.distance).sum()
                    found += 0.0 if far.is_meta else float(far)
                count += len(x) * len(several)
                del x, several, y, wanted  # before the next ones come
        return found / count

    def _held_out(self) -> Iterator[tuple[Tensor, list[Tensor]]]:
        for at in range(0, len(self._held), self._micro):
            x, wanted = self._pick(self._held[at : at + self._micro])
            yield x, [wanted]

    def _pick(self, some: np.ndarray) -> tuple[Tensor, Tensor]:
        """Anchors and targets of a micro-batch, expert by expert."""
        import torch

        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for expert in np.unique(some[:, 0]):
            for held, every in zip(found, (self._anchors[expert], self._targets[expert]), strict=True):
                held.append(every[torch.from_numpy(some[some[:, 0] == expert, 1]).to(every.device)])
        return torch.cat(found[0]), torch.cat(found[1])


def _take(adaptation: Callable[[], Adaptation | None], name: str, leaf: Tensor) -> None:
    found = adaptation()
    assert found is not None
    found.take(name, leaf)


def closed_form(inputs: Sequence[Tensor], moved: Sequence[Tensor], ridge: float) -> Tensor:
    """W - W_0 [rows, columns] from each expert's inputs [n, columns] and what its task vector makes of them [n, rows].

    lambda is `ridge` times the mean eigenvalue of X^T X. Solved on the smaller side, in fp64.
    """
    import torch

    x, z = torch.cat(list(inputs)).double(), torch.cat(list(moved)).double()
    count, columns = x.shape
    small = x @ x.T if count < columns else x.T @ x
    scale = float(small.diagonal().sum()) / columns
    small.diagonal().add_(max(ridge * scale, 1e-12 * scale))
    found = torch.linalg.solve(small, x).T @ z if count < columns else torch.linalg.solve(small, x.T @ z)
    return found.T.float()
