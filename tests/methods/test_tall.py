"""Tall matrices by blocks of rows: the merge of whole matrices, the same bits however it is cut, and less memory."""

import json

import build
import numpy as np
import pytest
import torch
from engine import simulated
from merging import run
from methods.memory import peak_of
from methods.test_tsvm import spectrum, tsvm
from methods.test_wudi import ADAM, authors, experts
from safetensors.numpy import load_file

import streammerge as sm
from streammerge import method as methods
from streammerge.errors import BudgetTooSmall, CheckpointError
from streammerge.methods import _tall
from streammerge.methods._matrices import LIBRARY, MatrixSurvey

MIB = 1 << 20
SHAPES = [(200, 40, 3), (161, 33, 2), (130, 24, 5), (97, 20, 1), (64, 16, 16)]
WAYS = [
    ("tsvm", {}),
    ("iso_c", {}),
    ("wudi", {"iterations": 60}),
    ("wudi", {"solver": "spectral"}),
    ("wudi", {"solver": "spectral", "keep": 0.5}),
    ("wudi", {"solver": "closed_form"}),
    ("wudi", {"solver": "closed_form", "ridge": 0.3}),
]
AGREE = {"tsvm": 3e-5, "iso_c": 3e-5, "wudi": 1e-5}  # of the norm; both ways are as far from fp64 at most
pytestmark = pytest.mark.usefixtures("one_thread")


def make(name, options, count=1):
    weight = {"weight": (1.0,) * count}
    return methods.build(methods.find(name), {**weight, **options})


@pytest.fixture
def tall(monkeypatch):
    """Merges by rows, 32 at a time, what is small enough for tests."""

    def merge(name, options, base, taken, **how):
        with monkeypatch.context() as patch:
            patch.setattr(_tall, "ROWS", 32)
            patch.setattr(_tall, "LARGE", 0)
            out, merger = run(make(name, options, len(taken)), base, taken, **how)
        assert isinstance(merger._survey, _tall.RowsSurvey)
        return out, dict(merger._survey.figures)

    return merge


def whole(name, options, base, taken):
    out, merger = run(make(name, options, len(taken)), base, taken)
    assert isinstance(merger._survey, MatrixSurvey)
    return out, merger._survey.figures


def away(found, wanted):
    return np.linalg.norm(found.astype(np.float64) - wanted) / np.linalg.norm(wanted)


# --- which matrices ---


def test_tall_is_a_matter_of_shape_and_solver():
    def by_rows(name, shape, **options):
        return isinstance(make(name, options).for_tensor("lm_head", shape, 3), _tall.Tall)

    for name in ("tsvm", "wudi", "iso_c"):
        assert by_rows(name, (32000, 4096), embeddings="matrix")
        assert not by_rows(name, (32000, 4096))  # the mean
        assert not by_rows(name, (11008, 4096), embeddings="matrix")  # not four times as long
        assert not by_rows(name, (4096, 32000), embeddings="matrix")
        assert not by_rows(name, (16384, 1024), embeddings="matrix")  # small enough
        assert by_rows(name, (16385, 1024), embeddings="matrix")
    assert not by_rows("tsvm", (32000, 4096), embeddings="matrix", solver="svd")
    assert not by_rows("cart", (32000, 4096), embeddings="matrix")


def test_a_plan_says_what_is_read_and_how_it_is_solved():
    for name, rounds, each in (("tsvm", 4, 3), ("wudi", 3, 3), ("iso_c", 1, 0)):
        method = make(name, {}).for_tensor("w", (32000, 4096), 3)
        assert method.rounds(3) == rounds
        assert [method.reads(i, 3) for i in range(rounds + 1)] == [
            *((0, i + 1) for i in range(each)),
            *[None] * (rounds + 1 - each),
        ]
        assert make(name, {"norm_guard": 1.0}).for_tensor("w", (32000, 4096), 3).rounds(3) == rounds + 1
        assert method.solver_name((32000, 4096), 3).endswith("by rows")
        assert method.fills_cores((32000, 4096))


