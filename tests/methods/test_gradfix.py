"""GradFix on tensors in memory: the worked case, the table of signs, the identities that hold to the bit."""

import math
import zlib
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from streammerge import kernel
from streammerge import method as methods
from streammerge.engine.tiles import Crew, Merger, settle_in_memory
from streammerge.errors import CheckpointError, RecipeError
from streammerge.formats.dtypes import SIGNS
from streammerge.kernels.numerics import Span
from streammerge.method import Tile
from streammerge.methods._ballots import MOST, Ballot, vote_dtype
from streammerge.methods._masked import PIECE, Masked
from streammerge.methods._masked_whole import MaskedWhole, trim
from streammerge.methods._tally import Tally
from streammerge.methods.gradfix import GradFix

torch = pytest.importorskip("torch")

NAN, INF = float("nan"), float("inf")
# Worked by hand: one weight [2, 3] of a linear layer, three samples of two, one and two tokens; dW = G^T X.
SAMPLES = [
    ([[1, -1], [-1, 2]], [[1, 2, 0], [3, -1, 0]], [[-2, 3, 0], [5, -4, 0]]),
    ([[2, 1]], [[-1, 1, 0]], [[-2, 2, 0], [-1, 1, 0]]),
    ([[0, 1], [1, 0]], [[4, 0, 0], [1, -3, 0]], [[1, -3, 0], [4, 0, 0]]),
]
TAU = [[0.5, -0.25, 0.125], [-1, 2, -0.5]]
VOTES = [[1, -1, 0], [-1, 0, 0]]
SUM = [[-3, 2, 0], [8, -3, 0]]
MASKED = [[0.5, -0.25, 0], [-1, 0, 0]]
MEAN_MASKED = [[0.5, -0.25, 0], [-1, 2, 0]]


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def ballot(gradients, mean=False, tasks=None, apart=False):
    """The ballot of these per-sample gradients."""
    gradients = [tensor(each) for each in gradients]
    tasks = tasks or [0] * len(gradients)
    made = Ballot(gradients[0].numel(), tasks, mean, apart, torch.device("cpu"))
    for number, gradient in enumerate(gradients):
        made.add(gradient, number)
    made.close()
    return made


def panels(samples, mean=False, tasks=None, apart=False):
    """The same of a linear layer's panels."""
    tasks = tasks or [0] * len(samples)
    made = Ballot(len(samples[0][0][0]) * len(samples[0][1][0]), tasks, mean, apart, torch.device("cpu"))
    for number, (outputs, inputs, *_) in enumerate(samples):
        made.add_panel(tensor(inputs), tensor(outputs), number)
    made.close()
    return made


def votes(made):
    return [list(made._found[task].tolist()) for task in sorted(made._found)]


def span(values):
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16"}
    return Span(values.data_ptr(), kinds[values.dtype], values.numel())


