"""Leading singular subspaces at GEMM speed, and the products that methods on singular vectors share.

    leading(A, k)                   the k largest singular values of A [m, n] and rows that span their subspaces, fp64:
                                    eigenvectors of the Gram matrix on the smaller side; the other side is A times
                                    them, over sigma
    leading_of_factors(B, A, k)     the same of B A, which is not formed: QR of both, a small SVD between

A Gram matrix squares the condition number, so it is formed and decomposed in fp64: from fp32 one would lose what is
below 3e-4 of the largest singular value. Only the subspaces matter to the methods; within clusters of equal singular
values any basis gives the same merge, and where values k and k + 1 are equal some basis is taken.

On the CPU a product is shared by blocks of rows, each the work of one core, and a decomposition is the work of one: a
library that splits either waits for all of its threads many times, and eigh rounds differently for their number.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache, partial
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streammerge.methods._crew import Crew

FP32, FP64 = 4, 8
BLOCK = 1 << 21  # elements that are widened to fp64 at once
DROP = 1e-6  # of the largest singular value: directions below it are rounding of fp32 entries
SMALL = 640 << 10  # elements of a matrix whose products are too small for several cores: several are solved at once


class Leading(NamedTuple):
    """Part of a singular value decomposition, fp64: matrix ~ left^T diag(values) right."""

    left: Tensor  # [k, m]
    values: Tensor  # [k], falling
    right: Tensor  # [k, n]


def crew_for(x: Tensor) -> Crew:
    """Threads for the products of a matrix; idle ones stay, they hold no memory of matrices."""
    import torch

    return _crew_of(x.device, torch.get_num_threads())


@lru_cache(4)
def _crew_of(device: torch.device, threads: int) -> Crew:
    from streammerge.methods._crew import Crew

    return Crew(device)


def product(crew: Crew, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a b, cut where it is longer."""
    import torch

    out = a.new_empty(a.shape[0], b.shape[1]) if out is None else out
    if b.shape[1] > a.shape[0]:
        crew.each(lambda lo, hi: torch.mm(a, b[:, lo:hi], out=out[:, lo:hi]), b.shape[1])
    else:
        crew.each(lambda lo, hi: torch.mm(a[lo:hi], b, out=out[lo:hi]), a.shape[0])
    return out


def gram(x: Tensor, out: Tensor | None = None, *, add: bool = False, crew: Crew | None = None) -> Tensor:
    """x x^T, or `out` plus it: on the CPU little more than half of the products, the rest is mirrored."""
    from streammerge.methods import _crew

    crew = crew or crew_for(x)
    out = x.new_empty(x.shape[0], x.shape[0]) if out is None else out
    _crew.gram(crew, out, x.T, onto=float(add))
    return _crew.mirror(crew, out)


def wide_gram(x: Tensor) -> Tensor:
    """x x^T in fp64, a block of columns at a time."""
    import torch

    square, crew = x.new_zeros(x.shape[0], x.shape[0], dtype=torch.float64), crew_for(x)
    for _, wide in columns_of(x):
        gram(wide, square, add=True, crew=crew)
    return square


def directions(square: Tensor, rank: int, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Singular values of X, falling, and rows along its right directions, from X^T X in fp64: those of `leading`."""
    import torch

    values, vectors = crew_for(square).alone(partial(torch.linalg.eigh, square))
    values = values.flip(0).clamp_(min=0).sqrt_()
    floor = max(floor, DROP * float(values[0]))
    rank = int((values[:rank] > floor).sum())
    return values[:rank], vectors[:, vectors.shape[1] - rank :].flip(1).T.contiguous()


def leading(matrix: Tensor, rank: int, floor: float = 0.0) -> Leading:
    """At most `rank` directions: those above DROP of the largest and above `floor`."""
    tall = matrix.T if matrix.shape[0] < matrix.shape[1] else matrix
    values, small = directions(wide_gram(tall.T), rank, floor)
    large, crew = small.new_empty(len(small), tall.shape[0]), crew_for(matrix)
    for at, wide in columns_of(tall.T):
        product(crew, small, wide, large[:, at : at + wide.shape[1]])
    large /= values[:, None]
    return Leading(large, values, small) if tall is matrix else Leading(small, values, large)


def leading_of_factors(b: Tensor, a: Tensor, rank: int) -> Leading:
    """`leading` of b a, b [m, r] and a [r, n]."""
    import torch

    def decompose() -> Leading:
        (left, low), (right, high) = torch.linalg.qr(b.double()), torch.linalg.qr(a.double().T)
        u, values, v = torch.linalg.svd(low @ high.T, full_matrices=False)
        kept = int((values[:rank] > DROP * values[:1]).sum())
        return Leading((left @ u[:, :kept]).T.contiguous(), values[:kept], v[:kept] @ right.T)

    return crew_for(b).alone(decompose)


def leading_bytes(rows: int, columns: int, rank: int) -> int:
    """What `leading` holds at most: Gram matrix, vectors and the library's work space; or its answer and blocks."""
    side, wide = min(rows, columns), min(max(BLOCK, rows, columns), rows * columns)
    return FP64 * max(4 * side * side, rank * (rows + columns) + side * side + 2 * wide)


def inner(a: Tensor, b: Tensor) -> float:
    """<a, b>, summed in fp64."""
    parts = zip(a.split(256), b.split(256), strict=True)
    return crew_for(a).alone(lambda: sum(float((x.double() * y).sum()) for x, y in parts))


def columns_of(x: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Blocks of columns of x in fp64, and where they begin."""
    step = max(1, BLOCK // x.shape[0])
    for at in range(0, x.shape[1], step):
        yield at, x[:, at : at + step].double()
