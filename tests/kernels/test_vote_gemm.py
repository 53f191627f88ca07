"""vote_gemm: the worked example, votes of single numbers, samples in any order and batch, the bound, far tokens."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import reference, vote_gemm
from streammerge.kernels.host.sign_mask import NANS, TIES
from streammerge.kernels.host.vote_gemm import segments
from streammerge.kernels.queue import Queue
from streammerge.kernels.reference import DTYPES, bits, span

SAMPLES = [  # (G, X) of the worked example
    ([[1, -1], [-1, 2]], [[1, 2, 0], [3, -1, 0]]),
    ([[2, 1]], [[-1, 1, 0]]),
    ([[0, 1], [1, 0]], [[4, 0, 0], [1, -3, 0]]),
]
TAU = torch.tensor([[0.5, -0.25, 0.125], [-1, 2, -0.5]])
NAN, INF = float("nan"), float("inf")


def together(samples, dtype="F32"):
    """G, X and offsets of samples."""
    g, x = (torch.tensor([row for sample in samples for row in sample[k]]).to(DTYPES[dtype]) for k in (0, 1))
    return g, x, np.cumsum([0, *(len(sample[0]) for sample in samples)])


def votes_of(g, x, offsets, mean=False, dtype=torch.int8, precision="ieee"):
    """Votes [rows, cols] and the NaNs met, by host; launch and reference give the same."""
    rows, cols = g.shape[1], x.shape[1]
    out, counts = torch.full((rows * cols,), 99, dtype=dtype), np.zeros(4, np.int64)
    rest = [None] * 4 + ["agreement", 1.0, precision]
    args = [out, g.flatten(), x.flatten(), np.asarray(offsets), rows, mean, counts, *rest]
    arguments.agree(vote_gemm, args)
    arguments.launch_agrees(vote_gemm, args)
    kernel.host("vote_gemm").host(*reference.spans(args))
    assert not counts[:NANS].any()
    return out.view(rows, cols), int(counts[NANS])


def integers(tokens, rows, cols, dtype="F32", seed=0):
    random = np.random.default_rng(seed)
    return [torch.from_numpy(random.integers(-3, 4, (tokens, n)).astype(np.float32)).to(DTYPES[dtype])
            for n in (rows, cols)]  # fmt: skip


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_by_hand(dtype):
    votes, _ = votes_of(*together(SAMPLES, dtype))
    assert votes.tolist() == [[1, -1, 0], [-1, 0, 0]]
    mean, _ = votes_of(*together(SAMPLES, dtype), mean=True)
    assert mean.tolist() == [[1, -1, 0], [-1, 1, 0]]


@pytest.mark.parametrize("offset", [np.int32, np.int64])
@pytest.mark.parametrize(
    ("mean", "mode", "masked"),
    [
        (False, "agreement", [[0.5, -0.25, 0], [-1, 0, 0]]),
        (True, "agreement", [[0.5, -0.25, 0], [-1, 2, 0]]),
        (False, "force", [[0.5, -0.25, 0], [-1, 0, 0]]),
    ],
)
def test_update_by_hand(mean, mode, masked, offset):
    g, x, offsets = together(SAMPLES)
    target, out, counts = torch.full((6,), 10.0), torch.full((6,), NAN), np.zeros(4, np.int64)
    args = [out, g.flatten(), x.flatten(), offsets.astype(offset), 2, mean, counts, target, TAU.flatten() + 1]
    args += [torch.ones(6), None, mode, 0.5, "ieee"]
    arguments.agree(vote_gemm, args)
    arguments.launch_agrees(vote_gemm, args)
    assert kernel.host("vote_gemm").host(*reference.spans(args)).tolist() == [0, 0, 0]
    assert torch.equal(out.view(2, 3), 10 + 0.5 * torch.tensor(masked))
    assert counts[TIES] == (2 if mean else 3)


@pytest.mark.parametrize(
    ("gradients", "vote", "mean"),
    [((-1, -1, 10), 1, -1), ((1, -1), 0, 0), ((0, 0), 0, 0), ((1, 0), -1, -1), ((-5,), 1, 1), ((NAN, 2), -1, 0),
     ((INF, -1), 0, -1), ((INF, -INF, -1), 1, 0)],
)  # fmt: skip
def test_single_numbers(gradients, vote, mean):
    g, x, offsets = together([([[g]], [[1]]) for g in gradients])
    for pooled, expected in ((False, vote), (True, mean)):
        votes, nans = votes_of(g, x, offsets, pooled)
        assert votes.item() == expected
        assert nans == (np.isnan(sum(gradients)) if pooled else np.isnan(gradients).sum())


def test_one_sample_votes_as_the_mean():
    g, x = integers(75, 20, 33)
    assert torch.equal(votes_of(g, x, [0, 75])[0], votes_of(g, x, [0, 20, 75], mean=True)[0])


def test_order_batches_and_scale_change_nothing():
    g, x = integers(150, 40, 50, "BF16", 1)
    lengths, random = [70, 3, 0, 1, 64, 12], np.random.default_rng(0)
    offsets = np.cumsum([0, *lengths])
    votes, _ = votes_of(g, x, offsets)
    assert set(votes.unique().tolist()) >= {-3, 0, 3}
    for order in ([5, 4, 3, 2, 1, 0], random.permutation(6)):
        rows = np.concatenate([np.arange(offsets[s], offsets[s + 1]) for s in order])
        assert torch.equal(votes_of(g[rows], x[rows], np.cumsum([0, *(lengths[s] for s in order)]))[0], votes)
    parts = [votes_of(g, x, offsets[cut])[0] for cut in (slice(0, 3), slice(2, 6), slice(5, 7))]  # tokens left out
    assert torch.equal(sum(parts), votes)
    twice, _ = votes_of(torch.cat([g, g]), torch.cat([x, x]), np.concatenate([offsets, offsets[1:] + 150]))
    assert torch.equal(twice, 2 * votes)
    padded = [torch.cat([t[:73], 0 * t[:9], t[73:]]) for t in (g, x)]
    assert torch.equal(votes_of(*padded, offsets + 9 * (offsets >= 74))[0], votes)
    factors = torch.tensor([2.0**k for k in (-9, 0, 5, 3, -2, 20)]).repeat_interleave(torch.tensor(lengths))[:, None]
    assert torch.equal(votes_of((g.float() * factors), x.float(), offsets)[0], votes)
    assert torch.equal(votes_of(-g, x, offsets)[0], -votes)


@pytest.mark.parametrize(("samples", "dtype"), [(127, torch.int8), (128, torch.int16), (300, torch.int16)])
def test_many_samples(samples, dtype):
    """A bf16 count would stop at 256."""
    g, x = torch.ones(samples, 2), torch.tensor([[1.0, -1, 0]]).repeat(samples, 1)
    votes, _ = votes_of(g, x, range(samples + 1), dtype=dtype)
    assert votes.tolist() == [[-samples, samples, 0]] * 2


def test_samples_of_one_token_are_a_product_of_signs():
    g, x = torch.randn(60, 30), torch.randn(60, 45)
    g[::7], x[3::5] = 0, -0.0
    assert torch.equal(votes_of(g, x, range(61))[0], -(g.sign().T @ x.sign()).to(torch.int8))


def test_subnormals():
    g = torch.tensor([[2.0**-140], [-(2.0**-149)], [2.0**-133]])
    x = torch.tensor([[2.0**20], [2.0**30], [-(2.0**20)]])
    assert votes_of(g, x, [0, 1, 2, 3])[0].item() == 1
    assert votes_of(g.bfloat16(), x.bfloat16(), [0, 1, 2, 3])[0].item() == 1  # the first two are zeros


def test_not_finite():
    g, x = integers(40, 9, 11, "BF16", 3)
    g[1, 2], g[30, 3], x[2, 4], x[3, 4], x[20, 5] = NAN, INF, INF, -INF, -INF
    votes, nans = votes_of(g, x, [0, 10, 25, 40])
    gradients = torch.stack([g[a:b].double().T @ x[a:b].double() for a, b in ((0, 10), (10, 25), (25, 40))])
    assert nans == gradients.isnan().sum() > 10
    assert torch.equal(votes, -gradients.sign().nan_to_num(0).sum(0).to(torch.int8))


@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 700])
@pytest.mark.parametrize(
    ("dtype", "precision"), [("BF16", "ieee"), ("F16", "ieee"), ("F32", "ieee"), ("F32", "tf32x3")]
)
def test_votes_err_within_the_bound(dtype, precision, tokens):
    """Tokens in pairs that cancel, and one more that leaves next to nothing: less and less from row to row."""
    random, rows, cols = torch.Generator().manual_seed(tokens), 72, 100
    g, x = (torch.randn(tokens, n, generator=random) for n in (rows, cols))
    last, ones = 2.0 ** -torch.linspace(0, 23, rows)[None], torch.ones(1, cols)
    g, x = (torch.cat(parts).to(DTYPES[dtype]) for parts in ((g, g.flip(0), last), (x, -x.flip(0), ones)))
    exact, size, tokens = g.double().T @ x.double(), g.double().abs().T @ x.double().abs(), len(g)
    bound = (2 * tokens + 8) * 2.0**-23 * size + tokens * 2.0**-126
    args = [torch.empty(rows * cols, dtype=torch.int8), g.flatten(), x.flatten(), np.array([0, tokens]), rows, False]
    args += [np.zeros(4, np.int64), None, None, None, None, "agreement", 1.0, precision]
    for run in (
        lambda: kernel.host("vote_gemm").host(*reference.spans(args)),
        lambda: arguments.launch(vote_gemm, args),
    ):
        args[0].fill_(99)
        run()
        differ = args[0].view(rows, cols) != -exact.sign()
        assert (exact.abs() <= bound)[differ].all()
        assert (args[0].abs() <= 1).all()
        assert tokens < 1000 or differ.any()  # of a bound that nothing comes near, nothing is learnt


def test_votes_then_mask_is_the_update(monkeypatch):
    monkeypatch.setattr(vote_gemm, "WIDTH", 32)
    for case in vote_gemm.CASES[2:3] + vote_gemm.CASES[7:8]:
        args = list(vote_gemm.inputs(*case, seed=4))
        rows, cols = case[2:4]
        votes = torch.empty(rows * cols, dtype=torch.int16)
        kernel.host("vote_gemm").host(*reference.spans([votes, *args[1:6]]), args[6].copy())
        separate = [torch.empty_like(args[0]), *args[7:10], votes, args[11], args[12], args[6].copy(), args[10].clone()]
        kernel.host("sign_mask").host(*reference.spans(separate))
        arguments.launch(vote_gemm, args)
        assert all(map(arguments.same, (args[0], args[6], args[10]), (separate[0], separate[7], separate[8])))


@pytest.mark.parametrize("seed", range(4))
def test_ragged_lengths(seed):
    """More rows and columns than one tile, samples that end at any place of a step."""
    random = np.random.default_rng(seed)
    lengths = random.choice([0, 1, 2, 31, 32, 33, 63, 64, 65, 129], 7)
    rows, cols = random.integers(1, 290, 2)
    g, x = integers(int(lengths.sum()) + 5, rows, cols, ("BF16", "F32", "F16", "F32")[seed], seed)
    votes_of(g, x, np.cumsum([2, *lengths]), precision=("ieee", "tf32x3")[seed % 2])


def test_more_rows_and_columns_than_a_product_of_the_host():
    from streammerge.kernels.host import vote_gemm as ours

    g, x = integers(2 * ours.TOKENS + 3, ours.ROWS + 5, ours.COLS + 9, "BF16", 5)
    out, counts = torch.empty(g.shape[1] * x.shape[1], dtype=torch.int8), np.zeros(4, np.int64)
    args = [out, g.flatten(), x.flatten(), np.array([0, 3, len(g)]), g.shape[1], False, counts]
    arguments.agree(vote_gemm, args)


@pytest.mark.parametrize("dtype", ["BF16", "F32"])
def test_tokens_beyond_the_reach_of_32_bits(dtype):
    """G and X are said to begin 2**33 bytes and more before the tokens that the samples have."""
    g, x = integers(40, 64, 48, dtype, 6)
    expected, _ = votes_of(g, x, [0, 30, 40])
    first, size = 1 << 31, g.element_size()
    held = [t.to(arguments.DEVICE) for t in (g, x)]
    queue = Queue.on(arguments.DEVICE)
    for run, (left, right) in ((kernel.host("vote_gemm").host, (g, x)), (None, held)):
        out, counts = torch.empty(64 * 48, dtype=torch.int8), np.zeros(4, np.int64)
        out = out if run else out.to(arguments.DEVICE)
        spans = [span(t)._replace(address=t.data_ptr() - first * t.shape[1] * size, numel=(first + 40) * t.shape[1])
                 for t in (left, right)]  # fmt: skip
        args = [span(out), *spans, first + np.array([0, 30, 40]), 64, False, counts]
        run(*args) if run else vote_gemm.launch(queue, *args)
        queue.end().wait()
        assert torch.equal(out.cpu().view(64, 48), expected)


def test_out_may_be_the_target():
    args = list(vote_gemm.inputs(*vote_gemm.CASES[2]))
    expected = [arguments.copy(a) for a in args]
    vote_gemm.reference(*expected)
    for place in ("host", arguments.DEVICE):
        mine = [arguments.copy(a) if place == "host" else arguments.moved(arguments.copy(a), place) for a in args]
        mine[0] = mine[7]
        if place == "host":
            kernel.host("vote_gemm").host(*reference.spans(mine))
        else:
            queue = Queue.on(place)
            vote_gemm.launch(queue, *reference.spans(mine, queue))
            queue.end().wait()
            queue.finish()
        assert torch.equal(bits(mine[0].cpu()), bits(expected[0]))
        assert np.array_equal(mine[6], expected[6])


def test_segments():
    assert segments(np.array([2, 5, 5, 9], np.int32), 9, False).tolist() == [[2, 5], [5, 9]]
    assert segments(np.array([2, 5, 5, 9]), 12, True).tolist() == [[2, 9]]
    assert segments(np.array([0]), 0, False).tolist() == []
    for wrong in ([3, 2], [-1, 2], [0, 10], []):
        with pytest.raises(AssertionError):
            segments(np.array(wrong), 9, False)


@pytest.mark.parametrize("wrong", ["samples", "dtype", "mask", "precision", "shape", "mode"])
def test_refuses(wrong):
    args = list(vote_gemm.inputs(*vote_gemm.CASES[6]))
    if wrong in ("samples", "dtype"):
        args[0] = torch.empty(64 * 128, dtype=torch.int8 if wrong == "samples" else torch.uint8)
        args[7:11] = [None] * 4
        args[1:4] = torch.ones(128 * 64), torch.ones(128 * 128), np.arange(129)
    elif wrong == "mask":
        args[10] = torch.empty(3, dtype=torch.uint8)
    else:
        args[{"precision": 13, "shape": 4, "mode": 11}[wrong]] = {"shape": 65}.get(wrong, "tf32")
    with pytest.raises(AssertionError):
        kernel.host("vote_gemm").host(*reference.spans(args))
    with pytest.raises(AssertionError):
        vote_gemm.launch(Queue.on("cpu"), *reference.spans(args))


def test_tensor_cores_do_what_is_not_ieee():
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, Path(__file__).with_name("compiled.py"), "vote_gemm"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    for row, case in zip(map(json.loads, done.stdout.splitlines()), vote_gemm.CASES, strict=True):
        plain = case[4] != ("BF16",) and case[4] != ("F16",) and case[8] == "ieee"
        assert row["tensor_cores"] != plain, row
        assert row["fused"] == plain, row
