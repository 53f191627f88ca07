"""One step towards the polar factor on the CPU, and the polynomials that lead there.

    gram = x x^T,   poly = b gram + c gram gram,   out = a x + poly x          x [k, columns], k <= columns, fp32

The singular values of x must lie in (0, 1] for POLAR_EXPRESS, in (0, sqrt(7 / 3)) for QUINTIC alone. For matrices
[U_1 ... U_T] of orthonormal blocks divide by 1.01 sqrt(T); else by 1.01 times the Frobenius norm, and take seven steps
of POLAR_EXPRESS more if the spectrum is wide.
"""

from __future__ import annotations

import numpy as np

from streammerge.kernels.host.gemm import matrix, mirror, operand, settle
from streammerge.kernels.numerics import Span

# Amsel et al. 2025, arXiv:2505.16932: the best polynomial of degree five for what the steps before it left over.
POLAR_EXPRESS = (
    (8.2051, -22.9019, 16.4607),
    (4.0664, -2.8612, 0.5184),
    (3.9096, -2.8234, 0.5250),
    (3.2856, -2.4153, 0.4853),
    (2.2779, -1.6198, 0.3985),
    (1.8726, -1.2307, 0.3585),
    (1.8564, -1.2132, 0.3568),
)
QUINTIC = (1.875, -1.25, 0.375)  # Newton-Schulz of third order: the error e of a singular value becomes 2.5 e^3
CUBIC = (1.5, -0.5, 0.0)  # of second order, one product less: 1.5 e^2
MUON = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024. Fast, but it leaves singular values between 0.7 and 1.2
STEPS = POLAR_EXPRESS + 5 * (QUINTIC,)  # orthonormal to fp32 where the condition number is below some 3,000


def host(
    out: Span,
    x: Span,
    gram: Span,
    poly: Span,
    columns: int,
    coefficients: tuple[float, float, float],
    precision: str = "tf32x3",
) -> None:
    """Write gram, poly and `out`. The precision is fp32 whatever was asked for."""
    a, b, c = (np.float32(value) for value in coefficients)
    rows = x.numel // columns
    assert out.numel == x.numel == rows * columns
    assert gram.numel == poly.numel == rows * rows
    results = [matrix(span, side) for span, side in ((gram, max(rows, 1)), (poly, max(rows, 1)), (out, columns))]
    source = operand(matrix(x, columns))
    with np.errstate(all="ignore"):
        np.matmul(source, source.T, out=results[0])
        settle(gram.address, 0, results[0], rows, 0, 0, False, 0, 1)
        mirror(gram.address, rows)
        first = operand(results[0])
        np.matmul(first, first.T, out=results[1]) if c else results[1].fill(0)
        settle(poly.address, gram.address, results[1], rows, 0, 0, False, b, c or 1)
        mirror(poly.address, rows)
        np.matmul(operand(results[1]), source, out=results[2])
    settle(out.address, x.address, results[2], columns, 0, 0, False, a, 1)
