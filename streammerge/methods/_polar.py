"""Polar factors at GEMM speed: X = P S Q^T -> P Q^T, the nearest matrix with orthonormal rows, X [k, n], k <= n.

The first route that holds, in this order:

    orthonormal     one block of orthonormal rows: it is its own polar factor
    pair            two such blocks in fp64: inverse root of [1 M; M^T 1] by an eigendecomposition of half the size
    newton-schulz   fp32: seven Polar Express steps, then quintic ones until ||X X^T - 1||_F / sqrt(k) < ORTHONORMAL
    eigh            fp64 inverse root of X X^T, pseudo-inverse: without singular values below CUTOFF of the largest
                    if X is stacked bases, below DROP if it is any matrix

The route depends on the matrix alone. With `products` (_precision.py) the Polar Express steps behind the first are
done by them; the quintic steps and the check are fp32 as ever, so that what comes out is as orthonormal.

Newton-Schulz in fp32 is off by some 5e-9 times the condition number; what takes more than LIMIT steps has one above 1e4
and goes the fp64 way. More steps would even let rounding errors of directions that experts share grow into directions
of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from streammerge.kernels.host.polar_step import POLAR_EXPRESS, QUINTIC
from streammerge.methods._spectra import BLOCK, DROP, FP32, FP64, columns_of, crew_for, gram, product, wide_gram

if TYPE_CHECKING:
    from torch import Tensor

    from streammerge.methods._precision import Products

CUTOFF = 1e-5  # of stacked bases' largest singular value: experts that share a direction to so little share it
ORTHONORMAL = 1e-6
LIMIT = 12  # steps


class Polar(NamedTuple):
    """A polar factor, fp32, and how it was found."""

    factor: Tensor
    route: str
    deviation: float  # ||X X^T - 1||_F / sqrt(k); sqrt of the share of dropped directions after `eigh`


def polar(x: Tensor, sizes: Sequence[int] | None = None, products: Products | None = None) -> Polar:
    """The polar factor of x. `sizes`: x is so many blocks of so many orthonormal rows each."""
    import torch

    if not x.shape[0]:
        return Polar(x.float(), "none", 0.0)
    blocks = [size for size in sizes or () if size]
    if len(blocks) == 1:
        found: Polar | None = Polar(x.float(), "orthonormal", deviation(x))
    elif len(blocks) == 2 and x.dtype == torch.float64:
        found = pair(x, blocks[0])
    else:
        found = newton_schulz(x.float(), len(blocks), products)
    if found is None or found.deviation > ORTHONORMAL:
        return inverse_root(x, CUTOFF if blocks else DROP)
    return found


def polar_bytes(rows: int, columns: int, pairs: bool = False) -> int:
    """What `polar` holds at most beside a matrix of `rows` <= `columns`, the factor included. `pairs`: see there."""
    square, whole = rows * rows, rows * columns
    wide = min(max(BLOCK, rows), whole)
    root = max(4 * square, 2 * square + whole) if pairs else max(4 * square, square + 3 * wide)
    return max(2 * FP32 * (whole + square), FP64 * root + FP32 * whole)


def deviation(x: Tensor) -> float:
    """||x x^T - 1||_F / sqrt(k)."""
    return _from_identity(gram(x))


def newton_schulz(x: Tensor, blocks: int = 0, products: Products | None = None) -> Polar | None:
    """The polar factor by odd polynomials of x, or None if LIMIT steps do not get there. x is kept.

    The largest singular value must be known from above. It is at most sqrt(blocks), and at most ||G G||_F^(1/4) with
    G = x x^T, which the first step computes in any case.
    """
    import torch

    crew, norm = crew_for(x), _norm(x)
    if not norm:
        return None
    x = torch.div(x, norm, out=x.new_empty(x.shape)) if products else x / norm
    other, square, poly = torch.empty_like(x), x.new_empty(x.shape[0], x.shape[0]), x.new_empty(x.shape[0], x.shape[0])
    for step in range(LIMIT + 1):
        if products and 0 < step < len(POLAR_EXPRESS):
            products.polar_step((other, x, square, poly), POLAR_EXPRESS[step])
            x, other = other, x
            continue
        gram(x, square, crew=crew)
        if step >= len(POLAR_EXPRESS):
            poly.copy_(square)
            left = _from_identity(poly)
            if left < ORTHONORMAL:
                return Polar(x, f"newton-schulz {step}", left)
            if step == LIMIT:
                break
        gram(square, poly, crew=crew)
        a, b, c = POLAR_EXPRESS[step] if step < len(POLAR_EXPRESS) else QUINTIC
        if not step:
            bound = 1.01 * _norm(poly) ** 0.25
            bound = min(bound, 1.01 * blocks**0.5 / norm) if blocks else bound
            a, b, c = a / bound, b / bound**3, c / bound**5
        poly.mul_(c).add_(square, alpha=b).diagonal().add_(a)
        product(crew, poly, x, other)
        x, other = other, x
    return None


def pair(x: Tensor, first: int) -> Polar | None:
    """The polar factor of two blocks of orthonormal rows, `first` of them above, or None if they share a direction.

    With M = X_1 X_2^T and w^2 the eigenvalues of 1 - M M^T, the inverse root of x x^T = [1 M; M^T 1] is
    [f, g M; M^T g, 1 + M^T h M], where f, g, h are the functions of M M^T that are below in terms of w.
    """
    import torch

    crew = crew_for(x)
    mixed = product(crew, x[:first], x[first:].T)
    values, vectors = crew.alone(partial(torch.linalg.eigh, gram(mixed, crew=crew)))
    w = (1 - values).clamp_(min=0).sqrt_()
    if float(w.min()) < 2 * CUTOFF:  # the squared singular values of x are 1 - c to 1 + c, and w^2 = 1 - c^2
        return None
    f = ((1 + w) / 2).sqrt() / w
    g = -1 / (w * (2 * (1 + w)).sqrt())
    h = (1 + 2 * w) / (2 * w**2 * (1 + w) * (1 + f))
    turned = product(crew, vectors.T, mixed)
    root = x.new_empty(x.shape[0], x.shape[0])
    product(crew, vectors * f, vectors.T, root[:first, :first])
    product(crew, vectors * g, turned, root[:first, first:])
    root[first:, :first] = root[:first, first:].T
    product(crew, turned.T * h, turned, root[first:, first:])
    root[first:, first:].diagonal().add_(1)
    factor = product(crew, root, x).float()
    return Polar(factor, "pair", deviation(factor))


def inverse_root(x: Tensor, cutoff: float) -> Polar:
    """(x x^T)^(-1/2) x in fp64, pseudo-inverse: directions below `cutoff` of the largest come out as zero."""
    import torch

    root, crew = root_of(wide_gram(x), cutoff), crew_for(x)
    factor = torch.empty_like(x, dtype=torch.float32)
    for at, wide in columns_of(x):
        factor[:, at : at + wide.shape[1]] = product(crew, root, wide)
    return Polar(factor, "eigh", deviation(factor))


def root_of(square: Tensor, cutoff: float) -> Tensor:
    """The inverse root of x x^T in fp64, without the directions below `cutoff` of x's largest."""
    import torch

    crew = crew_for(square)
    values, vectors = crew.alone(partial(torch.linalg.eigh, square))
    kept = values > cutoff**2 * values[-1].clamp(min=1e-300)
    vectors = vectors[:, kept]
    return product(crew, vectors / values[kept].sqrt(), vectors.T)


def _from_identity(square: Tensor) -> float:
    """||square - 1||_F / sqrt(k); square is overwritten."""
    square.diagonal().sub_(1)
    return _norm(square) / math.sqrt(max(1, square.shape[0]))


def _norm(x: Tensor) -> float:
    """The Frobenius norm, on one core."""
    import torch

    return crew_for(x).alone(lambda: float(torch.linalg.vector_norm(x)))
