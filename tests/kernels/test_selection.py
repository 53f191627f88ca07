"""Counting and selecting magnitudes, and the bounds that sign_elect keeps, against a stable sort."""

from __future__ import annotations

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import magnitude_histogram as histogram
from streammerge.kernels import reference
from streammerge.kernels import select_threshold as select
from streammerge.kernels.queue import Queue
from streammerge.kernels.reference import span


def deltas() -> dict[str, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    normal = torch.randn(5000, generator=random)
    return {
        "normal": normal,
        "few values": (normal * 2).round() / 4,
        "all equal": torch.where(normal > 0, 0.5, -0.5),
        "all zero": torch.zeros(5000) * normal,
        "mostly zero": torch.where(normal > 1.5, normal, 0),
        "wide": normal * torch.exp(20 * torch.randn(5000, generator=random)),
        "subnormal": normal * 1e-40,
        "one": torch.tensor([3.0]),
        "with infinities": torch.where(normal > 2, torch.inf, normal),
    }


def find(base, expert, rank, cuts=(0, 1300)):
    """Through brackets, counting in parts."""
    bracket, passes = select.WHOLE, 0
    ends = (*cuts[1:], base.numel())
    while isinstance(bracket, select.Bracket):
        counts = bracket.empty()
        for start, stop in zip(cuts, ends, strict=True):
            kernel.host("magnitude_histogram").host(
                span(base[start:stop]), span(expert[start:stop]), bracket.low, bracket.shift, counts
            )
        assert counts.sum() == base.numel()
        bracket, passes = select.narrow(bracket, counts, rank), passes + 1
    assert passes == 2
    return bracket


@pytest.mark.parametrize("name", deltas())
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_found_key_is_the_sorted_one(name, share):
    delta = deltas()[name]
    base = torch.zeros_like(delta)
    keys = np.empty(delta.numel(), np.uint32)
    kernel.host("magnitude_histogram").keys(span(base), span(delta), keys)
    rank = int(share * (delta.numel() - 1))
    found = find(base, delta, rank, (0,) if name == "one" else (0, 1300))
    assert found.key == np.sort(keys)[rank]
    assert found.below == (keys < found.key).sum()
    assert (
        found.equal
        == (keys == found.key).sum()
        == kernel.host("magnitude_histogram").count_equal(span(base), span(delta), found.key)
    )


@pytest.mark.parametrize("name", deltas())
@pytest.mark.parametrize(("keep", "drop"), [(0, 0), (1, 0), (1000, 0), (1000, 50), (4999, 1), (5000, 0), (5000, 5000)])
def test_bounds_keep_what_a_stable_sort_keeps(name, keep, drop):
    delta = deltas()[name]
    numel = delta.numel()
    keep, drop, base = min(keep, numel), min(drop, numel), torch.zeros(numel)
    order = torch.argsort(delta.abs(), descending=True, stable=True)
    expected = torch.zeros(numel)
    expected[order[drop:keep]] = delta[order[drop:keep]]
    lower = find(base, delta, numel - keep, (0,)) if 0 < keep < numel else None
    upper = find(base, delta, numel - drop, (0,)) if 0 < drop < numel else None
    bounds = (*select.keep_largest(numel, keep, lower), *select.drop_largest(numel, drop, upper))
    trims, ranks, out = np.array([bounds], np.int64), np.zeros((1, 2), np.int64), torch.full((numel,), torch.nan)
    for start, stop in ((0, 1), (1, 1300), (1300, numel)):
        a, b, e = (span(t[start:stop]) for t in (out, base, delta))
        if a.numel > 0:
            kernel.host("sign_elect").host(
                a, b, [e], np.ones(1, np.float32), None, 1.0, False, False, trims, ranks, None
            )
    assert torch.equal(out, expected)


def test_nan_sorts_above_infinity():
    delta = torch.tensor([1.0, -torch.inf, torch.nan, 0.0, -torch.nan])
    base, keys = torch.zeros(5), np.empty(5, np.uint32)
    kernel.host("magnitude_histogram").keys(span(base), span(delta), keys)
    assert keys.tolist() == [0x3F800000, 0x7F800000, 0x7FC00000, 0, 0x7FC00000]


def test_counts_by_hand_and_added_up():
    base, expert = torch.zeros(5), torch.tensor([0.0, 1.0, -1.5, 2.0, 1.0])
    counts, one = np.zeros(4, np.int64), 0x3F800000
    for _ in range(2):
        kernel.host("magnitude_histogram").host(span(base), span(expert), one, 22, counts)
    assert counts.tolist() == [2, 4, 2, 2]
    assert reference.magnitude(torch.tensor([-1.0])).item() == one


@pytest.mark.parametrize("name", list(deltas()))
def test_a_guess_changes_no_count(name):
    """Right, wrong, inside or outside the brackets: a guessed key only makes counting quicker."""
    delta = deltas()[name].clone()
    delta[:2048] = delta[0]  # four chunks with nothing else inside narrow brackets
    base = torch.zeros_like(delta)
    a, b, keys = span(base), span(delta), np.empty(delta.numel(), np.uint32)
    kernel.host("magnitude_histogram").keys(a, b, keys)
    key = int(keys[0])
    for low, shift, bins in ((max(0, key - 5), 0, 11), (max(0, key - 900), 7, 20), (0, 15, 1 << 16)):
        plain, wide = np.zeros(bins + 2, np.int64), np.tile(np.array([[1 << 31, 0]], np.uint32), (bins, 1))
        kernel.host("magnitude_histogram").host(a, b, low, shift, plain, wide)
        for guess in (key, key + 1, 0, (1 << 31) - 1):
            counts, ends = np.zeros_like(plain), np.tile(np.array([[1 << 31, 0]], np.uint32), (bins, 1))
            kernel.host("magnitude_histogram").host(a, b, low, shift, counts, ends, guess)
            assert np.array_equal(counts, plain)
            assert np.array_equal(ends, wide)


def test_a_guess_above_the_brackets_is_not_counted():
    """As many elements have it as lie inside the brackets: they must not be taken for those."""
    one = 0x3F800000
    expert = torch.tensor([one, one, one + 9, one + 9], dtype=torch.int32).view(torch.float32)
    base, memory = torch.zeros(4), np.zeros(64, np.int64)  # kept: a span does not
    histogram_of = kernel.host("magnitude_histogram").host
    histogram_of(span(base), span(expert), one, 0, memory[:6], None, one + 9)
    assert memory[:6].tolist() == [0, 2, 0, 0, 0, 2]
    assert not memory[6:].any()


def launched(base, expert, low, shift, bins, guess, cuts=(0,)):
    """Counts and ends of launches that add to the same arrays on the device."""
    queue, counts = Queue.on(arguments.DEVICE), np.zeros(bins + 2, np.int64)
    ends = np.tile(np.array([[1 << 31, 0]], np.uint32), (bins, 1))
    a, b = base.to(arguments.DEVICE), expert.to(arguments.DEVICE)
    for start, stop in zip(cuts, (*cuts[1:], base.numel()), strict=True):
        histogram.launch(queue, span(a[start:stop], queue), span(b[start:stop], queue), low, shift, counts, ends, guess)
    queue.end().wait()
    queue.finish()
    return counts, ends


@pytest.mark.parametrize("name", list(deltas()))
def test_blocks_launches_and_guesses_change_no_count(name, monkeypatch):
    """Blocks with nothing, little and much inside the brackets; whole ranges, narrow ones, single keys."""
    delta = deltas()[name][:1500]
    base, numel = torch.zeros_like(delta), delta.numel()
    keys = np.empty(numel, np.uint32)
    kernel.host("magnitude_histogram").keys(span(base), span(delta), keys)
    key = int(np.sort(keys)[numel // 2])
    for low, shift, bins in ((max(0, key - 5), 0, 11), (max(0, key - 9000), 7, 200), (0, 29, 4), (0, 15, 1 << 16)):
        counts, ends = np.zeros(bins + 2, np.int64), np.tile(np.array([[1 << 31, 0]], np.uint32), (bins, 1))
        histogram.reference(base, delta, low, shift, counts, ends)
        for block, guess, cuts in ((512, key, (0,)), (64, -1, (0, numel // 3)), (2048, key + 1, (0,))):
            monkeypatch.setattr(histogram, "block_size", lambda usual, block=block: block)
            found, range_ = launched(base, delta, low, shift, bins, guess, cuts)
            assert np.array_equal(found, counts), (low, shift, block, guess)
            assert np.array_equal(range_, ends), (low, shift, block, guess)


def test_keys_from_the_device():
    base, delta = torch.zeros(5000), deltas()["with infinities"]
    queue, keys, expected = Queue.on(arguments.DEVICE), np.zeros(5000, np.uint32), np.empty(5000, np.uint32)
    kernel.host("magnitude_histogram").keys(span(base), span(delta), expected)
    a, b = base.to(arguments.DEVICE), delta.to(arguments.DEVICE)
    for low, high in ((0, 1), (1, 1), (1, 5000)):
        histogram.launch_keys(queue, span(a[low:high], queue), span(b[low:high], queue), keys[low:high])
    queue.end().wait()
    queue.finish()
    assert np.array_equal(keys, expected)
