"""Votes of per-sample gradients of one tensor: collected while a layer goes backward, read when it is done.

    majority   v = sum_n sign(-g_n), int8 for up to 127 samples, int16 for up to 32767: exact
    mean       v = -sum_n g_n, fp32, summed in the order of the samples

Samples may belong to several tasks, one task's after the other's. Then each task's votes come to one sign, and either
these add up to a vote of the tasks, or each task's own signs are kept (`apart`). A gradient of zero abstains, as does a
NaN.

Of a linear layer on a GPU no gradient is made: there are its inputs X and the gradients G of its outputs. Votes are
counted by kernels/vote_gemm.py, all samples of a task in one launch, and sum_i g_i d_i for a step d is sum(G (X d^T)).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge import kernel
from streammerge.errors import RecipeError
from streammerge.kernels.numerics import Span
from streammerge.method import BLOCK
from streammerge.methods._precision import exact_products
from streammerge.methods._tally import NANS

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 1 << 24  # elements that torch looks at at once, on a GPU
SLOPE = 1 << 18  # elements of a step whose slope is taken at once
ROWS = 1 << 9  # rows of a step whose products with inputs are taken at once
MOST = {"int8": 127, "int16": 32767}  # samples of a task that a vote counts
TYPES = {"int8": "I8", "int16": "I16", "float32": "F32", "bfloat16": "BF16", "float16": "F16", "float64": "F64"}


def vote_dtype(tasks: Sequence[int]) -> str:
    """The smallest dtype whose votes count exactly.

    Raises:
        RecipeError: a task has more samples than any counts.
    """
    samples = max(np.bincount(np.asarray(tasks, np.int64)), default=0)
    for name, most in MOST.items():
        if samples <= most:
            return name
    raise RecipeError(f"{samples} samples of one task; votes count {MOST['int16']:,} at most")


class Ballot:
    """The gradients of one tensor, sample by sample; `signs` once all are in. `tasks` has the task of each sample."""

    def __init__(self, numel: int, tasks: Sequence[int], mean: bool, apart: bool, device: torch.device) -> None:
        self._numel, self._tasks, self._mean, self._apart, self._device = numel, tuple(tasks), mean, apart, device
        self._count = len(set(tasks))
        self._kind = vote_dtype(tasks)
        self._task = 0
        self._own: Tensor | None = None  # votes, or the summed gradient, of the task at hand
        self._found: dict[int, Tensor] = {}  # signs by task; a vote of all tasks so far at 0
        self._panels: list[tuple[int, Tensor, Tensor]] = []  # task, X [tokens, columns], G [tokens, rows]
        self._total: Tensor | None = None  # summed gradient of all samples, NaN as 0
        self.nans = 0

    @staticmethod
    def bytes_held(numel: int, tasks: Sequence[int], mean: bool, apart: bool, on_gpu: bool = False) -> int:
        """What gradients leave behind, and the pieces that signs are taken of."""
        several = len(set(tasks))
        votes = 4 if mean else np.dtype(vote_dtype(tasks)).itemsize
        kept = 0 if several == 1 else several if apart else 1
        return numel * (votes + kept + 4) + (8 * min(numel, PIECE) if on_gpu else 12 * min(numel, SLOPE))

    @staticmethod
    def panel_bytes(rows: int, columns: int, tokens: int, width: int) -> int:
        """What panels of so many tokens hold, of items of `width` bytes."""
        return width * tokens * (rows + columns)

    @staticmethod
    def counting_bytes(rows: int, columns: int, tokens: int, width: int, tasks: Sequence[int], apart: bool) -> int:
        """What it takes to count the votes of panels, and a step's slope: joined panels, votes, products of rows."""
        several = len(set(tasks))
        votes = np.dtype(vote_dtype(tasks)).itemsize + (0 if several == 1 else several if apart else 1)
        products = (4 * columns + 20 * tokens) * min(rows, ROWS) + 4 * tokens * columns
        return width * tokens * (rows + columns) + votes * rows * columns + products

    def add(self, gradient: Tensor, sample: int) -> None:
        """Take in one sample's gradient, which is not kept."""
        import torch

        own = self._of(self._tasks[sample])
        if self._total is None:
            self._total = torch.zeros(self._numel, dtype=torch.float32, device=self._device)
        flat = gradient.reshape(-1)
        if flat.is_cuda:
            self._add_there(flat, own, self._total)
            return
        from streammerge.kernels.host import ballot

        self.nans += ballot.add(_span(flat), _span(own), _span(self._total))

    def _add_there(self, flat: Tensor, own: Tensor, total: Tensor) -> None:
        """The same by torch, on a GPU."""
        import torch

        for part in _parts(self._numel, PIECE):
            piece = flat[part]
            self.nans += int(piece.isnan().sum())
            total[part] += piece.nan_to_num(0.0, torch.inf, -torch.inf)
            if self._mean:
                own[part] += piece
            else:
                own[part] += (piece < 0).view(torch.int8)
                own[part] -= (piece > 0).view(torch.int8)

    def add_panel(self, inputs: Tensor, outputs: Tensor, sample: int) -> None:
        """Take in what one sample's gradient of a linear layer is made of; both are kept."""
        self._panels.append((self._tasks[sample], inputs, outputs))

    def close(self, queue: Any = None) -> None:
        """All samples are in."""
        for task in sorted({task for task, _, _ in self._panels}):
            self._count_panels(task, queue)
        for task in range(self._count if self._apart else 1):
            if task not in self._found and not (self._own is not None and task == self._task):
                self._of(task)  # no gradient came: everything abstains
        self._fold()

    def signs(self, queue: Any = None) -> list[Span]:
        """What a mask takes as signs, valid as long as the ballot lives: votes, or a gradient."""
        return [_span(self._found[task], queue) for task in sorted(self._found)]

    def slope(self, delta: Callable[[slice], Tensor]) -> float:
        """sum_i g_i d_i over the samples' summed gradient; `delta` gives a part of the step d, flat and fp32."""
        if self._panels:
            return self._slope_of_panels(delta)
        total = self._total
        return 0.0 if total is None else math.fsum(_dot(total[part], delta(part)) for part in self._pieces())

    def _pieces(self) -> Iterator[slice]:
        return _parts(self._numel, SLOPE if self._device.type == "cpu" else PIECE)

    def _of(self, task: int) -> Tensor:
        """The votes of a task that begins, or goes on."""
        import torch

        if self._own is None or task != self._task:
            self._fold()
            kind = torch.float32 if self._mean else getattr(torch, self._kind)
            self._own, self._task = torch.zeros(self._numel, dtype=kind, device=self._device), task
        return self._own

    def _fold(self) -> None:
        """What becomes of a task's votes: where there are several tasks, one sign."""
        import torch

        own, self._own = self._own, None
        if own is None:
            return
        if self._count == 1:
            self._found[0] = own
            return
        signs = torch.empty(self._numel, dtype=torch.int8, device=self._device)
        for part in self._pieces():
            piece = own[part]
            signs[part] = (piece > 0).view(torch.int8) - (piece < 0).view(torch.int8)
        if own.is_floating_point():
            signs.neg_()
        place = self._task if self._apart else 0
        if place in self._found:
            self._found[place] += signs
        else:
            self._found[place] = signs

    def _count_panels(self, task: int, queue: Any) -> None:
        """One launch for all samples of a task."""
        import torch

        inputs, outputs, offsets = self._joined(task)
        own = self._of(task)
        if own.is_floating_point():
            self._own = own = torch.zeros(self._numel, dtype=torch.int8, device=self._device)
        counts = np.zeros(4, np.int64)
        spans = [_span(each, queue) for each in (own, outputs, inputs)]
        kernel.run("vote_gemm", *spans, offsets, outputs.shape[1], self._mean, counts)
        if queue is not None:
            queue.finish()
        self.nans += int(counts[NANS])

    def _joined(self, task: int) -> tuple[Tensor, Tensor, Any]:
        """Inputs and outputs of a task's samples below each other, and where each begins."""
        import torch

        mine = [(inputs, outputs) for of, inputs, outputs in self._panels if of == task]
        offsets = np.cumsum([0, *(len(inputs) for inputs, _ in mine)])
        return torch.cat([i for i, _ in mine]), torch.cat([o for _, o in mine]), offsets

    def _slope_of_panels(self, delta: Callable[[slice], Tensor]) -> float:
        rows, columns = self._panels[0][2].shape[1], self._panels[0][1].shape[1]
        found = 0.0
        for part in _parts(rows, ROWS):
            step = delta(slice(part.start * columns, part.stop * columns)).view(-1, columns)
            with exact_products():
                for _, inputs, outputs in self._panels:
                    made = inputs.float() @ step.T
                    found += float((made.double() * outputs[:, part].double()).sum())
        return found


def _span(values: Tensor, queue: Any = None) -> Span:
    return Span(values.data_ptr(), TYPES[str(values.dtype).removeprefix("torch.")], values.numel(), queue)


def _dot(gradient: Tensor, step: Tensor) -> float:
    """Products and sum in fp64, the sum per block."""
    if gradient.is_cuda:
        return float(gradient.double() @ step.double())
    sums = np.empty((-(-gradient.numel() // BLOCK), 3))
    kernel.run("norms_and_dots", (_span(gradient), _span(step)), None, BLOCK, sums)
    return math.fsum(sums[:, 1])


def _parts(numel: int, size: int) -> Iterator[slice]:
    for first in range(0, numel, size):
        yield slice(first, min(first + size, numel))
