"""What solvers share that need every task vector of a matrix at once, and exact spectra of single matrices.

Gram matrices are formed in fp64 from the fp32 entries, a block at a time, and decomposed in fp64: singular values
come out to about 1e-8 of the largest, so that directions below NOISE of it are none. Large products are done in the
matrix's own type, shared by blocks of rows (_crew.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from streammerge.methods import _spectra as spectra
from streammerge.methods._matrices import FP32, Solver

if TYPE_CHECKING:
    from torch import Tensor

FP64 = 8
BLOCK = 512  # rows or columns that are widened to fp64 at once
NOISE = 1e-7  # of the largest singular value: what lies below is rounding


class Keeper(Solver):
    """Keeps the task vectors; the last one is not copied."""

    def __init__(self, experts: int) -> None:
        self._experts = experts
        self.deltas: list[Tensor] = []

    def take(self, expert: int, delta: Tensor) -> None:
        self.deltas.append(delta if expert == self._experts - 1 else delta.clone())


def matrices_bytes(rows: int, columns: int, count: int) -> int:
    """So many fp32 matrices."""
    return FP32 * rows * columns * count


def spectrum_bytes(rows: int, columns: int, side: int = 0) -> int:
    """What `gram` and `directions` hold: the Gram matrix, its vectors, the library's work space, one wide block."""
    side = side or min(rows, columns)
    return 4 * FP64 * side * side + 2 * FP64 * BLOCK * side


def ordered(values: Tensor, index: int) -> Tensor:
    """The element that would have this index if all were sorted."""
    return values.reshape(-1).kthvalue(index + 1).values


def inverted(values: Tensor) -> Tensor:
    """1 / singular values, and 0 for those that are noise."""
    import torch

    real = values > NOISE * values[:1]
    return torch.where(real, 1 / torch.where(real, values, 1), 0)


def gram(matrices: Sequence[Tensor], left: bool) -> Tensor:
    """Sum of A A^T (left) or of A^T A, fp64."""
    import torch

    size = matrices[0].shape[0 if left else 1]
    total, crew = matrices[0].new_zeros(size, size, dtype=torch.float64), spectra.crew_for(matrices[0])
    for matrix in matrices:
        turned = matrix if left else matrix.T
        for at in range(0, turned.shape[1], BLOCK):
            spectra.gram(turned[:, at : at + BLOCK].double(), total, add=True, crew=crew)
    return total


def directions(matrices: Sequence[Tensor], left: bool) -> tuple[Tensor, Tensor]:
    """Singular values, falling, and vectors (columns) of matrices side by side (left) or stacked; both fp64."""
    import torch

    square = gram(matrices, left)
    values, vectors = spectra.crew_for(square).alone(partial(torch.linalg.eigh, square))
    return values.clamp_(min=0).sqrt_().flip(0), vectors.flip(1)


def add_product(out: Tensor, a: Tensor, b: Tensor, factor: float = 1.0) -> None:
    """out += factor a b."""
    spectra.crew_for(out).each(lambda lo, hi: out[lo:hi].addmm_(a[lo:hi], b, alpha=factor), len(out))
