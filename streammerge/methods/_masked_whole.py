"""Masked task vectors of several models, merged by a rule that must see whole tensors.

    ties   of each task vector the ceil(n / 5) largest magnitudes stay (of equal ones, the first); the sign of an
           element is the one that more of them have (+ if as many); the mean of those that have it
    tsvm   tsvm.py, for what counts as a matrix there; the mean elsewhere

TIES as GradFix's authors have it: trimmed per tensor and elected by count, where ties.py elects by summed magnitude.
merge_then_mask merges the task vectors and masks the result, mask_then_merge masks each one first.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge import kernel
from streammerge.errors import CheckpointError
from streammerge.method import Flags, TensorMethod, Tile
from streammerge.methods._masked import Masked, Signs
from streammerge.methods._matrices import ADD, LIBRARY, Solver
from streammerge.methods._precision import exact_products, span
from streammerge.methods._tally import KEPT, LOST, NANS, TIES, Noted, Tally
from streammerge.methods.tsvm import Tsvm

if TYPE_CHECKING:
    from torch import Tensor

SHARE = 5  # one of so many elements stays in a TIES merge


def is_matrix(name: str, shape: tuple[int, ...], sources: int) -> bool:
    """Whether tsvm takes a tensor as a matrix."""
    return isinstance(Tsvm().for_tensor(name, shape, sources), Tsvm)


@dataclass(frozen=True)
class MaskedWhole(Masked, TensorMethod):
    """Several task vectors merged by `how`: ties or tsvm."""

    summary = "masked task vectors, merged as whole tensors, on top of another model"

    how: str

    def solver_name(self, shape: tuple[int, ...], experts: int) -> str:
        return self.how

    def rounds(self, experts: int) -> int:
        return self.sources

    def reads(self, number: int, experts: int) -> tuple[int, ...] | None:
        """A task vector's two models in each round, and the signs where they are applied."""
        source = self.sources + 1
        if number >= self.sources:
            return (0, source + 1) if self.voters and not self.apart else (0,)
        votes = (source + 1 + number % self.voters,) if self.voters and self.apart else ()
        return (number + 1, source, *votes)

    def survey(self, shape: tuple[int, ...], experts: int) -> Together:
        importlib.import_module("torch")
        return Together(self, shape)

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        numel = math.prod(shape)
        if self.how == "tsvm":
            return 4 * numel + Tsvm().bytes_kept(shape[0], shape[1], self.sources) + LIBRARY
        return (4 * (self.sources + 3) + 2) * numel

    def solver(self, shape: tuple[int, ...]) -> Solver:
        return Tsvm().solver(shape[0], shape[1], self.sources) if self.how == "tsvm" else CountedTies(self.sources)

    def _part(self, tile: Tile, survey: Together, noted: Noted) -> None:
        assert tile.out is not None
        queue, stop = tile.out.queue, tile.start + tile.numel
        delta = span(survey.delta, queue, tile.start, stop)
        if self.apart:
            with survey.working():
                downhill = -survey.delta[tile.start : stop]
            signs, rule, counted = span(downhill, queue), "agreement", (KEPT, LOST)
            noted.found(self._step(tile, delta, None, signs, rule, self.alpha, noted, counted), (0,))
            return
        vote = Signs(tile, tile.experts[-1:] if self.voters else ())
        noted.found(self._step(tile, delta, None, vote.spans[0], self.rule, self.alpha, noted), (0,))


class Together(Tally):
    """Collects one task vector per round, masked if each is, and hands it to the rule that merges them."""

    in_order = True

    def __init__(self, method: MaskedWhole, shape: tuple[int, ...]) -> None:
        super().__init__(math.prod(shape), method.sources if method.apart else 1, method.alpha)
        self._method, self._shape = method, shape
        self._solver = method.solver(shape)
        self._queue: Any = None
        self._values: Tensor | None = None
        self._number = 0
        self.delta: Tensor  # flat

    def look(self, tile: Tile) -> tuple[str, Flags]:
        expert, source, *signs = tile.experts
        if self._values is None:
            self._queue = self._solver.queue = expert.queue
            self._values = self._room()
        target = span(self._values, self._queue, tile.start, tile.start + tile.numel)
        if not self._method.apart:
            return tile.name, kernel.run("add_deltas", target, source, (expert,), ADD)
        noted = Noted()
        vote, counts = Signs(tile, signs), noted.count((TIES, NANS))
        flags = kernel.run("sign_mask", target, target, expert, source, vote.spans[0], self._method.rule, 1.0, counts)
        self.take(noted, late=self._queue is not None)
        return tile.name, flags[1:3]

    def _room(self) -> Tensor:
        import torch

        with self.working():
            return torch.zeros(math.prod(self._shape), device="cpu" if self._queue is None else self._queue.device)

    @contextmanager
    def working(self) -> Iterator[None]:
        """Torch's operations in turn with the kernels', and exact."""
        with exact_products(), nullcontext() if self._queue is None else self._queue.current():
            yield

    def settle(self, partials: Sequence[Any]) -> bool:
        for name, flags in partials:
            if np.any(flags):
                raise CheckpointError(
                    f"tensor {name!r} of model {self._number + 1} or of its base holds a NaN or an infinity; such "
                    f"task vectors cannot be merged by {self._method.how}, mend it or leave the model out"
                )
        assert self._values is not None
        with self.working():
            self._solver.take(self._number, self._values.view(self._shape))
        self._values = None
        self._number += 1
        if self._number < self._method.sources:
            return False
        with self.working():
            self.delta = self._solver.finish().contiguous().view(-1)
        del self._solver
        return True

    def release(self) -> None:
        del self.delta


class CountedTies(Solver):
    """Trim each, elect signs by count, average those that agree."""

    def __init__(self, sources: int) -> None:
        self._sources = sources
        self._trimmed: list[Tensor] = []

    def take(self, expert: int, delta: Tensor) -> None:
        self._trimmed.append(trim(delta.view(-1)))
        self._shape = delta.shape

    def finish(self) -> Tensor:
        import torch

        total = torch.zeros_like(self._trimmed[0])
        for each in self._trimmed:
            total += each.sign()
        up = total >= 0
        total.zero_()
        count = torch.zeros_like(total)
        while self._trimmed:
            each = self._trimmed.pop(0)
            agrees = torch.where(up, each > 0, each < 0)
            count += agrees
            total += each.mul_(agrees)
        return (total / count.clamp_(min=1)).view(self._shape)


def trim(delta: Tensor) -> Tensor:
    """The largest magnitudes of a flat task vector, the others 0; in place."""
    sizes = delta.abs()
    keep = -(-delta.numel() // SHARE)
    if not delta.numel():
        return delta
    rank = delta.numel() - keep  # from the smallest, from 0
    bound = sizes.kthvalue(rank + 1).values if sizes.is_cuda else np.partition(sizes.numpy(), rank)[rank]
    if bound == 0:
        return delta
    equal = (sizes == bound).nonzero().view(-1)
    larger = int((sizes > bound).sum())
    delta[sizes < bound] = 0
    delta[equal[keep - larger :]] = 0
    return delta
