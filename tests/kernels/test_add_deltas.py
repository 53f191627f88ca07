"""add_deltas: worked values, what must stay exact, groups along rows, columns and by a hash, parts, rounding."""

from __future__ import annotations

from itertools import pairwise

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import add_deltas, reference
from streammerge.kernels.add_deltas import WHOLE
from streammerge.kernels.numerics import Partition, Stochastic
from streammerge.kernels.queue import Queue
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


# --- on a device, or in the interpreter ---


def launched(base, experts, coefs, dtype=None, start=0, inner=WHOLE, split=None, rounding=None, low=None):
    out = torch.full_like(base, torch.nan, dtype=dtype or base.dtype)
    arguments.launch(add_deltas, (out, base, list(experts), np.float32(coefs), start, inner, split, rounding, low))
    return out


def counted(queue):
    """The names of what a queue is given to launch."""
    names, submit = [], queue.submit

    def count(kernel, grid, *args, **options):
        names.append(kernel.fn.__name__)
        submit(kernel, grid, *args, **options)

    queue.submit = count
    return names


@pytest.mark.parametrize("numel", [3000, 40_001])
@pytest.mark.parametrize("name", list(DTYPES))
def test_launch_is_exact_where_it_must_be(name, numel):
    base, one, two = (values(numel, name, s) for s in range(3))
    poor = one.clone()
    poor[::50] = torch.full_like(poor[::50], torch.nan, dtype=torch.float32).to(poor.dtype)
    assert torch.equal(bits(launched(base, [poor, one], [[1, 0, 0]])), bits(base))
    assert torch.equal(bits(launched(base, [one, two], [[1, 0, 1]])), bits(two))
    assert torch.equal(bits(launched(base, [base.clone(), base.clone()], [[1, 0.3, -0.7]])), bits(base))


@pytest.mark.parametrize("block", [128, 512])
@pytest.mark.parametrize("numel", [1000, 1024])
@pytest.mark.parametrize(
    ("groups", "options"),
    [
        (1, {}),
        (3, {"inner": 500}),
        (5, {"inner": 1, "start": 7}),
        (2, {"inner": 1 << 33, "start": (1 << 33) - 700}),
        (6, {"inner": 600, "start": 600 * 7_158_279 + 473}),  # the first 128 elements end one behind a run
        (4, {"split": Partition(3, 9)}),
        (4, {"split": Partition(3, 9), "start": (1 << 31) - 2, "rounding": Stochastic(3, 9)}),
        (1, {"rounding": Stochastic((1 << 64) - 1, (1 << 32) - 1), "low": True}),
    ],
)
def test_the_block_changes_no_bit(monkeypatch, block, numel, groups, options):
    """Neither for a group that copies an expert, nor for one that copies the base."""
    monkeypatch.setattr(add_deltas, "block_size", lambda usual: block)
    monkeypatch.setattr(add_deltas, "SMALL", 0)
    out, base, one, two, low = reference.tensors(numel, ("BF16", "BF16", "F32", "BF16", "BF16"), 5, "cpu", 1)
    coefs = np.random.default_rng(0).normal(size=(groups, 3)).astype(np.float32)
    coefs[1:2], coefs[2:3] = (1, 0, 1), (1, 0, 0)
    options = {"start": 0, "inner": WHOLE, "split": None, "rounding": None, "low": None} | options
    options["low"] = low if options["low"] else None
    args = (out, base, [one, two], coefs, *options.values())
    arguments.launch_agrees(add_deltas, args)
    arguments.agree(add_deltas, args)


