"""The kernels' formulas in plain torch, as a good user of it writes them: what benchmarks/kernels.py compares with.

fp32 arithmetic, the fewest passes that eager torch allows (a product and a sum in one call, dtypes promoted on the way
in). Arguments are tensors, lists of them and plain numbers, so that torch.compile takes each function as it is.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def delta(expert: Tensor, base: Tensor) -> Tensor:
    """`base` is fp32; eight-bit floats do not promote."""
    return (expert if expert.element_size() > 1 else expert.float()) - base


def merged(base: Tensor, experts: list[Tensor], weights: list[float]) -> Tensor:
    b = total = base.float()
    for expert, weight in zip(experts, weights, strict=True):
        total = torch.add(total, delta(expert, b), alpha=weight)
    return total


def add_deltas(out: Tensor, base: Tensor, experts: list[Tensor], weights: list[float]) -> Tensor:
    return out.copy_(merged(base, experts, weights))


def apply_delta(out: Tensor, base: Tensor, delta: Tensor, scale: float) -> Tensor:
    return out.copy_(torch.add(base, delta, alpha=scale))


def add_deltas_by_row(out: Tensor, base: Tensor, experts: list[Tensor], table: Tensor) -> Tensor:
    """table [rows, experts]."""
    b = total = base.float().view(len(table), -1)
    for k, expert in enumerate(experts):
        total = torch.addcmul(total, expert.view(b.shape) - b, table[:, k : k + 1])
    return out.copy_(total.view(-1))


def add_deltas_by_group(out: Tensor, base: Tensor, experts: list[Tensor], table: Tensor, group: Tensor) -> Tensor:
    """table [experts, groups]; the group of each element was drawn and stored beforehand."""
    b = total = base.float()
    for k, expert in enumerate(experts):
        total = torch.addcmul(total, expert - b, table[k][group])
    return out.copy_(total)


def add_deltas_by_chance(out: Tensor, base: Tensor, experts: list[Tensor], weights: list[float]) -> Tensor:
    """Stochastic rounding to bf16: noise below the last bit, then cut."""
    words = merged(base, experts, weights).view(torch.int32)
    noise = torch.randint(0, 1 << 16, words.shape, dtype=torch.int32, device=words.device)
    return out.copy_(((words + noise) & -(1 << 16)).view(torch.float32))


def add_deltas_in_two(out: Tensor, low: Tensor, base: Tensor, experts: list[Tensor], weights: list[float]) -> Tensor:
    value = merged(base, experts, weights)
    out.copy_(value)
    low.copy_(value - out)
    return out


def magnitude_histogram(base: Tensor, expert: Tensor, low: int, shift: int, bins: int) -> Tensor:
    key = (expert - base.float()).abs_().view(torch.int32)
    place = ((key - low) >> shift).clamp_(-1, bins) + 1
    return torch.bincount(place, minlength=bins + 2)


def sign_elect(
    out: Tensor,
    base: Tensor,
    experts: list[Tensor],
    weights: list[float],
    elect: bool,
    bound: float | None,
    first: int,
    density: float | None,
) -> Tensor:
    """`bound` keeps what is not below it in magnitude; of the elements that equal it those from the `first` on."""
    b, votes = base.float(), []
    for expert, weight in zip(experts, weights, strict=True):
        v = expert - b
        if bound is not None and first:
            size = v.abs()
            tie = size == bound
            v = torch.where((size > bound) | (tie & (tie.cumsum(0) > first)), v, 0)
        elif bound is not None:
            v = torch.where(v.abs() >= bound, v, 0)
        if density is not None:
            v, weight = torch.where(torch.rand_like(v) < density, v, 0), weight / density
        votes.append(v * weight)
    total = votes[0]
    for v in votes[1:]:
        total = total + v
    if not elect:
        return out.copy_(b + total)
    majority, counted, divisor = torch.where(total >= 0, 1.0, -1.0), torch.zeros_like(b), torch.zeros_like(b)
    for v, weight in zip(votes, weights, strict=True):
        agrees = v * majority > 0
        counted = counted + torch.where(agrees, v, 0)
        divisor = torch.add(divisor, agrees, alpha=weight)
    return out.copy_(b + counted / torch.where(divisor == 0, 1, divisor))


def drop_rescale(base: Tensor, expert: Tensor, density: float) -> Tensor:
    size = (expert - base.float()).abs_()
    return torch.stack([size.sum(), torch.where(torch.rand_like(size) < density, size, 0).sum()])


def window_norms(base: Tensor, expert: Tensor, low: float, high: float) -> Tensor:
    size = (expert - base.float()).abs_()
    return torch.stack([size.sum(), torch.where((size > low) & (size < high), size, 0).sum()])


def norms_and_dots(inputs: list[Tensor], base: Tensor) -> Tensor:
    b = base.float()
    values = [x - b for x in inputs]
    return torch.stack([(x * y).sum() for i, x in enumerate(values) for y in values[i:]])


def norms_and_dots_by_row(inputs: list[Tensor], base: Tensor, columns: int) -> Tensor:
    b = base.float()
    values = [(x - b).view(-1, columns) for x in inputs]
    return torch.stack([(x * y).sum(1) for i, x in enumerate(values) for y in values[i:]], 1)


def multi_dot(g: Tensor, base: Tensor, experts: list[Tensor]) -> Tensor:
    b = base.float()
    return torch.stack([((expert - b) * g).sum() for expert in experts])


def multi_dot_by_group(g: Tensor, base: Tensor, experts: list[Tensor], group: Tensor, groups: int) -> Tensor:
    """The group of each element was drawn and stored beforehand. A scatter onto so few sums is slower than this."""
    b = base.float()
    products = [(expert - b) * g for expert in experts]
    return torch.stack([torch.where(group == q, p, 0).sum() for p in products for q in range(groups)])


def row_ranks(base: Tensor, expert: Tensor, columns: int) -> Tensor:
    order = torch.sort((expert - base.float()).abs_().view(-1, columns), dim=1, stable=True).indices
    places = torch.arange(columns, dtype=torch.int32, device=base.device).expand_as(order)
    return torch.empty_like(order, dtype=torch.int32).scatter_(1, order, places).view(-1)


def sign_mask(out: Tensor, target: Tensor, expert: Tensor, base: Tensor, votes: Tensor, scale: float) -> Tensor:
    """Votes of any sign; the kernel also counts what it keeps and ties."""
    tau = expert - base.float()
    return out.copy_(torch.add(target, torch.where(tau * votes > 0, tau, 0), alpha=scale))


def sign_mask_packed(out: Tensor, target: Tensor, expert: Tensor, base: Tensor, packed: Tensor, scale: float) -> Tensor:
    """Four votes to a byte, in two bits of two's complement each."""
    pairs = (packed[:, None] >> torch.arange(0, 8, 2, dtype=torch.uint8, device=packed.device)) & 3
    votes = (pairs == 1).to(torch.int8) - (pairs > 1).to(torch.int8)
    return sign_mask(out, target, expert, base, votes.view(-1)[: out.numel()], scale)


