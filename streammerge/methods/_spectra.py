"""Leading singular subspaces and polar factors at GEMM speed: what the methods on task singular vectors share.

    leading(A, k)   the k largest singular values of A [m, n] and rows that span their subspaces, fp64:
                    eigenvectors of the Gram matrix on the smaller side; the other side is A times them, over sigma
    polar(X)        X = P S Q^T -> P Q^T, the nearest matrix with orthonormal rows, X [k, n], k <= n

A Gram matrix squares the condition number, so it is formed and decomposed in fp64: from fp32 one would lose what is
below 3e-4 of the largest singular value. Only the subspaces matter to the methods; within clusters of equal singular
values any basis gives the same merge, and where values k and k + 1 are equal some basis is taken.

Polar factors take, in this order, the first route that holds:

    orthonormal     one block of orthonormal rows: it is its own polar factor
    pair            two such blocks in fp64: inverse root of [1 M; M^T 1] by an eigendecomposition of half the size
    newton-schulz   fp32: seven Polar Express steps, then quintic ones until ||X X^T - 1||_F / sqrt(k) < ORTHONORMAL
    eigh            fp64 inverse root of X X^T, pseudo-inverse: without singular values below CUTOFF of the largest
                    if X is stacked bases, below DROP if it is any matrix

The route depends on the matrix alone. Newton-Schulz in fp32 is off by some 5e-9 times the condition number; what takes
more than LIMIT steps has one above 1e4 and goes the fp64 way. More steps would even let rounding errors of directions
that experts share grow into directions of their own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

R = TypeVar("R")

FP32, FP64 = 4, 8
BLOCK = 1 << 21  # elements that are widened to fp64 at once
LEAF = 128  # rows of a symmetric product up to which half of it costs as much as all
DROP = 1e-6  # of the largest singular value: directions below it are rounding of fp32 entries
CUTOFF = 1e-5  # the same for stacked fp32 bases: experts that share a direction to so little share it
ORTHONORMAL = 1e-6
LIMIT = 12  # steps
SMALL = 640 << 10  # elements of a matrix whose decompositions are too small for several cores: each gets one
CORES = 4  # that work on small matrices at once at most: each piece of work has memory of its own

# Amsel et al. 2025, arXiv:2505.16932; singular values must start in (0, 1].
POLAR_EXPRESS = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568),
)
QUINTIC = (1.875, -1.25, 0.375)


class Leading(NamedTuple):
    """Part of a singular value decomposition, fp64: matrix ~ left^T diag(values) right."""

    left: Tensor  # [k, m]
    values: Tensor  # [k], falling
    right: Tensor  # [k, n]


class Polar(NamedTuple):
    """A polar factor, fp32, and how it was found."""

    factor: Tensor
    route: str
    deviation: float  # ||X X^T - 1||_F / sqrt(k); sqrt of the share of dropped directions after `eigh`


def each(works: Sequence[Callable[[], R]], numel: int) -> list[R]:
    """What independent pieces of work on matrices of so many elements give.

    Small ones are done side by side, each on one core, and so with the same bits on any number of cores: libraries
    split eigendecompositions of some hundred rows badly. Large ones are done one after the other on all cores.
    """
    import torch

    if numel > SMALL:
        return [work() for work in works]
    cores = torch.get_num_threads()

    def alone(work: Callable[[], R]) -> R:
        torch.set_num_threads(1)  # of this thread, and of the library's products everywhere until the end
        return work()

    try:
        with ThreadPoolExecutor(min(cores, CORES)) as pool:
            return list(pool.map(alone, works))
    finally:
        torch.set_num_threads(cores)


def gram(x: Tensor, out: Tensor | None = None, *, add: bool = False) -> Tensor:
    """x x^T, or `out` plus it: little more than half of the products, the rest is mirrored."""
    import torch

    rows, half = x.shape[0], x.shape[0] // 2
    if out is None:
        out = x.new_empty(rows, rows)
    if rows <= LEAF:
        return torch.addmm(out, x, x.T, beta=float(add), out=out)
    gram(x[:half], out[:half, :half], add=add)
    gram(x[half:], out[half:, half:], add=add)
    corner = out[half:, :half]
    torch.addmm(corner, x[half:], x[:half].T, beta=float(add), out=corner)
    out[:half, half:].copy_(corner.T)
    return out


def wide_gram(x: Tensor) -> Tensor:
    """x x^T in fp64, a block of columns at a time."""
    import torch

    square = x.new_zeros(x.shape[0], x.shape[0], dtype=torch.float64)
    for _, wide in _columns(x):
        gram(wide, square, add=True)
    return square


def leading(matrix: Tensor, rank: int, floor: float = 0.0) -> Leading:
    """At most `rank` directions: those above DROP of the largest and above `floor`."""
    import torch

    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    values, vectors = torch.linalg.eigh(wide_gram(tall.T))
    values = values.flip(0).clamp_(min=0).sqrt_()
    floor = max(floor, DROP * float(values[0]))
    rank = int((values[:rank] > floor).sum())
    values, small = values[:rank], vectors[:, vectors.shape[1] - rank :].flip(1).T.contiguous()
    del vectors
    large = small.new_empty(rank, tall.shape[0])
    for at, wide in _columns(tall.T):
        torch.mm(small, wide, out=large[:, at : at + wide.shape[1]])
    large /= values[:, None]
    return Leading(large, values, small) if tall is matrix else Leading(small, values, large)


def leading_bytes(rows: int, columns: int, rank: int) -> int:
    """What `leading` holds at most: Gram matrix, vectors and the library's work space; or its answer and blocks."""
    side = min(rows, columns)
    return FP64 * max(4 * side * side, rank * (rows + columns) + side * side + 2 * max(BLOCK, side))


