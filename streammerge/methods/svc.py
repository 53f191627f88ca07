"""SVC: singular values of a merge, calibrated against the experts. A post-processing of another method, `of`.

    Delta   = the merged task vector of `of`, its scale included, with left singular vectors u_r
    s_ir    = <u_r^T Delta, u_r^T tau_i> / |u_r^T tau_i|^2          how much of task i is in direction r, 1: all of it
    gamma_r = T / sum_i max(floor, s_ir)
    merged  = base + scale sum_r gamma_r u_r u_r^T Delta            Li et al. 2026, arXiv:2602.05536

`of` is a method on matrices by its name, or task_arithmetic; it has its defaults but for what `options` says:

    merge_method: svc
    parameters: {of: cart, options: "rho=0.1 lambda=0.7"}

Weights, caps, vectors and embeddings are parameters of svc itself and hold for both. The floor is 1 / T, and 1 for
tsvm, unless it is given. Where a task has nothing in a direction (or the direction no singular value), s_ir is the
floor. The direction is that of the merge, as in the paper; fusion_bench 54c9e8c projects each task on its own singular
vectors instead.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np

from streammerge import method as methods
from streammerge.errors import RecipeError
from streammerge.method import param
from streammerge.methods._keeping import Keeper, directions, inverted, matrices_bytes, spectrum_bytes
from streammerge.methods._matrices import MatrixMethod, Solver
from streammerge.methods.task_arithmetic import TaskArithmetic

if TYPE_CHECKING:
    from torch import Tensor

OURS = ("weight", "other", "embeddings", "norm_guard")  # parameters that are svc's, not those of what it works on
TRUTH = {"true": True, "false": False}


@dataclass(frozen=True)
class Svc(MatrixMethod):
    """Calibrated singular values."""

    summary = "another merge with its singular values calibrated against the experts"
    source = "Li et al. 2026, arXiv:2602.05536"

    of: str = param("task_arithmetic", "the method whose merge is calibrated")
    options: str = param("", "its parameters, as in 'rho=0.1 lambda=0.7'")
    floor: float = param(0.0, "least share of a task that counts as present; 0: 1 / experts, or 1 for tsvm")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.floor < 0:
            raise RecipeError(f"floor is {self.floor}; it must be 0 or more")
        _inner(self.of, self.options)

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        inner = _inner(self.of, self.options)
        least = self.floor or (1.0 if self.of == "tsvm" else 1.0 / experts)
        if isinstance(inner, TaskArithmetic):
            return _Solver(experts, _Sum(), inner.lambda_ / inner.divisor(np.ones(experts)), least)
        return _Solver(experts, inner.solver(rows, columns, experts), inner.scale, least)

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        inner = _inner(self.of, self.options)
        sums = isinstance(inner, TaskArithmetic)
        before = matrices_bytes(rows, columns, 1) if sums else inner.bytes_kept(rows, columns, experts)
        after = spectrum_bytes(rows, columns) + matrices_bytes(rows, columns, 5)
        return matrices_bytes(rows, columns, experts) + max(before, after)


class _Sum(Solver):
    """The task vectors added up."""

    _total: Tensor

    def take(self, expert: int, delta: Tensor) -> None:
        self._total = delta.clone() if not expert else self._total.add_(delta)

    def finish(self) -> Tensor:
        return self._total


class _Solver(Keeper):
    """All task vectors, shown to the other method as well."""

    def __init__(self, experts: int, inner: Solver, scale: float, least: float) -> None:
        super().__init__(experts + 1)  # one more: all are copied, the other method may change its own
        self._inner: Solver | None = inner
        self._scale, self._least = scale, least

    def take(self, expert: int, delta: Tensor) -> None:
        super().take(expert, delta)
        assert self._inner is not None
        self._inner.take(expert, delta)

    def finish(self) -> Tensor:
        import torch

        assert self._inner is not None
        merged = self._inner.finish()
        self.figures = self._inner.figures
        self._inner = None
        merged *= self._scale
        left = merged.shape[0] <= merged.shape[1]
        values, vectors = directions([merged], left)
        basis = vectors.float()
        del vectors
        if not left:
            basis = merged @ basis
            basis *= inverted(values).float()
        mine = basis.T @ merged
        present = torch.zeros(len(mine), dtype=torch.float64, device=mine.device)
        for delta in self.deltas:
            its = basis.T @ delta
            size = its.square().sum(1).double()
            overlap = its.mul_(mine).sum(1).double()
            present += (overlap / size).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0).clamp_(min=self._least)
        mine *= (len(self.deltas) / present - 1).float()[:, None]
        return merged.addmm_(basis, mine)


@cache
def _inner(of: str, options: str) -> Any:
    """The method that svc works on."""
    cls = methods.find(of)
    if of == "svc" or not issubclass(cls, (MatrixMethod, TaskArithmetic)):
        raise RecipeError(f"svc cannot work on {of}; it takes methods on whole matrices and task_arithmetic")
    known, values = methods.parameters(cls), {}
    for item in options.replace(",", " ").split():
        name, equals, text = item.partition("=")
        if name not in known or not equals or name in OURS:
            why = "is a parameter of svc itself" if name in OURS else f"is no parameter of {of}, as 'name=value'"
            raise RecipeError(f"svc: options: {item!r} {why}")
        try:
            values[name] = TRUTH[text.lower()] if known[name].kind is bool else known[name].kind(text)
        except (KeyError, ValueError):
            raise RecipeError(f"svc: options: {item!r} is not a {known[name].kind.__name__}") from None
    return methods.build(cls, {"weight": 1.0, **values})


# By hand: the sum is diag(4, 1). Of the first direction 4 / 2 is there twice, gamma = 2 / 4; of the second all that the
# first expert has, and the other has nothing: gamma = 2 / (1 + 1 / 2).
EXAMPLES = [
    (
        Svc(),
        [[0.0, 1.0], [0.0, 0.0]],
        [[[2.0, 1.0], [0.0, 1.0]], [[2.0, 1.0], [0.0, 0.0]]],
        [[2.0, 1.0], [0.0, 4 / 3]],
    ),
]
