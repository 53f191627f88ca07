"""WUDI without steps: the gradient flow at a time, or its end, from C, D and M_0.

    M = M_0 + R f(C)    R = D - M_0 C    f(x) = (1 - exp(-t x)) / x, or 1 / (x + a)

The row space of R lies in that of C, so that nothing must be said about C's kernel. The flow on all eigenvalues takes
products alone, half of each for it is symmetric: as fast as eigh on two cores, faster on more and on a GPU. eigh and
Cholesky run on one core, for they round differently on several. fp32 on C means an error of t |C| times its rounding:
against fp64 1e-5 of the merged matrix at 3 times the inverse mean eigenvalue, 1e-4 at 15, 1e-3 at 100; eigh a third of
that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from streammerge.methods._crew import Crew, mirror, norm, symmetric
from streammerge.methods._wudi import Move

REACH = 4.0  # the polynomial serves h times the eigenvalues up to here, doubling does the rest
DEGREE, CHUNK = 11, 3  # of the polynomial, 3e-10 off; powers that it is made of


def eigen(crew: Crew, gram: Tensor, mean: float, *, strength: Callable[[Tensor, float], Tensor]) -> Move:
    """X = R V f V^T with the eigenvectors V of C; f = strength(eigenvalues in rising order, their mean)."""
    values, vectors = crew.alone(partial(torch.linalg.eigh, gram))
    factors = strength(values, mean)

    def move(rest: Tensor) -> tuple[Tensor, Tensor]:
        spectrum, moved, gradient = crew.room(3, rest.shape, rest.dtype)
        torch.mm(torch.mm(rest, vectors, out=spectrum).mul_(factors), vectors.T, out=moved)
        return moved, torch.addmm(rest, moved, gram, beta=-1, out=gradient)

    return move


def flow(values: Tensor, mean: float, *, time: float, keep: float) -> Tensor:
    """(1 - exp(-t lambda)) / lambda on the largest eigenvalues, zero on the others."""
    t = time / mean
    values = values.clamp(min=0)
    factors = torch.where(t * values < 1e-9, t, -torch.expm1(-t * values) / values.clamp(min=1e-300))
    factors[: len(values) - math.ceil(keep * len(values))] = 0
    return factors


def inverse(values: Tensor, mean: float, *, amount: float) -> Tensor:
    """1 / (lambda + a), and zero where that is rounding: with a = 0 the pseudo-inverse."""
    least = len(values) * torch.finfo(values.dtype).eps * values[-1]
    values = values + amount * mean
    return torch.where(values > least, 1 / values, 0.0)


def ridge(crew: Crew, gram: Tensor, mean: float, *, amount: float) -> Move:
    """X = R (C + a I)^-1 by Cholesky."""
    shifted = gram.clone()
    shifted.diagonal().add_(amount * mean)
    factor = crew.alone(partial(torch.linalg.cholesky, shifted))
    del shifted
    inverted = crew.alone(partial(torch.cholesky_inverse, factor))
    del factor

    def move(rest: Tensor) -> tuple[Tensor, Tensor]:
        moved, gradient = crew.room(2, rest.shape, rest.dtype)
        torch.mm(rest, inverted, out=moved)
        return moved, torch.addmm(rest, moved, gram, beta=-1, out=gradient)

    return move


def doubling(crew: Crew, gram: Tensor, mean: float, *, time: float) -> Move:
    """X = R (1 - exp(-t C)) / C by products alone: a polynomial for h = t / 2^q, then q doublings of h.

    With P = (1 - exp(-hC)) / hC and F = hC P = 1 - exp(-hC), twice the time has P (2 - F) and F (2 - F).
    """
    row = max(crew.each(lambda a, b: float(torch.linalg.vector_norm(gram[a:b], 1, dim=1).max()), len(gram)))
    most = min(norm(crew, gram), row, mean * len(gram))  # each bounds the largest eigenvalue
    doublings = max(0, math.ceil(math.log2(time / mean * most / REACH)))
    h = time / mean / 2**doublings
    p, f = _polynomial(crew, gram, h)
    other = gram
    for _ in range(doublings):
        _twice(crew, p, f, other)
        f, other = other, f

    def move(rest: Tensor) -> tuple[Tensor, Tensor]:
        moved, gradient = crew.room(2, rest.shape, rest.dtype)
        torch.mm(rest, p, out=moved).mul_(h)
        return moved, torch.addmm(rest, rest, f, beta=-1, out=gradient)

    return move


def _twice(crew: Crew, p: Tensor, f: Tensor, out: Tensor) -> None:
    """p = p (2 - f), out = f (2 - f)."""

    def block(a: int, b: int) -> None:
        (rows,) = crew.room(1, p[a:b].shape, p.dtype)
        p[a:b, a:].addmm_(rows.copy_(p[a:b]), f[:, a:], beta=2, alpha=-1)
        torch.addmm(f[a:b, a:], f[a:b], f[:, a:], beta=2, alpha=-1, out=out[a:b, a:])

    symmetric(crew, p, block)
    mirror(crew, out)


def _polynomial(crew: Crew, c: Tensor, h: float) -> tuple[Tensor, Tensor]:
    """(1 - exp(-hC)) / hC and 1 - exp(-hC) for h |C| <= REACH: powers of Y = 2hC / REACH - 1, which takes C's place."""
    half = REACH / 2
    terms = _terms(half)
    crew.each(lambda a, b: c[a:b].mul_(h / half).diagonal(a).sub_(1), len(c))
    second, third, p = (torch.empty_like(c) for _ in range(3))
    symmetric(crew, second, lambda a, b: torch.mm(c[a:b], c[:, a:], out=second[a:b, a:]))
    symmetric(crew, third, lambda a, b: torch.mm(second[a:b], c[:, a:], out=third[a:b, a:]))
    for at in range(DEGREE + 1 - CHUNK, -1, -CHUNK):
        _horner(crew, p, third if at + CHUNK <= DEGREE else None, c, second, terms[at : at + CHUNK])
    f = second
    symmetric(crew, f, lambda a, b: torch.addmm(p[a:b, a:], c[a:b], p[:, a:], beta=half, alpha=half, out=f[a:b, a:]))
    return p, f


def _terms(half: float) -> list[float]:
    """(1 - exp(-x)) / x for x in [0, 2 half] as a polynomial in y = x / half - 1."""
    nodes = half * (1 + np.cos(np.pi * (np.arange(DEGREE + 1) + 0.5) / (DEGREE + 1)))
    fitted = np.polynomial.Polynomial.fit(nodes, -np.expm1(-nodes) / nodes, DEGREE, domain=[0, 2 * half])
    return [float(term) for term in fitted.coef]


def _horner(crew: Crew, p: Tensor, power: Tensor | None, y: Tensor, square: Tensor, terms: Sequence[float]) -> None:
    """p = p power + terms of 1, y and y^2; without a power, p is begun."""

    def block(a: int, b: int) -> None:
        out = p[a:b, a:]
        if power is None:
            out.zero_()
        else:
            (rows,) = crew.room(1, p[a:b].shape, p.dtype)
            torch.mm(rows.copy_(p[a:b]), power[:, a:], out=out)
        out.add_(y[a:b, a:], alpha=terms[1]).add_(square[a:b, a:], alpha=terms[2]).diagonal().add_(terms[0])

    symmetric(crew, p, block)