def polar(x: Tensor, sizes: Sequence[int] | None = None) -> Polar:
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
        found = newton_schulz(x.float(), len(blocks))
    if found is None or found.deviation > ORTHONORMAL:
        return inverse_root(x, CUTOFF if blocks else DROP)
    return found


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b>, summed in fp64."""
    return sum(float((x.double() * y).sum()) for x, y in zip(a.split(256), b.split(256), strict=True))


def polar_bytes(rows: int, columns: int, pairs: bool = False) -> int:
    """What `polar` holds at most beside a matrix of `rows` <= `columns`, the factor included. `pairs`: see there."""
    square, whole = rows * rows, rows * columns
    root = max(4 * square, 2 * square + whole) if pairs else max(4 * square, square + 3 * max(BLOCK, rows))
    return max(2 * FP32 * (whole + square), FP64 * root + FP32 * whole)


def deviation(x: Tensor) -> float:
    """||x x^T - 1||_F / sqrt(k)."""
    return _from_identity(gram(x))


def newton_schulz(x: Tensor, blocks: int = 0) -> Polar | None:
    """The polar factor by odd polynomials of x, or None if LIMIT steps do not get there. x is kept.

    The largest singular value must be known from above. It is at most sqrt(blocks), and at most ||G G||_F^(1/4) with
    G = x x^T, which the first step computes in any case.
    """
    import torch

    norm = float(torch.linalg.vector_norm(x))
    if not norm:
        return None
    x = x / norm
    other, square, poly = torch.empty_like(x), x.new_empty(x.shape[0], x.shape[0]), x.new_empty(x.shape[0], x.shape[0])
    for step in range(LIMIT + 1):
        gram(x, square)
        if step >= len(POLAR_EXPRESS):
            poly.copy_(square)
            left = _from_identity(poly)
            if left < ORTHONORMAL:
                return Polar(x, f"newton-schulz {step}", left)
            if step == LIMIT:
                break
        gram(square, poly)
        a, b, c = POLAR_EXPRESS[step] if step < len(POLAR_EXPRESS) else QUINTIC
        if not step:
            bound = 1.01 * float(torch.linalg.vector_norm(poly)) ** 0.25
            bound = min(bound, 1.01 * blocks**0.5 / norm) if blocks else bound
            a, b, c = a / bound, b / bound**3, c / bound**5
        poly.mul_(c).add_(square, alpha=b).diagonal().add_(a)
        torch.mm(poly, x, out=other)
        x, other = other, x
    return None


def pair(x: Tensor, first: int) -> Polar | None:
    """The polar factor of two blocks of orthonormal rows, `first` of them above, or None if they share a direction.

    With M = X_1 X_2^T and w^2 the eigenvalues of 1 - M M^T, the inverse root of x x^T = [1 M; M^T 1] is
    [f, g M; M^T g, 1 + M^T h M], where f, g, h are the functions of M M^T that are below in terms of w.
    """
    import torch

    mixed = x[:first] @ x[first:].T
    values, vectors = torch.linalg.eigh(gram(mixed))
    w = (1 - values).clamp_(min=0).sqrt_()
    if float(w.min()) < 2 * CUTOFF:  # the squared singular values of x are 1 - c to 1 + c, and w^2 = 1 - c^2
        return None
    f = ((1 + w) / 2).sqrt() / w
    g = -1 / (w * (2 * (1 + w)).sqrt())
    h = (1 + 2 * w) / (2 * w**2 * (1 + w) * (1 + f))
    root = x.new_empty(x.shape[0], x.shape[0])
    torch.mm(vectors * f, vectors.T, out=root[:first, :first])
    torch.mm((vectors * g) @ vectors.T, mixed, out=root[:first, first:])
    root[first:, :first] = root[:first, first:].T
    root[first:, first:] = mixed.T @ ((vectors * h) @ vectors.T @ mixed)
    root[first:, first:].diagonal().add_(1)
    factor = (root @ x).float()
    return Polar(factor, "pair", deviation(factor))


def inverse_root(x: Tensor, cutoff: float) -> Polar:
    """(x x^T)^(-1/2) x in fp64, pseudo-inverse: directions below `cutoff` of the largest come out as zero."""
    import torch

    values, vectors = torch.linalg.eigh(wide_gram(x))
    kept = values > cutoff**2 * values[-1].clamp(min=1e-300)
    vectors = vectors[:, kept]
    root = (vectors / values[kept].sqrt()) @ vectors.T
    factor = torch.empty_like(x, dtype=torch.float32)
    for at, wide in _columns(x):
        factor[:, at : at + wide.shape[1]] = root @ wide
    return Polar(factor, "eigh", deviation(factor))


def _columns(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of columns of x in fp64, and where they begin."""
    step = max(1, BLOCK // x.shape[0])
    for at in range(0, x.shape[1], step):
        yield at, x[:, at : at + step].double()


def _from_identity(square: Tensor) -> float:
    """||square - 1||_F / sqrt(k); square is overwritten."""
    import torch

    square.diagonal().sub_(1)
    return float(torch.linalg.vector_norm(square)) / math.sqrt(max(1, square.shape[0]))