def packed(signs):
    """Two-bit signs in memory, as a file has them, with who owns it."""
    memory = np.zeros(-(-signs.numel() // 4), np.uint8)
    kernel.host("sign_mask").pack(Span(memory.ctypes.data, "U8", memory.size), span(signs))
    return memory, Span(memory.ctypes.data, SIGNS, signs.numel())


def apply(method, target, taus, signs, *, source=None, name="w", cuts=(), threads=1, out=None, seed=0, told=None):
    """target + alpha * masked task vectors; the fine-tuned models are source + tau, exactly."""
    source = torch.zeros_like(target) if source is None else source
    experts = [source + tau for tau in taus]
    out = torch.full_like(target, NAN) if out is None else out
    spans = [each if isinstance(each, Span) else span(each) for each in signs]
    method = method.for_tensor(name, tuple(target.shape), len(taus)) if isinstance(method, GradFix) else method
    tile = Tile(
        name=name,
        tensor_id=zlib.crc32(name.encode()),
        shape=tuple(target.shape),
        start=0,
        numel=target.numel(),
        base=span(target),
        experts=(*(span(each) for each in experts), span(source), *spans),
        out=span(out),
        seed=seed,
    )
    edges = [0, *cuts, target.numel()]
    tiles = [tile.part(first, last) for first, last in pairwise(edges)]
    crew = Crew(threads)
    survey = method.survey(tile.shape, len(tile.experts)) or method.tally(tile.shape)
    if isinstance(method, MaskedWhole):
        settle_in_memory(crew, method, survey, tiles)
    merger = Merger(crew, method, survey)
    for each in tiles:
        merger.merge(each)
    crew.close()
    if told is not None:
        told.update(survey.figures, flags=merger.flags)
    return out


def masked(tau, signs, mode="agreement"):
    """mask(tau, signs) alone; signs are votes or a ballot."""
    tau = tensor(tau)
    spans = signs.signs() if isinstance(signs, Ballot) else [signs]
    return apply(GradFix(alpha=1.0, mode=mode), torch.zeros_like(tau), [tau], spans)


def signed(values):
    return torch.tensor(values, dtype=torch.int8)


# --- votes ---


@pytest.mark.parametrize("made", [ballot([dw for *_, dw in SAMPLES]), panels(SAMPLES)], ids=["gradients", "panels"])
def test_the_worked_case(made):
    assert votes(made) == [[*VOTES[0], *VOTES[1]]]
    tau = tensor(TAU)
    found = apply(GradFix(alpha=1.0), torch.zeros(2, 3), [tau], made.signs())
    assert found.tolist() == MASKED
    assert made.slope(lambda part: found.view(-1)[part]) == -10
    forced = apply(GradFix(alpha=1.0, mode="force"), torch.zeros(2, 3), [tau], made.signs())
    assert forced.tolist() == MASKED


@pytest.mark.parametrize("how", [ballot, panels])
def test_the_worked_case_by_the_mean(how):
    made = how(SAMPLES if how is panels else [dw for *_, dw in SAMPLES], mean=True)
    found = apply(GradFix(alpha=1.0, vote="mean"), torch.zeros(2, 3), [tensor(TAU)], made.signs())
    assert found.tolist() == MEAN_MASKED
    assert made.slope(lambda part: found.view(-1)[part]) == -16


@pytest.mark.parametrize(
    ("gradients", "vote"),
    [([-1, -1, 10], 1), ([1, -1], 0), ([0, 0], 0), ([1, 0], -1), ([-0.0, 1e-45], -1), ([NAN, -1], 1), ([NAN], 0)],
)
def test_what_samples_vote(gradients, vote):
    made = ballot([[g] for g in gradients])
    assert np.sign(votes(made)[0][0]) == vote
    assert made.nans == sum(math.isnan(g) for g in gradients)


def test_the_vote_is_not_the_mean():
    found = {mean: masked([1.0], ballot([[-1], [-1], [10]], mean)).item() for mean in (False, True)}
    assert found == {False: 1.0, True: 0.0}


def random_gradients(count, numel=500, seed=0):
    dice = np.random.default_rng(seed)
    return [np.where(dice.random(numel) < 0.2, 0, dice.standard_normal(numel)).tolist() for _ in range(count)]


def test_one_sample_votes_as_it_means():
    (gradient,) = random_gradients(1)
    tau = tensor(random_gradients(1, seed=1)[0]).tolist()
    assert torch.equal(masked(tau, ballot([gradient])), masked(tau, ballot([gradient], True)))


def test_neither_order_nor_copies_nor_scale_of_samples_change_a_sign():
    gradients = random_gradients(9)
    wanted = votes(ballot(gradients))[0]
    assert votes(ballot(gradients[::-1]))[0] == wanted
    assert votes(ballot(gradients * 2))[0] == [2 * vote for vote in wanted]
    scaled = [[value * 2.0**power for value in each] for power, each in enumerate(gradients)]
    assert votes(ballot(scaled))[0] == wanted


def test_a_loss_turned_round_keeps_the_other_half():
    gradients = random_gradients(7)
    tau = tensor(random_gradients(1, seed=3)[0])
    one = masked(tau.tolist(), ballot(gradients))
    other = masked(tau.tolist(), ballot([[-value for value in each] for each in gradients]))
    voted = torch.tensor(votes(ballot(gradients))[0]) != 0
    assert not ((one != 0) & (other != 0)).any()
    assert torch.equal((one != 0) | (other != 0), voted & (tau != 0))
    assert torch.equal(one + other + tau * ~voted, tau)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mean", [False, True])
def test_a_gpu_would_count_the_same(dtype, mean):
    """What torch does there and the compiled loop here, on odd sizes with NaN, infinities and zeros."""
    random = torch.Generator().manual_seed(0)
    one, other = (Ballot(1501, [0] * 4, mean, False, torch.device("cpu")) for _ in range(2))
    for number in range(4):
        gradient = torch.randn(1501, generator=random).to(dtype)
        gradient[number::7], gradient[number::11] = 0.0, -0.0
        gradient[100 + number], gradient[200 + number] = INF, NAN
        one.add(gradient, number)
        other._total = torch.zeros(1501) if other._total is None else other._total
        other._add_there(gradient, other._of(0), other._total)
    assert one.nans == other.nans == 4
    assert torch.equal(one._total, other._total)
    torch.testing.assert_close(one._own, other._own, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("samples", [127, 128, 255, 300])
def test_votes_are_counted_exactly(samples):
    made = ballot([[-1.0, 1.0, 0.0]] * samples)
    assert votes(made) == [[samples, -samples, 0]]
    assert made._found[0].dtype == (torch.int8 if samples <= 127 else torch.int16)


def test_an_accumulator_of_bfloat16_would_not_do():
    """Why votes are integers."""
    votes = torch.zeros(1, dtype=torch.bfloat16)
    for _ in range(257):
        votes += 1
    assert votes.item() != 257


def test_too_many_samples_are_refused():
    with pytest.raises(RecipeError, match="32768 samples of one task; votes count 32,767 at most"):
        vote_dtype([0] * (MOST["int16"] + 1))
    assert vote_dtype([0] * 100 + [1] * 100) == "int8"


def test_a_tensor_that_no_sample_reached_abstains():
    for apart in (False, True):
        made = Ballot(3, [0, 1], False, apart, torch.device("cpu"))
        made.add(tensor([1.0, -1, 0]), 1)
        made.close()
        assert votes(made) == ([[0, 0, 0], [-1, 1, 0]] if apart else [[-1, 1, 0]])
    made = Ballot(3, [0], False, False, torch.device("cpu"))
    made.close()
    assert votes(made) == [[0, 0, 0]]
    assert made.slope(lambda part: torch.ones(part.stop - part.start)) == 0


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("how", ["gradients", "panels"])
def test_tasks_have_one_vote_each(mean, how):
    """Three samples of one task against one of another: the tasks tie where they differ."""
    samples = [([[1.0]], [[g, 1.0]], [[g, 1.0]]) for g in (-1.0, -1.0, 3.0, 5.0)]
    tasks = [0, 0, 0, 1]
    made = panels(samples, mean, tasks) if how == "panels" else ballot([dw for *_, dw in samples], mean, tasks)
    first = -1 if mean else 1
    assert votes(made) == [[first - 1, -2]]
    made = (
        panels(samples, mean, tasks, True) if how == "panels" else ballot([d for *_, d in samples], mean, tasks, True)
    )
    assert votes(made) == [[first, -1], [-1, -1]]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_panels_vote_as_gradients_do(mean, seed):
    """Integers, so that sums are exact in any order."""
    dice = np.random.default_rng(seed)
    samples = []
    for tokens in (5, 1, 17, 3, 8):
        outputs, inputs = dice.integers(-3, 4, (tokens, 13)), dice.integers(-3, 4, (tokens, 9))
        samples.append((outputs.tolist(), inputs.tolist(), (outputs.T @ inputs).tolist()))
    tau = tensor(dice.standard_normal((13, 9)))
    found = []
    for made in (panels(samples, mean), ballot([dw for *_, dw in samples], mean)):
        out = apply(GradFix(alpha=1.0), torch.zeros(13, 9), [tau], made.signs())
        found.append((out, made.slope(lambda part, out=out: out.view(-1)[part])))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], rel=1e-6)


def test_one_position_votes_by_a_product_of_signs():
    """Rank one: where a sample has one token, its signs are those of G and X."""
    dice = np.random.default_rng(0)
    outputs, inputs = dice.standard_normal((11, 7)), dice.standard_normal((11, 5))
    made = panels([([o.tolist()], [i.tolist()]) for o, i in zip(outputs, inputs, strict=True)])
    wanted = -np.sign(outputs).T @ np.sign(inputs)
    assert votes(made) == [wanted.astype(int).ravel().tolist()]


def test_what_a_ballot_holds():
    numel = (1 << 18) + 5
    for tasks, mean, apart, each in (
        ([0] * 3, False, False, 1 + 4), ([0] * 300, False, False, 2 + 4), ([0] * 3, True, False, 4 + 4),
        ([0, 0, 1], False, False, 1 + 1 + 4), ([0, 1, 2], False, True, 1 + 3 + 4),
    ):  # fmt: skip
        assert Ballot.bytes_held(numel, tasks, mean, apart) == each * numel + 12 * (1 << 18)
        made = Ballot(numel, tasks, mean, apart, torch.device("cpu"))
        for number in range(min(len(tasks), 3)):
            made.add(torch.ones(numel), number)
        held = [made._own, made._total, *made._found.values()]
        assert sum(t.numel() * t.dtype.itemsize for t in held if t is not None) <= each * numel


# --- masks and merges ---


def test_every_pair_of_signs():
    taus = [2.0, -2.0, 0.0, -0.0, 2.0**-149, -(2.0**-149), INF, NAN]
    for mode in ("agreement", "force"):
        for tau in taus:
            for vote in (1, -1, 0):
                sign = (tau > 0) - (tau < 0)
                wanted = tau if sign == vote != 0 else vote * abs(tau) if mode == "force" and sign * vote else 0.0
                assert masked([tau], signed([vote]), mode).item() == wanted


def fixture(numel=5001, sources=1, seed=0):
    dice = torch.Generator().manual_seed(seed)
    target, source = torch.randn(2, numel, generator=dice)
    taus = [torch.randn(numel, generator=dice).bfloat16().float() for _ in range(sources)]
    signs = [torch.randint(-3, 4, (numel,), generator=dice, dtype=torch.int8) for _ in range(sources)]
    return target, source.bfloat16().float() * 8, taus, signs


@pytest.mark.parametrize("order", ["merge_then_mask", "mask_then_merge"])
@pytest.mark.parametrize("merge", ["mean", "ties", "tsvm"])
@pytest.mark.parametrize("sources", [1, 3])
def test_nothing_moves_without_alpha_or_task_vector(merge, order, sources):
    target, source, taus, signs = fixture(60 * 50, sources)
    target, source, taus = target.view(60, 50), source.view(60, 50), [tau.view(60, 50) for tau in taus]
    method = GradFix(alpha=0.0, merge=merge, order=order, sources=sources)
    assert torch.equal(apply(method, target, taus, signs[:1], source=source), target)
    method, nothing = replace(method, alpha=1.0), [torch.zeros(60, 50)] * sources
    told = {}
    assert torch.equal(apply(method, target, nothing, signs[:1], source=source, told=told), target)
    assert (told["kept"], told["displacement"]) == (0, 0.0)


def test_oracle_signs_on_the_same_model_give_the_fine_tuned_one():
    _, source, (tau,), _ = fixture()
    tuned = source + tau
    signs = (tuned - source).sign().to(torch.int8)
    found = apply(GradFix(alpha=1.0), source, [tuned - source], [signs], source=source)
    torch.testing.assert_close(found, tuned, rtol=0, atol=1e-6)
    assert torch.equal(found, source + (tuned - source))


def test_a_step_down_the_gradient_is_kept_whole():
    (gradient,) = random_gradients(1)
    made = ballot([gradient], mean=True)
    tau = -0.125 * tensor(gradient)
    assert torch.equal(masked(tau.tolist(), made), tau)
    assert torch.equal(masked((-tau).tolist(), made), torch.zeros(500))


def test_masking_twice_is_masking_once():
    _, _, (tau,), (signs,) = fixture()
    once = masked(tau.tolist(), signs)
    assert torch.equal(masked(once.tolist(), signs), once)


def test_descent_holds_at_every_element():
    gradients = random_gradients(5)
    made = ballot(gradients, mean=True)
    tau = tensor(random_gradients(1, seed=9)[0])
    delta = masked(tau.tolist(), made)
    total = sum(tensor(each) for each in gradients)
    assert (total * delta).max() <= 0
    wanted = -float((total.abs() * tau.abs())[delta != 0].double().sum())
    assert made.slope(lambda part: delta[part]) == pytest.approx(wanted, rel=1e-6)


def test_random_task_vectors_are_kept_by_half():
    dice = torch.Generator().manual_seed(1)
    tau, signs = torch.randn(200_000, generator=dice), torch.randint(-2, 3, (200_000,), generator=dice).to(torch.int8)
    told = {}
    apply(GradFix(), torch.zeros(200_000), [tau], [signs], told=told)
    assert told["kept"] / 200_000 == pytest.approx((1 - 0.2) / 2, abs=0.005)
    assert told["ties"] / 200_000 == pytest.approx(0.2, abs=0.005)


@pytest.mark.parametrize("order", ["merge_then_mask", "mask_then_merge"])
@pytest.mark.parametrize("mode", ["agreement", "force", "random"])
@pytest.mark.parametrize("sources", [1, 3])
def test_the_formula(mode, order, sources):
    """All of it in plain torch, and what is counted."""
    numel = PIECE + 5001
    target, source, taus, signs = fixture(numel, sources)
    method = GradFix(alpha=0.7, mode=mode, order=order, sources=sources)
    apart = sources > 1 and order == "mask_then_merge"
    signs = [] if mode == "random" else signs if apart else signs[:1]
    method = replace(method, voters=max(1, len(signs)))
    told = {}
    found = apply(method, target, taus, signs, source=source, told=told)
    taus = [(source + tau) - source for tau in taus]
    wanted = (
        [drawn(numel)] * sources if mode == "random" else [s.float().sign() for s in signs] * (sources // len(signs))
    )

    def mask(tau, s):
        return torch.where(tau.sign() == s, tau, 0) if mode == "agreement" else tau.abs() * s

    delta = sum(map(mask, taus, wanted)) if apart else mask(sum(taus), wanted[0])
    step = float(np.float32(0.7 / sources)) * delta
    torch.testing.assert_close(found, torch.where(delta == 0, target, target + step), rtol=0, atol=1e-6)
    assert told["kept"] == int((delta != 0).sum())
    ties = [(s == 0) & (tau != 0) for tau, s in zip(taus if apart else [sum(taus)], wanted, strict=False)]
    assert told["ties"] == pytest.approx(sum(int(each.sum()) for each in ties) / (sources if apart else 1), abs=1e-9)
    assert told["unchanged"] == int(((found == target) & (delta != 0)).sum())
    assert told["displacement"] == pytest.approx(float((found - target).double().norm()), rel=1e-9)


def drawn(numel, seed=0, name="w"):
    """The signs that `mode: random` draws, by numpy's own generator and a plain loop over bits."""
    words = np.random.Philox(key=[seed, zlib.crc32(name.encode())], counter=0).random_raw(-(-numel // 64))
    bits = (words[:, None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    return torch.from_numpy(1 - 2 * bits.reshape(-1)[:numel].astype(np.float32))


def test_drawn_signs_are_fair_and_of_seed_and_name():
    tau = torch.ones(100_000)
    found = [
        apply(GradFix(alpha=1.0, mode="random"), torch.zeros(100_000), [tau], [], seed=seed, name=name)
        for seed, name in ((0, "w"), (0, "w"), (1, "w"), (0, "v"))
    ]
    assert torch.equal(found[0], found[1])
    assert set(found[0].tolist()) == {1.0, -1.0}
    for one, other in ((0, 2), (0, 3), (2, 3)):
        assert abs(float((found[one] * found[other]).mean())) < 0.02
    assert abs(float(found[0].mean())) < 0.02


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("signs", ["votes", "packed", "gradient", "drawn"])
@pytest.mark.parametrize("merge", ["mean", "ties"])
@pytest.mark.parametrize("order", ["merge_then_mask", "mask_then_merge"])
def test_tiles_never_change_a_bit(merge, order, signs, threads):
    numel = 540_001
    target, source, taus, voted = fixture(numel, 2)
    method = GradFix(merge=merge, order=order, sources=2, mode="random" if signs == "drawn" else "agreement")
    voted = voted[: 1 + method.apart]
    method = replace(method, voters=len(voted))
    owners = [packed(each) for each in voted]
    given = {
        "votes": voted, "packed": [each for _, each in owners], "gradient": [-each.float() for each in voted],
        "drawn": [],
    }[signs]  # fmt: skip
    found = [
        apply(method, target, taus, given, source=source, cuts=cuts, threads=threads)
        for cuts in ((), (4096, 4096 * 70, 4096 * 131))
    ]
    assert torch.equal(found[0], found[1])
    if signs != "drawn":
        assert torch.equal(found[0], apply(method, target, taus, voted, source=source))


def test_one_model_is_not_merged():
    target, source, taus, signs = fixture(60 * 50)
    shaped = [each.view(60, 50) for each in (target, source, *taus)]
    wanted = apply(GradFix(), shaped[0], shaped[2:], signs, source=shaped[1])
    for merge in ("mean", "ties", "tsvm"):
        for order in ("merge_then_mask", "mask_then_merge"):
            method = GradFix(merge=merge, order=order)
            assert torch.equal(apply(method, shaped[0], shaped[2:], signs, source=shaped[1]), wanted)


def test_both_orders_agree_where_models_and_signs_do():
    target, source, (tau,), (signs,) = fixture()
    found = [
        apply(GradFix(order=order, sources=2), target, [tau, tau], [signs], source=source)
        for order in ("merge_then_mask", "mask_then_merge")
    ]
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], apply(GradFix(), target, [tau], [signs], source=source))


def test_orders_differ_where_models_do():
    """s = +, tau = (+1, -3): mask_then_merge keeps half of the first, merge_then_mask nothing."""
    taus, signs = [tensor([1.0]), tensor([-3.0])], [signed([1])]
    found = [
        apply(GradFix(alpha=1.0, order=order, sources=2), torch.zeros(1), taus, signs).item()
        for order in ("mask_then_merge", "merge_then_mask")
    ]
    assert found == [0.5, 0.0]


def test_ties_by_hand():
    """Ten elements, two kept of each: signs elected by count, the mean of those that have them."""
    taus = [
        tensor([5.0, 4, 1, 1, 1, 1, 1, 1, 1, 1]),
        tensor([-9.0, 0, 8, 1, 1, 1, 1, 1, 1, 1]),
        tensor([-2.0, 6, 0, 1, 1, 1, 1, 1, 1, 1]),
    ]
    kept = [[5, 4, 0], [-9, 0, 8], [-2, 6, 0]]
    assert [trim(tau.clone())[:3].tolist() for tau in taus] == kept
    method = GradFix(alpha=1.0, merge="ties", sources=3)
    found = apply(method, torch.zeros(10), taus, [torch.ones(10, dtype=torch.int8)])
    assert found.tolist() == [0.0, 5.0, 8.0] + [0.0] * 7  # the first is -5.5 and masked
    found = apply(method, torch.zeros(10), taus, [-torch.ones(10, dtype=torch.int8)])
    assert found.tolist() == [-5.5] + [0.0] * 9
    found = apply(replace(method, order="mask_then_merge"), torch.zeros(10), taus, [torch.ones(10, dtype=torch.int8)])
    assert found[:4].tolist() == [5.0, 5.0, 8.0, 1.0]  # the third model's first and largest was masked away


def test_an_even_count_elects_plus():
    taus = [tensor([3.0, 0, 0, 0, 0]), tensor([-4.0, 0, 0, 0, 0])]
    found = apply(GradFix(alpha=1.0, merge="ties", sources=2), torch.zeros(5), taus, [torch.ones(5, dtype=torch.int8)])
    assert found.tolist() == [3.0, 0, 0, 0, 0]


@pytest.mark.parametrize("numel", [1, 4, 5, 6, 1000, 1001])
def test_a_trim_keeps_a_fifth_and_of_equals_the_first(numel):
    values = torch.arange(1, numel + 1).float() * torch.tensor([1.0, -1.0]).repeat(numel)[:numel]
    kept = trim(values.clone())
    assert int((kept != 0).sum()) == -(-numel // 5)
    assert torch.equal(kept, torch.where(values.abs() > numel - -(-numel // 5), values, 0))
    equal = trim(torch.ones(numel))
    assert equal.tolist() == [1.0] * -(-numel // 5) + [0.0] * (numel - -(-numel // 5))
    assert trim(torch.zeros(0)).numel() == 0


@pytest.mark.parametrize("order", ["merge_then_mask", "mask_then_merge"])
def test_tsvm_is_the_methods_own(order):
    """The merged vector is what method tsvm adds to a base of zeros."""
    from merging import run

    dice = torch.Generator().manual_seed(0)
    taus = [torch.randn(40, 30, generator=dice) for _ in range(2)]
    signs = torch.randint(-2, 3, (40, 30), generator=dice).to(torch.int8)
    method = GradFix(alpha=1.0, merge="tsvm", order=order, sources=2)
    found = apply(method, torch.zeros(40, 30), taus, [signs])
    given = [torch.where(tau.sign() == signs.sign(), tau, 0) for tau in taus] if method.apart else taus
    merged = torch.from_numpy(
        run(methods.find("tsvm")(), np.zeros((40, 30), np.float32), [t.numpy() for t in given])[0]
    )
    wanted = merged if method.apart else torch.where(merged.sign() == signs.sign(), merged, 0)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
    assert (found != 0).any()


def test_tsvm_takes_matrices_and_the_mean_the_rest():
    method = GradFix(merge="tsvm", sources=2)
    kinds = [type(method.for_tensor(*each, 3)) for each in (("q.weight", (8, 8)), ("norm", (8,)), ("lm_head", (8, 8)))]
    assert kinds == [MaskedWhole, Masked, Masked]


@pytest.mark.parametrize("merge", ["ties", "tsvm"])
def test_a_nan_in_a_model_is_named(merge):
    taus = [torch.ones(8, 8), torch.full((8, 8), NAN)]
    with pytest.raises(CheckpointError, match=r"tensor 'w' of model 2 or of its base holds a NaN or an infinity"):
        apply(GradFix(merge=merge, sources=2), torch.zeros(8, 8), taus, [torch.ones(64, dtype=torch.int8)])


@pytest.mark.parametrize("order", ["merge_then_mask", "mask_then_merge"])
@pytest.mark.parametrize("sources", [1, 3])
def test_nan_is_noticed_where_it_is(order, sources):
    target, source, taus, signs = fixture(9000, sources)
    taus[-1] = taus[-1].clone()
    taus[-1][8000] = NAN
    told = {}
    found = apply(GradFix(order=order, sources=sources), target, taus, signs[:1], source=source, told=told)
    assert list(told["flags"])[: sources + 2] == [0] * sources + [2, 0]
    assert found[8000] == target[8000] or sources > 1
    assert found.isfinite().all()
    assert told["nan"] >= 1


def test_pass_adds_whole_task_vectors():
    target, source, taus, _ = fixture(9000, 2)
    found = apply(GradFix(alpha=0.5, sources=2, whole=True), target, taus, [], source=source)
    wanted = target + 0.25 * sum((source + tau) - source for tau in taus)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-6)


def test_results_are_rounded_once():
    target, source, taus, signs = fixture(9000)
    exact = apply(GradFix(alpha=0.3), target.bfloat16().float(), taus, signs, source=source)
    out = torch.empty(9000, dtype=torch.bfloat16)
    told = {}
    apply(GradFix(alpha=0.3), target.bfloat16(), taus, signs, source=source.float(), out=out, told=told)
    assert torch.equal(out, exact.bfloat16())
    assert told["unchanged"] == int(((out == target.bfloat16()) & (exact != target.bfloat16().float())).sum())


# --- what a recipe may say ---


def test_parameters_and_keys():
    assert list(methods.parameters(GradFix)) == ["alpha", "vote", "mode", "unmatched"]
    assert (GradFix(alpha=(0.1, 0.2)).alphas, GradFix(alpha=0.3).alphas) == ((0.1, 0.2), (0.3,))
    given = GradFix.read_keys({"source_base": "a", "data": {"train": "t"}}, 2, "recipe")
    assert given["data"] == {"train": ["t"], "validation": None, "max_length": None}
    assert (given["merge"], given["order"]) == ("mean", "merge_then_mask")


BASE = {"source_base": "a", "data": {"train": "t"}}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"data": {"train": "t"}}, "gradfix needs source_base"),
        ({**BASE, "merge": "slerp"}, "merge is 'slerp'; one of mean, ties, tsvm"),
        ({**BASE, "order": "both"}, "order is 'both'; one of"),
        ({**BASE, "votes": "v", "save_votes": "w.safetensors"}, "both votes and save_votes"),
        ({**BASE, "save_votes": "w"}, "save_votes is 'w'; its name must end in .safetensors"),
        ({**BASE, "votes": 3}, "votes must be the path of a file"),
        ({**BASE, "votes": "v"}, "data.train: there are votes already"),
        ({**BASE, "data": "t"}, "data: must be a mapping of train, validation, max_length"),
        ({**BASE, "data": {"train": "t", "test": "u"}}, "data: unknown key 'test'"),
        ({**BASE, "data": {"train": ["t", "u", "v"]}}, "data.train: 3 files for 2 models"),
        ({**BASE, "data": {"train": [1]}}, "data.train: must be a file, or a list"),
        ({**BASE, "data": {"train": "t", "validation": 1}}, "data.validation: must be a file"),
        ({**BASE, "data": {"train": "t", "max_length": 1}}, "data.max_length: 1; give a whole number"),
        ({**BASE, "compute": "int8"}, "compute is 'int8'"),
    ],
)
def test_wrong_keys_are_one_line(given, line):
    with pytest.raises(RecipeError, match=line) as caught:
        GradFix.read_keys(given, 2, "r.yml")
    assert str(caught.value).startswith("r.yml: ")


@pytest.mark.parametrize(("name", "value"), [("vote", "max"), ("mode", "soft"), ("unmatched", "keep")])
def test_wrong_parameters_are_one_line(name, value):
    with pytest.raises(RecipeError, match=f"gradfix: {name} is {value!r}; one of"):
        GradFix(**{name: value})


def test_what_an_empty_tensor_tells():
    figures = Tally(0).figures
    assert figures == {
        "alpha": 1.0,
        "elements": 0,
        "kept": 0,
        "ties": 0.0,
        "unchanged": 0,
        "nan": 0,
        "displacement": 0.0,
    }


def test_places_of_counts_are_the_kernels():
    from streammerge.kernels.host import sign_mask
    from streammerge.methods import _tally

    for name in ("KEPT", "TIES", "LOST", "NANS"):
        assert getattr(_tally, name) == getattr(sign_mask, name)
