"""A gated MLP, y = D (silu(G x) * U x), and its expert's, by explicit formulas in delta-forward form.

    a = G x    b = U x    h = silu(a) b    y0 = D h
    da = tau_G x    db = tau_U x    dh = (silu(a + da) - silu(a)) (b + db) + silu(a) db
    dy = tau_D (h + dh) + D dh                                             y1 = y0 + dy
    r = df/dy0 from (y0, dy)    e = D^T r    s_G = e b silu'(a)    s_U = e silu(a)
    g_D = sum r h^T    g_G = sum s_G x^T    g_U = sum s_U x^T

Differences between base and expert are carried and never formed by subtraction of two results, so the products may be
in bfloat16: the gradient by x keeps about two digits, whatever the size of the task vectors. In fp32 it keeps five.

F = sum <r, y0'> with y0' = V_D h + D h', h' = silu'(a) b (V_G x) + silu(a) (V_U x); autograd takes dF/dx, with no
gradient of any weight. If all anchors are one micro-batch, one forward pass serves both passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from streammerge.methods._induced import Tensors, pull
from streammerge.methods._rounded import casts, product, products

if TYPE_CHECKING:
    from torch import Tensor

GATE, UP, DOWN = range(3)


class GatedMlp:
    """The three matrices of base and task vector; `names` are those of gate, up and down."""

    def __init__(
        self, base: Tensors, tau: Tensors, names: tuple[str, str, str], distance: str, precision: str = "fp32"
    ) -> None:
        """`precision` is that of the operands of products (_rounded.py)."""
        import torch

        self._names, self._distance = names, distance
        device = base[names[GATE]].device
        self._rounds = casts(precision, device)
        self._exactly = partial(products, precision, device)
        dtype = torch.bfloat16 if self._rounds else torch.float32
        self._kept: tuple[Tensor, _Run, Tensor] | None = None
        self._base = [base[name].to(dtype) for name in names]
        self._tau = [tau[name].to(dtype) for name in names]

    def likeness_gradient(self, x: Tensor, anchors: int, names: Sequence[str]) -> list[Tensor]:
        import torch

        with self._exactly():
            whole = len(x) == anchors
            leaf, run, r = self._both(x, anchors, whole)
            self._kept = (leaf, run, r) if whole else None
            with torch.no_grad():
                e = self._times(r, self._base[DOWN])
                pairs = dict(
                    zip(self._names, ((e * run.b * _dsilu(run.a), x), (e * run.act, x), (r, run.h)), strict=True)
                )
                return [product(pairs[name][0].T, pairs[name][1], self._rounds) for name in names]

    def slope(self, x: Tensor, anchors: int, along: Tensors) -> Tensor:
        import torch

        with torch.enable_grad(), self._exactly():
            leaf, run, r = self._kept or self._both(x, anchors, True)
            self._kept = None
            gate, up, down = (along.get(name) for name in self._names)
            dot_a = torch.zeros_like(run.a) if gate is None else self._map(leaf, gate)
            dot_b = torch.zeros_like(run.b) if up is None else self._map(leaf, up)
            dot_h = _dsilu(run.a) * run.b * dot_a + run.act * dot_b
            dot_y = self._map(dot_h, self._base[DOWN])
            if down is not None:
                dot_y = dot_y + self._map(run.h, down)
            (found,) = torch.autograd.grad((r * dot_y).sum(), leaf)
            return found

    def _both(self, x: Tensor, anchors: int, again: bool) -> tuple[Tensor, _Run, Tensor]:
        """A leaf of x, a forward pass of it and r; `again`: to be differentiated by x."""
        import torch

        with torch.set_grad_enabled(again):
            leaf = x.detach().requires_grad_(again)
            run = self._forward(leaf)
            return leaf, run, pull(run.y0, run.dy, self._distance, anchors)

    def outputs(self, x: Tensor) -> Tensor:
        import torch

        with torch.no_grad(), self._exactly():
            run = self._forward(x)
            return run.y0 + run.dy

    def _forward(self, x: Tensor) -> _Run:
        from torch.nn.functional import silu

        base, tau = self._base, self._tau
        a, b = self._map(x, base[GATE]), self._map(x, base[UP])
        da, db = self._map(x, tau[GATE]), self._map(x, tau[UP])
        act = silu(a)
        h = act * b
        dh = (silu(a + da) - act) * (b + db) + act * db
        y0 = self._map(h, base[DOWN])
        dy = self._map(h + dh, tau[DOWN]) + self._map(dh, base[DOWN])
        return _Run(a, b, act, h, y0, dy)

    def _map(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W^T, fp32."""
        return product(x, weight.T, self._rounds)

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        """x W, fp32."""
        return product(x, weight, self._rounds)


class _Run:
    """What a forward pass of both leaves."""

    __slots__ = ("a", "act", "b", "dy", "h", "y0")

    def __init__(self, a: Tensor, b: Tensor, act: Tensor, h: Tensor, y0: Tensor, dy: Tensor) -> None:
        self.a, self.b, self.act, self.h, self.y0, self.dy = a, b, act, h, y0, dy


def _dsilu(a: Tensor) -> Tensor:
    s = a.sigmoid()
    return s * (1 + a * (1 - s))
