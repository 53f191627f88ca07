"""Gram matrix of a task vector, of its columns or its rows, without the task vector ever being written down.

    delta = expert - base           [m, columns], row-major; base None: the expert is the task vector
    out = weight * delta^T delta                     [columns, columns], or with rows
    out = weight * delta delta^T                     [m, m]                 out += ... with accumulate

The difference is rounded at most once, to fp32, and no further but as `precision` says (gemm.py). What that costs, as
the relative Frobenius error of the Gram matrix of 1024 x 128 against fp64, in Triton's interpreter:

    precision   fp32 checkpoints   bf16 checkpoints     rate of the unit, relative to tf32
    ieee        1e-7               1e-7                 1/8, fp32 without tensor cores
    tf32        1e-4               1e-5                 1
    tf32x3      2e-7               1e-7                 1/3
    bf16x3      3e-6, too small    4e-7, too small      2/3

bf16x3 drops low * low, so its diagonal is always too small. eigh of a Gram matrix loses what lies below the square
root of its error: take fp64 from a library for that.

Only tiles on and above the diagonal are computed. The others are written as their mirror images, or with mirror=False
are left alone: the sum over row tiles and experts is accumulated that way, and mirrored by its last call.

With weight 1 the sum goes on from `out` term by term, so a matrix in row tiles of whole multiples of 64 rows gives the
bits of the matrix in one piece. With another weight `out` gets the weighted sum of the call added to it. The CPU
computes in fp32 whatever the precision, in panels of rows (PANEL in host/delta_gram.py).

A delta that is infinite or NaN makes NaN of its row and column of the result, diagonal included: look there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import gemm
from . import reference as truth
from .numerics import Span
from .queue import Queue

FUSED = True  # the products of 'ieee' are fused multiply-adds; the rest is not

CASES = [
    (0, 5, ("F32",), True, False, True, True, "ieee"),
    (1, 1, ("F32",), True, False, False, True, "tf32x3"),
    (37, 70, ("F32", "BF16", "F16"), True, False, True, True, "tf32x3"),
    (100, 200, ("BF16",), True, False, True, False, "bf16x3"),
    (64, 256, ("BF16",), True, False, False, True, "tf32x3"),
    (64, 256, ("BF16",), True, False, False, True, "bf16x3"),
    (96, 128, ("F32",), False, False, True, True, "tf32"),
    (150, 64, ("BF16",), True, True, False, True, "tf32x3"),
    (130, 47, ("F32", "F8_E4M3", "F8_E5M2"), True, True, True, True, "bf16x3"),
    (128, 128, ("F32",), False, True, True, True, "ieee"),
    (80, 128, ("BF16",), True, False, True, False, "ieee"),
]


def launch(
    queue: Queue,
    out: Span,
    base: Span | None,
    expert: Span,
    columns: int,
    weight: float = 1.0,
    rows: bool = False,
    accumulate: bool = False,
    mirror: bool = True,
    precision: str = "tf32x3",
) -> None:
    spans = (expert,) if base is None else (expert, base)
    gemm.symmetric(queue, out, spans, columns, rows, out if accumulate else None, 1.0, weight, mirror, precision)


def reference(
    out: Tensor,
    base: Tensor | None,
    expert: Tensor,
    columns: int,
    weight: float = 1.0,
    rows: bool = False,
    accumulate: bool = False,
    mirror: bool = True,
    precision: str = "tf32x3",
) -> None:
    """The same in torch, in fp32 throughout."""
    delta = expert.float() if base is None else expert.float() - base.float()
    delta = gemm.operand(delta).view(-1, columns)
    product = delta @ delta.T if rows else delta.T @ delta
    square = out.view(product.shape)
    value = float(torch.tensor(weight)) * (product + 0.0)
    value = square + value if accumulate else value
    lower = value.T if mirror else square
    upper = torch.ones_like(value, dtype=torch.bool).triu()
    truth.write(out, torch.where(upper, value, lower).reshape(-1))


def inputs(
    m: int,
    columns: int,
    dtypes: tuple[str, ...],
    based: bool,
    rows: bool,
    accumulate: bool,
    mirror: bool,
    precision: str,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[Any, ...]:
    """Deltas that are small multiples of 1/4, so that every sum is exact in fp32 and every precision; out the first."""
    side = m if rows else columns
    random = torch.Generator().manual_seed(seed)
    kinds = [truth.DTYPES[dtypes[k % len(dtypes)]] for k in range(1, 3)]

    def small(numel: int, dtype: torch.dtype) -> Tensor:
        return (torch.randint(-4, 5, (numel,), generator=random) / 4).to(dtype).to(device)

    base = small(m * columns, kinds[0]) if based else None
    out = small(side * side, torch.float32)
    return out, base, small(m * columns, kinds[1]), columns, 0.5 if rows else 1.0, rows, accumulate, mirror, precision


def bytes_moved(out: Any, base: Any, expert: Any, *rest: Any) -> int:
    return truth.nbytes(out, expert, *([] if base is None else [base]))


def flops(out: Any, base: Any, expert: Any, columns: int, weight: float = 1.0, rows: bool = False, *rest: Any) -> int:
    """Multiplications and additions of one triangle, diagonal included."""
    numel = expert.numel if isinstance(expert, Span) else expert.numel()
    m = numel // columns
    side, depth = (m, columns) if rows else (columns, m)
    return side * (side + 1) * depth