# --- the same merge ---


@pytest.mark.parametrize(("name", "options"), WAYS)
@pytest.mark.parametrize(("rows", "columns", "count"), SHAPES)
def test_rows_agree_with_whole_matrices(name, options, rows, columns, count, tall):
    taus = experts(rows, columns, count)
    base = np.zeros((rows, columns), np.float32)
    wanted, before = whole(name, options, base, taus)
    found, after = tall(name, options, base, taus)
    assert away(found, wanted) < AGREE[name]
    assert set(before) - set(after) <= {"loss", "loss_before"}  # which would take every pair of experts
    for key, value in after.items():
        assert value == pytest.approx(before[key], rel=1e-4, abs=1e-12), key


def test_authors_arithmetic(tall):
    for rows, columns, count in SHAPES[:3]:
        base = np.zeros((rows, columns), np.float32)
        taus = experts(rows, columns, count, std=1e-4)
        assert away(tall("wudi", {}, base, taus)[0], authors(taus)) < ADAM
        assert away(tall("tsvm", {}, base, taus)[0], tsvm(taus)) < AGREE["tsvm"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("tsvm", {"weight": (1.0, -0.5, 2.0), "scale": 0.7}),
        ("iso_c", {"weight": (1.0, -0.5, 2.0), "scale": -0.7}),
        ("wudi", {"weight": (1.0, -0.5, 2.0), "scale": 0.7, "iterations": 20}),
        ("wudi", {"weight": (1.0, -0.5, 2.0), "balance": "norms", "iterations": 20}),
        *((name, {"norm_guard": cap, "scale": -3.0}) for name in ("tsvm", "iso_c", "wudi") for cap in (0.4, 50.0)),
    ],
)
def test_options(name, options, tall):
    base, taus = np.float32(np.random.default_rng(1).normal(size=(120, 24))), experts(120, 24, 3)
    taken = [base + tau for tau in taus]
    wanted, before = whole(name, options, base, taken)
    found, after = tall(name, options, base, taken)
    assert away(found - base, wanted - base) < 2e-4  # fp32 weights round the difference
    assert after["displacement"] == pytest.approx(before["displacement"], rel=1e-4)
    assert after["displacement"] == pytest.approx(np.linalg.norm(found - base), rel=1e-3)


@pytest.mark.parametrize("name", ["tsvm", "iso_c", "wudi"])
def test_special_task_vectors(name, tall):
    rng = np.random.default_rng(2)
    base = np.zeros((120, 24), np.float32)
    one, other, _ = experts(120, 24, 3)
    zero = np.zeros_like(one)
    low = [np.float32(1e-3 * rng.normal(size=(120, 3)) @ rng.normal(size=(3, 24))) for _ in range(3)]
    for taus in ([one, one], [one, one, other], [zero, one, other], [one, zero], [zero, zero, one], low):
        wanted, found = whole(name, {}, base, taus)[0], tall(name, {}, base, taus)[0]
        assert away(found, wanted) < max(AGREE[name], 3e-5)
    assert not tall(name, {}, base, [zero] * 3)[0].any()
    if name != "iso_c":
        assert np.array_equal(tall(name, {}, base, [one])[0], one)
    if name == "wudi":
        assert np.array_equal(tall(name, {}, base, [zero, one, zero])[0], one)


@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("drop", [1e-3, 1e-5])
def test_wide_spectra(count, drop, tall):
    """Down to what an expert's fp32 entries still say."""
    rng = np.random.default_rng(3)
    values = np.geomspace(1, drop ** (count * 23 / 24), 24)
    taus = [spectrum(rng, 130, 24, values) for _ in range(count)]
    assert away(tall("tsvm", {}, np.zeros((130, 24), np.float32), taus)[0], tsvm(taus)) < AGREE["tsvm"]
    total = np.linalg.svd(sum(tau.astype(np.float64) for tau in taus), full_matrices=False)
    found = tall("iso_c", {}, np.zeros((130, 24), np.float32), taus)[0]
    assert away(found, total[1].mean() * total[0] @ total[2]) < AGREE["iso_c"]


