"""sign_elect and drop_rescale: worked values, the same mask in both, parts that change nothing."""

from __future__ import annotations

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import reference, sign_elect
from streammerge.kernels.reference import bits, span


def merge(base, experts, weights, scale=1.0, normalize=False, elect=False, trims=None, ranks=None, drop=None):
    out = torch.full_like(base, torch.nan)
    spans = span(out), span(base), reference.spans(experts)
    kernel.host("sign_elect").host(*spans, np.float32(weights), None, scale, normalize, elect, trims, ranks, drop)
    return out


BASE = torch.tensor([10.0, 10.0, 10.0, 10.0, -0.0])
EXPERTS = [torch.tensor([11.0, 9.0, 12.0, 10.0, -0.0]), torch.tensor([12.0, 12.0, 7.0, 10.0, -0.0])]


def test_election_by_hand():
    assert merge(BASE, EXPERTS, [1, 1], elect=True).tolist() == [13, 12, 7, 10, 0]
    assert merge(BASE, EXPERTS, [2, 1], elect=True).tolist() == [14, 12, 14, 10, 0]
    got = merge(BASE, EXPERTS, [2, 1], elect=True, normalize=True)
    assert torch.equal(got, torch.tensor([10 + torch.tensor(4.0) / 3, 12, 12, 10, 0]))
    assert got[4].signbit()


def test_without_election_by_hand():
    assert merge(BASE, EXPERTS, [1, 1], scale=0.5).tolist() == [11.5, 10.5, 9.5, 10, 0]
    assert merge(BASE, EXPERTS, [1, 3], normalize=True).tolist() == [11.75, 11.25, 8.25, 10, 0]
    assert merge(BASE, EXPERTS, [1, -1], normalize=True)[0] == 9  # weights that cancel divide by one


def test_a_negative_weight_turns_the_vote():
    assert merge(BASE[:1], [e[:1] for e in EXPERTS], [1, -2], elect=True).tolist() == [6]


def test_bounds_by_hand():
    one, two = 0x3F800000, 0x40000000
    trims = np.array([(one, 0, 1, 1 << 31, 0, 0), (-1, 0, 0, two, 0, 1)])
    got = merge(BASE, EXPERTS, [1, 1], trims=trims)
    assert got.tolist() == [13, 10, 12, 10, 0]
    late = merge(BASE, EXPERTS, [1, 1], trims=trims, ranks=np.array([(1, 0), (0, 1)]))
    assert late.tolist() == [10, 10, 12, 10, 0]


@pytest.mark.parametrize("elect", [False, True])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
def test_parts_are_the_whole(elect, count):
    numel, names = 6001, ("BF16", "F16", "BF16", "F32")
    out, base, *experts = reference.tensors(numel, names, count + 2, "cpu", 1)
    weights, rescale = np.linspace(0.5, 1.5, count, dtype=np.float32), np.full(count, 1.7)

    def drop(start):
        return kernel.host("sign_elect").Drop(np.linspace(0.2, 1, count), 1 << 63, 0xFFFFFFFF, range(count), start)

    whole = out.clone()
    arguments.agree(
        sign_elect, (out, base, experts, weights, rescale, 0.9, True, elect, None, None, drop((1 << 35) + 2))
    )
    rest = weights, rescale, 0.9, True, elect, None, None
    kernel.host("sign_elect").host(span(whole), span(base), reference.spans(experts), *rest, drop((1 << 35) + 2))
    for start, stop in ((0, 1), (1, 3), (3, 1000), (1000, 5003), (5003, numel)):
        cut = span(out[start:stop]), span(base[start:stop]), [span(e[start:stop]) for e in experts]
        kernel.host("sign_elect").host(*cut, *rest, drop((1 << 35) + 2 + start))
    assert torch.equal(bits(whole), bits(out))


@pytest.mark.parametrize("density", [0.0, 2**-32, 0.37, 1 - 2**-32, 1.0])
def test_both_kernels_draw_the_same_mask(density):
    numel, start = 3 * 4096 + 5, 5 * 4096
    base, expert = torch.zeros(numel), torch.ones(numel)
    partials = np.full((4, 2), np.nan)
    kernel.host("drop_rescale").host(span(base), span(expert), density, 11, 12, 13, start, partials)
    mask = merge(base, [expert], [1], drop=kernel.host("sign_elect").Drop(density, 11, 12, [13], start))
    assert partials[:, 0].tolist() == [4096, 4096, 4096, 5]
    assert partials[:, 1].tolist() == [part.sum().item() for part in mask.split(4096)]
    # five standard deviations of a binomial count
    assert abs(mask.mean().item() - density) <= 5 * (density * (1 - density) / numel) ** 0.5 + 1e-9


def test_masks_differ_by_seed_tensor_and_expert():
    base, expert = torch.zeros(1000), torch.ones(1000)

    def mask(seed, tensor, stream):
        return merge(base, [expert], [1], drop=kernel.host("sign_elect").Drop(0.5, seed, tensor, [stream], 0))

    first = mask(1, 2, 3)
    assert torch.equal(first, mask(1, 2, 3))
    for other in (mask(2, 2, 3), mask(1 + (1 << 32), 2, 3), mask(1, 3, 3), mask(1, 2, 4)):
        assert 380 < (first != other).sum() < 620
