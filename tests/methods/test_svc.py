"""SVC after other methods: against fp64 oracles with full decompositions; what it refuses and holds."""

import zlib
from dataclasses import dataclass

import methods.falling as falling
import methods.oracles as oracles
import numpy as np
import pytest
from merging import run
from methods.memory import held_by
from methods.test_contract import NAMES, make
from methods.test_contract import material as tied

from streammerge import method
from streammerge.errors import CheckpointError
from streammerge.method import Survey
from streammerge.methods._matrices import LIBRARY
from streammerge.methods.post.svc import EXAMPLES, Svc
from streammerge.methods.task_arithmetic import TaskArithmetic

SHAPES = [(24, 40), (40, 24), (30, 30)]
WEIGHT = (0.5, 0.3, 0.4)
DENSITY = (0.5, 0.3, 0.7)
pytestmark = pytest.mark.usefixtures("one_thread")


def after(name, floor=0.0, norm_guard=0.0, **values):
    return Svc(method.build(method.find(name), values), floor=floor, norm_guard=norm_guard)


def given(name, **values):
    """A method of the table with ordinary parameters."""
    if method.find(name).sees == "layer":
        pytest.skip("merges whole layers")
    return make(name, **values)


def material(shape, experts=3, seed=0, size=0.02):
    sizes = [each * size for each in (1.0, 0.83, 0.7)[:experts]]  # no singular value twice, also side by side
    return falling.material(shape, sizes, seed)


def svc(merged, taus, floor=0.0):
    """The paper's formula, direction by direction."""
    floor = floor or 1 / len(taus)
    u, s, v = np.linalg.svd(merged, full_matrices=False)
    factors = []
    for r in range(len(s)):
        mine = u[:, r] @ merged
        its = [u[:, r] @ t for t in taus]
        shares = [mine @ a / (a @ a) if a.any() else 0.0 for a in its]
        factors.append(len(taus) / sum(max(floor, share) for share in shares))
    return (u * s * factors) @ v


def moved(instance, base, experts, **more):
    """What the package adds to the base, in fp64, beside fp32's rounding of the sum."""
    out, _ = run(instance, base, experts, **more)
    return out.astype(np.float64) - base


def close(found, wanted, base, tolerance=1e-5):
    """`tolerance` of the merged task vector's norm, and the rounding of two sums with the base."""
    limit = tolerance * np.linalg.norm(wanted) + 2e-7 * np.linalg.norm(base)
    assert np.linalg.norm(found - wanted) <= limit, (np.linalg.norm(found - wanted), limit)


# --- the formula ---


