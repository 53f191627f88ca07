"""Induced gradients: what a set of anchors pulls a unit's weights towards, and how far that is from its task vectors.

    f(theta)  = mean over anchors of the likeness of y0 = unit(x; theta) and y1 = unit(x; theta + tau)
    g_p       = df / dp at the base's theta, for every tensor p of the unit
    loss      = sum over p of 1 - cos(g_p, tau_p)                          arXiv:2510.21223, as its code has it

The likeness is the cosine over all that a unit returns for one anchor, or minus the mean square (l2) or absolute
(l1) difference: g is the direction downhill. Its derivative by y0 is taken from dy = y1 - y0, which no rounding of y0
and y1 has touched where the unit carries dy itself (`delta-forward`).

The derivative of the loss by the anchors is that of F(x) = sum_p <g_p(x), v_p>, with

    v_p = -(tau_p / |tau_p| - cos_p g_p / |g_p|) / |g_p|                   held fixed

which is a derivative of f along v: one pass makes g, the next differentiates F, micro-batch by micro-batch. So what is
in memory at once does not grow with the number of anchors. Tensors that the expert did not change, and those without a
gradient (`without_gradient`), have no part in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from streammerge.methods._loops import over_rows

if TYPE_CHECKING:
    from torch import Tensor

DISTANCES = ("cosine", "l2", "l1")
NOTHING = 1e-12  # of the largest gradient, in fp64: less is what rounding leaves of an exact zero
PIECE, PIECES = 1 << 15, 128  # elements of a piece of a dot product, at least; pieces, at most

Tensors = Mapping[str, "Tensor"]


class Network(Protocol):
    """A unit at the base's weights and its expert's; x is a micro-batch of anchors, fp32, [anchors, ...]."""

    def likeness_gradient(self, x: Tensor, anchors: int, names: Sequence[str]) -> list[Tensor]:
        """This micro-batch's share of g, for these tensors; f is a mean over `anchors` anchors."""

    def slope(self, x: Tensor, anchors: int, along: Tensors) -> Tensor:
        """This micro-batch's part of dF / dx for v = `along`."""

    def outputs(self, x: Tensor) -> Tensor:
        """y1, what the expert returns."""


def pull(y0: Tensor, dy: Tensor, distance: str, anchors: int) -> Tensor:
    """df / dy0, differentiable once; y0 and dy = y1 - y0 are [micro-batch, ...]."""
    import torch

    if distance == "l1":
        return dy.sign() / (anchors * dy[0].numel())
    if distance == "l2":
        return dy * (2 / (anchors * dy[0].numel()))
    flat, change = y0.flatten(1), dy.flatten(1)
    if flat.dtype == change.dtype == torch.float32 and flat.device.type in ("cpu", "meta"):
        return torch.as_tensor(_pull().apply(flat.contiguous(), change.contiguous(), anchors)).view_as(y0)
    norm = flat.norm(dim=1, keepdim=True)
    unit = flat / norm
    across = change - unit * (unit * change).sum(1, keepdim=True)
    found = across / ((flat + change).norm(dim=1, keepdim=True) * norm * anchors)
    return found.view_as(y0)


@cache
def _pull() -> Any:
    import torch
    from torch.autograd import Function
    from torch.autograd.function import once_differentiable

    from streammerge.kernels.host import pull as loops

    class Pull(Function):  # type: ignore[misc]  # torch is untyped here
        @staticmethod
        def forward(ctx: Any, y0: Tensor, dy: Tensor, anchors: int) -> Tensor:
            ctx.save_for_backward(y0, dy)
            ctx.anchors, found = anchors, torch.empty_like(y0)
            over_rows(loops.pull, y0.shape[1], y0, anchors, y0, dy, found)
            return found

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, *given: Tensor) -> Any:
            y0, dy = ctx.saved_tensors
            to_y0, to_dy = torch.empty_like(y0), torch.empty_like(y0)
            u = given[0].contiguous()
            over_rows(loops.pull_twice, y0.shape[1], y0, ctx.anchors, y0, dy, u, to_y0, to_dy)
            return to_y0, to_dy, None

    return Pull


def aim(gradients: Mapping[str, Tensor], tau: Tensors, norms: Tensors) -> Tensor:
    """The loss, fp64; `norms` are those of tau. What is left in `gradients` is v."""
    import torch

    if all(g.device.type == "cpu" for g in gradients.values()):
        return torch.tensor(_aim_here(gradients, tau, norms), dtype=torch.float64)
    losses = []
    for name, g in gradients.items():
        t, norm = tau[name], norms[name]
        length = inner(g, g).sqrt()
        there = length > 0
        safe = torch.where(there, length, 1.0)
        cosine = inner(g, t) / (safe * norm)
        losses.append(1 - cosine)
        toward = torch.where(there, -1 / (norm * safe), 0.0)
        g.mul_(torch.where(there, cosine / safe**2, 0.0).to(g.dtype)).addcmul_(t, toward.to(g.dtype))
    return torch.stack(losses).sum()


def _aim_here(gradients: Mapping[str, Tensor], tau: Tensors, norms: Tensors) -> float:
    """The same on the CPU, in two passes over memory."""
    from streammerge.kernels.host import aim as loops

    loss, found = 0.0, np.empty(2)
    for name, g in gradients.items():
        t, norm = tau[name], float(norms[name])
        assert g.is_contiguous()
        assert t.is_contiguous()
        loops.dots(g.data_ptr(), t.data_ptr(), g.numel(), found)
        dot, length = float(found[0]), math.sqrt(found[1])
        cosine = dot / ((length or 1.0) * norm)
        loss += 1 - cosine
        turn = (cosine / length**2, -1 / (norm * length)) if length > 0 else (0.0, 0.0)
        loops.turn(g.data_ptr(), t.data_ptr(), g.numel(), *turn)
    return loss


def inner(one: Tensor, other: Tensor) -> Tensor:
    """A dot product: fp32 over pieces, fp64 over their sums."""
    import torch

    flat, others = one.reshape(-1), other.reshape(-1)
    piece = max(PIECE, -(-flat.numel() // PIECES))
    pairs = zip(flat.split(piece), others.split(piece), strict=True)
    return torch.stack([torch.dot(here, there) for here, there in pairs]).double().sum()
