"""The rows of benchmarks/kernels.py: which kernels are tested and timed, with what, and what is promised of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import kernel_cases as cases
import kernel_products as products
from kernel_cases import COLUMNS, GROUPS, KEY, Case, Source
from kernel_products import PRECISIONS, SAMPLES


@dataclass(frozen=True)
class Row:
    """`judged` names bounds beside "not slower than torch.compile": copy, eager, library (kernel_report.py)."""

    name: str
    kernel: str
    make: Callable[[Source], Case]
    judged: tuple[str, ...] = ()
    tolerance: float = 0.0  # relative, by the Frobenius norm; 0: the reference's bits


def by_count(kernel: str, label: str, count: int, make: Callable[[Source], Case]) -> Row:
    """A row of a kernel that takes several models: up to 4 at the speed of a copy, from 3 on well ahead of eager."""
    judged = (*["copy"][: count <= 4], *["eager"][: count >= 3])
    return Row(f"{kernel} {label}={count}", kernel, make, judged)


def _merges() -> Iterator[Row]:
    deltas, elect = cases.deltas, cases.elect
    for count in (1, 2, 3, 4, 8, 16):
        yield by_count("add_deltas", "BF16 K", count, partial(deltas, count, "BF16", ""))
    for what, make in (
        ("F32 K=2", partial(deltas, 2, "F32", "")),
        ("F8_E4M3 K=2", partial(deltas, 2, "F8_E4M3", "")),
        ("K=2, by row", partial(cases.deltas_by_row, 2)),
        (f"K=2, {GROUPS} random groups", partial(cases.deltas_by_group, 2)),
        ("K=2, stochastic rounding", partial(deltas, 2, "BF16", "rounding")),
        ("K=2, high and low part", partial(deltas, 2, "BF16", "low")),
        ("K=2, 512 small tensors", partial(cases.bundle, 2)),
    ):
        yield Row(f"add_deltas {what}", "add_deltas", make)
    yield Row("apply_delta BF16", "apply_delta", cases.applied, ("copy",))
    for name, how in (("TIES", "trim"), ("DARE", "drop")):
        for count in range(1, 5):
            yield by_count("sign_elect", f"{name} K", count, partial(elect, count, how))
    yield by_count("sign_elect", "election K", 3, partial(elect, 3, "elect"))
    yield Row("sign_elect TIES K=3, ties split", "sign_elect", partial(elect, 3, "split"), ("eager",))
    for votes, name in (("I8", "votes of 8 bits"), ("U8", "votes of 2 bits"), ("BF16", "gradient")):
        yield Row(f"sign_mask {name}", "sign_mask", partial(cases.masked, votes), ("copy",))


def _surveys() -> Iterator[Row]:
    narrow, whole = (KEY >> 15 << 15, 0, 1 << 15, False), (0, 15, 1 << 16, True)
    make = cases.histogram
    yield Row("magnitude_histogram narrow", "magnitude_histogram", partial(make, *narrow), ("copy",))
    yield Row("magnitude_histogram whole", "magnitude_histogram", partial(make, *whole))
    yield Row("drop_rescale", "drop_rescale", cases.dropped)
    yield Row("window_norms", "window_norms", cases.window)
    yield Row(f"row_ranks of {COLUMNS}", "row_ranks", cases.ranked)
    for count in range(1, 5):
        yield by_count("norms_and_dots", "M", count, partial(cases.gram, count))
    yield Row("norms_and_dots M=2, by row", "norms_and_dots", partial(cases.gram_by_row, 2))
    for count in range(1, 5):
        yield by_count("multi_dot", "K", count, partial(cases.dots, count))
    yield Row(f"multi_dot K=2, {GROUPS} random groups", "multi_dot", partial(cases.dots_by_group, 2))


def _conversions() -> Iterator[Row]:
    for to, given, by_chance in (("BF16", "F32", False), ("BF16", "F32", True), ("F32", "BF16", False)):
        name = f"cast {given} to {to}" + ", stochastic" * by_chance
        yield Row(name, "cast", partial(cases.cast, to, given, by_chance))
    yield Row("fp8_quant E4M3, 128 x 128", "fp8_quant", cases.quantised)
    yield Row("fp8_dequant E4M3, 128 x 128", "fp8_dequant", cases.unquantised)


def _products() -> Iterator[Row]:
    yield Row(f"vote_gemm {SAMPLES} x 512 tokens, {COLUMNS} x {COLUMNS}", "vote_gemm", products.votes)
    for m in (COLUMNS, 13824):
        for name, (tolerance, _, _) in PRECISIONS.items():
            make = partial(products.delta_gram, m, name)
            yield Row(f"delta_gram {m} x {COLUMNS} {name}", "delta_gram", make, ("library",), tolerance)
    for kernel in ("polar_step", "adam_gemm"):
        for name in ("tf32x3", "bf16x3", "tf32"):
            make = partial(getattr(products, kernel), name)
            tolerance = 4 * PRECISIONS[name][0]  # products of products, and what is added to them
            yield Row(f"{kernel} {COLUMNS} x {COLUMNS} {name}", kernel, make, (), tolerance)


def rows(only: Sequence[str] = ()) -> list[Row]:
    """Those whose name contains one of the words; all without words. A kernel's rows come one after the other."""
    every = [*_merges(), *_surveys(), *_conversions(), *_products()]
    return [row for row in every if not only or any(word in row.name for word in only)]
