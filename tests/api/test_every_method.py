"""Every method from its recipe: to the bit what `merge_state_dicts` and `stream` give, and close to its oracle."""

import zlib

import build
import methods.oracles as oracles
import numpy as np
import pytest
from reading import DEFAULTS, SHAPES, close, family, read, values, write

import streammerge as sm
from streammerge import method

RAM = "1GiB"
TILES = [name for name in method.names() if method.find(name).sees == "tile"]
DTYPES = ["F32", "BF16", "F16"]


def case(name, folder, dtype="F32", **more):
    """Checkpoints and a recipe for a method: (base tensors or None, the experts', recipe, parameters)."""
    cls = method.find(name)
    count = min(2, cls.max_experts or 2)
    base, *experts = family(count, dtype)
    root, *near = write(folder, [base, *experts])
    known = method.parameters(cls)
    chosen = {key: value for key, value in (DEFAULTS | more).items() if key in known}
    for key, value in chosen.items():
        if known[key].per_expert:
            chosen[key] = value[:count] if isinstance(value, list) else [value] * count
    recipe = build.recipe(folder / "r.yml", name, near, root if cls.needs_base else None, **chosen)
    return base if cls.needs_base else None, experts, recipe, chosen


def as_torch(model):
    import torch

    kinds = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    return {
        name: torch.frombuffer(bytearray(each.data), dtype=kinds[each.dtype]).reshape(each.shape)
        for name, each in model.items()
    }


def raw(tensor):
    import torch

    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", TILES)
def test_files_memory_and_stream_agree_to_the_bit(tmp_path, name, dtype):
    base, experts, recipe, parameters = case(name, tmp_path, dtype)
    sm.merge(recipe, tmp_path / "out", ram=RAM, seed=7)
    merged = read(tmp_path / "out")
    assert list(merged) == list(SHAPES)
    assert any(merged[key] != experts[0][key] for key in merged) or name == "passthrough"
    memory = sm.merge_state_dicts(
        [as_torch(each) for each in experts],
        method=name,
        base=None if base is None else as_torch(base),
        parameters=parameters,
        seed=7,
    )
    assert {key: raw(each) for key, each in memory.items()} == {key: each.data for key, each in merged.items()}
    streamed = [(key, tuple(each.shape), raw(each)) for key, each in sm.stream(recipe, ram=RAM, seed=7)]
    assert streamed == [(key, each.shape, each.data) for key, each in merged.items()]


def plain(model):
    return {name: values(each) for name, each in model.items()}


def trimmed(elect):
    def oracle(base, experts, weight, density, lambda_, **_):
        masks = [oracles.largest(e - base, d) for e, d in zip(experts, density, strict=True)]
        return oracles.vectors(base, experts, weight, masks, lambda_, normalize=elect, elect=elect)

    return oracle


def crumbled(elect):
    def oracle(base, experts, weight, density, gamma, lambda_, **_):
        masks = [oracles.crumbs(e - base, d, g) for e, d, g in zip(experts, density, gamma, strict=True)]
        return oracles.vectors(base, experts, weight, masks, lambda_, elect=elect)

    return oracle


def dropped(elect):
    def oracle(base, experts, weight, density, lambda_, key):
        masks = [oracles.dropped(base.shape, d, 7, zlib.crc32(key.encode()), k) for k, d in enumerate(density)]
        return oracles.vectors(base, experts, weight, masks, lambda_, rescale=True, elect=elect)

    return oracle


def arithmetic(base, experts, weight, lambda_, **_):
    return oracles.vectors(base, experts, weight, [np.ones_like(base)] * len(experts), lambda_)


ORACLES = {
    "linear": lambda base, experts, weight, **_: oracles.linear(base, experts, weight),
    "passthrough": lambda base, experts, **_: oracles.passthrough(base, experts),
    "slerp": lambda base, experts, t, **_: oracles.slerp(base, experts, t),
    "nuslerp": lambda base, experts, weight, **_: oracles.nuslerp(base, experts, weight),
    "model_stock": lambda base, experts, **_: oracles.model_stock(base, experts),
    "task_arithmetic": arithmetic,
    "ties": trimmed(True),
    "breadcrumbs": crumbled(False),
    "breadcrumbs_ties": crumbled(True),
    "dare_linear": dropped(False),
    "dare_ties": dropped(True),
}


@pytest.mark.parametrize("name", ORACLES)
def test_what_is_on_the_disk_is_the_oracles_answer(tmp_path, name):
    base, experts, recipe, parameters = case(name, tmp_path)
    sm.merge(recipe, tmp_path / "out", ram=RAM, seed=7)
    if "lambda" in parameters:
        parameters["lambda_"] = parameters.pop("lambda")
    for key, merged in read(tmp_path / "out").items():
        root = None if base is None else values(base[key])
        exact = ORACLES[name](root, [values(each[key]) for each in experts], key=key, **parameters)
        far = np.abs(values(merged) - exact) > 1e-6
        # where two magnitudes or a sum of signs are closer than fp32 can tell, one element may fall the other way
        assert far.sum() <= 1, f"{key}: {far.sum()} elements"
        if name in ("linear", "passthrough", "slerp", "nuslerp", "task_arithmetic"):
            close(values(merged), exact)


@pytest.mark.parametrize("budget", ["least", "plenty"])
def test_inputs_and_outputs_of_other_dtypes(tmp_path, budget):
    """Computed in fp32 whatever comes in, rounded once to what goes out."""
    kinds = ["BF16", "F32", "F16", "F64"]
    models = [family(3, kind, seed=5)[i] for i, kind in enumerate(kinds)]
    root, *near = write(tmp_path, models)
    for out_dtype, stored in ((None, "BF16"), ("float32", "F32"), ("float16", "F16"), ("float64", "F64")):
        body = {
            "merge_method": "task_arithmetic",
            "base_model": str(root),
            "models": [{"model": str(each), "parameters": {"weight": 0.3}} for each in near],
            **({"out_dtype": out_dtype} if out_dtype else {}),
        }
        ram = RAM
        if budget == "least":
            with pytest.raises(sm.BudgetTooSmall) as caught:
                sm.plan(body, ram=1)
            ram = caught.value.least + (2 << 20)
        out = tmp_path / f"{stored}"
        sm.merge(body, out, ram=ram)
        for key, merged in read(out).items():
            assert merged.dtype == stored
            base, *experts = (values(model[key]) for model in models)
            close(values(merged), base + 0.3 * sum(e - base for e in experts), stored)
