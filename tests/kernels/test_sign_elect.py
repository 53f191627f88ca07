"""sign_elect and drop_rescale: worked values, the same mask in both, parts that change nothing."""

from __future__ import annotations

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import reference, sign_elect
from streammerge.kernels.queue import Queue
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
    ranks = np.zeros((2, 2), np.int64)
    got = merge(BASE, EXPERTS, [1, 1], trims=trims, ranks=ranks)
    assert got.tolist() == [13, 10, 12, 10, 0]
    assert ranks.tolist() == [[2, 0], [0, 2]]
    together = merge(BASE, EXPERTS, [1, 1], trims=trims)  # without ranks no bound cuts its equals in two
    assert together.tolist() == [13, 11, 12, 10, 0]
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


TOP = 1 << 31


def many_ties(numel, experts, seed):
    """Task vectors of five magnitudes, one of them zero, and random bounds at and beside them, with random ranks."""
    random = np.random.default_rng(seed)
    values = np.float32([0, 0.5, 1, 1.5, 2])
    base = torch.from_numpy(random.integers(-3, 4, numel).astype(np.float32))
    others = []
    for _ in range(experts):
        sign = random.choice(np.float32([-1, 1]), numel)
        others.append(base + torch.from_numpy(sign * random.choice(values, numel, p=[0.2, 0.2, 0.3, 0.2, 0.1])))
    keys = [-1, TOP, *(int(key) for key in values.view(np.int32)), 0x3F000001]
    trims = np.empty((experts, 6), np.int64)
    for side in trims.reshape(-1, 3):
        first = int(random.integers(0, numel // 8))
        side[:] = random.choice(keys), first, first + random.choice([0, 1, numel // 20, numel])
    return base, others, trims, random.integers(0, numel // 8, (experts, 2))


def launch_in_parts(cuts, base, experts, trims, ranks, drop=None, **options):
    """One array of ranks, one launch for each part, no answer awaited in between."""
    place = [t.to(arguments.DEVICE) for t in (torch.full_like(base, torch.nan), base, *experts)]
    queue = Queue.on(arguments.DEVICE)
    weights, given = (
        np.linspace(-0.5, 1.5, len(experts), dtype=np.float32),
        {"elect": True, "normalize": True, **options},
    )
    for low, high in zip(cuts, [*cuts[1:], base.numel()], strict=True):
        out, root, *others = [span(t[low:high], queue) for t in place]
        part = None if drop is None else drop._replace(start=drop.start + low)
        rest = weights, None, 0.7, given["normalize"], given["elect"], trims, ranks, part
        sign_elect.launch(queue, out, root, others, *rest)
    queue.end().wait()
    queue.finish()
    return place[0].cpu()


@pytest.mark.parametrize("seed", range(8))
def test_ranks_stay_on_the_device_between_launches(seed, monkeypatch):
    """Bounds that cut ties inside a block, between blocks and between launches; open, closed and absent ones."""
    numel, block = 1501, (64, 256)[seed % 2]
    monkeypatch.setattr(sign_elect, "block_size", lambda usual: block)
    base, experts, trims, ranks = many_ties(numel, 1 + seed % 4, seed)
    weights = np.linspace(-0.5, 1.5, len(experts), dtype=np.float32)
    expected, moved = torch.full_like(base, torch.nan), ranks.copy()
    sign_elect.reference(expected, base, experts, weights, None, 0.7, True, True, trims, moved, None)
    for cuts in ([0], [0, 1, 63, 64, 1000, 1499]):
        begun = ranks.copy()
        assert torch.equal(bits(launch_in_parts(cuts, base, experts, trims, begun)), bits(expected))
        assert np.array_equal(begun, moved), cuts


def test_ranks_that_can_cut_nothing_are_moved_without_a_first_pass(monkeypatch):
    monkeypatch.setattr(sign_elect, "rank_blocks", None)
    base, experts, trims, ranks = many_ties(2000, 3, 0)
    trims[:, [2, 5]] = trims[:, [1, 4]]
    for begun in (ranks.copy(), None):
        moved, expected = None if begun is None else ranks.copy(), torch.full_like(base, torch.nan)
        sign_elect.reference(
            expected,
            base,
            experts,
            np.linspace(-0.5, 1.5, 3, dtype=np.float32),
            None,
            0.7,
            True,
            True,
            trims,
            moved,
            None,
        )
        assert torch.equal(bits(launch_in_parts([0, 700], base, experts, trims, begun)), bits(expected))
        assert begun is None or np.array_equal(begun, moved)


@pytest.mark.parametrize("start", [0, (1 << 33) + 1, (1 << 40) + 4])
@pytest.mark.parametrize("elect", [False, True])
def test_blocks_and_launches_change_no_bit(start, elect, monkeypatch):
    base, experts, trims, ranks = many_ties(2003, 3, 7)
    experts = [e + 0.01 * torch.randn(2003, generator=torch.Generator().manual_seed(k)) for k, e in enumerate(experts)]
    drop = kernel.host("sign_elect").Drop(np.array([0.3, 0.9, 0.0]), 1 << 63, 0xFFFFFFFF, [0, 5, 0xFFFFFFFF], start)
    found = []
    for block, cuts in ((64, [0]), (512, [0, 1, 1003]), (4096, [0, 4])):
        monkeypatch.setattr(sign_elect, "block_size", lambda usual, block=block: block)
        moved = ranks.copy()
        found.append((bits(launch_in_parts(cuts, base, experts, trims, moved, drop, elect=elect)), moved))
    for out, moved in found[1:]:
        assert torch.equal(out, found[0][0])
        assert np.array_equal(moved, found[0][1])


@pytest.mark.parametrize("seed", range(4))
def test_host_ranks_as_the_reference_does(seed):
    base, experts, trims, ranks = many_ties(2001, 3, seed)
    out, weights = torch.full_like(base, torch.nan), np.float32([1, 2, -0.5])
    for begun in (ranks, None):
        arguments.agree(
            sign_elect, (out, base, experts, weights, None, 1.0, seed % 2 == 0, seed < 2, trims, begun, None)
        )


def test_overflow_and_cancellation_in_the_vote():
    """Sums of infinities, a vote that is not a number, products that vanish: the same everywhere."""
    big, small = 3e38, 1e-45
    base = torch.tensor([0.0, 0.0, 0.0, 0.0, -big, small])
    experts = [torch.tensor([big, big, big, small, big, 2 * small]), torch.tensor([big, -big, -big, -small, 1.0, 0.0])]
    for scale in (1.0, 1e-3):
        for elect in (False, True):
            weights = np.float32([3.0, 0.25])
            args = torch.zeros(6), base, experts, weights, np.array([1.0, 20.0]), scale, True, elect, None, None, None
            arguments.agree(sign_elect, args)
            arguments.launch_agrees(sign_elect, args)
