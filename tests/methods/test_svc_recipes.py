"""SVC through recipe, plan and engine: what is refused, what is written, and the same bytes where inputs do not fit."""

import json
from types import SimpleNamespace

import build as files
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from merging import run
from methods.test_svc import WEIGHT, after, material

import streammerge as sm
from streammerge import method
from streammerge.cli import cli, show
from streammerge.errors import BudgetTooSmall, RecipeError
from streammerge.methods.post.svc import Svc
from streammerge.methods.task_arithmetic import TaskArithmetic
from streammerge.planner import steps
from streammerge.planner.recipe import from_dict

pytestmark = pytest.mark.usefixtures("one_thread")

# --- what is refused ---

BODY = {"merge_method": "ties", "base_model": "b", "models": [{"model": "m"}], "parameters": {"weight": 1}}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"merge_method": "svc"}, "svc is done to another method's merge; write 'post: svc' beside its merge_method"),
        ({"post": "svx"}, "post: unknown post-processing 'svx'; did you mean 'svc'?"),
        ({"post": "ties"}, "post: unknown post-processing 'ties'; known: svc"),
        ({"post": ["svc"]}, "post: a list; it must be a mapping"),
        ({"post": {}}, "post: 0 names; give one, as svc or {svc: {floor: 0.5}}"),
        ({"post": {"svc": None, "svd": None}}, "post: 2 names; give one, as svc or {svc: {floor: 0.5}}"),
        ({"post": {"svc": 3}}, "post.svc: a number; it must be a mapping"),
        ({"post": {3: None}}, "post: a number; it must be text"),
        ({"post": {"svc": {"flor": 1}}}, "post.svc: svc has no parameter 'flor'; did you mean 'floor'?"),
        (
            {"post": {"svc": {"of": "ties"}}},
            "post.svc: svc has no parameter 'of'; known: floor, embeddings, norm_guard",
        ),
        ({"post": {"svc": {"floor": "much"}}}, "post.svc.floor: 'much' is not a finite number"),
        ({"pots": "svc"}, "unknown key 'pots'; did you mean 'post'?"),
    ],
)
def test_recipes_that_are_refused(changed, why):
    with pytest.raises(RecipeError) as error:
        from_dict({**BODY, **changed}, "r.yml")
    assert str(error.value).removeprefix("r.yml: ") == why


def test_methods_on_whole_layers_are_refused():
    layered = type("Layered", (TaskArithmetic,), {"sees": "layer"})
    with pytest.raises(RecipeError, match="post: svc works on one tensor at a time, ties on whole layers"):
        from_dict({**BODY, "post": "svc"}, "r.yml", lambda name: layered)


def test_negative_parameters_and_gpus_are_refused():
    for key in ("floor", "norm_guard"):
        with pytest.raises(RecipeError, match=f"svc: {key} is -1"):
            after("ties", weight=1.0, **{key: -1.0})
    assert after("ties", weight=1.0).refusal("cuda:0") == "with svc runs on the CPU so far; give --device cpu"
    assert not after("ties", weight=1.0).refusal("cpu")


# --- from a recipe ---

TENSORS = {"layers.0.w": (96, 130), "model.embed_tokens.weight": (50, 20), "layers.1.w": (30, 50), "norm": (33,)}


@pytest.fixture
def models(tmp_path):
    """Base and three experts: their arrays, and their folders."""
    arrays = [{}, {}, {}, {}]
    for at, (key, shape) in enumerate(TENSORS.items()):
        base, experts = material(shape if len(shape) > 1 else (1, *shape), seed=at)
        for model, array in zip(arrays, [base, *experts], strict=True):
            model[key] = array.reshape(shape)
    folders = [files.checkpoint(tmp_path / f"m{i}", {"model.safetensors": m}) for i, m in enumerate(arrays)]
    return SimpleNamespace(arrays=arrays, folders=folders)


def recipe(models, name, post="svc", **parameters):
    root, *near = map(str, models.folders)
    listed = [{"model": each, "parameters": {"weight": w}} for each, w in zip(near, WEIGHT, strict=True)]
    body = {"merge_method": name, "base_model": root, "models": listed, "parameters": parameters}
    return {**body, **({"post": post} if post else {})}


def streamed(body, **options):
    return {key: tensor.numpy() for key, tensor in sm.stream(body, ram="1GiB", **options)}


@pytest.mark.parametrize("name", ["linear", "ties", "dare_ties", "breadcrumbs", "della", "cart", "iso_cts"])
def test_recipes_give_what_arrays_give(models, name):
    """Matrices calibrated; embeddings and vectors as the method leaves them."""
    density = {"density": 0.4} if "density" in method.parameters(method.find(name)) else {}
    found = streamed(recipe(models, name, **density))
    plain = method.build(method.find(name), {"weight": WEIGHT, **density})
    for key in TENSORS:
        base, *experts = (model[key] for model in models.arrays)
        calibrated = key.startswith("layers")
        sees_base = calibrated or plain.takes_base()
        wanted, _ = run(Svc(plain) if calibrated else plain, base if sees_base else None, experts, name=key)
        assert np.array_equal(found[key], wanted), key


def test_state_dicts_give_what_files_give(models):
    root, *near = ({k: torch.from_numpy(v) for k, v in model.items()} for model in models.arrays)
    post = {"svc": {"floor": 0.5, "embeddings": True}}
    for name in ("linear", "ties"):
        options = {"method": name, "parameters": {"weight": list(WEIGHT)}, "post": post}
        made = sm.merge_state_dicts(near, base=root, **options)
        found = streamed(recipe(models, name, post))
        assert all(np.array_equal(made[key].numpy(), found[key]) for key in TENSORS)
        with pytest.raises(RecipeError, match="needs a base"):
            sm.merge_state_dicts(near, **options)


