"""WUDI's step: Adam on sum_i w_i ||(x - t_i) t_i^T||^2, whose gradient is one product once the sums are known.

    g      = 2 (x gram - target)            gram = sum_i w_i t_i^T t_i [n, n],  target = sum_i w_i t_i t_i^T t_i
    mean   = mean + (1 - beta1) (g - mean)
    square = beta2 square + (1 - beta2) g g
    out    = x - (lr / (1 - beta1^t)) mean / (sqrt(square) / sqrt(1 - beta2^t) + eps)

x, target, mean and square [m, n], all fp32, t counts from 1: the order of operations is torch.optim.Adam's. `out` is
another buffer than x, which every tile reads whole rows of; mean and square change in place. gram is symmetric, and
read by rows (column j of it is its row j). Division and square root are correctly rounded; the product is as
`precision` says (gemm.py), on the CPU fp32. What 300 steps on three task vectors of 48 x 64 are away from fp64, in
units of the distance travelled, in Triton's interpreter: ieee and tf32x3 4e-7, bf16x3 6e-6, tf32 6e-4.
"""

# mypy: disable-error-code="no-untyped-call"
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import gemm
from . import reference as truth
from .device import load, store
from .gemm import grouped_tile, multiply, place
from .host.adam_gemm import constants, side_of
from .numerics import Span
from .queue import Queue

FUSED = True  # the products of 'ieee' are fused multiply-adds; the rest is not

CASES = [
    (0, 16, 1, "tf32x3"),
    (1, 1, 1, "ieee"),
    (37, 70, 3, "tf32x3"),
    (64, 128, 1, "tf32x3"),
    (130, 64, 300, "bf16x3"),
    (128, 128, 2, "ieee"),
    (64, 128, 7, "tf32"),
]


@triton.jit
def _update(spans, product, i, j, rows, columns, scalars, ALIGN: tl.constexpr, MASKED: tl.constexpr):
    """Adam on a part of a tile whose first element is (i, j)."""
    out, x, _, target, mean_at, square_at = spans
    ROWS: tl.constexpr = product.shape[0]
    COLUMNS: tl.constexpr = product.shape[1]
    r, c = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    mask = (r < rows - i)[:, None] & (c < columns - j)[None, :]
    offs, at = r[:, None] * columns + c[None, :], 4 * place(i, j, columns)
    g = 2.0 * (product - load(target + at, offs, mask, 0, ALIGN, MASKED))
    mean = load(mean_at + at, offs, mask, 0, ALIGN, MASKED)
    mean += scalars[0] * (g - mean)
    store(mean_at + at, offs, mean, mask, 0, ALIGN, MASKED)
    square = scalars[1] * load(square_at + at, offs, mask, 0, ALIGN, MASKED) + scalars[2] * g * g
    store(square_at + at, offs, square, mask, 0, ALIGN, MASKED)
    below = tl.div_rn(tl.sqrt_rn(square), tl.zeros_like(square) + scalars[4]) + scalars[5]
    result = load(x + at, offs, mask, 0, ALIGN, MASKED) - tl.div_rn(scalars[3] * mean, below)
    store(out + at, offs, result, mask, 0, ALIGN, MASKED)


@triton.jit(do_not_specialize=["spans", "rows", "columns"])
def _step(
    spans,
    rows,
    columns,
    patch,
    scalars,
    PRECISION: tl.constexpr,
    ALIGN: tl.constexpr,
    MASKED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WARPS: tl.constexpr,
):
    i, j = grouped_tile(tl.program_id(0), rows, columns, patch, ROWS, COLUMNS)
    acc = tl.zeros((ROWS, COLUMNS), tl.float32)
    acc = multiply(
        acc, (spans[1],), (spans[2],), i, j, rows, columns, columns, columns, columns, (0,), (0,), True, True,
        PRECISION, ALIGN, MASKED, DEPTH, WARPS,
    )  # fmt: skip
    if ALIGN > 1:
        columns = columns // 16 * 16
    # a quarter of the columns after the other: five tiles at once would not fit into registers
    QUARTER: tl.constexpr = COLUMNS // 4
    halves = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, COLUMNS // 2)), (0, 2, 1)))
    for half in tl.static_range(2):
        parts = tl.split(tl.permute(tl.reshape(halves[half], (ROWS, 2, QUARTER)), (0, 2, 1)))
        for part in tl.static_range(2):
            _update(spans, parts[part], i, j + (2 * half + part) * QUARTER, rows, columns, scalars, ALIGN, MASKED)


