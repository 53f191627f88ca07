"""One step towards the polar factor of a matrix: an odd polynomial of its singular values, three products.

    gram = x x^T,   poly = b gram + c gram gram,   out = a x + poly x          x [k, columns], k <= columns, fp32

Singular values s become a s + b s^3 + c s^5; singular vectors stay. With coefficients that drive s to 1 the limit is
U V^T, the nearest matrix with orthonormal rows. Which coefficients: host/polar_step.py. A tall matrix is transposed
first by the caller. What x was like before the step can be read in `gram`: the identity, when it is done.

gram and poly are symmetric to the bit; half of each is computed. They are read by rows, so that of the six operands
only x in the last product has its k across memory, and that one stays in registers. c = 0 saves the second product.
Every product is as `precision` says (gemm.py). What 12 steps leave of max |out out^T - 1|, 96 x 160, condition 6, in
Triton's interpreter: ieee 2e-7, tf32x3 3e-7, bf16x3 6e-6, tf32 1e-3. The CPU computes in fp32 whatever was asked for.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemm
from . import reference as truth
from .device import load, store
from .gemm import grouped_tile, multiply, place
from .numerics import Span
from .queue import Queue

FUSED = True  # the products of 'ieee' are fused multiply-adds; the rest is not

CASES = [
    (1, 1, (1.5, -0.5, 0.25), "ieee"),
    (37, 70, (1.5, -0.5, 0.25), "tf32x3"),
    (64, 128, (1.5, -0.5, 0.25), "tf32x3"),
    (70, 130, (1.5, -0.5, 0.0), "bf16x3"),
    (128, 144, (2.0, -1.5, 0.5), "bf16x3"),
    (128, 128, (1.5, -0.5, 0.25), "ieee"),
    (128, 160, (1.5, -0.5, 0.25), "tf32"),
]


@triton.jit(do_not_specialize=["out", "x", "poly", "rows", "columns"])
def _apply(
    out,
    x,
    poly,
    rows,
    columns,
    patch,
    a,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WARPS: tl.constexpr,
):
    """A tile of out^T = a x^T + x^T poly: that way round, x is the operand that stays in registers."""
    i, j = grouped_tile(tl.program_id(0), columns, rows, patch, ROWS, COLUMNS)
    out, x, poly = tl.cast(out, tl.int64), tl.cast(x, tl.int64), tl.cast(poly, tl.int64)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = multiply(
        acc, (x,), (poly,), i, j, columns, rows, rows, columns, rows, (0,), (0,), False, True,
        PRECISION, ALIGN, MASKED, DEPTH, WARPS,
    )  # fmt: skip
    if ALIGN > 1:
        columns = columns // 16 * 16
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (r < columns - i)[:, None] & (c < rows - j)[None, :]
    offs, at = r[:, None] + c[None, :] * columns, 4 * place(j, i, columns)
    acc += a * load(x + at, offs, mask, 0, ALIGN, MASKED)
    store(out + at, offs, acc, mask, 0, ALIGN, MASKED)


def launch(
    queue: Queue,
    out: Span,
    x: Span,
    gram: Span,
    poly: Span,
    columns: int,
    coefficients: tuple[float, float, float],
    precision: str = "tf32x3",
) -> None:
    rows = x.numel // columns
    a, b, c = coefficients
    assert out.numel == x.numel == rows * columns
    assert {span.dtype for span in (out, x, gram, poly)} == {"F32"}
    gemm.symmetric(queue, gram, (x,), columns, True, None, 0.0, 1.0, True, precision)
    gemm.symmetric(queue, poly, (gram,), rows, True, gram, b, c, True, precision)
    spans = (out, x, poly)
    shape = gemm.shape_of(precision, (x,), spans, (columns, rows, rows), (columns, rows))
    queue.submit(
        _apply,
        (triton.cdiv(columns, shape["ROWS"]) * triton.cdiv(rows, shape["COLUMNS"]),),
        *(span.address for span in spans),
        rows,
        columns,
        gemm.PATCH,
        float(np.float32(a)),
        PRECISION=precision,
        **shape,
    )


def reference(
    out: Tensor,
    x: Tensor,
    gram: Tensor,
    poly: Tensor,
    columns: int,
    coefficients: tuple[float, float, float],
    precision: str = "tf32x3",
) -> None:
    """The same in torch, in fp32 throughout."""
    a, b, c = (float(np.float32(value)) for value in coefficients)
    square = x.view(-1, columns)
    clean = gemm.operand(square)
    first = clean @ clean.T + 0.0
    second = b * first + (c * (gemm.operand(first) @ gemm.operand(first) + 0.0) if c else 0.0)
    truth.write(gram, first.reshape(-1))
    truth.write(poly, second.reshape(-1))
    truth.write(out, (a * square + (gemm.operand(second) @ clean + 0.0)).reshape(-1))


def inputs(
    rows: int,
    columns: int,
    coefficients: tuple[float, float, float],
    precision: str,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    """A sparse x of -1, 0 and 1, so that every sum is exact in fp32 and every precision; the outputs are poisoned."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randint(-1, 2, (rows * columns,), generator=random).float()
    x *= torch.rand(rows * columns, generator=random) < 6 / columns
    made = [torch.full((numel,), torch.nan, device=device) for numel in (rows * columns, rows * rows, rows * rows)]
    return made[0], x.to(device), made[1], made[2], columns, coefficients, precision


def bytes_moved(out: Any, x: Any, gram: Any, poly: Any, *rest: Any) -> int:
    return truth.nbytes(out, x, gram, poly)


def flops(out: Any, x: Any, gram: Any, poly: Any, columns: int, coefficients: Any, *rest: Any) -> int:
    """Multiplications and additions, of symmetric results one triangle."""
    numel = x.numel if isinstance(x, Span) else x.numel()
    rows = numel // columns
    return rows * (rows + 1) * (columns + (rows if coefficients[2] else 0)) + 2 * rows * rows * columns
