"""Sums in a fixed order: against fp64, and cut into parts."""

from __future__ import annotations

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import drop_rescale, norms_and_dots, reference
from streammerge.kernels.reference import span


def gram(tensors, base, block):
    pairs = len(tensors) * (len(tensors) + 1) // 2
    partials = np.full((-(-tensors[0].numel() // block), pairs), np.nan)
    kernel.host("norms_and_dots").host(reference.spans(tensors), base if base is None else span(base), block, partials)
    return partials


def test_by_hand():
    x, y, base = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, -1.0]), torch.ones(3)
    assert gram([x, y], None, 2).tolist() == [[5, 2, 1], [9, -3, 1]]
    assert gram([x, y], base, 4096).tolist() == [[5, -4, 5]]


@pytest.mark.parametrize("block", [4096, 1, 5, 129, 1000])
def test_parts_at_blocks_are_the_whole(block):
    _, base, *tensors = reference.tensors(9999, ("BF16", "F32", "F16"), 5, "cpu", 2)
    whole, at = gram(tensors, base, block), 2 * block
    parts = [gram([t[s] for t in tensors], base[s], block) for s in (slice(0, at), slice(at, None))]
    assert np.array_equal(whole, np.concatenate(parts))
    exact = torch.stack([t.float() - base.float() for t in tensors]).double()
    exact = (exact @ exact.T)[np.triu_indices(3)]
    assert np.allclose(whole.sum(0), exact.numpy(), rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("ncols", [1, 7, 600, 1300])
def test_columns(ncols):
    numel = ncols * 13
    _, base, *tensors = reference.tensors(numel, ("BF16", "F32"), 4, "cpu", 3)
    sums, expected = np.zeros((ncols, 3)), np.zeros((ncols, 3))
    for rows in (slice(0, 4 * ncols), slice(4 * ncols, numel)):
        kernel.host("norms_and_dots").columns([span(t[rows]) for t in tensors], span(base[rows]), ncols, sums)
    norms_and_dots.reference_columns(tensors, base, ncols, expected)
    assert np.array_equal(sums, expected)
    values = torch.stack([t.float() - base.float() for t in tensors]).double().view(2, 13, ncols)
    assert np.allclose(sums[:, 1], (values[0] * values[1]).sum(0).numpy(), rtol=1e-12, atol=1e-12)


def test_norms_before_and_after_dropping_in_parts():
    _, base, expert = reference.tensors(10_000, ("BF16",), 3, "cpu", 4)
    args = 0.4, 99, 7, 1
    whole = np.full((3, 2), np.nan)
    kernel.host("drop_rescale").host(span(base), span(expert), *args, 0, whole)
    part = np.full((2, 2), np.nan)
    kernel.host("drop_rescale").host(span(base[4096:]), span(expert[4096:]), *args, 4096, part)
    assert np.array_equal(whole[1:], part)
    exact = (expert.float() - base.float()).double().abs().sum().item()
    assert abs(whole[:, 0].sum() - exact) < 1e-9 * exact
    arguments.agree(drop_rescale, (base, expert, *args, 0, np.empty((3, 2))))
