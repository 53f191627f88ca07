"""SVC: the singular values of a merge, calibrated against the experts. Works on the merge of any method.

    Delta   = merged - base, [m, n], as the method gives it, with left singular vectors u_r
    tau_i   = expert_i - base
    s_ir    = <u_r^T Delta, u_r^T tau_i> / |u_r^T tau_i|^2          how much of task i is in direction r, 1: all of it
    gamma_r = T / sum_i max(floor, s_ir)
    merged' = base + sum_r gamma_r u_r u_r^T Delta            Li et al. 2026, arXiv:2602.05536, and lyymuwu/SVC da4d9c2

Weights, scales and densities are the method's: they are in Delta, and task vectors count without them. The floor is
1 / T, and 1 for tsvm, unless it is given. Where a task has nothing in a direction (or the direction no singular value),
s_ir is the floor. fusion_bench 54c9e8c projects each task on its own singular vectors instead. Where singular values
are equal, as all of iso_c's and iso_cts's are, directions are not defined: rounding chooses them, here as in the
authors' code.

Matrices are calibrated: tensors with two dimensions, both above 1, without embeddings and head. All others are what the
method gives. Delta and the task vectors are rounded to fp32 once; the merge is not rounded to the output's type before
it is calibrated.
"""

from __future__ import annotations

import importlib
import math
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.errors import CheckpointError, RecipeError
from streammerge.kernels.numerics import Span
from streammerge.method import Cost, Flags, Post, Survey, TensorMethod, Tile, TileMethod, is_vocabulary, param
from streammerge.methods import _spectra as spectra
from streammerge.methods._keeping import add_product, directions, inverted, matrices_bytes, spectrum_bytes
from streammerge.methods._matrices import ADD, LIBRARY, norm
from streammerge.methods._memory import give_back
from streammerge.methods._precision import exact_products, span
from streammerge.methods.task_arithmetic import TaskArithmetic
from streammerge.methods.tsvm import Tsvm

if TYPE_CHECKING:
    from torch import Tensor

PRODUCTS = 4  # matrices that a calibration holds beside Delta and the task vectors: a basis and what is seen through it


@dataclass(frozen=True)
class Svc(Post):
    """Calibrated singular values."""

    summary = "singular values of the merge, calibrated against the experts"
    source = "Li et al. 2026, arXiv:2602.05536"
    kernels = ("add_deltas", "apply_delta")
    shared_bytes = LIBRARY

    floor: float = param(0.0, "least share of a task that counts as present; 0: 1 / experts, or 1 for tsvm")
    embeddings: bool = param(False, "calibrate embeddings and head too")
    norm_guard: float = param(0.0, "cap on a matrix's displacement, in norms of its longest task vector; 0: none")

    before: int = 0  # rounds that the method's own survey of this tensor takes; `for_tensor` says

    def __post_init__(self) -> None:
        for name, value in (("floor", self.floor), ("norm_guard", self.norm_guard)):
            if value < 0:
                raise RecipeError(f"svc: {name} is {value}; it must be 0 or more")

    def uses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.of.uses(), *self.kernels)))

    def refusal(self, device: str) -> str:
        here = "" if device == "cpu" else "with svc runs on the CPU so far; give --device cpu"
        return self.of.refusal(device) or here

    def solver_name(self, shape: tuple[int, ...], experts: int) -> str:
        of = self.of
        plain = type(of).__module__.rpartition(".")[2]
        return f"svc after {of.solver_name(shape, experts) if isinstance(of, TensorMethod) else plain}"

    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> TileMethod:
        of = self.of.for_tensor(name, shape, experts)
        if len(shape) != 2 or min(shape) < 2 or (is_vocabulary(name) and not self.embeddings):
            return of
        importlib.import_module("torch")  # now, so that the plan counts what it takes
        least = self.floor or (1.0 if isinstance(self.of, Tsvm) and isinstance(of, TensorMethod) else 1.0 / experts)
        before = 0 if of.survey(shape, experts) is None else of.rounds(experts)
        return replace(self, of=of, floor=least, before=before)

    def keeps_equal(self) -> bool:
        return self.of.keeps_equal()

    def rounds(self, experts: int) -> int:
        return self.before + 1

    def reads(self, number: int, experts: int) -> tuple[int, ...] | None:
        if number > self.before:
            return (0,)
        return self.shown(number, experts) if number < self.before else None

    def shown(self, number: int, experts: int) -> tuple[int, ...] | None:
        """What round `number` of the method's own survey looks at; behind the last, its merge."""
        found = self.of.reads(number, experts)
        return found if found is None or self.of.takes_base() else tuple(which + 1 for which in found)

    def grain(self, shape: tuple[int, ...]) -> int:
        return self.of.grain(shape)

    def cost(self, numel: int, experts: int, device: str) -> Cost:
        return self.of.cost(numel, experts, device)

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey:
        return _Survey(self, self.of.survey(shape, experts) if self.before else None, shape, experts)

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        rows, columns = shape
        inner = self.of.survey_bytes(shape, experts, threads) if self.before else 0
        work = max(spectrum_bytes(rows, columns), matrices_bytes(rows, columns, PRODUCTS)) + LIBRARY
        return matrices_bytes(rows, columns, experts + 1) + max(inner, work)

    def merge(self, tile: Tile, survey: _Survey) -> Flags:
        assert tile.out is not None
        delta = span(survey.delta, tile.out.queue, tile.start, tile.start + tile.numel)
        kernel.run("apply_delta", tile.out, tile.base, delta, 1.0)
        return survey.flags


