"""add_deltas: worked values, what must stay exact, groups along rows and columns, parts."""

from __future__ import annotations

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import add_deltas, reference
from streammerge.kernels.reference import DTYPES, bits, span


def merge(base, experts, coefs, dtype=None, **place):
    out = torch.full_like(base, torch.nan, dtype=dtype or base.dtype)
    kernel.host("add_deltas").host(span(out), span(base), reference.spans(experts), np.float32(coefs), **place)
    return out


def values(numel: int, name: str, seed: int) -> torch.Tensor:
    return reference.tensors(numel, (name,), 2, "cpu", seed)[1]


def test_by_hand():
    out = merge(torch.tensor([1.0, -2.0]), [torch.tensor([3.0, 0.0]), torch.tensor([5.0, 2.0])], [[1, 0.5, 0.25]])
    assert out.tolist() == [3.0, 0.0]
    assert merge(torch.tensor([4.0]), [torch.tensor([6.0])], [[0.5, 2]]).tolist() == [6.0]


@pytest.mark.parametrize("name", list(DTYPES))
def test_no_weight_leaves_the_base_to_the_bit(name):
    base, expert = values(5000, name, 0), values(5000, name, 1)
    expert[::50] = torch.full((100,), torch.nan).to(expert.dtype)
    assert torch.equal(bits(merge(base, [expert, expert], [[1, 0, 0]])), bits(base))


@pytest.mark.parametrize("name", list(DTYPES))
def test_equal_experts_leave_the_base_to_the_bit(name):
    base = values(5000, name, 0)
    assert torch.equal(bits(merge(base, [base.clone(), base.clone()], [[1, 0.3, -0.7]])), bits(base))


@pytest.mark.parametrize("name", list(DTYPES))
def test_one_whole_expert_is_that_expert_to_the_bit(name):
    base, one, two = (values(5000, name, s) for s in range(3))
    assert torch.equal(bits(merge(base, [one, two], [[1, 0, 1]])), bits(two))


@pytest.mark.parametrize(("groups", "inner"), [(1, 1 << 62), (60, 77), (77, 1), (4, 1155)])
@pytest.mark.parametrize("names", [("BF16",), ("F32", "BF16", "F16", "F8_E5M2"), ("F64", "F8_E4M3")])
def test_parts_are_the_whole(groups, inner, names):
    numel, random = 60 * 77, np.random.default_rng(5)
    args = reference.tensors(numel, names, 4, "cpu", 3)
    coefs = random.normal(size=(groups, 3)).astype(np.float32)
    coefs[::2, 0], coefs[::3, 1:], coefs[::4, 1] = 1, 0, 1
    whole, parts = args[0].clone(), args[0].clone()
    kernel.host("add_deltas").host(span(whole), *reference.spans([args[1], args[2:]]), coefs, 0, inner)
    for start, stop in ((0, 1), (1, 600), (600, 4000), (4000, numel)):
        cut = [t[start:stop] for t in args]
        kernel.host("add_deltas").host(
            span(parts[start:stop]), *reference.spans([cut[1], cut[2:]]), coefs, start, inner
        )
    assert torch.equal(bits(whole), bits(parts))
    arguments.agree(add_deltas, (args[0], args[1], args[2:], coefs, 0, inner))


def test_one_coefficient_per_column():
    base, expert = torch.zeros(6), torch.ones(6)
    out = merge(base, [expert], [[1, 10], [1, 20], [1, 30]], inner=1)
    assert out.tolist() == [10, 20, 30] * 2
    assert merge(base, [expert], [[1, 10], [1, 20]], inner=3).tolist() == [10] * 3 + [20] * 3


def test_out_may_be_the_base():
    base, expert = values(2000, "BF16", 0), values(2000, "BF16", 1)
    expected = merge(base, [expert], [[1, 0.4]])
    kernel.host("add_deltas").host(span(base), span(base), [span(expert)], np.float32([[1, 0.4]]))
    assert torch.equal(bits(base), bits(expected))


def test_close_to_fp64():
    args = [t.double() for t in reference.tensors(10_000, ("F32",), 5, "cpu", 9)[1:]]
    coefs = [1, 0.3, -0.8, 1.7]
    exact = args[0] + sum(c * (e - args[0]) for c, e in zip(np.float32(coefs[1:]).tolist(), args[1:], strict=True))
    got = merge(args[0].float(), [a.float() for a in args[1:]], [coefs])
    assert (got - exact).abs().max() < 2e-6  # a few roundings of values below 8, half an ulp of 2**-22 each
