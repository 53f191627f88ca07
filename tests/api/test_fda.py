"""FDA from a recipe to files: what is outside units is the start's, whatever interrupts it."""

import json
import shutil
import threading

import build
import pytest

pytest.importorskip("transformers")

import torch
import transformers
from models import tiny
from transport import llama, tensors

import streammerge as sm
from streammerge.errors import BudgetTooSmall, CheckpointError, Interrupted, OutputExists, RecipeError
from streammerge.store.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
    pytest.mark.usefixtures("one_thread"),
]
RAM = "2GiB"
FEW = {"anchors": 12, "construct_steps": 6, "adapt_epochs": 2, "batch": 8}
STARTS = {
    "task_arithmetic": {"lambda": 0.5},
    "tsvm": {},
    "wudi": {"iterations": 5},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama and two near it."""
    path = tmp_path_factory.mktemp("fda")
    base = llama(path / "base", 0)
    for seed, name in enumerate(("one", "two"), 1):
        llama(path / name, seed, base)
    return path


def recipe(folder, parameters=None, **keys):
    models = [{"model": str(folder / name)} for name in ("one", "two")]
    values = {**FEW, **(parameters or {})}
    return {"merge_method": "fda", "base_model": str(folder / "base"), "models": models, "parameters": values, **keys}


def merge(folder, out, parameters=None, options=None, **keys):
    return sm.merge(recipe(folder, parameters, **keys), out, ram=RAM, device="cpu", **(options or {}))


def of_start(folder, out, method):
    weight = {"weight": 1} if method == "task_arithmetic" else {}
    body = recipe(folder) | {"merge_method": method, "parameters": {**weight, **STARTS[method]}}
    sm.merge(body, out, ram=RAM, device="cpu")
    return tensors(out)


def is_mlp(name):
    return ".mlp." in name


def changed(found, other):
    return {name for name in found if not torch.equal(found[name], other[name])}


@pytest.mark.parametrize("method", ["base", *STARTS])
def test_only_units_differ_from_the_start(folder, tmp_path, method):
    begun = tensors(folder / "base") if method == "base" else of_start(folder, tmp_path / "start", method)
    start = "base" if method == "base" else {"merge_method": method, "parameters": STARTS[method]}
    report = merge(folder, tmp_path / "out", start=start)
    found = tensors(tmp_path / "out")
    assert changed(found, begun) == {name for name in found if is_mlp(name)}
    assert verify(tmp_path / "out")["bad"] == []
    assert report["read_bytes"] == report["predicted"]["read_bytes"]
    assert set(report["fda"]) == {f"model.layers.{i}.mlp" for i in range(3)}
    for row in report["fda"].values():
        assert row["loss_0"] < row["first_0"]
        assert row["adaptation"] < row["adaptation_first"]


@pytest.mark.parametrize("method", STARTS)
@pytest.mark.parametrize("alphas", ["merged", "experts"])
def test_a_rate_of_nothing_leaves_the_start_to_the_bit(folder, tmp_path, method, alphas):
    if alphas == "experts" and method != "task_arithmetic":
        pytest.skip("goes with sums")
    begun = of_start(folder, tmp_path / "start", method)
    start = {"merge_method": method, "parameters": STARTS[method]}
    merge(folder, tmp_path / "out", {"adapt_lr": 1e-30, "construct_steps": 1, "alphas": alphas}, start=start)
    assert changed(tensors(tmp_path / "out"), begun) == set()


def test_bfloat16_is_rounded_once_from_a_start_in_fp32(folder, tmp_path):
    start = {"merge_method": "task_arithmetic", "parameters": STARTS["task_arithmetic"]}
    body = recipe(folder) | {"merge_method": "task_arithmetic", "out_dtype": "bfloat16"}
    sm.merge(body | {"parameters": {"weight": 1, "lambda": 0.5}}, tmp_path / "start", ram=RAM, device="cpu")
    merge(folder, tmp_path / "out", {"adapt_lr": 1e-30, "construct_steps": 0}, start=start, out_dtype="bfloat16")
    assert changed(tensors(tmp_path / "out"), tensors(tmp_path / "start")) == set()


def test_the_merged_model_loads(folder, tmp_path):
    merge(folder, tmp_path / "out")
    model = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.isfinite(model(torch.arange(5)[None]).logits).all()


@pytest.mark.parametrize("adapt", [pytest.param("weights", marks=pytest.mark.slow), "closed_form"])
def test_one_expert_is_recovered_on_its_anchors(folder, tmp_path, adapt):
    """The unit's results on the anchors become the expert's."""
    from safetensors.torch import load_file

    more = {"adapt": adapt, "anchors": 8, "adapt_epochs": 400, "adapt_lr": 1e-3, "ridge": 1e-6, "distance": "l2"}
    merge(folder, tmp_path / "out", more, models=[{"model": str(folder / "one")}], save_anchors=str(tmp_path / "a"))
    anchors = load_file(tmp_path / "a" / "model.safetensors")
    base, expert, found = (tensors(path) for path in (folder / "base", folder / "one", tmp_path / "out"))

    def run(weights, layer, x):
        gate, up, down = (weights[f"model.layers.{layer}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        return (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T

    for layer in range(3):
        x = anchors[f"layers.{layer}.expert.0"]
        wanted = run(expert, layer, x)
        before, after = ((run(each, layer, x) - wanted).norm() for each in (base, found))
        assert after < (0.2 if adapt == "weights" else 0.05) * before


def test_a_linear_unit_is_solved_without_steps(folder, tmp_path):
    more = {"unit": "linear", "distance": "l2", "adapt": "closed_form", "anchors": 4, "ridge": 0.1}
    merge(folder, tmp_path / "out", more, save_anchors=str(tmp_path / "a"))
    notes = json.loads((tmp_path / "a" / "anchors.json").read_text())["layers"]
    assert len(notes) == 3 * 7
    base, one, two, found = (tensors(p) for p in (*(folder / n for n in ("base", "one", "two")), tmp_path / "out"))
    name = "model.layers.1.self_attn.q_proj.weight"
    number = next(i for i, row in enumerate(notes) if row["unit"] == name.removesuffix(".weight"))
    taus = [each[name].double() - base[name].double() for each in (one, two)]
    grams = []
    for tau, row in zip(taus, notes[number]["experts"], strict=True):
        _, s, right = torch.linalg.svd(tau)
        grams.append(right[:4].T @ right[:4])
        assert row["loss"] == pytest.approx(1 - float(s[:4].square().sum().sqrt() / s.norm()), abs=1e-5)
        assert row["steps"] == 0
    both = grams[0] + grams[1]
    scale = 0.1 * both.trace() / len(both)
    wanted = (taus[0] @ grams[0] + taus[1] @ grams[1]) @ torch.linalg.inv(both + scale * torch.eye(len(both)))
    assert float((found[name] - base[name] - wanted).norm() / wanted.norm()) < 1e-4


@pytest.mark.parametrize("name", ["bert", pytest.param("vit", marks=pytest.mark.slow), "llama"])
def test_whole_layers(tmp_path, name):
    for seed, part in enumerate(("base", "one", "two")):
        tiny.save(tmp_path / part, name, seed=7 + seed)
    report = merge(tmp_path, tmp_path / "out", {"unit": "block", "anchors": 6, "rows": 12})
    found, base = tensors(tmp_path / "out"), tensors(tmp_path / "base")
    different = changed(found, base)
    layers = {each for each in found if any(f".{i}." in each for i in range(3)) and "embeddings" not in each}
    assert different <= layers
    assert {each for each in layers if each.endswith("weight") and found[each].dim() == 2} <= different
    for row in report["fda"].values():
        assert row["loss_0"] < row["first_0"]


def test_weights_as_anchors_and_another_seed(folder, tmp_path):
    outs = []
    for number, (seed, init) in enumerate([(0, "gaussian"), (0, "gaussian"), (1, "gaussian"), (0, "weights")]):
        merge(folder, tmp_path / str(number), {"init": init}, {"seed": seed})
        outs.append(tensors(tmp_path / str(number)))
    assert changed(outs[0], outs[1]) == set()
    assert changed(outs[0], outs[2])
    assert changed(outs[0], outs[3])


def test_a_part_of_the_units_and_another_budget(folder, tmp_path):
    merge(folder, tmp_path / "all")
    merge(folder, tmp_path / "part", {}, units="1-2")
    every, part, base = (tensors(path) for path in (tmp_path / "all", tmp_path / "part", folder / "base"))
    assert changed(part, base) == {name for name in base if is_mlp(name) and ".0." not in name}
    assert changed(part, every) == {name for name in base if is_mlp(name) and ".0." in name}
    least = sm.plan(recipe(folder), ram=RAM, device="cpu").ram_peak_bytes
    sm.merge(recipe(folder), tmp_path / "tight", ram=least + (8 << 20), device="cpu")
    assert changed(tensors(tmp_path / "tight"), every) == set()


# --- anchors in folders ---


def test_saved_anchors_are_used_again(folder, tmp_path):
    from safetensors import safe_open

    merge(folder, tmp_path / "one", save_anchors=str(tmp_path / "anchors"))
    notes = json.loads((tmp_path / "anchors" / "anchors.json").read_text())
    assert [row["unit"] for row in notes["layers"]] == [f"model.layers.{i}.mlp" for i in range(3)]
    for row in notes["layers"]:
        for expert in row["experts"]:
            assert 0 < expert["loss"] < 3
            assert expert["steps"] == FEW["construct_steps"]
            assert expert["seconds"] >= 0
    with safe_open(tmp_path / "anchors" / "model.safetensors", "pt") as file:
        assert sorted(file.keys()) == sorted(f"layers.{i}.expert.{e}" for i in range(3) for e in range(2))
        assert file.get_tensor("layers.1.expert.0").shape == (FEW["anchors"], 32)
    report = merge(folder, tmp_path / "two", {"construct_steps": 50}, anchors_from=str(tmp_path / "anchors"))
    assert changed(tensors(tmp_path / "two"), tensors(tmp_path / "one")) == set()
    assert report["fda"]["model.layers.0.mlp"]["loss_1"] == notes["layers"][0]["experts"][1]["loss"]


def test_anchors_of_another_expert_are_refused_unless_nothing_can_be_compared(folder, tmp_path):
    anchors = tmp_path / "anchors"
    merge(folder, tmp_path / "one", {"construct_steps": 60}, save_anchors=str(anchors))
    body = recipe(folder, anchors_from=str(anchors))
    body["models"] = body["models"][::-1]
    with pytest.raises(RecipeError, match=r"layers\.0\.expert\.0 in .* has a loss of .*: it was made for another"):
        sm.merge(body, tmp_path / "two", ram=RAM, device="cpu")
    assert not (tmp_path / "two").exists()
    assert not (tmp_path / "two.partial").exists()
    for changes in ({"distance": "l2"}, {"precision": "bf16"}):
        merge(folder, tmp_path / str(changes), changes, anchors_from=str(anchors))
    notes = json.loads((anchors / "anchors.json").read_text())
    for unit in notes["layers"]:
        for expert in unit["experts"]:
            assert expert.pop("distance") == "cosine"
    (anchors / "anchors.json").write_text(json.dumps(notes))
    sm.merge(body, tmp_path / "two", ram=RAM, device="cpu")


def test_parts_that_several_machines_made_come_together(folder, tmp_path):
    for part in ("0-0", "1-2"):
        merge(folder, tmp_path / part, units=part, save_anchors=str(tmp_path / f"anchors{part}"))
    both = [str(tmp_path / f"anchors{part}") for part in ("0-0", "1-2")]
    merge(folder, tmp_path / "joined", {"construct_steps": 0}, anchors_from=both)
    merge(folder, tmp_path / "alone")
    assert changed(tensors(tmp_path / "joined"), tensors(tmp_path / "alone")) == set()


def test_a_taken_folder_is_left_alone(folder, tmp_path):
    merge(folder, tmp_path / "one", units=0, save_anchors=str(tmp_path / "anchors"))
    with pytest.raises(OutputExists, match=r"holds model\.safetensors already"):
        merge(folder, tmp_path / "two", units=0, save_anchors=str(tmp_path / "anchors"))
    merge(folder, tmp_path / "two", {}, {"overwrite": True}, units=0, save_anchors=str(tmp_path / "anchors"))
    with pytest.raises(RecipeError, match="lies in the output folder"):
        merge(folder, tmp_path / "three", save_anchors=str(tmp_path / "three" / "anchors"))


# --- interruptions ---


@pytest.mark.parametrize(
    "where", ["layers.0.mlp, expert 1", "layers.1.mlp, expert 0, step 3", "layers.1.mlp, adapting"]
)
def test_a_run_is_taken_up_where_it_was(folder, tmp_path, where):
    keys = {"save_anchors": str(tmp_path / "anchors"), "start": {"merge_method": "tsvm"}}
    stop, told = threading.Event(), []

    def tell(now):
        told.append(now.tensor)
        if where in now.tensor:
            stop.set()

    with pytest.raises(Interrupted):
        merge(folder, tmp_path / "out", {}, {"progress": tell, "cancel": stop}, **keys)
    assert not (tmp_path / "anchors").exists()
    seen = []
    merge(folder, tmp_path / "out", {}, {"progress": lambda now: seen.append(now.tensor)}, **keys)
    assert not any(text.startswith("model.layers.0.mlp, expert 0, step") for text in seen)
    assert any(text.startswith("model.layers.2.mlp, expert 1, step 6 of 6, loss") for text in seen)
    merge(folder, tmp_path / "whole", start={"merge_method": "tsvm"})
    assert changed(tensors(tmp_path / "out"), tensors(tmp_path / "whole")) == set()
    assert (tmp_path / "anchors" / "anchors.json").exists()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


def test_progress_counts_the_work(folder, tmp_path):
    seen = []
    merge(folder, tmp_path / "out", {}, {"progress": lambda now: seen.append((now.work, now.work_total))})
    shares = [done / total for done, total in seen]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1, rel=0.05)


# --- what is refused ---


@pytest.mark.parametrize(
    ("keys", "parameters", "message"),
    [
        ({"start": "two"}, {}, "start must be base, or a mapping"),
        ({"start": {"merge_method": "nothing"}}, {}, "unknown merge_method 'nothing'"),
        ({"start": {"merge_method": "linear"}}, {}, "linear is no merge of task vectors"),
        ({"start": {"merge_method": "tsvm", "models": [{"model": "x"}]}}, {}, "must be those of the recipe"),
        ({"start": {"merge_method": "tsvm", "units": 3}}, {}, "unknown key 'units'"),
        ({"units": "3-1"}, {}, "ends before it begins"),
        ({"units": "all"}, {}, "write a number or a range"),
        ({"units": "0-7"}, {}, "the model has units 0-2"),
        ({}, {"adapt": "coefficients"}, "refines a merged start"),
        ({}, {"unit": "feed"}, "is in no module of model.layers.0; it has"),
        ({}, {"unit": "self_attn"}, "model.layers.0.self_attn does not run alone on its input"),
        ({}, {"unit": [{"filter": "layers.0", "value": "mlp"}, {"value": "block"}]}, "unit is for the whole model"),
        ({}, {"alphas": "experts"}, "goes with start: task_arithmetic and adapt: coefficients; the start is base"),
        ({}, {"unit": "mlp*"}, "'mlp.gate_proj' is inside 'mlp' of model.layers.0; give a pattern of one of them"),
        ({}, {"anchors": 0}, "anchors is 0"),
        ({}, {"preset": "paper-bert"}, "preset is 'paper-bert'"),
        ({"anchors_from": 3}, {}, "must be the path of a folder"),
        ({"post": "svc"}, {}, "leave it out"),
        ({"validation": "x"}, {}, "unknown key 'validation'"),
    ],
)
def test_a_wrong_recipe_is_one_clear_line(folder, keys, parameters, message):
    with pytest.raises(RecipeError, match=message) as error:
        sm.plan(recipe(folder, parameters, **keys), ram=RAM, device="cpu")
    assert "\n" not in str(error.value)


def test_wrong_anchors_are_named(folder, tmp_path):
    with pytest.raises(CheckpointError, match="holds no anchors"):
        sm.plan(recipe(folder, anchors_from=str(folder / "base")), ram=RAM, device="cpu")
    merge(folder, tmp_path / "out", units=0, save_anchors=str(tmp_path / "a"))
    with pytest.raises(CheckpointError, match="they were made for another unit or model, or by another number"):
        sm.plan(recipe(folder, {"unit": "block"}, anchors_from=str(tmp_path / "a")), ram=RAM, device="cpu")


def test_streams_and_state_dicts_are_refused(folder):
    with pytest.raises(RecipeError, match="fda merges unit by unit, with anchors that it makes first; use merge"):
        next(sm.stream(recipe(folder), ram=RAM, device="cpu"))
    with pytest.raises(RecipeError, match="fda is a layer method; merge_state_dicts has no layers to run, use merge"):
        sm.merge_state_dicts([{}], base={}, method="fda")


def test_a_budget_that_is_too_small_is_named(folder):
    with pytest.raises(BudgetTooSmall, match="give --ram"):
        sm.plan(recipe(folder), ram="64MiB", device="cpu")


def test_too_many_anchors_are_refused_at_once(folder):
    line = r"1,000,000,000 anchors of .+ take .+ are allowed; give fewer anchors, or --ram \d+MiB at least"
    with pytest.raises(BudgetTooSmall, match=line):
        sm.plan(recipe(folder, {"anchors": 10**9}), ram=RAM, device="cpu")


def test_no_unit_where_there_is_no_mlp(tmp_path):
    for part in ("base", "one", "two"):
        tiny.save(tmp_path / part, "bert")
    with pytest.raises(RecipeError, match=r"'mlp' is in no module of encoder\.layer\.0"):
        sm.plan(recipe(tmp_path, {"unit": "mlp"}), ram=RAM, device="cpu")


@pytest.mark.parametrize("name", ["deberta", "t5-encoder"])
def test_a_layer_that_takes_more_than_a_hidden_state_is_no_unit(tmp_path, name):
    """DeBERTa's take a table of positions from the embedding, T5's the first one's bias."""
    for seed, part in enumerate(("base", "one", "two")):
        tiny.save(tmp_path / part, name, seed=7 + seed)
    with pytest.raises(RecipeError, match="needs what earlier layers compute, so it is no unit; choose a part"):
        sm.plan(recipe(tmp_path, {"unit": "block"}), ram=RAM, device="cpu")


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_experts_of_a_layer_are_no_unit(tmp_path, name):
    """Its other linear maps are."""
    for seed, part in enumerate(("base", "one", "two")):
        tiny.save(tmp_path / part, name, seed=7 + seed)
    mlp = "block_sparse_moe" if transformers.__version__ < "5" and name == "mixtral" else "mlp"
    for unit in ("auto", mlp, "block", f"{mlp}.experts"):
        with pytest.raises(RecipeError, match=r"sends tokens to experts of its own.*give a unit without") as error:
            sm.plan(recipe(tmp_path, {"unit": unit}), ram=RAM, device="cpu")
        assert "\n" not in str(error.value)
    report = merge(tmp_path, tmp_path / "out", {"unit": "self_attn.*_proj"})
    assert len(report["fda"]) == 3 * 4


# --- the command line ---


def test_the_command_line_tells_and_reports(folder, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "fda.yml"
    path.write_text(
        json.dumps(recipe(folder, start={"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}}))
    )
    plan = build.command("plan", path, "--ram", RAM, "--device", "cpu")
    assert "3 of 3 units, one at a time" in plan.stdout, plan.stderr
    done = build.command("merge", path, tmp_path / "out", "--ram", RAM, "--device", "cpu", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert "construction loss" in done.stdout
    report = json.loads((tmp_path / "out" / "streammerge.json").read_text())["report"]
    assert report["ram_peak_bytes"] <= report["predicted"]["ram_peak_bytes"]
    assert build.command("report", tmp_path / "out").returncode == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "construction loss" in page
    assert "adaptation loss" in page
    again = build.command("merge", path, tmp_path / "out", "--ram", RAM, "--device", "cpu")
    assert again.returncode == 2
    shutil.rmtree(tmp_path / "out")
