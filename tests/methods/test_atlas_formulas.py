"""Learned coefficients, tensor by tensor: what is composed, its gradients, groups, and what a recipe may say."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
from merging import NUMPY, bf16, run, span, widen

from streammerge import kernel
from streammerge.engine.findings import Findings
from streammerge.engine.tiles import Crew, Merger, settle_in_memory
from streammerge.errors import RecipeError
from streammerge.kernels.host.multi_dot import host as multi_dot
from streammerge.kernels.numerics import Partition
from streammerge.method import Tile
from streammerge.methods._composed import Composed
from streammerge.methods.atlas import Atlas

ORIGIN = zlib.crc32(b"w")


def composed(rows, seed=0, origin=ORIGIN):
    return Composed(tuple(map(tuple, rows)), origin, seed)


def vectors(count, numel, size=0.01, seed=0):
    """A base and experts in bf16, task vectors of `size` of the weights."""
    random = np.random.default_rng(seed)
    base = bf16(random.normal(0, 0.02, numel))
    weights = widen(base)
    return base, [bf16(weights * (1 + size * random.normal(0, 1, numel))) for _ in range(count)]


def dots(method, gradient, base, experts):
    """dL/dc, [experts, groups]."""
    survey = method.dots(gradient.shape)
    tile = Tile(
        "w", ORIGIN, gradient.shape, 0, gradient.size, span(base, 0, base.size),
        (span(gradient, 0, gradient.size), *(span(each, 0, each.size) for each in experts)),
    )  # fmt: skip
    assert survey.settle([survey.look(tile)])
    return survey.sums


@pytest.mark.parametrize("groups", [1, 4])
def test_zero_is_the_base_and_one_is_the_expert(groups):
    base, experts = vectors(3, 100_000)
    zero, _ = run(composed(np.zeros((3, groups))), base, experts)
    assert (zero == base).all()
    for number, expert in enumerate(experts):
        unit = np.zeros((3, groups))
        unit[number] = 1
        out, _ = run(composed(unit), base, experts)
        assert (out == expert).all()


def test_the_sum_is_that_of_the_formula():
    base, experts = vectors(3, 5000, 0.3)
    rows = [[0.5], [-0.25], [1.5]]
    out, _ = run(composed(rows), base, experts, dtype="F32")
    wanted = widen(base) + sum(row[0] * (widen(each) - widen(base)) for row, each in zip(rows, experts, strict=True))
    np.testing.assert_allclose(out, wanted, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("groups", [1, 3, 40])
def test_tiles_and_threads_never_change_a_bit(groups):
    base, experts = vectors(2, 700_001)
    rows = np.random.default_rng(1).normal(0, 1, (2, groups))
    whole, _ = run(composed(rows), base, experts)
    for tile, threads in ((4096, 1), (100_000, 2), (0, 3)):
        assert (run(composed(rows), base, experts, tile=tile, threads=threads)[0] == whole).all()


def test_groups_with_equal_coefficients_are_one_coefficient():
    base, experts = vectors(2, 50_000)
    one, _ = run(composed([[0.3], [-0.7]]), base, experts)
    many, _ = run(composed([[0.3] * 5, [-0.7] * 5]), base, experts)
    assert (one == many).all()


# --- gradients ---


@pytest.mark.parametrize("groups", [1, 2, 7, 40])
def test_gradients_of_groups_add_up(groups):
    base, experts = vectors(3, 300_001)
    gradient = np.float32(np.random.default_rng(2).normal(0, 1e-3, base.size))
    one = dots(composed(np.zeros((3, 1))), gradient, base, experts)
    many = dots(composed(np.zeros((3, groups))), gradient, base, experts)
    assert many.shape == (3, groups)
    scale = np.abs(gradient).astype(np.float64) @ np.abs(widen(experts[0]) - widen(base))
    assert np.abs(many.sum(1) - one[:, 0]).max() <= 1e-15 * scale


def test_duplicates_permutations_and_nothing():
    base, experts = vectors(3, 20_000)
    gradient = np.float32(np.random.default_rng(3).normal(0, 1, base.size))
    none = composed(np.zeros((4, 1)))
    found = dots(none, gradient, base, [experts[0], experts[1], experts[0], base])[:, 0]
    assert found[0] == found[2] != found[1]
    assert found[3] == 0
    turned = dots(none, gradient, base, [experts[1], base, experts[0], experts[0]])[:, 0]
    assert turned.tolist() == [found[1], found[3], found[0], found[2]]


def test_a_longer_task_vector_with_a_smaller_coefficient():
    """tau * 4 with c / 4 composes the same weights, and its gradient is 4 times as large; powers of two are exact."""
    random = np.random.default_rng(4)
    base = np.zeros(9000, np.float32)
    delta = np.float32(random.normal(0, 1, base.size))
    gradient = np.float32(random.normal(0, 1, base.size))
    one, four = dots(composed([[0.0]]), gradient, base, [delta]), dots(composed([[0.0]]), gradient, base, [4 * delta])
    assert four[0, 0] == 4 * one[0, 0]
    assert (run(composed([[0.5]]), base, [delta])[0] == run(composed([[0.125]]), base, [4 * delta])[0]).all()


def test_products_are_those_of_fp64():
    base, experts = vectors(2, 1 << 20, 0.001)
    gradient = np.float32(np.random.default_rng(5).normal(0, 1e-9, base.size))  # half floats lose all of it
    found = dots(composed(np.zeros((2, 1))), gradient, base, experts)[:, 0]
    for value, expert in zip(found, experts, strict=True):
        delta = widen(expert) - widen(base)
        wanted = float(gradient.astype(np.float64) @ delta)
        assert abs(value - wanted) <= 1e-6 * abs(wanted) + 1e-15 * float(np.abs(gradient) @ np.abs(delta))


def test_the_difference_is_taken_before_the_product():
    """<g, expert> - <g, base> in fp32 would miss the same sum by thousands of times more."""
    base, experts = vectors(1, 1 << 18, 0.001)
    gradient = np.float32(np.random.default_rng(6).normal(1, 1, base.size))
    found = dots(composed([[0.0]]), gradient, base, experts)[0, 0]
    wanted = float(gradient.astype(np.float64) @ (widen(experts[0]) - widen(base)))
    apart = float(gradient @ np.float32(widen(experts[0]))) - float(gradient @ np.float32(widen(base)))
    assert abs(found - wanted) < 1e-9 * abs(wanted)
    assert abs(apart - wanted) > 1e-6 * abs(wanted)


@pytest.mark.parametrize("groups", [1, 5])
def test_gradients_are_the_same_whatever_the_threads(groups):
    base, experts = vectors(2, 900_001)
    gradient = np.float32(np.random.default_rng(7).normal(0, 1, base.size))
    method = composed(np.zeros((2, groups)))
    wanted = dots(method, gradient, base, experts)
    everything = (span(gradient, 0, base.size), *(span(each, 0, each.size) for each in experts))
    for threads in (1, 2, 5):
        crew, survey = Crew(threads), method.dots(base.shape)
        settle_in_memory(
            crew, method, survey, [Tile("w", ORIGIN, base.shape, 0, base.size, span(base, 0, base.size), everything)]
        )
        crew.close()
        assert (survey.sums == wanted).all()


# --- groups ---


@pytest.mark.parametrize("groups", [5, 8, 1200])
def test_groups_are_of_one_size_within_five_sigma(groups):
    found = group_numbers(1 << 20, groups, 0, ORIGIN)
    share = found.size / groups
    counts = np.bincount(found, minlength=groups)
    assert np.abs(counts - share).max() < 5 * np.sqrt(share * (1 - 1 / groups))


def test_groups_of_different_tensors_and_seeds_have_nothing_in_common():
    groups, size = 8, 1 << 18
    first = group_numbers(size + 64, groups, 0, ORIGIN)
    for seed, origin in ((0, ORIGIN + 1), (1, ORIGIN), (0, zlib.crc32(b"v"))):
        other = group_numbers(size + 64, groups, seed, origin)
        for shift in (-3, -1, 0, 1, 2, 64):
            same = (
                np.mean(first[3 : 3 + size - 64] == other[3 + shift : 3 + shift + size - 64])
                if shift
                else np.mean(first == other)
            )
            assert abs(same - 1 / groups) < 5 * np.sqrt(1 / groups / size) * 1.1, (seed, origin, shift)


def test_groups_are_those_of_torch_and_of_the_other_kernel():
    torch = pytest.importorskip("torch")
    reference = kernel.find("multi_dot").truth
    wanted = reference.partition(7, 5000, 6, Partition(3, ORIGIN), torch.device("cpu")).numpy()
    assert (group_numbers(5007, 6, 3, ORIGIN)[7:] == wanted).all()
    base, ones = np.zeros(5000, np.float32), np.ones(5000, np.float32)
    partials = np.empty((2, 1, 6))
    multi_dot(span(ones, 0, 5000), span(base, 0, 5000), [span(ones, 0, 5000)], 4096, partials, 0, Partition(3, ORIGIN))
    assert (partials.sum((0, 1)) == np.bincount(group_numbers(5000, 6, 3, ORIGIN), minlength=6)).all()


def group_numbers(numel, groups, seed, origin):
    """The group of each element, read off the merge: coefficient q in group q."""
    base, expert = np.zeros(numel, np.float32), np.ones(numel, np.float32)
    out, _ = run(composed([np.arange(2, groups + 2)], seed, origin), base, [expert])
    return out.astype(np.int64) - 2


# --- the dead zone of 16 bits ---


def test_sixteen_bits_lose_small_steps_and_pairs_do_not():
    """The slope of what is stored on what was meant, task vectors of 0.3 %, c = 0.1: fp32 and pairs keep all of it."""
    from streammerge.kernels.host.add_deltas import host as add_deltas
    from streammerge.methods._composed import NO_AXIS

    base, experts = vectors(1, 1 << 20, 0.003)
    meant = 0.1 * (widen(experts[0]) - widen(base))

    def slope(stored):
        return float((stored - widen(base)) @ meant / (meant @ meant))

    assert abs(slope(widen(run(composed([[0.1]]), base, experts, dtype="F32")[0])) - 1) < 1e-3
    assert slope(widen(run(composed([[0.1]]), base, experts)[0])) < 0.5
    high, low = np.empty_like(base), np.empty_like(base)
    spans = [span(each, 0, base.size) for each in (high, base, experts[0], low)]
    add_deltas(spans[0], spans[1], [spans[2]], np.array([[1, 0.1]], np.float32), 0, NO_AXIS, None, None, spans[3])
    assert abs(slope(widen(high) + widen(low)) - 1) < 0.01


def left(base, experts, rows, dtype=None, tile=0, threads=1):
    """Slope and noise as a report has them, and the merged array."""
    method, out = replace(composed(rows), watched=True), np.empty(base.size, NUMPY[dtype] if dtype else base.dtype)
    crew, survey = Crew(threads), method.tally((base.size,))
    merger, size = Merger(crew, method, survey), tile or base.size
    for lo in range(0, base.size, size):
        hi = min(lo + size, base.size)
        spans = tuple(span(each, lo, hi) for each in experts)
        merger.merge(Tile("w", ORIGIN, base.shape, lo, hi - lo, span(base, lo, hi), spans, span(out, lo, hi)))
    crew.close()
    findings = Findings(learned={"models": ["a"]})
    if survey.figures:
        findings.take({"figures": ["w", dict(survey.figures)], "section": survey.section})
    return findings.learning()["atlas"].get("rounding"), out, findings.warnings()


TABLE = [  # size of the task vector beside the weights, coefficient, dtype of the output, slope, noise
    (0.001, 0.1, None, 0.090, 0.97),
    (0.001, 0.7, None, 1.292, 0.38),
    (0.003, 0.1, None, 0.164, 0.95),
    (0.01, 0.3, None, 0.979, 0.47),
    (0.03, 0.1, None, 0.927, 0.49),
    (0.03, 0.7, None, 0.997, 0.08),
    (0.003, 0.1, "F16", 1.172, 0.22),
]


@pytest.mark.parametrize(("size", "coefficient", "dtype", "slope", "noise"), TABLE)
def test_what_rounding_leaves_is_told(size, coefficient, dtype, slope, noise):
    """The dead zone as an independent computation has it; a warning where a tenth of the steps is lost or added."""
    random = np.random.default_rng(0)
    base = bf16(random.normal(0, 0.02, 1 << 20))
    expert = bf16(widen(base) + size * random.normal(0, 0.02, base.size))
    found, _, warnings = left(base, [expert], [[coefficient]], dtype)
    assert found["slope"] == pytest.approx(slope, abs=0.01)
    assert found["noise"] == pytest.approx(noise, abs=0.01)
    assert found["tensors"] == {"w": {"slope": found["slope"], "noise": found["noise"]}}
    told = f"{found['slope']:.0%} are left in the output"
    assert [told in warning for warning in warnings] == ([True] if abs(slope - 1) > 0.1 else [])


@pytest.mark.parametrize("groups", [1, 3])
def test_what_rounding_leaves_is_that_of_all_elements(groups):
    """Of a small tensor all are looked at, of a large one some; never does a tile, a thread or the looking show."""
    base, experts = vectors(2, 700_001, 0.004)
    rows = np.random.default_rng(1).normal(0.2, 0.05, (2, groups))
    found, out, _ = left(base, experts, rows)
    assert (out == run(composed(rows), base, experts)[0]).all()
    for tile, threads in ((4096, 1), (100 * 4096, 2), (0, 3)):
        again, other, _ = left(base, experts, rows, tile=tile, threads=threads)
        assert again == found
        assert (other == out).all()
    exact, _ = run(composed(rows), base, experts, dtype="F32")
    moved, meant = widen(out) - widen(base), widen(exact) - widen(base)
    for numel, close in ((50_001, 1e-6), (700_001, 0.03)):  # fp32 of what was meant; a sample
        found, _, _ = left(base[:numel], [each[:numel] for each in experts], rows)
        s, m = moved[:numel], meant[:numel]
        assert found["slope"] == pytest.approx(float(s @ m / (m @ m)), rel=close)
        assert found["noise"] == pytest.approx(float(np.linalg.norm(s - m) / np.linalg.norm(m)), rel=close)


def test_where_nothing_moves_or_is_a_number_nothing_is_told():
    base, experts = vectors(1, 5000)
    assert left(base, experts, [[0.0]])[0] is None
    assert left(base, [base], [[0.5]])[0] is None
    experts[0][17] = 0x7F80
    assert left(base, experts, [[0.5]])[0] is None


# --- what a recipe may say ---


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"objective": "best"}, "objective is 'best'; one of supervised"),
        ({"schedule": "linear"}, "schedule is 'linear'"),
        ({"steps": -1}, "steps is -1; give 0 or more"),
        ({"partitions": 0}, "partitions is 0; give 1 or more"),
        ({"lr": -0.1}, "lr is -0.1; it must not be negative"),
        ({"batch": "some"}, "batch is 'some'; give a number of samples, or all"),
        ({"batch": 0}, "batch is 0"),
    ],
)
def test_values_out_of_range_are_refused(values, said):
    with pytest.raises(RecipeError, match=said):
        Atlas(**values)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "neither data nor coefficients"),
        ({"data": {"train": "a"}, "coefficients": "b"}, "both data and coefficients"),
        ({"data": {}}, "no train"),
        ({"data": "a"}, "must be a mapping of train"),
        ({"data": {"train": "a", "test": "b"}}, "unknown key 'test'"),
        ({"data": {"train": ["a", ""]}}, "train: must be the path of a file"),
        ({"data": {"train": "a", "max_length": 1}}, "max_length: 1"),
        ({"coefficients": 3}, "coefficients: must be the path of a file"),
        ({"coefficients": "a", "compute": "float16"}, "compute is 'float16'"),
    ],
)
def test_keys_are_checked(given, said):
    with pytest.raises(RecipeError, match=f"r.yml: .*{said}"):
        Atlas.read_keys(given, 2, "r.yml")


def test_which_blocks_learn():
    norm, matrix = ("model.norm.weight", (32,)), ("model.layers.0.mlp.up_proj.weight", (48, 32))
    learns = [[Atlas(blocks=blocks).learns(*each) for each in (norm, matrix)] for blocks in ("all", "weights", "*mlp*")]
    assert learns == [[True, True], [False, True], [False, True]]
    assert Atlas(blocks=("*norm*", "*.up_*")).learns(*norm)
