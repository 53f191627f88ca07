"""GradFix on tensors in memory: the table of signs, the identities that hold to the bit."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from methods.voting import INF, NAN, apply, ballot, masked, packed, random_gradients, signed, tensor

from streammerge import method as methods
from streammerge.errors import CheckpointError
from streammerge.methods._masked import PIECE, Masked
from streammerge.methods._masked_whole import MaskedWhole, trim
from streammerge.methods.gradfix import GradFix


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
