"""Cases of benchmarks/kernels.py that are matrix products, beside the library's own."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import kernel_formulas as formulas
import numpy as np
import torch
from kernel_cases import COLUMNS, Case, Source, poison
from torch import Tensor

SAMPLES = 16
COEFFICIENTS = (1.875, -1.25, 0.375)
# Per precision: allowed relative error of a product (Frobenius norm), the format that it multiplies, how many products
# it takes. Allowed is some ten times what the interpreter has, whose sums are fp32's: tensor cores cut theirs short.
PRECISIONS = {
    "ieee": (2.0**-21, "fp32", 1),
    "tf32": (2.0**-12, "tf32", 1),
    "tf32x3": (2.0**-19, "tf32", 3),
    "bf16x3": (2.0**-16, "bf16", 3),
}


def multiply(setting: str, left: Tensor, right: Tensor) -> Tensor:
    torch.set_float32_matmul_precision(setting)
    return torch.mm(left, right)


def library(left: Tensor, right: Tensor) -> dict[str, tuple[Callable[[], Tensor], int]]:
    """torch.mm in fp32, TF32 and bf16; its operands are made beforehand."""
    flops = 2 * left.shape[0] * left.shape[1] * right.shape[1]
    wide, narrow = (left.float(), right.float()), (left.bfloat16(), right.bfloat16())
    kinds = {"fp32": ("highest", *wide), "tf32": ("high", *wide), "bf16": ("highest", *narrow)}
    return {kind: (partial(multiply, *how), flops) for kind, how in kinds.items()}


def as_precise(precision: str) -> dict[str, Any]:
    """What a case says of its precision. torch's products have the setting that is no more precise than the kernel."""
    _, unit, products = PRECISIONS[precision]
    return {"products": products, "unit": unit, "setting": "high" if precision == "tf32" else "highest"}


def votes(source: Source) -> Case:
    side, tokens = source.pick(256, COLUMNS), SAMPLES * source.pick(40, 512)
    g, x = source.digits(tokens * side, "BF16"), source.digits(tokens * side, "BF16")
    out = torch.full((side * side,), 99, dtype=torch.int8, device=source.device)
    offsets = np.linspace(0, tokens, SAMPLES + 1).astype(np.int32)
    left, right = g.view(tokens, side), x.view(tokens, side)
    return Case(
        [(out, g, x, offsets, side, False, np.zeros(4, np.int64))],
        formulas.vote_gemm,
        [(out, left, right, SAMPLES)],
        flops=2 * side * side * tokens,
        unit="bf16",
        library={"bf16": library(left.T, right)["bf16"]},
    )


def delta_gram(m: int, precision: str, source: Source) -> Case:
    m, columns = source.pick((256, 256), (m, COLUMNS))
    base = source.normal(m * columns, "BF16")
    expert, out = source.near(base), torch.full((columns * columns,), torch.nan, device=source.device)
    difference = (expert.float() - base.float()).view(m, columns)
    return Case(
        [(out, base, expert, columns, 1.0, False, False, True, precision)],
        formulas.delta_gram,
        [(out, base, expert, columns)],
        flops=columns * (columns + 1) * m,
        library=library(difference.T, difference),
        **as_precise(precision),
    )


def polar_step(precision: str, source: Source) -> Case:
    rows, columns = source.pick((128, 256), (COLUMNS, COLUMNS))
    x = source.normal(rows * columns) / (2 * columns**0.5)  # singular values between 0 and 1
    out, gram, poly = (torch.full((size,), torch.nan, device=source.device) for size in (x.numel(), rows**2, rows**2))
    square = x.view(rows, columns)
    return Case(
        [(out, x, gram, poly, columns, COEFFICIENTS, precision)],
        formulas.polar_step,
        [(out, x, columns, COEFFICIENTS)],
        flops=rows * (rows + 1) * (columns + rows) + 2 * rows * rows * columns,
        library=library(square, square.T),
        **as_precise(precision),
    )


def adam_gemm(precision: str, source: Source) -> Case:
    rows, columns = source.pick((128, 256), (COLUMNS, COLUMNS))
    half = source.normal(columns * columns).view(columns, columns)
    gram = torch.mm(half.T, half) / columns
    x, target, mean = (source.normal(rows * columns) for _ in range(3))
    tensors = (poison(x), x, gram.view(-1), target, mean, source.normal(rows * columns).square())
    matrices = [tensor.view(-1, columns) for tensor in tensors[1:]]
    return Case(
        [(*tensors, 3, 1e-3, 0.9, 0.999, 1e-8, precision)],
        formulas.adam_gemm,
        [(tensors[0], *matrices, 3, 1e-3)],
        flops=2 * rows * columns * columns,
        library=library(matrices[0], matrices[1]),
        **as_precise(precision),
    )