def test_embeddings_if_asked_for(models):
    key = "model.embed_tokens.weight"
    found = streamed(recipe(models, "ties", {"svc": {"embeddings": True}}, density=0.4))
    base, *experts = (model[key] for model in models.arrays)
    wanted, _ = run(after("ties", weight=WEIGHT, density=0.4), base, experts, name="layers")
    assert np.array_equal(found[key], wanted)


def test_parameters_by_tensor(models):
    """Filters and gradients, of the method and of svc itself."""
    rules = [{"filter": "layers.0", "value": 0.2}, {"value": 0.6}]
    floors = [{"filter": "layers.1", "value": 1}]
    found = streamed(recipe(models, "ties", {"svc": {"floor": floors}}, density=rules))
    for key, density, floor in (("layers.0.w", 0.2, 0.0), ("layers.1.w", 0.6, 1.0)):
        base, *experts = (model[key] for model in models.arrays)
        wanted, _ = run(after("ties", floor, weight=WEIGHT, density=density), base, experts)
        assert np.array_equal(found[key], wanted), key


def test_a_base_that_is_listed_is_no_expert(models):
    body = recipe(models, "linear")
    listed = [*body["models"], {"model": body["base_model"], "parameters": {"weight": 1.0}}]
    plan = sm.plan({**body, "models": listed}, ram="1GiB")
    assert any("weight of" in each and "the base model is no expert" in each for each in plan.warnings)
    with_base, without = streamed({**body, "models": listed}), streamed(body)
    assert all(np.array_equal(with_base[key], without[key]) for key in TENSORS)


def test_a_base_model_is_needed(models):
    body = recipe(models, "linear")
    del body["base_model"]
    with pytest.raises(RecipeError, match="linear with post: svc needs a base_model"):
        sm.plan(body, ram="1GiB")


def test_slices_have_the_base_as_a_source(models):
    body = recipe(models, "linear")
    sources = [{**each, "layer_range": [0, 2]} for each in body.pop("models")]
    with pytest.raises(RecipeError, match="must be one of the sources"):
        sm.plan({**body, "slices": [{"sources": sources}]}, ram="1GiB")
    sources.append({"model": body["base_model"], "layer_range": [0, 2]})
    found, wanted = streamed({**body, "slices": [{"sources": sources}]}), streamed(recipe(models, "linear"))
    assert all(np.array_equal(found[key], wanted[key]) for key in TENSORS)


def test_plan_manifest_and_digest_name_it(models, tmp_path, capsys):
    body = recipe(models, "ties", density=0.4)
    plan = sm.plan(body, ram="1GiB")
    assert plan.solvers == {"svc after ties": 2}
    assert sm.plan(recipe(models, "tsvm"), ram="1GiB").solvers == {"svc after tsvm gram": 2}
    show.plan(plan)
    assert "svc after ties" in capsys.readouterr().out
    report = sm.merge(plan, tmp_path / "out")
    assert set(report["matrices"]) == {"layers.0.w", "layers.1.w"}
    assert json.loads((tmp_path / "out" / "streammerge.json").read_text())["recipe"]["post"] == {"svc": {}}
    digests = [sm.plan({**body, "post": post}, ram="1GiB").digest for post in (None, "svc", {"svc": {"floor": 1}})]
    assert len(set(digests)) == 3
    assert digests[1] == sm.plan({**body, "post": {"svc": {}}}, ram="1GiB").digest
    assert from_dict(plan.recipe.canonical()).canonical() == plan.recipe.canonical()


def test_methods_explains_it():
    listed = CliRunner().invoke(cli, ["methods"]).output
    assert "post: svc" in listed
    told = CliRunner().invoke(cli, ["methods", "svc"]).output
    assert "post: svc" in told
    assert "floor" in told
    assert "svc" not in method.names()


# --- where inputs do not fit ---


@pytest.mark.parametrize("misled", [False, True])
def test_the_same_bytes_where_inputs_do_not_fit(tmp_path, monkeypatch, misled):
    monkeypatch.setattr(steps, "SAMPLE", 1 << 14)
    base, *taus = np.random.default_rng(1).normal(size=(3, 700, 900))
    for at in range(128 * misled):  # what the sample sees of the task vectors is small
        start = at * (base.size - 128) // 127 // 4096 * 4096
        for tau in taus:
            tau.reshape(-1)[start : start + 128] *= 1e-3
    arrays = [np.float32(base), *(np.float32(base + tau) for tau in taus)]
    root, *near = (files.checkpoint(tmp_path / str(i), {"model.safetensors": {"w": a}}) for i, a in enumerate(arrays))
    body = {
        "merge_method": "ties",
        "base_model": str(root),
        "models": [{"model": str(each), "parameters": {"weight": 1, "density": 0.3}} for each in near],
        "post": "svc",
    }
    with pytest.raises(BudgetTooSmall) as caught:
        sm.plan(body, ram=1)
    least = sm.plan(body, ram=caught.value.least + (2 << 20))
    assert least.passes == 3
    assert sm.plan(body, ram="2GiB").passes == 1
    report = sm.merge(least, tmp_path / "least")
    assert (report["extra_rounds"] > 0) == misled
    sm.merge(body, tmp_path / "plenty", ram="2GiB")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("least", "plenty"))
    assert one == other
