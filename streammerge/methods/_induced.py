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

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

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
    """df / dy0, differentiable; y0 and dy = y1 - y0 are [micro-batch, ...]."""
    if distance == "l1":
        return dy.sign() / (anchors * dy[0].numel())
    if distance == "l2":
        return dy * (2 / (anchors * dy[0].numel()))
    flat, change = y0.flatten(1), dy.flatten(1)
    norm = flat.norm(dim=1, keepdim=True)
    unit = flat / norm
    across = change - unit * (unit * change).sum(1, keepdim=True)
    found = across / ((flat + change).norm(dim=1, keepdim=True) * norm * anchors)
    return found.view_as(y0)


def aim(gradients: Mapping[str, Tensor], tau: Tensors, norms: Tensors) -> Tensor:
    """The loss, fp64; `norms` are those of tau. What is left in `gradients` is v."""
    import torch

    losses = []
    for name, g in gradients.items():
        t = tau[name]
        dot, square = _dots(g, t)
        length, norm = square.sqrt(), norms[name]
        there = length > 0
        safe = torch.where(there, length, 1.0)
        cosine = dot / (safe * norm)
        losses.append(1 - cosine)
        _turn(g, t, torch.where(there, cosine / safe**2, 0.0), torch.where(there, -1 / (norm * safe), 0.0))
    return torch.stack(losses).sum()


def _dots(g: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """<g, t> and <g, g>, fp64; in one pass on the CPU."""
    import torch

    if g.device.type != "cpu":
        return inner(g, t), inner(g, g)
    from streammerge.kernels.host import aim as loops

    assert g.is_contiguous()
    assert t.is_contiguous()
    found = torch.empty(2, dtype=torch.float64)
    loops.dots(g.data_ptr(), t.data_ptr(), g.numel(), found.numpy())
    return found[0], found[1]


def _turn(g: Tensor, t: Tensor, a: Tensor, b: Tensor) -> None:
    """g = a g + b t."""
    if g.device.type != "cpu":
        g.mul_(a.to(g.dtype)).addcmul_(t, b.to(g.dtype))
        return
    from streammerge.kernels.host import aim as loops

    loops.turn(g.data_ptr(), t.data_ptr(), g.numel(), float(a), float(b))


def inner(one: Tensor, other: Tensor) -> Tensor:
    """A dot product: fp32 over pieces, fp64 over their sums."""
    import torch

    flat, others = one.reshape(-1), other.reshape(-1)
    piece = max(PIECE, -(-flat.numel() // PIECES))
    pairs = zip(flat.split(piece), others.split(piece), strict=True)
    return torch.stack([torch.dot(here, there) for here, there in pairs]).double().sum()
