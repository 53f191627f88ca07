"""sign_mask: worked values, every pair of signs, what must stay exact, what is counted, packing, parts."""

from __future__ import annotations

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import device, reference, sign_mask
from streammerge.kernels.host.sign_mask import KEPT, NANS, TIES
from streammerge.kernels.queue import Queue
from streammerge.kernels.reference import DTYPES, bits, span

MODES = ("agreement", "force")
TAU = torch.tensor([[0.5, -0.25, 0.125], [-1, 2, -0.5]])  # of the worked example, with these votes
VOTES = torch.tensor([[1, -1, 0], [-1, 0, 0]], dtype=torch.int8)
GRADIENT = torch.tensor([[-3.0, 2, 0], [8, -3, 0]])  # summed over its samples
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def small_blocks(monkeypatch):
    """Programs as on a GPU: most have a whole block, the last a ragged one."""
    monkeypatch.setattr(sign_mask, "block_size", lambda usual: 256)


def apply(target, expert, base, vote, mode, scale=1.0, out=None, wanted=False):
    """The result; counts and mask too if wanted. By host; launch and reference give the same."""
    out = torch.full_like(target, NAN) if out is None else out
    mask = torch.full((-(-out.numel() // 8),), 0x5A, dtype=torch.uint8) if wanted else None
    args = [t if t is None else t.flatten() for t in (out, target, expert, base, vote)]
    counts = np.zeros(4, np.int64)
    args += [mode, scale, counts, mask]
    arguments.agree(sign_mask, args)
    arguments.launch_agrees(sign_mask, args)
    kernel.host("sign_mask").host(*reference.spans(args))
    return (args[0].view_as(target), counts, mask) if wanted else args[0].view_as(target)


def mask(tau, vote, mode="agreement"):
    """mask(tau, s) alone."""
    return apply(torch.zeros_like(tau), tau, None, vote, mode)


def packed(votes):
    out = torch.empty(-(-votes.numel() // 4), dtype=torch.uint8)
    kernel.host("sign_mask").pack(span(out), span(votes.flatten()))
    return out


def values(numel, name, seed):
    return reference.tensors(numel, (name,), 2, "cpu", seed)[1]


def random_votes(numel, seed=0, dtype=np.int8):
    return torch.from_numpy(np.random.default_rng(seed).integers(-3, 4, numel).astype(dtype))


def test_by_hand():
    assert mask(TAU, VOTES).tolist() == [[0.5, -0.25, 0], [-1, 0, 0]]
    assert mask(TAU, VOTES, "force").tolist() == [[0.5, -0.25, 0], [-1, 0, 0]]
    assert mask(TAU, GRADIENT).tolist() == [[0.5, -0.25, 0], [-1, 2, 0]]
    assert mask(TAU, -GRADIENT, "force").tolist() == [[-0.5, 0.25, 0], [1, -2, 0]]
    assert (GRADIENT * mask(TAU, VOTES)).sum() == -10
    assert (GRADIENT * mask(TAU, GRADIENT)).sum() == -16
    out, counts, kept = apply(torch.ones(2, 3), TAU + 2, torch.full((2, 3), 2.0), VOTES, "agreement", 0.5, wanted=True)
    assert out.tolist() == [[1.25, 0.875, 1], [0.5, 1, 1]]
    assert counts.tolist() == [3, 3, 0, 0]
    assert kept.tolist() == [0b001011]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["I8", "I16", "U8", "gradient"])
def test_every_pair_of_signs(mode, kind):
    taus = [2.0, -2.0, 0.0, -0.0, 1e-45, -1e-45, INF, -INF, NAN]
    votes = [1, -1, 0]
    tau = torch.tensor(taus).repeat_interleave(len(votes))
    vote = torch.tensor(votes * len(taus), dtype=torch.int16 if kind == "I16" else torch.int8)
    if kind == "U8":
        vote = packed(vote)
    elif kind == "gradient":
        vote = -vote.float()  # the zeros become -0.0
    out, counts, kept = apply(torch.zeros_like(tau), tau, None, vote, mode, wanted=True)
    expected = []
    for t in taus:
        sign = (t > 0) - (t < 0)
        expected += [t if sign == s != 0 else s * abs(t) if mode == "force" and sign != 0 else 0.0 for s in votes]
    expected = torch.tensor([0.0 if e != e else e for e in expected])
    assert torch.equal(out, expected)
    assert counts[KEPT] == (expected != 0).sum()
    assert counts[TIES] == 6
    assert counts[NANS] == 3
    assert kept.tolist() == np.packbits(expected.numpy() != 0, bitorder="little").tolist()


@pytest.mark.parametrize("name", list(DTYPES))
def test_a_nan_gradient_abstains_and_is_counted(name):
    vote = torch.tensor([NAN, -1, NAN, 0, 1]).to(DTYPES[name])
    out, counts, _ = apply(torch.zeros(5), torch.tensor([1.0, 1, NAN, 1, -1]), None, vote, "agreement", wanted=True)
    assert out.tolist() == [0, 1, 0, 0, -1]
    assert counts.tolist() == [2, 2, 0, 3]


@pytest.mark.parametrize("kind", ["votes", "gradient"])
def test_partition(kind):
    tau = values(5000, "F32", 1)
    vote = random_votes(5000) if kind == "votes" else values(5000, "BF16", 2) * random_votes(5000)
    sign, against = sign_mask.signs(vote, 5000), vote * -1
    with_it, against_it = mask(tau, vote), mask(tau, against)
    assert torch.equal(mask(tau, vote, "force"), with_it - against_it)
    assert torch.equal(with_it + against_it + tau * (sign == 0), tau)
    assert not ((with_it != 0) & (against_it != 0)).any()
    assert torch.equal((with_it != 0) | (against_it != 0), (sign != 0) & (tau != 0))
    assert torch.equal(mask(with_it, vote), with_it)
    assert torch.equal(mask(tau, vote * 4), with_it)  # a loss times 4


def test_a_step_downhill_is_kept_whole():
    gradient = values(3000, "F32", 3)
    tau = -0.125 * gradient
    assert torch.equal(mask(tau, gradient), torch.where(tau == 0, 0.0, tau))
    assert not mask(tau, -gradient).any()


@pytest.mark.parametrize("name", list(DTYPES))
@pytest.mark.parametrize("mode", MODES)
def test_nothing_to_add_leaves_the_target_to_the_bit(name, mode):
    target, expert, base = (values(3000, name, seed) for seed in range(3))
    vote, none = random_votes(3000), torch.zeros(3000, dtype=torch.int8)
    expert[::50] = torch.full((60,), INF).to(expert.dtype)
    for e, v, scale in ((expert, vote, 0.0), (base, vote, 1.0), (expert, none, 1.0)):
        assert torch.equal(bits(apply(target, e, base, v, mode, scale)), bits(target))


@pytest.mark.parametrize("out", list(DTYPES))
@pytest.mark.parametrize("names", [("BF16", "F16", "F32", "F8_E4M3"), ("F8_E5M2", "F64", "BF16", "F16"), ("F64",)])
def test_every_dtype(small_blocks, out, names):
    for at, (vote, mode) in enumerate([("F64", "force"), ("F8_E4M3", "agreement"), ("F8_E5M2", "force")]):
        args = list(sign_mask.inputs(1000 + at, names, vote, mode, True, True))
        args[0] = torch.empty(1000 + at, dtype=DTYPES[out])
        arguments.poison(args)
        arguments.agree(sign_mask, args)
        arguments.launch_agrees(sign_mask, args)


@pytest.mark.parametrize("case", sign_mask.CASES, ids=str)
def test_launch_on_programs_of_a_gpu(small_blocks, case):
    for by in (0, 3):
        args = arguments.shifted(sign_mask.inputs(*case), by)
        arguments.launch_agrees(sign_mask, args)
        arguments.poison(args)
        arguments.launch_agrees(sign_mask, args)


def test_updates_lost_in_rounding_are_counted():
    target = torch.tensor([1, 1, 1, -0.0, NAN, 256]).bfloat16()
    tau = torch.tensor([2.0**-8, 2.0**-10, 0, 1e-45, 1, 1])
    vote = torch.ones(6, dtype=torch.int8)
    out, counts, _ = apply(target, tau, None, vote, "agreement", wanted=True)
    assert counts.tolist() == [5, 0, 4, 0]  # 1 + 2**-8 is half a step: to even; 257 too; 0 is -0.0; NaN equals nothing
    assert out.tolist()[:3] == [1, 1, 1]
    wide = apply(target.float(), tau, None, vote, "agreement", wanted=True)
    assert wide[1].tolist() == [5, 0, 0, 0]
    mixed = apply(target.float(), tau, None, vote, "agreement", out=torch.empty(6).bfloat16(), wanted=True)
    assert mixed[1].tolist() == [5, 0, 4, 0]


def test_one_rounding():
    target, expert, base = (values(9000, "BF16", seed) for seed in range(3))
    vote = random_votes(9000)
    out = apply(target, expert, base, vote, "agreement", 0.7)
    tau = expert.float() - base.float()
    exact = target.float() + np.float32(0.7) * torch.where(tau.sign() == vote.sign(), tau, 0)
    assert torch.equal(out, exact.bfloat16())


@pytest.mark.parametrize("dtype", [np.int8, np.int16])
@pytest.mark.parametrize("numel", [0, 1, 2, 3, 4, 5, 600, 1023])
def test_packing(small_blocks, numel, dtype):
    votes = random_votes(numel, numel, dtype)
    theirs, ours = (torch.full((-(-numel // 4),), 0xEE, dtype=torch.uint8) for _ in range(2))
    sign_mask.reference_pack(theirs, votes)
    assert torch.equal(packed(votes), theirs)
    assert torch.equal(sign_mask.signs(theirs, numel), votes.long().sign())
    queue = Queue.on(arguments.DEVICE)
    on_device, from_device = ours.to(arguments.DEVICE), votes.to(arguments.DEVICE)
    sign_mask.launch_pack(queue, span(on_device), span(from_device))
    queue.end().wait()
    assert torch.equal(on_device.cpu(), theirs)
    tau = values(numel, "F32", 4)
    assert torch.equal(mask(tau, votes), mask(tau, theirs))


def test_packing_by_hand():
    assert packed(torch.tensor([1, -1, 0, 5, -7], dtype=torch.int8)).tolist() == [0b01001101, 0b00000011]
    assert packed(torch.tensor([-2.0, 3.0, NAN, -0.0])).tolist() == [0b00001101]
    assert mask(torch.tensor([-1.0, 1.0]), torch.tensor([0b1010], dtype=torch.uint8)).tolist() == [-1, 0]


@pytest.mark.parametrize("kind", ["I8", "I16", "U8", "BF16"])
def test_parts_are_the_whole(kind):
    args = sign_mask.inputs(4097, ("BF16", "F32"), kind, "agreement", True, True)
    whole, parts = (tuple(map(arguments.copy, args)) for _ in range(2))
    found = kernel.host("sign_mask").host(*reference.spans(whole))
    flags = []
    for start, stop in ((0, 8), (8, 2000), (2000, 4096), (4096, 4097)):
        cut = [t[start:stop] for t in parts[:4]]
        cut.append(parts[4][start // 4 : -(-stop // 4)] if kind == "U8" else parts[4][start:stop])
        flags.append(
            kernel.host("sign_mask").host(
                *reference.spans(cut), "agreement", 0.3, parts[7], span(parts[8][start // 8 : -(-stop // 8)])
            )
        )
    assert np.array_equal(found, np.max(flags, 0))
    assert all(map(arguments.same, whole, parts))


def test_out_may_be_the_target(small_blocks):
    """The target is infinite nowhere; the result is: flags speak of what was read."""
    target, expert, base = (values(1000, "F16", seed) for seed in range(3))
    expert[7], target[:10] = INF, 60000
    vote = -torch.ones(1000)
    expected, counts, _ = apply(target, expert, base, vote, "force", 3e4, wanted=True)
    assert expected.isinf().sum() > 1
    found, launched = np.zeros(4, np.int64), np.zeros(4, np.int64)
    host, held = target.clone(), [t.to(arguments.DEVICE) for t in (target.clone(), expert, base, vote)]
    where = [span(t) for t in (host, host, expert, base, vote)]
    assert kernel.host("sign_mask").host(*where, "force", 3e4, found).tolist() == [0, 1, 0, 0]
    queue = Queue.on(arguments.DEVICE)
    place = [span(t, queue) for t in held]
    with np.errstate(all="ignore"):
        flags = sign_mask.launch(queue, place[0], *place, "force", 3e4, launched)
    queue.end().wait()
    queue.finish()
    assert flags.tolist() == [0, 1, 0, 0]
    assert torch.equal(bits(host), bits(expected))
    assert torch.equal(bits(held[0].cpu()), bits(expected))
    assert np.array_equal(found, counts)
    assert np.array_equal(launched, counts)


@pytest.mark.skipif(not device.INTERPRETED, reason="sets the programs' numbers in the interpreter")
def test_beyond_the_reach_of_32_bits(monkeypatch):
    """Program 2**23 of 1,024 elements: element 2**33. It is told that the tensors begin that far before."""
    from triton.runtime.interpreter import interpreter_builder

    program, first = 1 << 23, 1 << 33
    out, target, expert, base, vote, _, _, counts, kept = sign_mask.inputs(
        900, ("BF16",), "U8", "agreement", True, True
    )
    expected = [arguments.copy(t) for t in (out, counts, kept)]
    sign_mask.reference(expected[0], target, expert, base, vote, "agreement", 0.3, expected[1], expected[2])
    monkeypatch.setattr(
        interpreter_builder,
        "set_grid_idx",
        lambda x, y, z: setattr(interpreter_builder, "grid_idx", (x + program, y, z)),
    )
    sign_mask._mask[(1,)](
        tuple(t.data_ptr() - 2 * first for t in (out, target, expert, base)),
        vote.data_ptr() - first // 4,
        kept.data_ptr() - first // 8,
        0.3,
        first + 900,
        0,
        counts.ctypes.data,
        CODES=(device.BF16.value,) * 4,
        KIND=sign_mask.PACKED.value,
        FORCE=False,
        BITS=True,
        ALIGN=1,
        BLOCK=1024,
    )
    assert all(map(arguments.same, (out, counts, kept), expected))


@pytest.mark.parametrize(
    "change",
    [{"mode": "agree"}, {"scale": NAN}, {"vote": random_votes(9)}, {"mask": torch.zeros(3, dtype=torch.uint8)},
     {"expert": torch.ones(1)}],
    ids=str,
)  # fmt: skip
def test_refuses(change):
    args = {"out": torch.empty(10), "target": torch.ones(10), "expert": torch.ones(10), "base": None}
    args |= {"vote": random_votes(10), "mode": "agreement", "scale": 1.0, "counts": np.zeros(4, np.int64), "mask": None}
    args = [reference.spans(v) for v in (args | change).values()]
    with pytest.raises(AssertionError):
        kernel.host("sign_mask").host(*args)
    with pytest.raises(AssertionError):
        sign_mask.launch(Queue.on("cpu"), *args)
