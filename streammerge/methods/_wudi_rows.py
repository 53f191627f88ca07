"""WUDI on tall matrices: every row of M needs the same row of all task vectors, and squares of the columns.

    tau_i^T tau_i                     one expert after the other, fp64; w_i = 1 / trace
    rows of M_0                       sum_i tau_i
    rows of R = D - M_0 C             sum_i tau_i B_i, B_i = w_i tau_i^T tau_i - C = -sum_(j not i) w_j tau_j^T tau_j
    rows of M                         M_0 + X, from R and C as ever (_wudi.py, _wudi_flow.py)

B_i are kept in the precision of the way. No large numbers cancel in R: what is left of them has cancelled in B_i, in
fp64, before it is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from streammerge.methods._crew import ROOM, STEP, add_product, dot, gram, mirror
from streammerge.methods._tall import ROWS, RowSolver
from streammerge.methods._wudi import TINY, WIDE, Move, Way


class Rows(RowSolver):
    """The experts' squares, then blocks of rows on their own. `balanced` are the weights, to balance norms."""

    def __init__(self, experts: int, way: Way, wide: bool, balanced: Sequence[float] | None) -> None:
        super().__init__()
        self._experts, self._way, self._balanced = experts, way, balanced
        self._dtype = torch.float64 if wide else torch.float32
        self._square: Tensor | None = None  # of this round, on the diagonal and above it
        self._kept: dict[int, Tensor] = {}  # of those that count: tau_i^T tau_i, then B_i
        self._sizes: dict[int, float] = {}  # |tau_i|^2
        self._pulls: dict[int, float] = {}  # factors on task vectors in M_0 and D
        self._move: Move | None = None

    def look(self, number: int, taus: Sequence[Tensor]) -> None:
        (tau,) = taus
        wide = self.room(0, tau, tau.shape[1], torch.float64).copy_(tau)
        if self._square is None:
            self._square = wide.new_zeros(wide.shape[1], wide.shape[1])
        gram(self.crew, self._square, wide, onto=1.0)

    def settle(self, number: int) -> None:
        assert self._square is not None
        size = float(self._square.diagonal().sum())
        if size >= TINY:
            self._sizes[number] = size
            self._kept[number] = mirror(self.crew, self._square.to(self._dtype))
        self._square = None
        if number == self._experts - 1 and len(self._kept) > 1:
            self._prepare()

    def _prepare(self) -> None:
        norms = [math.sqrt(size) for size in self._sizes.values()]
        if self._balanced:
            norms = [norm / abs(self._balanced[i]) for i, norm in zip(self._sizes, norms, strict=True)]
        mean = sum(norms) / len(norms)
        self._pulls = {i: mean / norm if self._balanced else 1.0 for i, norm in zip(self._sizes, norms, strict=True)}
        both = torch.empty_like(next(iter(self._kept.values())))

        def block(a: int, b: int) -> None:
            for at in range(a, b, STEP):
                rows = slice(at, min(at + STEP, b))
                parts = {i: square[rows].double() / self._sizes[i] for i, square in self._kept.items()}
                total = torch.stack(list(parts.values())).sum(0)
                both[rows] = total
                for i, part in parts.items():
                    self._kept[i][rows] = (part - total) * self._pulls[i]

        self.crew.each(block, len(both))
        self._move = self._way(self.crew, both, len(norms) / len(both))

    def merged(self, taus: Sequence[Tensor]) -> tuple[Tensor, tuple[float, ...]]:
        if self._move is None:  # at most one counts, and is the answer to the bit
            return next((taus[i] for i in self._kept), torch.zeros_like(taus[0])), (0.0, 0.0, 0.0)
        start, rest = (self.room(i, taus[0], taus[0].shape[1], self._dtype).zero_() for i in (1, 2))

        def block(a: int, b: int) -> tuple[float, ...]:
            assert self._move is not None
            for i, turned in self._kept.items():
                tau = taus[i][a:b].to(self._dtype)
                start[a:b].add_(tau, alpha=self._pulls[i])
                add_product(self.crew, rest[a:b], tau, turned, 1.0)
            moved, gradient = self._move(rest[a:b])
            start[a:b] += moved
            return dot(rest[a:b], rest[a:b]), dot(gradient, gradient), dot(moved, moved)

        sums = self.crew.each(block, len(start))
        return taus[0].copy_(start), tuple(math.fsum(column) for column in zip(*sums, strict=True))

    def figures(self, sums: Sequence[float]) -> Mapping[str, float]:
        before, after, moved = sums
        if self._move is None:
            return {}
        return {"residual": math.sqrt(after / before) if before > 0 else 0.0, "travelled": math.sqrt(moved)}


def bytes_kept(columns: int, experts: int, way: str) -> int:
    """The peak of `Rows`: adding up, going its way, or merging a block."""
    size = 8 if way in WIDE else 4
    square, block = columns * columns, ROWS * columns
    adding = (experts * size + 8) * square
    preparing = (experts + 1) * size * square + 2 * 8 * (experts + 1) * STEP * columns * torch.get_num_threads()
    going = (experts + (1 if way == "adam" else 4)) * size * square + (2 * size + max(ROOM, 3 * size)) * block
    return int(max(adding, preparing, going) + 8 * block)