def tsvm(taus):
    kept = max(1, min(taus[0].shape) // len(taus))
    parts = [np.linalg.svd(t, full_matrices=False) for t in taus]
    left, right = (np.linalg.svd(np.hstack(side), full_matrices=False) for side in (
        [u[:, :kept] for u, _, _ in parts], [v[:kept].T for _, _, v in parts]))  # fmt: skip
    values = np.concatenate([s[:kept] for _, s, _ in parts])
    return left[0] @ left[2] * values @ (right[0] @ right[2]).T


def cart(taus, rho):
    mean, rank = sum(taus) / len(taus), max(1, int(rho * min(taus[0].shape)))
    parts = [np.linalg.svd(t - mean, full_matrices=False) for t in taus]
    return mean + sum((u[:, :rank] * s[:rank]) @ v[:rank] for u, s, v in parts)


def family(mask, **options):
    """The task vector of a method that keeps some elements."""

    def merged(taus):
        return oracles.vectors(0 * taus[0], taus, WEIGHT, [mask(t, i) for i, t in enumerate(taus)], **options)

    return merged


def dare(tau, which):
    return oracles.dropped(tau.shape, DENSITY[which], 0, zlib.crc32(b"tensor"), which)


ORACLES = {
    "task_arithmetic": ({"weight": WEIGHT, "lambda": 2.0}, family(lambda t, _: np.ones_like(t), lambda_=2.0)),
    "linear": ({"weight": WEIGHT}, lambda taus: oracles.linear(None, taus, WEIGHT)),
    "ties": (
        {"weight": WEIGHT, "density": DENSITY},
        family(lambda t, i: oracles.largest(t, DENSITY[i]), normalize=True, elect=True),
    ),
    "dare_ties": ({"weight": WEIGHT, "density": DENSITY}, family(dare, rescale=True, elect=True)),
    "cart": ({"rho": 0.3, "scale": 0.8}, lambda taus: 0.8 * cart(taus, 0.3)),
    "tsvm": ({"scale": 1.5}, lambda taus: 1.5 * tsvm(taus)),
}


@pytest.mark.parametrize(("instance", "base", "experts", "wanted"), EXAMPLES)
def test_worked_example(instance, base, experts, wanted):
    out, _ = run(instance, np.float32(base), [np.float32(e) for e in experts])
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("floor", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("name", ORACLES)
def test_formula(name, floor, shape):
    values, merged = ORACLES[name]
    base, experts = material(shape)
    taus = [(e - base).astype(np.float64) for e in experts]
    wanted = svc(merged(taus), taus, floor or (1.0 if name == "tsvm" else 0.0))
    assert floor == 1 or np.linalg.norm(wanted - merged(taus)) > 0.01 * np.linalg.norm(wanted)
    close(moved(after(name, floor, **values), base, experts), wanted, base)


@pytest.mark.parametrize("name", sorted({*NAMES} - {"iso_c", "iso_cts"}))
def test_after_every_method(name):
    """The merge of the method by itself, calibrated; not where all singular values are equal: it has any directions."""
    inner = given(name)
    base, experts = material((24, 40), min(2, inner.max_experts or 2), size=0.2)
    alone, _ = run(inner, base if inner.takes_base() else None, experts)
    wanted = svc(alone.astype(np.float64) - base, [(e - base).astype(np.float64) for e in experts], name == "tsvm")
    close(moved(Svc(inner), base, experts), wanted, base)


def test_task_vectors_count_without_weights():
    base, experts = material((24, 40))
    heavy = moved(after("task_arithmetic", 1e-6, weight=(2.0, 2.0, 2.0)), base, experts)
    plain = moved(after("task_arithmetic", 1e-6, weight=(1.0, 1.0, 1.0)), base, experts)
    close(heavy, plain, base, 1e-4)  # twice the merge is twice there: half of it is kept
    one = moved(after("task_arithmetic", weight=(1.0,)), base, experts[:1])
    close(one, experts[0].astype(np.float64) - base, base)


@pytest.mark.parametrize("cap", [0.3, 1.0, 100.0])
def test_norm_guard(cap):
    base, experts = material((24, 40))
    free = moved(after("task_arithmetic", weight=1.0), base, experts)
    limit = cap * max(np.linalg.norm(e - base) for e in experts)
    wanted = free * min(1, limit / np.linalg.norm(free))
    close(moved(after("task_arithmetic", norm_guard=cap, weight=1.0), base, experts), wanted, base)


def test_figures(monkeypatch):
    base, experts = material((24, 40))
    seen, merge = [], Svc.merge
    monkeypatch.setattr(Svc, "merge", lambda self, tile, survey: seen.append(survey) or merge(self, tile, survey))
    found = moved(after("cart"), base, experts)
    figures = seen[0].figures
    assert figures["displacement"] == pytest.approx(np.linalg.norm(found), rel=1e-5)
    assert figures["uncalibrated"] == pytest.approx(
        np.linalg.norm(cart([(e - base).astype(np.float64) for e in experts], 0.08)), rel=1e-5
    )
    assert figures["norm_2"] == pytest.approx(np.linalg.norm(experts[1] - base))


# --- bits ---


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("name", [*NAMES, "ties rescaled"])
def test_tile_size_and_threads_never_change_a_bit(name, dtype):
    """Of bf16 models many task vectors' elements tie in magnitude: ranks travel from tile to tile."""
    inner = given("ties", rescale=True, density=(0.5, 0.1)) if name == "ties rescaled" else given(name)
    base, experts = tied(name.split()[0], (160, 513), dtype)
    base = experts[-1] if base is None else base
    whole, _ = run(Svc(inner), base, experts)
    assert not np.array_equal(whole, base) or name == "passthrough"
    for tile, threads, streamed in ((1, 1, False), (8192, 1, True), (20000, 2, False), (65536, 2, True)):
        cut, _ = run(Svc(inner), base, experts, tile=tile, threads=threads, streamed=streamed)
        assert np.array_equal(whole, cut), (tile, threads, streamed)


def test_a_sample_that_misleads_costs_rounds_and_no_bit():
    base, experts = material((60, 90))
    order = np.argsort(np.abs(experts[0] - base), axis=None)  # what is sampled is small
    base, *experts = (x.reshape(-1)[order].reshape(x.shape) for x in (base, *experts))
    instance = after("ties", weight=(1.0, 1.0, 1.0), density=(0.02, 0.5, 0.02))
    whole, _ = run(instance, base, experts)
    cut, _ = run(instance, base, experts, tile=4096, streamed=True)
    assert np.array_equal(whole, cut)


@dataclass(frozen=True)
class Slow(TaskArithmetic):
    """Task arithmetic after a survey of the first two experts, one after the other, that takes so many rounds."""

    takes: int = 2

    def rounds(self, experts):
        return 2

    def reads(self, number, experts):
        return (0, number + 1) if number < 2 else None

    def survey(self, shape, experts):
        return Counting(self.takes)


class Counting(Survey):
    def __init__(self, takes):
        self.left, self.settled = takes, False

    def look(self, tile):
        assert tile.base is not None
        assert len(tile.experts) == 1
        return tile.experts[0].address

    def settle(self, partials):
        self.left -= 1
        return self.left == 0


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("takes", [1, 2, 3, 5])
def test_rounds_more_or_fewer_than_planned(takes, streamed):
    base, experts = material((60, 90))
    wanted, _ = run(after("task_arithmetic", weight=WEIGHT), base, experts)
    out, _ = run(Svc(Slow(weight=WEIGHT, takes=takes)), base, experts, tile=4096, streamed=streamed)
    assert np.array_equal(out, wanted)


def test_rounds_and_reads_are_those_of_the_method_and_one_more():
    def seen(instance, experts=3):
        made = instance.for_tensor("w", (30, 40), experts)
        return [made.reads(i, experts) for i in range(made.rounds(experts) + 1)]

    assert seen(after("task_arithmetic", weight=1.0)) == [None, (0,)]
    assert seen(after("ties", weight=1.0, density=1.0)) == [None, (0,)]
    assert seen(after("ties", weight=1.0, density=0.3, rescale=True)) == [None, None, None, (0,)]
    assert seen(after("cart")) == [(0, 1), (0, 2), (0, 3), None, (0,)]


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_equal_come_out_to_the_bit(name):
    inner = given(name)
    _, experts = tied(name, (7, 1000), "f32")
    base = experts[0]
    base.reshape(-1)[:3] = [-0.0, 0.0, 1e-40]
    out, merger = run(Svc(inner), base, [base.copy() for _ in experts])
    assert np.array_equal(out.view(np.uint8), base.view(np.uint8))
    assert not merger.equal  # they are not compared: the merge sees the base alone


@pytest.mark.parametrize("kind", falling.DEFICIENT)
@pytest.mark.parametrize("name", ["task_arithmetic", "ties", "cart", "linear"])
def test_deficient_experts_give_finite_merges(name, kind):
    base, experts = material((20, 33))
    near = falling.deficient(kind, base, experts)
    known = method.parameters(method.find(name))
    values = {key: value for key, value in {"weight": 1.0, "density": 0.5}.items() if key in known}
    falling.check_small(kind, moved(after(name, **values), base, near), base, near)


# --- what is refused ---


@pytest.mark.parametrize("wrong", [np.nan, -np.inf])
@pytest.mark.parametrize("name", ["linear", "task_arithmetic", "ties", "cart"])
def test_nan_is_refused(name, wrong):
    for who, said in ((2, "expert 2"), (0, "the base")):
        base, experts = material((70, 100), 2)
        ([base, *experts][who])[3, 5] = wrong
        with pytest.raises(CheckpointError, match=f"{said} holds a NaN"):
            run(Svc(make(name)), base, experts, tile=4096)


def test_a_merge_that_overflows_is_refused():
    base, experts = material((30, 40))
    with pytest.raises(CheckpointError, match="'tensor': the merge overflows fp32"):
        run(after("task_arithmetic", weight=1.0, **{"lambda": 1e38}), base, [1e3 * e for e in experts])


# --- memory ---


def peak_of(rows, columns):
    """Memory that one matrix takes at its peak after ties, beside the result, and what is declared, in bytes."""
    before = f"""
        from streammerge.methods.post.svc import Svc
        from streammerge.methods.ties import Ties

        method, shape = Svc(Ties(weight=1.0, density=0.3)), ({rows}, {columns})
        base, *experts = (np.random.default_rng(i).normal(size=shape).astype(np.float32) for i in range(4))
        run(method, base[:64], [each[:64] for each in experts])
    """
    declared = 'method.for_tensor("w", shape, 3).survey_bytes(shape, 3, 1)'
    peak, declared = held_by(before, "run(method, base, experts)", declared)
    return peak - 4 * rows * columns, declared


@pytest.mark.parametrize("shape", [(1024, 1536), (1536, 400)])
def test_peak_is_what_is_declared(shape):
    peak, declared = peak_of(*shape)
    assert peak <= declared
    assert declared - LIBRARY <= 1.5 * peak