class _Survey(Survey):
    """The method's own survey; then one round in which its merge and the task vectors are collected."""

    def __init__(self, method: Svc, inner: Survey | None, shape: tuple[int, ...], experts: int) -> None:
        self._method, self._inner, self._shape, self._experts = method, inner, shape, experts
        self.wants_sample = inner is not None and inner.wants_sample
        self.in_order = inner is not None and inner.in_order
        self._round = 0
        self._asking = inner is not None  # the method's own survey is not settled yet
        self._ranks: npt.NDArray[np.int64] | None = None
        self._lock = threading.Lock()
        self._rows: Tensor | None = None  # flat: the merge, then the task vectors
        self.figures: Mapping[str, float] = {}
        self.flags = np.zeros(experts + 1, np.uint8)
        self.delta: Tensor  # flat

    def sample(self, tiles: Sequence[Tile], resident: bool) -> None:
        assert self._inner is not None
        self._inner.sample([self._seen(tile) for tile in tiles], resident)

    def look(self, tile: Tile) -> Any:
        if self._asking:
            assert self._inner is not None
            last = self._method.before - 1
            more = self._round > last  # a round that the plan does not know of sees every input
            return self._inner.look(self._seen(tile.only(self._method.shown(last, self._experts)) if more else tile))
        return self._collect(tile) if self._round >= self._method.before else None

    def _seen(self, tile: Tile) -> Tile:
        return tile if self._method.of.takes_base() else replace(tile, base=None)

    def _collect(self, tile: Tile) -> tuple[str, Flags]:
        """Delta and the task vectors of one tile, fp32; what the inputs and the merge hold that is not finite."""
        import torch

        with self._lock:
            if self._rows is None:
                give_back()
                self._rows = torch.empty(self._experts + 1, math.prod(self._shape))
        merged, *deltas = (span(row, None, tile.start, tile.start + tile.numel) for row in self._rows)
        flags = np.zeros(self._experts + 2, np.uint8)
        for i, (delta, expert) in enumerate(zip(deltas, tile.experts, strict=True), 1):
            flags[[0, i]] |= kernel.run("add_deltas", delta, tile.base, (expert,), ADD)
        self._method.of.merge(self._merging(tile, merged), self._inner)
        flags[-1] = kernel.run("add_deltas", merged, tile.base, (merged,), ADD)[1]  # in place, element by element
        return tile.name, flags

    def _merging(self, tile: Tile, out: Span) -> Tile:
        """A tile as the method merges it. Where ranks count, tiles come in order, and a merge moves them on."""
        if self._inner is not None:  # else it sees all there is
            tile = tile.only(self._method.shown(self._method.before, self._experts))
        return replace(self._seen(tile), out=out, ranks=self._ranks)

    def settle(self, partials: Sequence[Any]) -> bool:
        self._round += 1
        if self._asking:
            assert self._inner is not None
            self._asking = not self._inner.settle(partials)
            if not self._asking:
                self._ranks = self._inner.first_ranks()
                self.in_order = self._ranks is not None
            return False
        if self._round <= self._method.before:
            return False
        for name, flags in partials:
            self._check(name, flags)
        self._solve()
        return True

    def _check(self, name: str, flags: Flags) -> None:
        if not flags.any():
            return
        which = int(np.flatnonzero(flags)[0])
        if which > self._experts:
            raise CheckpointError(
                f"tensor {name!r}: the merge overflows fp32, svc cannot decompose it; lower its scale"
            )
        who = f"expert {which}" if which else "the base"
        raise CheckpointError(
            f"tensor {name!r} of {who} holds a NaN or an infinity; such a matrix cannot be decomposed, "
            "mend it or leave the model out"
        )

    def _solve(self) -> None:
        assert self._rows is not None
        figures = {} if self._inner is None else self._inner.figures
        self._inner = None
        norms = [norm(row) for row in self._rows]
        merged, *deltas = (row.view(self._shape) for row in self._rows)
        with exact_products():
            calibrate(merged, deltas, self._method.floor)
        self.delta = self._rows[0].clone()
        self._rows = None
        moved, limit = norm(self.delta), (self._method.norm_guard or math.inf) * max(norms[1:])
        if moved > limit:
            self.delta *= limit / moved
        told = {f"norm_{i}": each for i, each in enumerate(norms[1:], 1)}
        self.figures = {**figures, **told, "uncalibrated": norms[0], "displacement": min(moved, limit)}

    def release(self) -> None:
        del self.delta


def calibrate(merged: Tensor, deltas: Sequence[Tensor], least: float) -> None:
    """Change `merged` [m, n] to its calibrated form, by the task vectors [m, n]; all fp32."""
    import torch

    left, crew = merged.shape[0] <= merged.shape[1], spectra.crew_for(merged)
    values, vectors = directions([merged], left)
    basis = vectors.float()  # left singular vectors in columns
    del vectors
    if not left:
        basis = spectra.product(crew, merged, basis)
        basis *= inverted(values).float()
    mine = spectra.product(crew, basis.T, merged)
    present = torch.zeros(len(mine), dtype=torch.float64)
    for delta in deltas:
        its = spectra.product(crew, basis.T, delta)
        size = its.square().sum(1).double()
        overlap = its.mul_(mine).sum(1).double()
        present += (overlap / size).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=least)
    mine *= (len(deltas) / present - 1).float()[:, None]
    add_product(merged, basis, mine)


# By hand: the sum is diag(4, 1). Of the first direction 4 / 2 is there twice, gamma = 2 / 4; of the second all that the
# first expert has, and the other has nothing: gamma = 2 / (1 + 1 / 2).
EXAMPLES = [
    (
        Svc(TaskArithmetic(weight=1.0)),
        [[0.0, 1.0], [0.0, 0.0]],
        [[[2.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, 0.0]]],
        [[2.0, 1.0], [0.0, 4 / 3]],
    ),
]
