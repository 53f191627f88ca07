"""Ranks within rows, worked values, pieces and sorts that change nothing; the norms of what their chances keep."""

from __future__ import annotations

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import reference, row_ranks
from streammerge.kernels.queue import Queue
from streammerge.kernels.reference import span

HOST = kernel.host("row_ranks")


def ranked(delta, row):
    base, ranks = torch.zeros_like(delta), np.empty(delta.numel(), np.uint32)
    HOST.host(span(base), span(delta), row, ranks)
    return ranks.tolist()


def test_ranks_by_hand():
    delta = torch.tensor([3.0, -1.0, 1.0, 0.0, -2.0, 0.0])
    assert ranked(delta, 6) == [5, 2, 3, 0, 4, 1]
    assert ranked(delta, 3) == [2, 0, 1, 0, 2, 1]
    assert ranked(delta, 1) == [0] * 6
    odd = torch.tensor([torch.nan, torch.inf, -torch.nan, -torch.inf, 1e-45, -0.0])
    assert ranked(odd, 6) == [4, 2, 5, 3, 1, 0]


@pytest.mark.parametrize("row", [1, 2, 47, 48, 49, 50, 1000, 6000])
@pytest.mark.parametrize("kind", ["normal", "few values", "equal"])
def test_ranks_are_those_of_a_stable_sort(row, kind):
    numel = row * max(1, 6000 // row)
    delta = torch.randn(numel, generator=torch.Generator().manual_seed(row))
    delta = {"normal": delta, "few values": (2 * delta).round(), "equal": delta.sign()}[kind]
    order = np.argsort(np.abs(delta.numpy()).reshape(-1, row), axis=1, kind="stable")
    expected = np.empty_like(order)
    np.put_along_axis(expected, order, np.arange(row)[None], 1)
    assert ranked(delta, row) == expected.ravel().tolist()


@pytest.mark.parametrize(("width", "compare"), [(16, True), (16, False), (64, True), (64, False), (1024, True)])
def test_pieces_change_no_rank(width, compare, monkeypatch):
    """Equal magnitudes within and between pieces; the last one short; sorted, or each compared with each."""
    monkeypatch.setattr(row_ranks, "WIDTH", width)
    monkeypatch.setattr(row_ranks, "COMPARE", compare)
    for row, rows in ((37, 3), (64, 2), (131, 1)):
        delta = (2 * torch.randn(row * rows, generator=torch.Generator().manual_seed(row))).round()
        arguments.launch_agrees(row_ranks, [torch.zeros_like(delta), delta, row, np.empty(delta.numel(), np.uint32)])


def test_chances_are_even_from_end_to_end():
    half = 1 << 31
    assert HOST.chances(0.5, 0.25, 5) == (half // 2, half / 4)
    assert HOST.chances(0.5, 0.0, 5) == (half, 0.0)
    assert HOST.chances(0.5, 0.25, 1) == (half, 0.0)
    assert HOST.chances(1.0, 0.25, 5) == (1 << 32, 0.0)
    assert HOST.chances(0.0, 0.25, 5) == (0, 0.0)
    low, step = HOST.chances(0.7, 0.2, 28672)
    assert abs(low + int(28671 * step) - 0.9 * 2.0**32) <= 2


NORMS = [(1, 9000), (5, 1700), (129, 70), (2048, 4), (5003, 3), (3, 1), (7, 0)]


@pytest.mark.parametrize(("row", "rows"), NORMS)
@pytest.mark.parametrize("dtypes", [("BF16",), ("F16", "F32")])
def test_norms_are_the_references(row, rows, dtypes):
    base, expert, *_ = row_ranks.inputs(row, rows, dtypes)
    block, found = HOST.block_of(row), []
    for start in (0, block * ((1 << 33) // block + 1)):
        given = row, 0.4, 0.3, (1 << 64) - 3, 0xFFFFFFFF, 7, start
        partials = [np.full((-(-base.numel() // block), 2), np.nan) for _ in range(3)]
        row_ranks.reference_norms(base, expert, *given, partials[0])
        HOST.norms(span(base), span(expert), *given, partials[1])
        queue, a, b = Queue.on(arguments.DEVICE), base.to(arguments.DEVICE), expert.to(arguments.DEVICE)
        row_ranks.launch_norms(queue, span(a, queue), span(b, queue), *given, partials[2])
        queue.end().wait()
        queue.finish()
        assert np.array_equal(partials[0], partials[1])
        assert np.array_equal(partials[0], partials[2])
        found.append(partials[0])
    assert rows < 2 or not np.array_equal(found[0][:, 1], found[1][:, 1])


def test_parts_are_the_whole():
    row = 300
    base, expert, *_ = row_ranks.inputs(row, 100, ("BF16",))
    block = HOST.block_of(row)
    given = row, 0.4, 0.3, 5, 6, 7
    whole = np.empty((-(-base.numel() // block), 2))
    HOST.norms(span(base), span(expert), *given, 0, whole)
    cut = np.empty_like(whole)
    HOST.norms(span(base[: 2 * block]), span(expert[: 2 * block]), *given, 0, cut[:2])
    HOST.norms(span(base[2 * block :]), span(expert[2 * block :]), *given, 2 * block, cut[2:])
    assert np.array_equal(whole, cut)


def test_larger_magnitudes_stay_more_often():
    row, rows = 1000, 60
    base, expert = torch.zeros(row * rows), reference.tensors(row * rows, ("F32",), 3, "cpu", 0)[2]
    kept = torch.empty(row * rows)
    sign_elect = kernel.host("sign_elect")
    drop = sign_elect.Drop(0.5, 1, 2, [3], 0, row, 0.3)
    sign_elect.host(
        span(kept), span(base), [span(expert)], np.ones(1, np.float32), None, 1.0, False, False, None, None, drop
    )
    ranks = torch.from_numpy(np.array(ranked(expert, row)))
    stays = (kept != 0).float()
    for tenth in range(10):
        share = stays[(ranks * 10 // row == tenth) & (expert != 0)].mean().item()
        assert abs(share - (0.2 + 0.06 * (tenth + 0.5))) < 0.03
