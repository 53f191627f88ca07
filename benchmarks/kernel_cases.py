"""Random arguments for the rows of benchmarks/kernels.py, made on the device, and the kernels that go by element.

Each case comes at two sizes, to be tested and to be timed. Both run the same compiled code: small tensors stay above
what add_deltas bundles, matrices are whole tiles. Outputs are poisoned. Kernels' own modules compile loops for the CPU
when they are imported, so that nothing of theirs is until a case is made.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import kernel_formulas as formulas
import numpy as np
import torch
from torch import Tensor

from streammerge.kernels import reference
from streammerge.kernels.numerics import BLOCK, Array, Partition, Stochastic

COLUMNS, TESTED = 5120, 70_003  # elements of a weight's row; of a tensor that is tested
GROUPS = 8
BOUND = 0.125  # of magnitudes: many differences of bf16 numbers equal it
KEY = int(np.float32(BOUND).view(np.int32))
EVERY = 1 << 40  # a rank, or a number of elements, beyond all


@dataclass
class Source:
    """Random tensors. `numel` elements are the usual size; without it, what a test needs."""

    device: str
    seed: int
    numel: int = 0

    def __post_init__(self) -> None:
        self.tested = not self.numel
        self.numel = self.numel or TESTED
        self.random = torch.Generator(self.device).manual_seed(self.seed)
        self.generator = np.random.default_rng(self.seed)

    def pick(self, tested: Any, timed: Any) -> Any:
        return tested if self.tested else timed

    def normal(self, numel: int | None = None, dtype: str = "F32") -> Tensor:
        value = torch.randn(numel or self.numel, generator=self.random, device=self.device)
        return value.to(reference.DTYPES[dtype])

    def digits(self, numel: int, dtype: str) -> Tensor:
        """In tests whole numbers, of whose products every sum is exact. Not for timing: zeros are fast."""
        if not self.tested:
            return self.normal(numel, dtype)
        value = torch.randint(-3, 4, (numel,), generator=self.random, device=self.device)
        return value.to(reference.DTYPES[dtype])

    def near(self, base: Tensor) -> Tensor:
        """Like a fine-tuned model: one element in eight is the base's."""
        value = torch.randn(base.numel(), generator=self.random, device=self.device).mul_(0.1).add_(base.float())
        same = torch.rand(base.numel(), generator=self.random, device=self.device) < 0.125
        return torch.where(same, base.float(), value).to(base.dtype)

    def models(
        self, experts: int, dtype: str = "BF16", numel: int | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """A poisoned output, a base, experts."""
        base = self.normal(numel, dtype)
        return poison(base), base, [self.near(base) for _ in range(experts)]

    def whole_rows(self, columns: int, tall: int = 1) -> int:
        """Rows of about `numel` elements, a multiple of `tall`."""
        return max(self.numel // columns // tall, 1) * tall

    def groups(self, split: Partition) -> Tensor:
        """Each element's, int32; made in parts."""
        parts = [(at, min(1 << 24, self.numel - at)) for at in range(0, self.numel, 1 << 24)]
        return torch.cat([reference.partition(at, n, GROUPS, split, self.device).int() for at, n in parts])


def poison(like: Tensor) -> Tensor:
    return torch.full(like.shape, torch.nan, device=like.device).to(like.dtype)


def written(*args: Any) -> Tensor:
    """What most kernels write: their first argument."""
    return args[0]


@dataclass
class Case:
    """Arguments of a kernel, one tuple per call (several go into one batch), and of its formula."""

    calls: list[tuple[Any, ...]]
    formula: Callable[..., Tensor]
    operands: list[tuple[Any, ...]]
    answer: Callable[..., Tensor] | None = written  # of a call, what the formula gives too; None: it draws at random
    flops: int = 0  # multiplications and additions that are needed
    products: int = 1  # how many times they are done, for the precision's sake
    scratch: int = 0  # bytes that a batch needs
    setting: str = "highest"  # of torch's fp32 products; "high" is TF32
    unit: str = ""  # which of the library's products multiplies in the same format
    library: dict[str, tuple[Callable[[], Tensor], int]] = field(default_factory=dict)  # with their flops


def weights(count: int) -> list[float]:
    return [float(w) for w in np.linspace(0.3, 0.6, count).astype(np.float32)]


def table(experts: int, rows: int, source: Source) -> Array:
    """Coefficients, a row per group, and those of the experts on the device."""
    return np.hstack([np.ones((rows, 1)), source.generator.normal(size=(rows, experts))]).astype(np.float32)


def blocks(numel: int, *entries: int) -> Array:
    """Poisoned partial sums."""
    return np.full((-(-numel // BLOCK), *entries), np.nan)


def deltas(experts: int, dtype: str, extra: str, source: Source) -> Case:
    (out, base, others), chosen = source.models(experts, dtype), weights(experts)
    coefs = np.array([[1, *chosen]], np.float32)
    if extra == "rounding":
        args = (out, base, others, coefs, 0, EVERY, None, Stochastic(source.seed, 7))
        return Case([args], formulas.add_deltas_by_chance, [(out, base, others, chosen)], None)
    if extra == "low":
        low = poison(out)
        args = (out, base, others, coefs, 0, EVERY, None, None, low)
        return Case([args], formulas.add_deltas_in_two, [(out, low, base, others, chosen)])
    return Case([(out, base, others, coefs)], formulas.add_deltas, [(out, base, others, chosen)])


def applied(source: Source) -> Case:
    """A merged task vector in fp32 on a base in BF16."""
    base, delta = source.normal(dtype="BF16"), source.normal()
    out = poison(base)
    return Case([(out, base, delta, 0.7)], formulas.apply_delta, [(out, base, delta, 0.7)])


def deltas_by_row(experts: int, source: Source) -> Case:
    rows = source.whole_rows(COLUMNS)
    out, base, others = source.models(experts, numel=rows * COLUMNS)
    coefs = table(experts, rows, source)
    operands = (out, base, others, torch.from_numpy(coefs[:, 1:].copy()).to(source.device))
    return Case([(out, base, others, coefs, 0, COLUMNS)], formulas.add_deltas_by_row, [operands])


def deltas_by_group(experts: int, source: Source) -> Case:
    out, base, others = source.models(experts)
    coefs, split = table(experts, GROUPS, source), Partition(source.seed, 7)
    operands = (out, base, others, torch.from_numpy(coefs.T[1:].copy()).to(source.device), source.groups(split))
    return Case([(out, base, others, coefs, 0, 1, split)], formulas.add_deltas_by_group, [operands])


def bundle(experts: int, source: Source) -> Case:
    """Tensors that add_deltas does by one launch."""
    sizes = [(5120, 13824, 32768, 1, 777)[k % 5] for k in range(source.pick(10, 512))]
    made, chosen = [source.models(experts, numel=size) for size in sizes], weights(experts)
    coefs = np.array([[1, *chosen]], np.float32)
    return Case([(*one, coefs) for one in made], formulas.add_deltas, [(*one, chosen) for one in made])


def histogram(low: int, shift: int, bins: int, ends: bool, source: Source) -> Case:
    _, base, (expert,) = source.models(1)
    found = np.tile(np.array([[1 << 31, 0]], np.uint32), (bins, 1)) if ends else None
    args = (base, expert, low, shift, np.zeros(bins + 2, np.int64), found)
    operands = (base, expert, low, shift, bins)
    return Case([args], formulas.magnitude_histogram, [operands], partial(array, at=4))


def elect(experts: int, how: str, source: Source) -> Case:
    from streammerge.kernels.host.sign_elect import ALL, Drop

    (out, base, others), chosen = source.models(experts), weights(experts)
    trims = ranks = drop = rescale = None
    first = source.numel // 1000 if how == "split" else 0  # equals that go; however often it runs, more are to come
    if how in ("trim", "split"):
        trims = np.array([(KEY, first, EVERY, *ALL[3:])] * experts, np.int64)
        ranks = np.zeros((experts, 2), np.int64) if first else None
    if how == "drop":
        drop, rescale = Drop(0.3, source.seed, 7, tuple(range(experts)), 0), np.full(experts, 1 / 0.3)
    args = (out, base, others, np.float32(chosen), rescale, 1.0, not drop, not drop, trims, ranks, drop)
    operands = (out, base, others, chosen, not drop, None if trims is None else BOUND, first, 0.3 if drop else None)
    return Case([args], formulas.sign_elect, [operands], None if drop else written)


def dropped(source: Source) -> Case:
    _, base, (expert,) = source.models(1)
    args = (base, expert, 0.3, source.seed, 7, 0, 0, blocks(source.numel, 2))
    return Case([args], formulas.drop_rescale, [(base, expert, 0.3)], None)


def array(*args: Any, at: int = -1) -> Tensor:
    """An array among the arguments."""
    return torch.from_numpy(args[at].astype(np.float64))


def sums(*args: Any) -> Tensor:
    """Partial sums, the last argument, added up."""
    return array(*args).sum(0)


def window(source: Source) -> Case:
    _, base, (expert,) = source.models(1)
    low, high = 0.05, 0.2
    keys = np.array([low, high], np.float32).view(np.int32).tolist()
    args = (base, expert, *keys, blocks(source.numel, 2))
    return Case([args], formulas.window_norms, [(base, expert, low, high)], sums)


def gram(inputs: int, source: Source) -> Case:
    _, base, others = source.models(inputs)
    args = (others, base, BLOCK, blocks(source.numel, inputs * (inputs + 1) // 2))
    return Case([args], formulas.norms_and_dots, [(others, base)], sums)


def gram_by_row(inputs: int, source: Source) -> Case:
    rows = source.whole_rows(COLUMNS)
    _, base, others = source.models(inputs, numel=rows * COLUMNS)
    args = (others, base, COLUMNS, np.full((rows, inputs * (inputs + 1) // 2), np.nan))
    operands = (others, base, COLUMNS)
    return Case([args], formulas.norms_and_dots_by_row, [operands], array)


def dots(experts: int, source: Source) -> Case:
    g, (_, base, others) = source.normal(dtype="BF16"), source.models(experts)
    args = (g, base, others, BLOCK, blocks(source.numel, experts))
    return Case([args], formulas.multi_dot, [(g, base, others)], sums)


def dots_by_group(experts: int, source: Source) -> Case:
    g, (_, base, others) = source.normal(dtype="BF16"), source.models(experts)
    split = Partition(source.seed, 7)
    args = (g, base, others, BLOCK, blocks(source.numel, experts, GROUPS), 0, split)
    operands = (g, base, others, source.groups(split), GROUPS)
    return Case([args], formulas.multi_dot_by_group, [operands], lambda *args: sums(*args[:5]).view(-1))


def ranked(source: Source) -> Case:
    """No more elements than a batch has memory for their ranks; the interpreter sorts slowly."""
    columns, few = source.pick(2500, COLUMNS), 1 if source.device == "cpu" else 16
    rows = source.pick(few, min(source.whole_rows(columns), (1 << 25) // columns))
    _, base, (expert,) = source.models(1, numel=rows * columns)
    args = (base, expert, columns, np.full(rows * columns, 1 << 31, np.uint32))
    answer = partial(array, at=3)
    return Case([args], formulas.row_ranks, [(base, expert, columns)], answer, scratch=256 << 20)


def masked(votes: str, source: Source) -> Case:
    """`votes`: I8, U8 (four to a byte) or BF16 (a gradient)."""
    target, (out, base, (expert,)) = source.normal(dtype="BF16"), source.models(1)
    formula: Callable[..., Tensor] = formulas.sign_mask
    if votes == "BF16":
        given, formula = source.normal(dtype="BF16"), formulas.sign_mask_downhill
    else:
        given = torch.randint(-3, 4, out.shape, generator=source.random, dtype=torch.int8, device=source.device)
    if votes == "U8":
        given, formula = packed(given), formulas.sign_mask_packed
    args = (out, target, expert, base, given, "agreement", 0.3, np.zeros(4, np.int64), None)
    return Case([args], formula, [(out, target, expert, base, given, 0.3)])


def packed(votes: Tensor) -> Tensor:
    """Signs, four to a byte, two bits of two's complement each."""
    four = torch.nn.functional.pad(votes.sign(), (0, -votes.numel() % 4)).view(torch.uint8).view(-1, 4) & 3
    return four[:, 0] | four[:, 1] << 2 | four[:, 2] << 4 | four[:, 3] << 6


def cast(to: str, given: str, by_chance: bool, source: Source) -> Case:
    base = source.normal(dtype=given)
    out = poison(base.to(reference.DTYPES[to]))
    args = (out, base, 0, Stochastic(source.seed, 7) if by_chance else None)
    return Case([args], formulas.cast, [(out, base)])


def quantised(source: Source) -> Case:
    columns, side = source.pick(640, COLUMNS), 128
    x = source.normal(source.whole_rows(columns, side) * columns, "BF16")
    codes = poison(x.to(torch.float8_e4m3fn))
    scales = torch.full((x.numel() // side**2,), torch.nan, device=source.device)
    operands = (codes, x, columns, side)
    return Case([(codes, scales, x, columns)], formulas.fp8_quant, [operands], lambda *args: args[1])


def unquantised(source: Source) -> Case:
    columns, side = source.pick(640, COLUMNS), 128
    codes = source.normal(source.whole_rows(columns, side) * columns).to(torch.float8_e4m3fn)
    args = (poison(codes.bfloat16()), codes, source.normal(codes.numel() // side**2), columns)
    return Case([args], formulas.fp8_dequant, [(*args, side)])
