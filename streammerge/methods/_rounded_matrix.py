"""A linear map's matrix, its task vector and a direction, and products of them with rows of fp32.

Where operands are bfloat16, and the device is quick with it, they are cast once and lie side by side, so that the sum
of two products is one product. CPUs round what comes out of it. The base's own output, of whose curvature all else is
made, and induced gradients cannot bear that: there the library rounds operands alone (_rounded.py).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from streammerge.methods._loops import over_rows
from streammerge.methods._rounded import multiplies_bf16, product_of_rounded

if TYPE_CHECKING:
    from torch import Tensor

TAU, BASE, ALONG = range(3)


class Matrix:
    """W [n, k], its task vector and V; rows are [m, k] where they go in and [m, n] where they come out, fp32."""

    def __init__(self, base: Tensor, tau: Tensor, precision: str) -> None:
        self._base, self._tau, self._width = base, tau, base.shape[1]
        self._rounds = precision == "bf16" and multiplies_bf16(base.device)
        self._widely = self._rounds and not here(base)
        if self._rounds:
            self._parts = _empty(base, len(base), 3 * self._width)
            self._part(TAU).copy_(tau)
            self._part(BASE).copy_(base)

    def _part(self, first: int, last: int | None = None) -> Tensor:
        end = (first if last is None else last) + 1
        return self._parts[:, first * self._width : end * self._width]

    def of(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x W^T + bias."""
        import torch

        if self._widely:
            return _product(x.bfloat16(), self._part(BASE).T, bias=bias)
        return x @ self._base.T if bias is None else torch.addmm(bias, x, self._base.T)

    def gradient(self, g: Tensor, x: Tensor) -> Tensor:
        """g^T x."""
        return product_of_rounded(g.bfloat16().T, x.bfloat16()) if self._widely else g.T @ x

    def differences(self, x: Tensor, x0: Tensor | None, y0: Tensor, bias: Tensor | None) -> Tensor:
        """y0 + x tau^T + (x - x0) W^T + bias; x0 is None where it is x."""
        import torch

        if self._rounds and x0 is None:
            return _product(x.bfloat16(), self._part(TAU).T, y0, bias)
        if self._rounds:
            return _product(_beside(x, x, x0), self._part(TAU, BASE).T, y0, bias)
        y = torch.addmm(y0, x, self._tau.T)
        if x0 is not None:
            torch.addmm(y, x - x0, self._base.T, out=y)
        return y if bias is None else y.add_(bias)

    def back(self, g: Tensor, through: int = BASE) -> Tensor:
        """g W, or g tau."""
        if self._rounds:
            return _product(g.bfloat16(), self._part(through))
        return g @ (self._base if through == BASE else self._tau)

    def back_both(self, g: Tensor) -> tuple[Tensor, Tensor]:
        """g (tau + W) and -g W: what `differences` pulls back to x and x0."""
        import torch

        if not self._rounds:
            of_base = g @ self._base
            return torch.addmm(of_base, g, self._tau), of_base.neg_()
        return _split(g.bfloat16(), self._part(TAU, BASE))

    def along(
        self, u: Tensor | None, x: Tensor, g: Tensor, direction: Tensor, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """u W^T + x V^T + bias and g V."""
        import torch

        if not self._rounds:
            y = x @ direction.T if bias is None else torch.addmm(bias, x, direction.T)
            return y if u is None else torch.addmm(y, u, self._base.T, out=y), g @ direction
        self._part(ALONG).copy_(direction)
        to_x = self.back(g, ALONG)
        if u is None:
            return _product(x.bfloat16(), self._part(ALONG).T, bias=bias), to_x
        return _product(_beside(u, x), self._part(BASE, ALONG).T, bias=bias), to_x


def here(x: Tensor) -> bool:
    """Whether loops of the CPU can read it."""
    return bool(x.device.type == "cpu")


def _empty(like: Tensor, *shape: int) -> Tensor:
    import torch

    return torch.empty(shape, dtype=torch.bfloat16, device=like.device)


def _product(one: Tensor, other: Tensor, plus: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """one @ other + plus + bias: operands bfloat16, sums fp32."""
    import torch

    if not here(one):
        found = product_of_rounded(one, other)
        for more in (plus, bias):
            found = found if more is None else found.add_(more)
        return found
    from streammerge.kernels.host import widen

    rounded = one @ other
    found = torch.empty(rounded.shape, dtype=torch.float32)
    given = (None if each is None else each.contiguous() for each in (plus, bias))
    over_rows(widen.sum_up, found.shape[1], found, rounded, *given, found)
    return found


def _split(g: Tensor, tau_and_base: Tensor) -> tuple[Tensor, Tensor]:
    """g (tau + W) and -g W."""
    import torch

    width = tau_and_base.shape[1] // 2
    if not here(g):
        of_tau, of_base = product_of_rounded(g, tau_and_base).split(width, 1)
        return of_tau + of_base, -of_base
    from streammerge.kernels.host import widen

    both = g @ tau_and_base
    found, minus = (torch.empty((len(g), width), dtype=torch.float32) for _ in range(2))
    over_rows(widen.split, width, found, both, found, minus)
    return found, minus


def _beside(one: Tensor, other: Tensor, minus: Tensor | None = None) -> Tensor:
    """[one | other - minus], rounded."""
    found, width = _empty(one, len(one), 2 * one.shape[1]), one.shape[1]
    if not here(one):
        found[:, :width] = one
        found[:, width:] = other if minus is None else other - minus
        return found
    from streammerge.kernels.host import widen

    given = (None if each is None else each.contiguous() for each in (one, other, minus))
    over_rows(widen.beside, width, one, *given, found)
    return found
