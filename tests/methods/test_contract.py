"""What every method must keep: its worked examples, the same bits at any tile size, the cost that it declares."""

import dataclasses
import importlib
import tracemalloc

import numpy as np
import pytest
from merging import bf16, run, widen

from streammerge import method as methods
from streammerge.engine.tiles import can_copy
from streammerge.errors import CheckpointError

NAMES = [name for name in methods.names() if methods.find(name).sees != "layer"]
DEFAULTS = {"weight": (0.6, 0.4), "density": (0.5, 0.3), "t": 0.3}


def examples(name):
    return importlib.import_module(methods.find(name).__module__).EXAMPLES


def make(name, **more):
    """A method with some value for whatever must be given."""
    cls = methods.find(name)
    known = methods.parameters(cls)
    values = {key: value for key, value in {**DEFAULTS, **more}.items() if key in known}
    experts = min(2, cls.max_experts or 2)
    for key, value in values.items():
        if known[key].per_expert:
            values[key] = tuple(value[:experts]) if isinstance(value, tuple) else (value,) * experts
    return methods.build(cls, values)


def material(name, shape, dtype="bf16", seed=0):
    """A base (or None) and experts whose task vectors have many ties in magnitude, as real bf16 ones have."""
    cls = methods.find(name)
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 0.02, shape).astype(np.float32)
    count = max(cls.min_experts, min(2, cls.max_experts or 2))
    experts = [base + rng.normal(0, 0.002, shape).astype(np.float32) * (rng.random(shape) < 0.7) for _ in range(count)]
    cast = bf16 if dtype == "bf16" else np.array
    return (cast(base) if cls.needs_base else None), [cast(np.float32(e)) for e in experts]


