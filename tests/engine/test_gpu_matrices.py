"""Matrix methods on a simulated device, or on a GPU if there is one: the CPU's merges within what libraries round."""

from __future__ import annotations

import contextlib
from dataclasses import replace

import build
import numpy as np
import pytest
import torch
from engine.simulated import REAL
from safetensors.numpy import load_file

import streammerge as sm
from streammerge import kernel
from streammerge.errors import BudgetTooSmall, CheckpointError, MachineError, OutputExists, RecipeError
from streammerge.kernels.queue import Queue
from streammerge.method import find
from streammerge.methods import _matrices as matrices
from streammerge.methods._precision import exact_products, span
from streammerge.planner import cutting
from streammerge.planner import device as placing
from streammerge.planner import plan as planning

NAMES = ("layer.0.weight", "layer.1.weight")
METHODS = {
    "tsvm": {},
    "tsvm svd": {"solver": "svd"},
    "wudi": {"iterations": 20},
    "wudi spectral": {"solver": "spectral"},
    "wudi eigen": {"solver": "spectral", "keep": 0.7},
    "wudi closed": {"solver": "closed_form", "ridge": 0.1},
    "iso_c": {"scale": 1.2},
    "iso_cts": {},
    "cart": {},
    "knots": {},
    "pcb": {},
}
# Of the merged task vector's norm. Both sides are within these of fp64 (test_tsvm.py, test_wudi.py) and round apart.
BOUND = 3e-5
PRECISIONS = {"tf32x3": 2e-5, "bf16x3": 3e-4}  # of Newton-Schulz: 6 steps, each 1.2e-6 and 5e-5 at most, may add up
pytestmark = pytest.mark.usefixtures("fresh_process")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Base and three experts: two matrices, one of them in fp16, a norm and an embedding."""
    folder = tmp_path_factory.mktemp("models")
    dice = np.random.default_rng(5)
    base = {
        NAMES[0]: dice.normal(0, 0.02, (90, 150)).astype(np.float32),
        "norm": dice.normal(1, 0.1, 90).astype(np.float32),
        NAMES[1]: dice.normal(0, 0.02, (130, 70)).astype(np.float16),
        "model.embed_tokens.weight": dice.normal(0, 0.02, (61, 40)).astype(np.float32),
    }
    made = [build.checkpoint(folder / "base", {"model.safetensors": base})]
    for name in "abc":
        near = {key: (w + dice.normal(0, 1e-3, w.shape)).astype(w.dtype) for key, w in base.items()}
        made.append(build.checkpoint(folder / name, {"model.safetensors": near}))
    return made


def written(folder, models, method, **more):
    name = method.split()[0]
    return build.recipe(folder / "r.yml", name, models[1:], models[0], **(METHODS[method] | more))


def read(folder):
    return load_file(folder / "model.safetensors")


def same_bits(one, other):
    return all(np.array_equal(one[name].view(np.uint8), other[name].view(np.uint8)) for name in one)


def agree(found, wanted, base, bound):
    """Matrices within a bound, in units of the merged task vector; in fp16 few round otherwise; else to the bit."""
    for name, value in found.items():
        other = wanted[name]
        if name not in NAMES:
            assert np.array_equal(value.view(np.uint8), other.view(np.uint8)), name
        elif value.dtype == np.float16:
            assert np.all(np.abs(value - other) <= np.spacing(np.abs(other))), name
            assert np.mean(value != other) <= 100 * bound, name
        else:
            moved = np.linalg.norm(other.astype(np.float64) - base[name])
            assert np.linalg.norm(value.astype(np.float64) - other) <= bound * moved, name
            assert moved > 0


@pytest.mark.parametrize("method", METHODS)
def test_the_merge_of_the_cpu_at_any_step_and_budget(tmp_path, monkeypatch, gpu, models, method):
    recipe = written(tmp_path, models, method)
    expected = sm.merge(recipe, tmp_path / "cpu", ram="1GiB", device="cpu")
    gpu(3)
    found = {}
    for tile in (1 << 18, 1 << 14, 1 << 12):
        monkeypatch.setattr(cutting, "TILE", tile)
        plan = sm.plan(recipe, ram="4GiB", vram="3GiB", device="cuda")
        if tile == 1 << 12:  # too few places for a matrix's tiles: it is read again for every round
            least = replace(plan.device_layout, slots=placing.SLOTS).peak_bytes
            plan = sm.plan(recipe, ram="4GiB", vram=least, device="cuda")
        assert plan.passes == (1 if tile > 1 << 12 else 1 + find(method.split()[0])().rounds(3))
        report = sm.merge(plan, tmp_path / f"gpu{tile}")
        found[tile] = read(tmp_path / f"gpu{tile}")
        assert report["device"] == "cuda:0"
        assert set(report["kernels"].values()) == {"triton"}
        for name in NAMES:
            assert report["matrices"][name] == pytest.approx(expected["matrices"][name], rel=2e-3, abs=1e-6)
    agree(found[1 << 18], read(tmp_path / "cpu"), load_file(models[0] / "model.safetensors"), BOUND)
    assert same_bits(found[1 << 14], found[1 << 18])
    assert same_bits(found[1 << 12], found[1 << 18])


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """Base and three experts of one small matrix: the interpreter takes its time over products."""
    folder, dice = tmp_path_factory.mktemp("few"), np.random.default_rng(6)
    base = dice.normal(0, 0.02, (40, 60)).astype(np.float32)
    tensors = [base, *(base + dice.normal(0, 1e-3, base.shape).astype(np.float32) for _ in range(3))]
    return [build.checkpoint(folder / f"{i}", {"model.safetensors": {NAMES[0]: x}}) for i, x in enumerate(tensors)]


@pytest.mark.parametrize("method", ["tsvm", "iso_c", "wudi"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_precisions_keep_to_their_bounds(tmp_path, gpu, few, method, precision):
    more = {"iterations": 3} if method == "wudi" else {}
    sm.merge(written(tmp_path, few, method, **more), tmp_path / "cpu", ram="1GiB", device="cpu")
    recipe = written(tmp_path, few, method, precision=precision, **more)
    gpu(4)
    report = sm.merge(recipe, tmp_path / "gpu", ram="4GiB", vram="3GiB", device="cuda")
    assert report["kernels"]["adam_gemm" if method == "wudi" else "polar_step"] == "triton"
    assert next(iter(report["predicted"]["solvers"])).endswith(precision)
    found, wanted, base = read(tmp_path / "gpu"), read(tmp_path / "cpu"), load_file(few[0] / "model.safetensors")
    agree(found, wanted, base, PRECISIONS[precision])
    assert not np.array_equal(found[NAMES[0]], wanted[NAMES[0]]) or REAL, "were the kernels used?"


@pytest.mark.parametrize("tile", [1 << 12, 1 << 18])
def test_nan_is_refused(tmp_path, monkeypatch, gpu, models, tile):
    broken = load_file(models[2] / "model.safetensors")
    broken[NAMES[0]][80, 3] = np.nan
    bad = build.checkpoint(tmp_path / "bad", {"model.safetensors": broken})
    recipe = written(tmp_path, [models[0], models[1], bad], "tsvm")
    gpu(5)
    monkeypatch.setattr(cutting, "TILE", tile)
    with pytest.raises(
        CheckpointError, match=r"'layer.0.weight' of expert 2 holds a NaN or an infinity; such a matrix"
    ):
        sm.merge(recipe, tmp_path / "out", ram="4GiB", vram="3GiB", device="cuda")
    assert not (tmp_path / "out").exists()


def test_a_gpu_too_small_for_the_solver_is_refused_by_what_would_do(tmp_path, gpu, models):
    recipe = written(tmp_path, models, "tsvm")
    gpu()
    with pytest.raises(BudgetTooSmall, match=r"of device memory and 700 MiB are allowed; give --vram") as refused:
        sm.plan(recipe, ram="4GiB", vram="700MiB", device="cuda")
    assert refused.value.least > 700 << 20
    plan = sm.plan(recipe, ram="4GiB", vram=refused.value.least, device="cuda")
    assert plan.device_layout.solver_bytes > 100 << 20
    assert (
        plan.device_layout.arena_bytes + plan.device_layout.solver_bytes < plan.vram_peak_bytes <= refused.value.least
    )
    sm.merge(plan, tmp_path / "out")


def test_the_host_holds_no_solver_of_the_device(tmp_path, gpu, models):
    recipe = written(tmp_path, models, "tsvm")
    here = sm.plan(recipe, ram="4GiB", device="cpu").ram_peak_bytes
    gpu()
    there = sm.plan(recipe, ram="4GiB", vram="3GiB", device="cuda")
    fixed = planning.COMPILER + planning.LIBRARIES + there.device_layout.pinned_bytes + placing.SLOTS * there.cut.step
    bare = there.ram_peak_bytes - fixed - there.ring_bytes - there.out_bytes
    assert bare < here - matrices.LIBRARY, "what a solver holds on the CPU is not counted twice"


@contextlib.contextmanager
def counted():
    """A list that gets, when the block ends, the most bytes that torch held of what it took within it."""
    found = []
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield found
    events = profile.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    found.append(int(np.cumsum([size for _, size in changes]).max()))


@pytest.mark.parametrize("method", ["tsvm", "wudi", "wudi spectral", "iso_cts"])
@pytest.mark.parametrize("shape", [(500, 900), (900, 400)])
def test_what_torch_takes_is_what_was_predicted(tmp_path, monkeypatch, gpu, method, shape):
    """Beside the arena, and without what is allowed for libraries that the CPU does not have."""
    dice = np.random.default_rng(1)
    names = ["base", "a", "b", "c"]
    for name in names:
        tensors = {key: dice.normal(0, 0.01, shape).astype(np.float32) for key in NAMES}
        build.checkpoint(tmp_path / name, {"model.safetensors": tensors})
    more = {"iterations": 2} if method == "wudi" else {}
    recipe = written(tmp_path, [tmp_path / name for name in names], method, **more)
    gpu(6)
    if REAL:
        report = sm.merge(recipe, tmp_path / "out", ram="4GiB", vram="3GiB", device="cuda")
        assert report["vram_peak_bytes"] + placing.CONTEXT <= report["predicted"]["vram_peak_bytes"]
        return
    for name in ("GPU_LIBRARY", "EIGH"):
        monkeypatch.setattr(matrices, name, 0)
    monkeypatch.setattr(matrices, "GAPS", 1 << 40)
    monkeypatch.setattr(cutting, "TILE", 1 << 17)
    plan = sm.plan(recipe, ram="4GiB", vram="3GiB", device="cuda")
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # only this thread is watched
    try:
        with counted() as peak:
            sm.merge(plan, tmp_path / "out")
    finally:
        torch.set_num_threads(before)
    taken = peak[0] - plan.device_layout.arena_bytes
    print(f"{method} {shape}: {taken >> 10} of {plan.device_layout.solver_bytes >> 10} KiB")
    assert 4 * 5 * shape[0] * shape[1] < taken <= plan.device_layout.solver_bytes


@pytest.mark.parametrize(("tile", "answers"), [(1 << 13, [0, 0]), (1 << 18, [0, 1])])
def test_answers_go_when_they_are_merged(tmp_path, monkeypatch, gpu, models, tile, answers):
    """Before another matrix is solved; those of one step are solved first and merged then."""
    made, held, room = [], [], matrices.MatrixSurvey._room

    def watched(survey, queue):
        held.append(sum(each.delta is not None for each in made))
        made.append(survey)
        return room(survey, queue)

    monkeypatch.setattr(matrices.MatrixSurvey, "_room", watched)
    gpu(8)
    monkeypatch.setattr(cutting, "TILE", tile)
    sm.merge(written(tmp_path, models, "iso_c"), tmp_path / "out", ram="4GiB", vram="3GiB", device="cuda")
    assert held == answers


def test_memory_that_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, gpu, models):
    def fail(*args):
        raise torch.OutOfMemoryError

    recipe = written(tmp_path, models, "tsvm")
    gpu()
    monkeypatch.setattr("streammerge.methods.tsvm.Directions.take", fail)
    with pytest.raises(MachineError, match=r"MiB of memory that were planned to solve 'layer.0.weight'; free the GPU"):
        sm.merge(recipe, tmp_path / "out", ram="4GiB", vram="3GiB", device="cuda")


def test_a_gpus_work_is_not_finished_on_the_cpu(tmp_path, monkeypatch, gpu, models):
    """Libraries round differently: one output must not mix both."""
    recipe = written(tmp_path, models, "tsvm")
    gpu(7)
    monkeypatch.setattr(cutting, "TILE", 1 << 14)
    seen = []

    class Stop:
        def is_set(self):
            return len(seen) > 4

    with pytest.raises(sm.Interrupted):
        sm.merge(recipe, tmp_path / "out", ram="4GiB", vram="3GiB", device="cuda", progress=seen.append, cancel=Stop())
    with pytest.raises(OutputExists, match="holds unfinished work of another recipe"):
        sm.merge(recipe, tmp_path / "out", ram="1GiB", device="cpu")
    digests = {
        name: [sm.plan(each, ram="4GiB", vram="3GiB", device=device).digest for device in ("cpu", "cuda")]
        for name, each in (("tsvm", recipe), ("linear", build.recipe(tmp_path / "l.yml", "linear", models, weight=1.0)))
    }
    assert len(set(digests["tsvm"])) == 2
    assert len(set(digests["linear"])) == 1


@pytest.mark.parametrize(
    ("method", "more", "said"),
    [
        ("tsvm", {"precision": "tf32x3"}, "tsvm with precision tf32x3 needs a GPU; give precision fp32"),
        ("wudi", {"precision": "bf16x3"}, "wudi with precision bf16x3 needs a GPU"),
        ("iso_c", {"precision": "tf32"}, "precision is 'tf32'; one of fp32, tf32x3, bf16x3"),
        ("tsvm", {"precision": "tf32x3", "solver": "svd"}, "solver svd computes in fp64"),
        ("wudi", {"precision": "tf32x3", "solver": "spectral"}, "precision tf32x3 is for solver adam"),
    ],
)
def test_a_precision_that_cannot_be_had_is_refused(tmp_path, models, method, more, said):
    recipe = build.recipe(tmp_path / "r.yml", method, models[1:], models[0], **more)
    with pytest.raises(RecipeError, match=said):
        sm.plan(recipe, ram="1GiB", device="cpu")
    model = {NAMES[0]: torch.zeros(4, 4)}
    with pytest.raises(RecipeError, match=said):
        sm.merge_state_dicts([model, model], method=method, base=model, parameters=more)


def test_elementwise_methods_on_whole_tensors_stay_on_the_cpu(tmp_path, gpu, models):
    gpu()
    with pytest.raises(RecipeError, match="emr runs on the CPU so far; give --device cpu"):
        sm.plan(build.recipe(tmp_path / "r.yml", "emr", models[1:], models[0]), ram="4GiB", vram="3GiB", device="cuda")


def test_small_launches_are_not_put_off_among_operations_of_torch():
    queue = Queue.on("cuda" if REAL else "cpu")
    x, out = (torch.full((10,), value, device=queue.device) for value in (3.0, 0.0))
    with queue.current():
        kernel.run("add_deltas", span(out, queue), span(x, queue), (), np.ones((1, 1), np.float32))
        assert torch.equal(out, x)
    kernel.run("add_deltas", span(x, queue), span(out, queue), (), np.full((1, 1), 2, np.float32))
    assert REAL or torch.equal(out, x)  # it waits for others like it
    queue.end().wait()
    assert torch.equal(x, 2 * out)


@pytest.mark.parametrize("setting", ["high", "medium", "newer name"])
def test_no_solver_multiplies_in_less_than_fp32(setting):
    matmul = torch.backends.cuda.matmul
    if setting == "newer name":
        if not hasattr(matmul, "fp32_precision"):
            pytest.skip("torch has none")
        before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    else:
        torch.set_float32_matmul_precision(setting)
    try:
        with exact_products():
            assert torch.get_float32_matmul_precision() == "highest"
            assert not matmul.allow_tf32
        if setting == "newer name":
            assert matmul.fp32_precision == "tf32"
        else:
            assert torch.get_float32_matmul_precision() == setting
    finally:
        if setting == "newer name":
            matmul.fp32_precision = before
        else:
            torch.set_float32_matmul_precision("highest")
