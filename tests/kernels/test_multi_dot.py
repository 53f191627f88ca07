"""multi_dot: worked values, exact sums, cancellation, parts, groups of a random partition."""

from __future__ import annotations

from fractions import Fraction

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import device, multi_dot, reference
from streammerge.kernels.numerics import Partition
from streammerge.kernels.reference import DTYPES, span

SPLIT = Partition(seed=(1 << 63) + 5, tensor_id=0xCAFE0001)


@pytest.fixture
def two_blocks(monkeypatch):
    """Programs of two blocks each, as on a GPU: some have whole blocks alone, one has the ragged last."""
    monkeypatch.setattr(device, "INTERPRETED", False)
    for name in ("LAUNCH", "SPLIT_LAUNCH"):
        monkeypatch.setattr(multi_dot, name, {16: {"BLOCKS": 2, "UNROLL": 2, "num_warps": 4}})


def tensors(numel: int, experts: int, names=("BF16",), seed: int = 0):
    _, base, g, *others = reference.tensors(numel, names, experts + 3, "cpu", seed)
    return g, base, others


def dots(g, base, experts, block, groups=0, start=0, split=SPLIT):
    """[blocks, experts] or, with groups, [blocks, experts, groups]."""
    partials = np.full((-(-g.numel() // block), len(experts), *([groups] if groups else [])), np.nan)
    base = None if base is None else span(base)
    args = span(g), base, reference.spans(experts), block, partials, start, split if groups else None
    kernel.host("multi_dot").host(*args)
    return partials


def test_by_hand():
    g, base = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3)
    experts = [torch.tensor([2.0, 0.0, 5.0]), torch.tensor([1.0, 1.0, 2.0])]
    assert dots(g, base, experts, 4096).tolist() == [[11, 3]]
    assert dots(g, None, experts, 2).tolist() == [[2, 3], [15, 6]]
    assert dots(g, base, experts, 4096, groups=1).tolist() == [[[11], [3]]]


def test_close_to_the_exact_sum():
    """Each of the 32 rows and 7 halvings rounds once, by at most 2**-53 of what has come together so far."""
    g, base, (expert,) = tensors(4096, 1, ("BF16", "F32"))
    values = g.float().tolist(), (expert.float() - base.float()).tolist()
    products = [Fraction(a) * Fraction(b) for a, b in zip(*values, strict=True)]
    error = abs(Fraction(float(dots(g, base, [expert], 4096)[0, 0])) - sum(products))
    assert error <= 39 * Fraction(1, 1 << 53) * sum(map(abs, products))


def test_subtracting_first_keeps_what_would_cancel():
    """Experts 0.01 % from the base: fp32 dots lose in <g, expert> - <g, base> what is kept here, and more than that."""
    random = torch.Generator().manual_seed(0)
    base, g = (torch.randn(4096, generator=random) for _ in range(2))
    expert = base * (1 + 1e-4 * torch.randn(4096, generator=random))
    numbers = zip(g.tolist(), expert.tolist(), base.tolist(), strict=True)
    exact = float(sum(Fraction(a) * (Fraction(b) - Fraction(c)) for a, b, c in numbers))
    ours = dots(g, base, [expert], 4096)[0, 0]
    theirs = (g @ expert - g @ base).item()
    assert abs(ours - exact) < 1e-12 * abs(exact)
    assert abs(theirs - exact) > 1e-6 * abs(exact)


def test_a_difference_is_rounded_to_fp32():
    g, base, expert = torch.ones(1), torch.tensor([1.0]), torch.tensor([1e-9])
    assert dots(g, base, [expert], 1)[0, 0] == -1


@pytest.mark.parametrize("block", [4096, 1, 5, 129, 1000])
@pytest.mark.parametrize("groups", [0, 3])
def test_parts_at_blocks_are_the_whole(block, groups):
    g, base, experts = tensors(5999, 3, ("BF16", "F32", "F16"))
    whole, at, start = dots(g, base, experts, block, groups, 1 << 33), block, (1 << 33) + block
    first = dots(g[:at], base[:at], [e[:at] for e in experts], block, groups, 1 << 33)
    second = dots(g[at:], base[at:], [e[at:] for e in experts], block, groups, start)
    assert np.array_equal(whole, np.concatenate([first, second]))
    exact = torch.stack([e.float() - base.float() for e in experts]).double() @ g.double()
    found = whole.sum((0, 2)) if groups else whole.sum(0)
    assert np.allclose(found, exact.numpy(), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("groups", [1, 2, 7, 80, 1200])
def test_groups_add_up_and_are_sums_of_masked_vectors(groups):
    """Each group's sums have the bits of sums over g with zeros elsewhere."""
    g, base, experts = tensors(3000, 2, ("F32",))
    whole, split = dots(g, base, experts, 1024), dots(g, base, experts, 1024, groups, 12)
    assert np.allclose(split.sum(2), whole, rtol=1e-12, atol=1e-12)
    group = reference.partition(12, 3000, groups, SPLIT)
    assert group.min() >= 0
    assert group.max() < groups
    for q in (0, groups // 2, groups - 1):
        masked = dots(torch.where(group == q, g, 0), base, experts, 1024)
        assert np.array_equal(split[:, :, q], masked)
    assert groups > 1 or np.array_equal(split[:, :, 0], whole)


def test_groups_are_even_and_differ_by_seed_and_tensor():
    group = reference.partition(0, 100_000, 10, SPLIT)
    counts = torch.bincount(group, minlength=10)
    assert (counts - 10_000).abs().max() < 500  # five standard deviations
    for other in (SPLIT._replace(seed=1), SPLIT._replace(tensor_id=1)):
        assert 0.05 < (group == reference.partition(0, 100_000, 10, other)).double().mean() < 0.15
    assert torch.equal(group[300:], reference.partition(300, 99_700, 10, SPLIT))


def test_few_groups_at_a_time(monkeypatch):
    """More groups than fit the room for lanes."""
    g, base, experts = tensors(2000, 3)
    assert kernel.host("multi_dot").ROOM // (8 * 128 * 3) < 1500
    got, expected = dots(g, base, experts, 2000, 1500), np.empty((1, 3, 1500))
    multi_dot.reference(g, base, experts, 2000, expected, 0, SPLIT)
    assert np.array_equal(got, expected)


def test_nan_and_infinity_stay_in_their_block_and_group():
    g, base, experts = tensors(300, 2, ("F32",))
    experts[0][150], g[20] = torch.nan, torch.inf
    got = dots(g, base, experts, 100, 4)
    at = reference.partition(0, 300, 4, SPLIT)
    odd = ~np.isfinite(got)
    expected = np.zeros_like(odd)
    expected[1, 0, at[150]] = expected[0, :, at[20]] = True
    assert np.array_equal(odd, expected)


@pytest.mark.parametrize("block", [4096, 1600, 1001, 5])
@pytest.mark.parametrize(("experts", "groups", "based"), [(1, 0, False), (4, 0, True), (16, 0, True), (3, 5, True)])
def test_launch_on_programs_of_a_gpu(two_blocks, block, experts, groups, based):
    numel = min(5 * block, 9000) + 1
    g, base, others = tensors(numel, experts)
    partials = np.full((-(-numel // block), experts, *([groups] if groups else [])), np.nan)
    split = SPLIT if groups else None
    arguments.launch_agrees(multi_dot, (g, base if based else None, others, block, partials, 1 << 40, split))


@pytest.mark.parametrize(("experts", "groups"), [(0, 0), (0, 3), (2, 30), (9, 3), (20, 2), (1, 20)])
@pytest.mark.parametrize("start", [4096, 7])
def test_launch_with_any_number_of_experts_and_groups(experts, groups, start):
    g, base, others = tensors(700, experts, ("F16", "F32"))
    partials = np.full((2, experts, *([groups] if groups else [])), np.nan)
    args = g, base, others, 512, partials, start, SPLIT if groups else None
    arguments.agree(multi_dot, args)
    arguments.launch_agrees(multi_dot, args)


@pytest.mark.parametrize("name", list(DTYPES))
def test_any_dtype(two_blocks, name):
    g, base, experts = tensors(5000, 2, (name, "BF16", "F32"))
    args = g, base, experts, 1024, np.full((5, 2, 3), np.nan), 0, SPLIT
    arguments.agree(multi_dot, args)
    arguments.launch_agrees(multi_dot, args)


@pytest.mark.skipif(not device.INTERPRETED, reason="sets the programs' numbers in the interpreter")
def test_blocks_beyond_the_reach_of_32_bits(monkeypatch):
    """Program 2**21 is two blocks of 4,096 from element 2**34 on: it is told that the tensor begins that far before."""
    from triton.runtime.interpreter import interpreter_builder

    def begin(x: int, y: int, z: int) -> None:
        interpreter_builder.grid_idx = ((1 << 21) + x, y, z)

    monkeypatch.setattr(interpreter_builder, "set_grid_idx", begin)
    g, base, experts = tensors(8000, 2)
    first, got, start = 1 << 22, np.full((2, 2), np.nan), 1 << 35
    spans = [span(t) for t in (g, base, *experts)]
    far = tuple(s.address - 2 * 4096 * first for s in spans), got.ctypes.data - 16 * first, 2, 0, 4096
    shape = {"CODES": device.codes(*spans), "ALIGN": 1, "BASED": 1, "BLOCKS": 2, "UNROLL": 2}
    multi_dot._dots[(1,)](*far, 4096 * first + 8000, **shape)
    assert np.array_equal(got, dots(g, base, experts, 4096))

    got = np.full((2, 2, 2), np.nan)
    far = far[0], got.ctypes.data - 32 * first, *far[2:]
    words = device.int32(SPLIT.seed), device.int32(SPLIT.seed >> 32), device.int32(SPLIT.tensor_id)
    multi_dot._split_dots[(1,)](*far, 4096 * first + 8000, start, *words, 2, 1, WIDTH=2, QUAD=True, **shape)
    assert np.array_equal(got, dots(g, base, experts, 4096, 2, start + 4096 * first))
