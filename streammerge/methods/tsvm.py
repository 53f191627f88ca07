"""TSV-Merge: each expert's leading singular directions side by side, made orthogonal to each other.

    tau_i  ~ U_i S_i V_i^T                  the k = floor(min(m, n) / T) leading singular triplets, T experts
    merged = base + scale P(U) S P(V)^T     U = [U_1 ... U_T], V alike, S all their values; P(X) the nearest matrix to
                                            X with orthonormal columns (its polar factor)

Gargiulo et al. 2024, arXiv:2412.00081. They choose the scale on validation sets and name 1 as a good default. One
expert comes out as it is: k is its whole rank. Where the paper leaves freedom:

    directions with singular values below 1e-6 of an expert's largest are rounding and dropped
    experts without any direction left count in T and add nothing
    directions that experts share (to 1e-5) are kept once: equal experts merge to the k leading directions of one
    matrices with fewer rows or columns than experts count as none: see `other`

`solver: gram` takes subspaces from fp64 Gram matrices (_spectra.py) and polar factors from fp32 products (_polar.py),
`solver: svd` decomposes whole matrices in fp64. They agree to 3e-5 in norm, unless an expert's singular values k and
k + 1 are nearly equal: then the paper does not say which direction is kept. Of an adapter the directions come from its
two factors.

Tall matrices go by squares of their columns, see _tall.py and _tsvm_rows.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from streammerge.errors import RecipeError
from streammerge.method import TileMethod, param
from streammerge.methods import _polar as polars
from streammerge.methods import _spectra as spectra
from streammerge.methods._matrices import EIGH, FP32, FP64, Solver
from streammerge.methods._precision import Products
from streammerge.methods._tall import One, RowsMethod, RowSolver

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Tsvm(RowsMethod):
    """Orthogonal task singular vectors."""

    summary = "each expert's leading singular directions, made orthogonal to the others'"
    source = "Gargiulo et al. 2024, arXiv:2412.00081"
    product = "polar_step"

    solver_: str = param("gram", "gram: eigenvectors of Gram matrices, and products; svd: plain and slow, in fp64")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_ not in ("gram", "svd"):
            raise RecipeError(f"tsvm: solver is {self.solver_!r}; one of gram, svd")
        if self.solver_ == "svd" and self.precision != "fp32":
            raise RecipeError(f"tsvm: precision is {self.precision}, and solver svd computes in fp64; leave one out")

    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> TileMethod:
        few = len(shape) == 2 and min(shape) < experts
        return super().for_tensor(name, shape[:1] if few else shape, experts)

    def solver(self, rows: int, columns: int, experts: int) -> Solver:
        return Directions(experts, min(rows, columns) // experts, self.solver_ == "svd", self.precision)

    def bytes_kept(self, rows: int, columns: int, experts: int) -> int:
        if experts == 1:
            return 0
        small, rank = min(rows, columns), min(rows, columns) // experts
        whole, side = rows * columns, experts * rank
        wide = experts == 2 or self.solver_ == "svd"
        bases = (spectra.FP64 if wide else FP32) * side * (rows + columns)
        if self.solver_ == "svd":  # the wide matrix, its copy, both factors and the library's work space
            found = factor = spectra.FP64 * (4 * whole + 9 * small * small)
        else:
            found = spectra.leading_bytes(rows, columns, rank)
            factor = polars.polar_bytes(side, max(rows, columns), wide)
        return bases + max(found, FP32 * side * small + factor)

    def bytes_kept_there(self, rows: int, columns: int, experts: int) -> int:
        library = EIGH * FP64 * min(rows, columns) ** 2
        return self.bytes_kept(rows, columns, experts) + library if experts > 1 else 0

    def by_rows(self, shape: tuple[int, ...]) -> bool:
        return self.solver_ == "gram" and super().by_rows(shape)

    def row_rounds(self, experts: int) -> tuple[int, int]:
        return experts, int(experts > 1)

    def row_solver(self, columns: int, experts: int) -> RowSolver:
        from streammerge.methods._tsvm_rows import Rows

        return Rows(experts, columns // experts) if experts > 1 else One()

    def row_bytes(self, columns: int, experts: int) -> int:
        from streammerge.methods._tsvm_rows import bytes_kept

        return bytes_kept(columns, experts) if experts > 1 else 0


class Directions(Solver):
    """The experts' leading directions as rows, one expert below the other."""

    def __init__(self, experts: int, rank: int, plain: bool, precision: str = "fp32") -> None:
        assert rank > 0
        self.routes: list[str] = []  # how the polar factors were found, left and right
        self._experts, self._rank, self._plain, self._precision = experts, rank, plain, precision
        self._leading = decomposed if plain else spectra.leading
        self._wide = plain or experts == 2
        self._alone: Tensor | None = None  # the task vector of an only expert
        self._sides: tuple[list[Tensor], list[Tensor]] = ([], [])  # left and right, a block of rows for each expert
        self._values: list[Tensor] = []

    def take(self, expert: int, delta: Tensor) -> None:
        if self._experts == 1:
            self._alone = delta
        else:
            self._add(self._leading(delta, self._rank))

    def take_factors(self, expert: int, b: Tensor, a: Tensor) -> None:
        if self._experts == 1:
            super().take_factors(expert, b, a)
        else:
            self._add(spectra.leading_of_factors(b, a, self._rank))

    def _add(self, found: spectra.Leading) -> None:
        import torch

        kind = torch.float64 if self._wide else torch.float32
        for blocks, side in zip(self._sides, (found.left, found.right), strict=True):
            blocks.append(side.to(kind))
        self._values.append(found.values)

    def finish(self) -> Tensor:
        import torch

        if self._alone is not None:
            return self._alone
        sizes = [len(values) for values in self._values]
        products = Products.on(self.queue, self._precision)
        polar = orthogonal if self._plain else partial(polars.polar, products=products)
        found = []
        for blocks in self._sides:
            stacked = torch.cat(blocks)
            blocks.clear()
            found.append(polar(stacked, sizes))
            del stacked
        self.routes = [each.route for each in found]
        left, right = (each.factor for each in found)
        left *= torch.cat(self._values).to(left.dtype)[:, None]
        return spectra.product(spectra.crew_for(left), left.T, right).float()


