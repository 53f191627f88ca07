"""Votes of samples: the worked case, exact counts, and what neither order nor scale may change."""

import math

import numpy as np
import pytest
import torch
from methods.voting import (
    INF,
    MASKED,
    MEAN_MASKED,
    NAN,
    SAMPLES,
    TAU,
    VOTES,
    apply,
    ballot,
    masked,
    panels,
    random_gradients,
    tensor,
    votes,
)

from streammerge.errors import RecipeError
from streammerge.methods._ballots import MOST, Ballot, vote_dtype
from streammerge.methods.gradfix import GradFix


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
