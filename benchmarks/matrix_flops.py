"""Useful FLOP of the solvers, by formula: what the arithmetic needs, not what a library happens to do.

A product [a, b] x [b, c] is 2abc, one with a symmetric result half of that, an eigendecomposition of [n, n] with its
vectors 9 n^3 (Golub and Van Loan). Norms, conversions and the elementwise part of Adam are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from streammerge.methods._polar import LIMIT
from streammerge.methods._wudi import _short
from streammerge.methods._wudi_flow import CHUNK, DEGREE

EIGEN = 9  # times n^3


class Flop(NamedTuple):
    """In products in fp32 and in fp64, and in eigendecompositions, which are fp64 or fp32 and never at their speed."""

    single: float = 0.0
    double: float = 0.0
    eigen: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)

    def plus(self, other: Flop) -> Flop:
        return Flop(*(a + b for a, b in zip(self, other, strict=True)))


def tsvm(rows: int, columns: int, experts: int, routes: Iterable[str]) -> Flop:
    """`routes`: how the polar factors were found, of the left [s, rows] and of the right [s, columns] bases."""
    small, large = sorted((rows, columns))
    rank = small // experts
    found = Flop(0, experts * (large * small**2 + 2 * rank * small * large), experts * EIGEN * small**3)
    for side, route in zip((rows, columns), routes, strict=True):
        found = found.plus(_polar(experts * rank, side, route))
    return found.plus(Flop(2 * rows * columns * experts * rank))


def _polar(rows: int, columns: int, route: str) -> Flop:
    """Of three experts or more: `newton-schulz STEPS`, or `eigh` when LIMIT of them did not do."""
    name, _, steps = route.partition(" ")
    gram, product = rows**2 * columns, 2 * rows**2 * columns
    count = int(steps or LIMIT)
    newton = Flop((count + 1) * gram + count * (rows**3 + product))
    if name == "newton-schulz":
        return newton
    assert name == "eigh", route
    return newton.plus(Flop(0, gram + 2 * rows**3 + product, EIGEN * rows**3))


def sums(rows: int, columns: int, experts: int) -> Flop:
    """C and D of WUDI over all experts, and R = D - M_0 C."""
    short = _short(rows, columns)
    side = min(rows, columns) if short else columns
    single = side * rows * columns + (rows * columns**2 if short else 0)
    return Flop(experts * single, experts * 2 * side * rows * columns + 2 * rows * columns**2)


def adam(rows: int, columns: int, experts: int, steps: int) -> Flop:
    """One product a step, and one for the report at the end."""
    return sums(rows, columns, experts).plus(Flop((steps + 1) * 2 * rows * columns**2))


def doubling(rows: int, columns: int, experts: int, doublings: int) -> Flop:
    """The polynomial's powers and Horner steps, two products a doubling, then R times the result."""
    squares = 2 + (DEGREE + 1) // CHUNK - 1 + 1 + 2 * doublings
    return sums(rows, columns, experts).plus(Flop(squares * columns**3 + 2 * 2 * rows * columns**2))