def test_small_tensors_of_the_same_dtypes_are_one_launch():
    queue, work, random = Queue.on(arguments.DEVICE), [], np.random.default_rng(1)
    launches = counted(queue)
    sizes = [(1, "BF16"), (3000, "BF16"), (17, "F32"), (4096, "BF16"), (0, "BF16"), (5000, "F32"), (50_000, "BF16")]
    for seed, (numel, name) in enumerate(sizes):
        out, base, *experts = reference.tensors(numel, (name,), 4, "cpu", seed)
        if numel > 1000:
            experts[1][700 + seed] = torch.nan
        coefs = np.array([[1, 0, 1]] if numel == 17 else random.normal(size=(1, 3)), np.float32)
        there = arguments.moved([out, base, *experts], arguments.DEVICE)
        target, at, *others = reference.spans(there, queue)
        found = add_deltas.launch(queue, target, at, others, coefs)
        work.append(((out, base, experts, coefs), there, found))
    assert launches == ["_add"]
    with np.errstate(all="ignore"):
        queue.end().wait()
    queue.finish()
    assert launches == ["_add", "_add_bundle", "_add_bundle"]
    for args, there, found in work:
        assert np.array_equal(add_deltas.reference(*args), found)
        assert torch.equal(bits(there[0].cpu()), bits(args[0]))


def test_casts_join_them():
    queue = Queue.on(arguments.DEVICE)
    launches = counted(queue)
    one, two = (torch.randn(n, device=arguments.DEVICE) for n in (100, 200))
    results = torch.empty_like(one), torch.empty_like(two)
    kernel.find("cast").launch(queue, span(results[0]), span(one))
    add_deltas.launch(queue, span(results[1]), span(two), (), np.ones((1, 1), np.float32))
    queue.end().wait()
    assert launches == ["_add_bundle"]
    assert torch.equal(results[0], one)
    assert torch.equal(results[1], two)


# --- groups by a hash ---


def groups_of(numel, groups, key, start=0, run=merge):
    """What group the kernel thinks each element is in: 0 + g * (1 - 0)."""
    coefs = np.stack([np.zeros(groups), np.arange(groups)], 1)
    return run(torch.zeros(numel), [torch.ones(numel)], coefs, start=start, split=key).long()