def sign_mask_downhill(
    out: Tensor, target: Tensor, expert: Tensor, base: Tensor, gradient: Tensor, scale: float
) -> Tensor:
    tau = expert - base.float()
    return out.copy_(torch.add(target, torch.where(tau * gradient < 0, tau, 0), alpha=scale))


def vote_gemm(out: Tensor, g: Tensor, x: Tensor, samples: int) -> Tensor:
    """One product and one pass over the votes per sample; g [tokens, rows], x [tokens, columns]."""
    votes = torch.zeros(g.shape[1], x.shape[1], dtype=torch.int8, device=g.device)
    for left, right in zip(g.chunk(samples), x.chunk(samples), strict=True):
        votes -= torch.mm(left.T, right).sign().to(torch.int8)
    return out.copy_(votes.view(-1))


def delta_gram(out: Tensor, base: Tensor, expert: Tensor, columns: int) -> Tensor:
    difference = (expert - base.float()).view(-1, columns)
    return out.copy_(torch.mm(difference.T, difference).view(-1))


def polar_step(out: Tensor, x: Tensor, columns: int, coefficients: tuple[float, float, float]) -> Tensor:
    (a, b, c), square = coefficients, x.view(-1, columns)
    gram = torch.mm(square, square.T)
    poly = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    return out.copy_(torch.addmm(square, poly, square, beta=a).view(-1))


def adam_gemm(
    out: Tensor, x: Tensor, gram: Tensor, target: Tensor, mean: Tensor, square: Tensor, step: int, lr: float
) -> Tensor:
    """Matrices; betas and epsilon are Adam's usual ones."""
    g = torch.addmm(target, x, gram, beta=-2, alpha=2)
    mean.lerp_(g, 0.1)
    square.mul_(0.999).addcmul_(g, g, value=0.001)
    below = square.sqrt() / math.sqrt(1 - 0.999**step) + 1e-8
    return out.copy_(torch.addcdiv(x, mean, below, value=-lr / (1 - 0.9**step)).view(-1))


def cast(out: Tensor, source: Tensor) -> Tensor:
    return out.copy_(source)


def fp8_quant(codes: Tensor, x: Tensor, columns: int, side: int) -> Tensor:
    """Whole blocks of side x side; the scales are the result."""
    tiles = x.float().view(-1, side, columns // side, side)
    scales = (tiles.abs().amax((1, 3), keepdim=True) / 448).clamp_(min=2.0**-126)
    codes.copy_((tiles / scales).clamp_(-448, 448).view(-1))
    return scales.view(-1)


def fp8_dequant(out: Tensor, codes: Tensor, scales: Tensor, columns: int, side: int) -> Tensor:
    tiles = codes.float().view(-1, side, columns // side, side)
    return out.copy_((tiles * scales.view(-1, 1, columns // side, 1)).view(-1))