@pytest.mark.parametrize("name", NAMES)
def test_worked_examples(name):
    assert examples(name), f"{name} has no worked example"
    for instance, base, experts, wanted in examples(name):
        for shape in ((-1,), (1, -1)) if np.ndim(wanted) < 2 else (np.shape(wanted),):
            root = None if base is None else np.array(base, np.float32).reshape(shape)
            out, _ = run(instance, root, [np.array(e, np.float32).reshape(shape) for e in experts])
            np.testing.assert_allclose(out.reshape(-1), np.reshape(wanted, -1), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
@pytest.mark.parametrize("name", NAMES)
def test_tile_size_and_threads_never_change_a_bit(name, dtype):
    shape = (160, 513)
    base, experts = material(name, shape, dtype)
    instance = make(name)
    whole, _ = run(instance, base, experts)
    assert not np.array_equal(whole, experts[0]) or name == "passthrough"
    for tile, threads, streamed in ((1, 1, False), (8192, 1, True), (20000, 2, False), (65536, 2, True)):
        cut, _ = run(instance, base, experts, tile=tile, threads=threads, streamed=streamed)
        assert np.array_equal(whole, cut), (tile, threads, streamed)


@pytest.mark.parametrize("name", ["nuslerp", "model_stock", "ties", "breadcrumbs", "dare_ties"])
def test_options_never_see_tiles_either(name):
    options = {
        "nuslerp": [{"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
        "model_stock": [{"filter_wise": True}],
        "ties": [{"rescale": True}, {"normalize": False, "density": (1.0, 0.3)}, {"density": (0.0, 0.01)}],
        "breadcrumbs": [{"rescale": True, "gamma": (0.05, 0.4)}],
        "dare_ties": [{"rescale": False}, {"density": (1.0, 0.1)}],
    }
    base, experts = material(name, (96, 700))
    for more in options[name]:
        instance = make(name, **more)
        whole, _ = run(instance, base, experts)
        for tile, threads in ((1, 1), (30000, 2)):
            cut, _ = run(instance, base, experts, tile=tile, threads=threads, streamed=threads == 2)
            assert np.array_equal(whole, cut), (more, tile, threads)


@pytest.mark.parametrize("shape", [(), (1,), (3,), (0,), (2, 0), (1, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_small_tensors(name, shape):
    base, experts = material(name, shape, "f32")
    out, _ = run(make(name), base, experts)
    assert out.shape == shape
    assert np.all(np.isfinite(out))


@pytest.mark.parametrize("name", NAMES)
def test_inputs_that_are_equal_come_out_to_the_bit(name):
    """Where a method says that it keeps equal inputs, computing them would give the same bits as copying."""
    instance = make(name)
    for dtype in ("bf16", "f32"):
        base, experts = material(name, (7, 1000), dtype)
        experts = [experts[0].copy() for _ in experts]
        base = None if base is None else experts[0].copy()
        experts[0].reshape(-1)[:3] = (
            np.array([-0.0, 0.0, 1e-40], np.float32).astype(np.float32) if dtype == "f32" else 0
        )
        for other in [*experts[1:], *([] if base is None else [base])]:
            other[...] = experts[0]
        out, merger = run(instance, base, experts)
        assert np.array_equal(out.view(np.uint8), experts[0].view(np.uint8))
        assert merger.equal == can_copy(instance)
        different = [e.copy() for e in experts]
        different[-1].reshape(-1)[-1] += 1
        if can_copy(instance) and len(experts) + (base is not None) > 1:
            out, merger = run(instance, base, different)
            assert not merger.equal
            assert np.array_equal(out.reshape(-1)[:-1].view(np.uint8), experts[0].reshape(-1)[:-1].view(np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_nan_is_noticed(name):
    base, experts = material(name, (70, 1000), "f32")
    experts[-1][3, 5] = np.nan
    if methods.find(name).sees == "tensor":  # no matrix with a NaN can be decomposed
        with pytest.raises(CheckpointError, match=f"expert {len(experts)} holds a NaN"):
            run(make(name), base, experts, tile=8192)
        return
    _, merger = run(make(name), base, experts, tile=8192)
    assert list(merger.flags) == [0] * (len(merger.flags) - 1) + [2]
    experts[-1][3, 5] = -np.inf
    _, merger = run(make(name), base, experts, tile=8192)
    assert list(merger.flags) == [0] * (len(merger.flags) - 1) + [1]


@pytest.mark.parametrize("name", NAMES)
def test_declared_cost_is_enough_and_not_twice_too_much(name):
    if methods.find(name).sees == "tensor":
        pytest.skip("torch's memory is not traced; the methods' own tests measure it")
    shape, threads = (1500, 4096), 1
    base, experts = material(name, shape)
    instance = make(name)
    run(instance, base, experts)  # whatever is made once is made now
    numel = int(np.prod(shape))
    declared = instance.cost(numel, len(experts), "cpu").host * threads
    declared += instance.survey_bytes(shape, len(experts), threads) if instance.survey(shape, len(experts)) else 0
    peak = 0
    for streamed in (False, True):
        tracemalloc.start()
        out, _ = run(instance, base, experts, streamed=streamed)
        peak = max(peak, tracemalloc.get_traced_memory()[1] - out.nbytes)
        tracemalloc.stop()
    slack = 256 << 10
    assert peak <= declared + slack, f"{name} held {peak}, declared {declared}"
    assert declared <= 2 * peak + slack, f"{name} held {peak}, declared {declared}"


@pytest.mark.parametrize("name", NAMES)
def test_parameters_survive_the_recipe(name):
    cls = methods.find(name)
    instance = make(name)
    values = {item.name.rstrip("_"): getattr(instance, item.name) for item in dataclasses.fields(cls)}
    assert list(values) == list(methods.parameters(cls))
    assert methods.build(cls, values) == instance
    assert dataclasses.is_dataclass(cls)
    assert all(param.meaning for param in methods.parameters(cls).values())
    assert cls.summary
    assert cls.source


def test_unknown_methods_name_the_nearest():
    from streammerge.errors import RecipeError

    with pytest.raises(RecipeError, match="did you mean 'ties'"):
        methods.find("tiess")


def test_widen_is_exact():
    assert np.array_equal(widen(bf16(np.float32([1.5, -0.25]))), [1.5, -0.25])