@pytest.mark.parametrize("run", [merge, launched])
def test_the_hash_by_hand(run):
    key, start = Partition(99, 12), (1 << 33) + 5
    words = reference.philox(start, 1000, 99, 12, 0xFFFFFFFF)
    assert torch.equal(groups_of(1000, 7, key, start, run), words * 7 // 2**32)
    out = run(torch.ones(1000), [torch.full((1000,), 3.0)], [[1, 0.5], [1, 1], [0, 0.25]], start=start, split=key)
    assert torch.equal(out, torch.tensor([2.0, 3.0, 0.5])[words * 3 // 2**32])


@pytest.mark.parametrize("run", [merge, launched])
@pytest.mark.parametrize("names", [("BF16",), ("F16", "F8_E4M3", "F32")])
def test_equal_groups_are_no_groups(run, names):
    _, base, one, two = reference.tensors(5000, names, 4, "cpu", 2)
    for coefs in ([1, 0.3, -2], [1, 0, 1], [1, 0, 0], [0.5, 0, 1]):
        plain = run(base, [one, two], [coefs])
        assert torch.equal(bits(run(base, [one, two], [coefs] * 5, split=Partition(1, 2))), bits(plain))


@pytest.mark.parametrize("groups", [2, 5, 8, 1200])
def test_groups_are_balanced(groups):
    """Within five standard deviations of numel / groups, on a million elements."""
    numel = 1 << 20
    counts = torch.bincount(groups_of(numel, groups, Partition(7, 3)), minlength=groups).double()
    assert len(counts) == groups
    assert (counts - numel / groups).abs().max() < 5 * (numel / groups * (1 - 1 / groups)) ** 0.5


def test_tensors_are_dealt_out_independently():
    """Also when one is shifted against the other: keys are hashed, not added to the index."""
    one, two, three = (groups_of(100_000, 8, Partition(*k)) for k in ((7, 3), (7, 4), (8, 3)))
    for other in (two, three):
        for shift in range(-4, 5):
            same = (one == other.roll(shift)).double().mean()
            assert abs(same - 1 / 8) < 5 * (1 / 8 * 7 / 8 / 100_000) ** 0.5


@pytest.mark.parametrize("run", [merge, launched])
@pytest.mark.parametrize("start", [0, 2, (1 << 31) - 1, (1 << 40) + 3])
def test_cuts_change_neither_groups_nor_rounding(run, start):
    base, expert, coefs = values(3000, "F32", 0), values(3000, "F32", 1), np.random.default_rng(3).normal(size=(9, 2))
    keys = {"split": Partition(1, 2), "rounding": Stochastic(1, 2), "dtype": torch.bfloat16}
    whole = run(base, [expert], coefs, start=start, **keys)
    for cuts in ((0, 1, 2, 3, 1501, 3000), (0, 512, 1025, 3000)):
        parts = [run(base[a:b], [expert[a:b]], coefs, start=start + a, **keys) for a, b in pairwise(cuts)]
        assert torch.equal(bits(torch.cat(parts)), bits(whole))


# --- rounding by chance, and what rounding loses ---


def test_rounding_by_chance_is_casts():
    """The fp32 result, rounded as the kernel cast rounds it."""
    base, expert = values(5000, "F32", 0), values(5000, "F32", 1)
    exact = merge(base, [expert], [[1, 0.3]])
    for dtype in (torch.bfloat16, torch.float16):
        out = torch.empty(5000, dtype=dtype)
        kernel.host("cast").host(span(out), span(exact), 40, Stochastic(1, 2))
        got = merge(base, [expert], [[1, 0.3]], dtype, start=40, rounding=Stochastic(1, 2))
        assert torch.equal(bits(got), bits(out))


@pytest.mark.parametrize("run", [merge, launched])
def test_low_by_hand(run):
    base = torch.tensor([1.0, 1.0, -1.0, 2.0**-120, 3.3e38, torch.inf, torch.nan, 1.0])
    expert = torch.tensor([1 + 2**-9, 1 + 3 * 2**-9, -1 - 2**-9 - 2**-20, 2.0**-120 * (1 + 2**-9), 3.4e38, 1, 1, 1.0])
    low = torch.full((8,), torch.nan, dtype=torch.bfloat16)
    out = run(base, [expert], [[1, 1.0]], torch.bfloat16, low=low if run is launched else span(low))
    assert out[:4].tolist() == [1, 1 + 2**-7, -1, 2.0**-120]
    assert low[:4].tolist() == [2**-9, -(2**-9), -(2**-9), 2.0**-129]  # the third: its 2**-20 is rounded away
    assert out[4] == torch.inf
    assert low[4:].tolist() == [0, 0, 0, 0]
    assert not bits(low[7:]).any()


@pytest.mark.parametrize("rounding", [None, Stochastic(5, 6)])
def test_high_and_low_hold_the_value(rounding):
    base, expert = (torch.ldexp(values(50_000, "F32", s), torch.tensor(40 * s - 100)) for s in (0, 1))
    exact, low = merge(base, [expert], [[1, 0.7]]), torch.empty(50_000, dtype=torch.bfloat16)
    high = merge(base, [expert], [[1, 0.7]], torch.bfloat16, rounding=rounding, low=span(low))
    error = (high.double() + low.double() - exact.double()).abs()
    held = exact.abs() > 2.0**-116
    assert held.sum() > 40_000
    assert (error <= exact.abs().double() * 2.0 ** (-17 if rounding is None else -16))[held].all()


def test_small_task_vectors_survive():
    """BF16 weights with a task vector of 0.3 %, a tenth of it added: nearest even keeps little of it, the others all.

    The slope of (result - base) on the task vector: 1 is right.
    """
    random = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(1 << 20, generator=random)).bfloat16()
    expert = (base.float() * (1 + 0.003 * torch.randn(1 << 20, generator=random))).bfloat16()
    delta, coefs, low = expert.double() - base.double(), [[1, 0.1]], torch.empty_like(base)

    def slope(result):
        return float((result - base.double()) @ delta / (delta @ delta) / 0.1)

    assert slope(merge(base, [expert], coefs).double()) < 0.5
    assert slope(merge(base, [expert], coefs, rounding=Stochastic(1, 1)).double()) == pytest.approx(1, abs=0.02)
    high = merge(base, [expert], coefs, low=span(low)).double()
    assert slope(high + low.double()) == pytest.approx(1, abs=0.005)