def decomposed(matrix: Tensor, rank: int) -> spectra.Leading:
    """The same as `leading`, from the whole singular value decomposition."""
    left, values, right = _svd(matrix.double())
    rank = min(rank, int((values > spectra.DROP * values[0]).sum()))
    return spectra.Leading(left[:, :rank].T.contiguous(), values[:rank], right[:rank].clone())


def orthogonal(x: Tensor, sizes: list[int]) -> polars.Polar:
    """The polar factor from the whole singular value decomposition, fp64."""
    left, values, right = _svd(x)
    kept = values > polars.CUTOFF * values[:1]
    return polars.Polar(spectra.product(spectra.crew_for(x), left[:, kept], right[kept]), "svd", 0.0)


def _svd(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """On one core; on a GPU by QR: Jacobi, which torch tries first, is slow beyond some hundred rows and less exact."""
    import torch

    driver = "gesvd" if x.is_cuda else None
    left, values, right = spectra.crew_for(x).alone(partial(torch.linalg.svd, x, full_matrices=False, driver=driver))
    return left, values, right


# By hand: with k = 1 each expert gives its larger direction; they are orthogonal already, so the merge is their sum.
# Twice the same expert: its larger direction, once. (3, 0; 0, 0) and (1, 1; 0, 0): both have the left direction (1, 0),
# so P([u u]) = [u u] / sqrt(2) drops nothing but shares it.
EXAMPLES = [
    (
        Tsvm(),
        [[1.0, 1.0], [1.0, 1.0]],
        [[[4.0, 1.0], [1.0, 2.0]], [[2.0, 1.0], [1.0, 6.0]]],
        [[4.0, 1.0], [1.0, 6.0]],
    ),
    (
        Tsvm(scale=0.5),
        [[0.0, 0.0], [0.0, 0.0]],
        [[[4.0, 0.0], [0.0, 2.0]], [[4.0, 0.0], [0.0, 2.0]]],
        [[2.0, 0.0], [0.0, 0.0]],
    ),
    (
        Tsvm(solver_="svd", weight=(1.0, 3.0)),
        [[0.0, 0.0], [0.0, 0.0]],
        [[[1.0, 0.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]],
        [[1.0, 0.0], [0.0, 3.0]],
    ),
]