# --- the same bits ---


@pytest.mark.parametrize(("name", "options"), [*WAYS, ("wudi", {"norm_guard": 0.1, "iterations": 5})])
def test_neither_tiles_nor_threads_change_a_bit(name, options, tall):
    rng = np.random.default_rng(4)
    base = np.float32(rng.normal(size=(960, 230)))
    taken = [base + tau for tau in experts(960, 230, 3)]
    wanted = tall(name, options, base, taken)
    before = torch.get_num_threads()
    try:
        for tile, threads, streamed in ((1, 1, True), (20_000, 2, False), (40_000, 3, True)):
            torch.set_num_threads(threads)
            found = tall(name, options, base, taken, tile=tile, threads=threads, streamed=streamed)
            assert np.array_equal(found[0], wanted[0])
            assert found[1] == wanted[1]
    finally:
        torch.set_num_threads(before)


def test_rows_that_did_not_change_keep_their_bits(tall):
    base = np.float32(np.random.default_rng(5).normal(size=(160, 20)))
    base[70, :3] = -0.0
    taken = [base + tau for tau in experts(160, 20, 3)]
    for expert in taken:
        expert[40:80] = base[40:80]
    for name, options in WAYS:
        found, _ = tall(name, options, base, taken, tile=700)
        assert np.array_equal(found[40:80].view(np.uint32), base[40:80].view(np.uint32))
        assert not np.array_equal(found[:40], base[:40])


# --- in a run ---