def launch(
    queue: Queue,
    out: Span,
    x: Span,
    gram: Span,
    target: Span,
    mean: Span,
    square: Span,
    step: int,
    lr: float = 1e-5,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    precision: str = "tf32x3",
) -> None:
    columns = side_of(gram.numel)
    spans, rows = (out, x, gram, target, mean, square), x.numel // columns
    assert all(span.numel == rows * columns for span in (out, x, target, mean, square))
    assert {span.dtype for span in spans} == {"F32"}
    assert out.address != x.address or not x.numel
    shape = gemm.shape_of(precision, (x,), spans, (rows, columns, columns), (columns,))
    queue.submit(
        _step,
        (triton.cdiv(rows, shape["ROWS"]) * triton.cdiv(columns, shape["COLUMNS"]),),
        tuple(span.address for span in spans),
        rows,
        columns,
        gemm.PATCH,
        constants(step, lr, beta1, beta2, eps),
        PRECISION=precision,
        **shape,
    )


def reference(
    out: Tensor,
    x: Tensor,
    gram: Tensor,
    target: Tensor,
    mean: Tensor,
    square: Tensor,
    step: int,
    lr: float = 1e-5,
    beta1: float = 0.9,
    beta2: float = 0.999,
    eps: float = 1e-8,
    precision: str = "tf32x3",
) -> None:
    """The same in torch, in fp32 throughout."""
    columns = side_of(gram.numel())
    one, two, rest, rate, unbias, eps = constants(step, lr, beta1, beta2, eps)
    product = gemm.operand(x).view(-1, columns) @ gemm.operand(gram).view(columns, columns).T + 0.0
    g = 2 * (product.reshape(-1) - target)
    moment = mean + one * (g - mean)
    second = two * square + rest * g * g
    root = second.double().sqrt().float()  # to nearest, which a vectorised square root need not be
    below = root / torch.full_like(root, unbias) + eps  # by a number, a GPU would multiply by its inverse
    truth.write(out, x - rate * moment / below)
    truth.write(mean, moment)
    truth.write(square, second)


def inputs(rows: int, columns: int, step: int, precision: str, device: str = "cpu", seed: int = 0) -> tuple[Any, ...]:
    """x and gram of small integers, so that the product is exact in fp32 and every precision; the rest is general."""
    random = torch.Generator().manual_seed(seed)
    numel = rows * columns
    half = torch.randint(-8, 9, (columns, columns), generator=random).float().triu()
    gram = half + half.triu(1).T
    x = torch.randint(-8, 9, (numel,), generator=random).float()
    target, mean = torch.randn(numel, generator=random), torch.randn(numel, generator=random)
    square = torch.rand(numel, generator=random)
    made = (torch.full((numel,), torch.nan), x, gram.reshape(-1), target, mean, square)
    return *(tensor.to(device) for tensor in made), step, 1e-3, 0.9, 0.999, 1e-8, precision


def bytes_moved(out: Any, x: Any, gram: Any, target: Any, mean: Any, square: Any, *rest: Any) -> int:
    return truth.nbytes(out, x, gram, target, mean, square)


def flops(out: Any, x: Any, gram: Any, *rest: Any) -> int:
    """Multiplications and additions of the product."""
    numel, square = (t.numel if isinstance(t, Span) else t.numel() for t in (x, gram))
    return 2 * numel * side_of(square)