@pytest.mark.parametrize("name", ["tsvm", "iso_c", "wudi"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(name, value, tall):
    base, taken = np.zeros((120, 24), np.float32), experts(120, 24, 3)
    taken[1][77, 3] = value
    for tile in (0, 800):
        with pytest.raises(CheckpointError, match=r"expert 2 holds a NaN or an infinity"):
            tall(name, {}, base, taken, tile=tile)
    base[0, 0] = value
    with pytest.raises(CheckpointError, match="the base holds a NaN"):
        tall(name, {}, base, taken[:1])


@pytest.fixture
def tiny(tmp_path):
    """A head of 300 tokens, an embedding that is a matrix as any other, a norm; base and three experts."""
    rng = np.random.default_rng(6)
    shapes = {"model.embed_tokens.weight": (50, 24), "model.norm.weight": (24,), "lm_head.weight": (300, 24)}
    tensors = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for model in ("base", "a", "b", "c"):
        moved = {
            name: np.float32(w + (model != "base") * 0.1 * rng.normal(size=w.shape)) for name, w in tensors.items()
        }
        build.checkpoint(tmp_path / model, {"model.safetensors": moved})
    return tmp_path


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("name", ["tsvm", "iso_c", "wudi"])
def test_a_merge_from_files(name, device, tiny, monkeypatch):
    models, base = [tiny / model for model in "abc"], tiny / "base"
    recipe = build.recipe(tiny / "r.json", name, models, base, embeddings="matrix", norm_guard=0.9)
    sm.merge(recipe, tiny / "whole")
    monkeypatch.setattr(_tall, "ROWS", 32)
    monkeypatch.setattr(_tall, "LARGE", 4000)
    if device == "cuda":
        if torch.cuda.is_available():
            pytest.skip("simulated only: a GPU that is there has tests of its own")
        simulated.install(monkeypatch)
    plan = sm.plan(recipe, device=device)
    way = {"tsvm": "tsvm gram", "iso_c": "iso_c", "wudi": "wudi adam"}[name]
    assert plan.solvers == {way: 1, f"{way} by rows": 1}
    report = sm.merge(recipe, tiny / "out", device=device)
    assert set(report["matrices"]) == {"lm_head.weight", "model.embed_tokens.weight"}
    found, wanted = (load_file(tiny / out / "model.safetensors") for out in ("out", "whole"))
    origin = load_file(base / "model.safetensors")
    for tensor, weights in found.items():
        assert away(weights - origin[tensor], wanted[tensor] - origin[tensor]) < 1e-4
    moved = np.linalg.norm(found["lm_head.weight"] - origin["lm_head.weight"])
    assert report["matrices"]["lm_head.weight"]["displacement"] == pytest.approx(moved, rel=1e-5)


def test_a_tall_matrix_has_all_cores(tiny, monkeypatch):
    """Where one is tall, none are solved side by side: in a lane it would have one core."""
    models = [tiny / model for model in "abc"]
    recipe = build.recipe(tiny / "r.json", "tsvm", models, tiny / "base", embeddings="matrix")
    assert sm.plan(recipe, threads=4).at_once == 2
    monkeypatch.setattr(_tall, "LARGE", 4000)
    assert sm.plan(recipe, threads=4).at_once == 1


@pytest.mark.parametrize(
    ("name", "options", "count"),
    [
        ("tsvm", {}, 3),
        ("iso_c", {}, 3),
        ("wudi", {"iterations": 2}, 3),
        pytest.param("tsvm", {}, 2, marks=pytest.mark.slow),
        pytest.param("wudi", {"solver": "spectral"}, 3, marks=pytest.mark.slow),
        pytest.param("wudi", {"solver": "spectral", "keep": 0.5}, 3, marks=pytest.mark.slow),
        pytest.param("wudi", {"solver": "closed_form"}, 3, marks=pytest.mark.slow),
        pytest.param("wudi", {"solver": "closed_form", "ridge": 1.0}, 3, marks=pytest.mark.slow),
    ],
)
def test_peak_is_what_is_declared(name, options, count):
    peak, declared = peak_of(name, options, (2048, 1536), count, by_rows=True)
    assert peak <= declared
    assert declared - LIBRARY <= 2 * peak


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Recipes on a head of 65536 x 512 in base and three experts, 64 MiB each; in fp32 it has 128."""
    folder, rng = tmp_path_factory.mktemp("large"), np.random.default_rng(7)
    block = rng.normal(size=(4, 4096, 512)).astype(np.float32) * 1e-2
    for model, bits in zip(("base", "a", "b", "c"), (block.view(np.uint32) >> 16).astype("<u2"), strict=True):
        head = build.Tensor("BF16", (65536, 512), np.tile(bits, (16, 1)).tobytes())
        build.checkpoint(folder / model, {"model.safetensors": {"lm_head.weight": head}})
    models = [folder / model for model in "abc"]
    return {
        name: build.recipe(folder / f"{name}.json", name, models, folder / "base", embeddings="matrix", **options)
        for name, options in {"tsvm": {}, "wudi": {"iterations": 2}}.items()
    }


@pytest.mark.parametrize("name", ["tsvm", pytest.param("wudi", marks=pytest.mark.slow)])
def test_no_task_vector_is_in_memory(name, large, tmp_path, monkeypatch):
    def least():
        with pytest.raises(BudgetTooSmall) as refused:
            sm.plan(large[name], ram="1MiB")
        return refused.value.least

    by_rows = least()
    monkeypatch.setattr(_tall, "LARGE", 1 << 40)
    assert by_rows < least() - 200 * MIB
    child = build.command("plan", large[name], "--ram", "1MiB", "--json")
    allowed = json.loads(child.stdout)["error"]["least_bytes"]  # of a process of its own
    child = build.command("merge", large[name], tmp_path / "out", "--ram", str(allowed), "--json")
    assert child.returncode == 0, child.stderr
    report = json.loads(child.stdout)
    predicted = report["predicted"]["ram_peak_bytes"]
    assert report["ram_peak_bytes"] <= predicted <= allowed
    assert predicted <= report["ram_peak_bytes"] + LIBRARY + 48 * MIB, "the promise is too careful to be of use"
