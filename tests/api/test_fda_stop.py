"""FDA that stops by real inputs: those that the base's own forward gives its units, whatever interrupts it."""

import json
import threading

import pytest

pytest.importorskip("transformers")

import torch
import transformers
from models import tiny
from transport import llama, samples, tensors

import streammerge as sm
from streammerge.errors import Interrupted, RecipeError
from streammerge.methods._adapt import PATIENCE

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
    pytest.mark.usefixtures("one_thread"),
]
RAM = "2GiB"
LENGTHS = [9, 4, 9, 17, 6]
OVERSHOOTS = {"anchors": 8, "construct_steps": 5, "adapt_epochs": 20, "adapt_lr": 3e-3, "batch": 16, "rows": 32}
TASK = {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.3}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama and two near it, with samples of five lengths and of one."""
    path = tmp_path_factory.mktemp("fda")
    base = llama(path / "base", 0)
    for seed, name in enumerate(("one", "two"), 1):
        llama(path / name, seed, base)
    samples(path / "real.jsonl", LENGTHS, 3)
    samples(path / "other.jsonl", [5, 5], 4)
    return path


def recipe(folder, parameters, **keys):
    models = [{"model": str(folder / name)} for name in ("one", "two")]
    values = {**OVERSHOOTS, **parameters}
    return {"merge_method": "fda", "base_model": str(folder / "base"), "models": models, "parameters": values, **keys}


def merge(folder, out, parameters, options=None, **keys):
    return sm.merge(recipe(folder, parameters, **keys), out, ram=RAM, device="cpu", **(options or {}))


def same(one, other):
    one, other = tensors(one), tensors(other)
    return all(torch.equal(one[name], other[name]) for name in one)


def given(folder, path, rows):
    """What a module of the base is given for each row, [1, tokens, d], by the model's own forward."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "base", attn_implementation="eager").eval()
    found = []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: found.append(args[0]))
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row["input_ids"]]))
    return found


def returned(folder, path, rows, inputs):
    """What the same module of another model returns for these."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    found = []
    model.get_submodule(path).register_forward_pre_hook(lambda _, args: (next(left), *args[1:]))
    model.get_submodule(path).register_forward_hook(
        lambda _, args, result: found.append(result[0] if isinstance(result, tuple) else result)
    )
    left = iter(inputs)
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([row["input_ids"]]))
    return found


def distance(ours, theirs, whole):
    """Minus the mean cosine: of samples where the unit is a whole layer, else of tokens."""
    parts = [(y.flatten(1), w.flatten(1)) if whole else (y[0], w[0]) for y, w in zip(ours, theirs, strict=True)]
    return -torch.cat([torch.nn.functional.cosine_similarity(y, w) for y, w in parts])


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("unit", "path"), [("mlp", ".mlp"), ("block", ""), ("mlp.*_proj", ".mlp.down_proj")])
def test_it_stops_by_what_units_are_given_in_reality(folder, tmp_path, unit, path):
    """The curve is that of the models themselves; what is kept is the best epoch, as if no other had followed."""
    report = merge(folder, tmp_path / "out", {"unit": unit, "early_stop": str(folder / "real.jsonl")})
    curves = report["fda_curves"]["held_out"]
    path = f"model.layers.1{path}"
    curve = [value for _, value in curves[path]["0"]]
    best = curve.index(min(curve))
    assert 0 < best == len(curve) - 1 - PATIENCE < OVERSHOOTS["adapt_epochs"] - PATIENCE
    assert report["fda"][path]["kept_epoch"] == best
    rows = rows_of(folder / "real.jsonl")
    inputs = given(folder, path, rows)
    for name, epoch in (("base", 0), ("out", best)):
        where = folder / name if name == "base" else tmp_path / name
        ours = returned(where, path, rows, inputs)
        found = [
            distance(ours, returned(folder / each, path, rows, inputs), unit == "block") for each in ("one", "two")
        ]
        assert curve[epoch] == pytest.approx(float(torch.cat(found).mean()), abs=1e-5)
    plain = merge(folder, tmp_path / "plain", {"unit": unit, "adapt_epochs": best})
    stopped, whole = tensors(tmp_path / "out"), tensors(tmp_path / "plain")
    assert all(torch.equal(stopped[name], whole[name]) for name in whole if name.startswith(path))
    assert report["read_bytes"] == report["predicted"]["read_bytes"] > plain["read_bytes"]


def test_a_file_of_each_model(folder, tmp_path):
    files = [str(folder / name) for name in ("real.jsonl", "other.jsonl")]
    report = merge(folder, tmp_path / "out", {"early_stop": files}, start=TASK)
    path = "model.layers.2.mlp"
    curve = [value for _, value in report["fda_curves"]["held_out"][path]["0"]]
    found = []
    for file, expert in zip(files, ("one", "two"), strict=True):
        rows = rows_of(folder / file.rpartition("/")[2])
        inputs = given(folder, path, rows)
        ours = returned(tmp_path / "out", path, rows, inputs)
        found.append(distance(ours, returned(folder / expert, path, rows, inputs), False))
    assert min(curve) == pytest.approx(float(torch.cat(found).mean()), abs=1e-5)
    turned = merge(folder, tmp_path / "turned", {"early_stop": files[::-1]}, start=TASK)
    assert turned["fda_curves"]["held_out"] != report["fda_curves"]["held_out"]


@pytest.mark.parametrize("name", ["bert", "bloom"])
def test_layers_of_others(tmp_path, name):
    """With a pooler behind them, and with attention that no rotary table shifts."""
    for seed, part in enumerate(("base", "one", "two")):
        tiny.save(tmp_path / part, name, seed=7 + seed)
    samples(tmp_path / "real.jsonl", LENGTHS, 3)
    parameters = {"unit": "block", "adapt_epochs": 2, "early_stop": str(tmp_path / "real.jsonl")}
    report = merge(tmp_path, tmp_path / "out", parameters)
    for curve in report["fda_curves"]["held_out"].values():
        assert len(curve["0"]) == 3


@pytest.mark.parametrize(
    "where", ["what units are given", "layers.0.mlp, expert 1", "layers.1.mlp, expert 0, step 3", "layers.1.mlp, adapt"]
)
def test_a_run_is_taken_up_where_it_was(folder, tmp_path, where):
    stop, parameters = threading.Event(), {"early_stop": str(folder / "real.jsonl")}

    def tell(now):
        if where in now.tensor:
            stop.set()

    with pytest.raises(Interrupted):
        merge(folder, tmp_path / "out", parameters, {"progress": tell, "cancel": stop}, start=TASK)
    merge(folder, tmp_path / "out", parameters, start=TASK)
    merge(folder, tmp_path / "whole", parameters, start=TASK)
    assert same(tmp_path / "out", tmp_path / "whole")
    assert not list((tmp_path / "out").glob("streammerge-*"))


def test_budgets_change_nothing(folder, tmp_path):
    body = recipe(folder, {"early_stop": str(folder / "real.jsonl"), "unit": "block", "adapt_epochs": 2})
    sm.merge(body, tmp_path / "wide", ram=RAM, device="cpu")
    least = sm.plan(body, ram=RAM, device="cpu").ram_peak_bytes
    sm.merge(body, tmp_path / "tight", ram=least + (8 << 20), device="cpu")
    assert same(tmp_path / "wide", tmp_path / "tight")


def test_the_work_is_that_of_the_samples(folder, tmp_path):
    """Other samples are other work, the same in another file's layout are not; a recipe's folder is looked into."""
    digests = []
    for number, text in enumerate(
        ['{"input_ids": [1, 2, 3]}', '{ "input_ids":[1,2,3] }\n', '{"input_ids": [1, 2, 4]}']
    ):
        place = tmp_path / str(number)
        place.mkdir()
        (place / "real.jsonl").write_text(text)
        (place / "fda.yml").write_text(json.dumps(recipe(folder, {"early_stop": "real.jsonl"})))
        digests.append(sm.plan(place / "fda.yml", ram=RAM, device="cpu").digest)
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "the samples cannot be read: No such file or directory"),
        ("", "holds no samples"),
        ("[1, 2]", "line 1: not an object"),
        (
            '{"input_ids": [1, 2]}\n{"input_ids": [1, 99]}',
            "line 2: token 99 lies outside the target's vocabulary of 61",
        ),
        ('{"text": "a b"}', "no tokenizer that transformers can load"),
    ],
)
def test_wrong_samples_are_one_clear_line(folder, tmp_path, text, message):
    if text is not None:
        (tmp_path / "real.jsonl").write_text(text)
    with pytest.raises(RecipeError, match=message) as error:
        sm.plan(recipe(folder, {"early_stop": str(tmp_path / "real.jsonl")}), ram=RAM, device="cpu")
    assert "\n" not in str(error.value)
    assert str(tmp_path / "real.jsonl") in str(error.value) or "tokenizer" in message


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"early_stop": ["a", "b", "c"]}, "3 files for 2 models; give one, or one each"),
        ({"early_stop": [0.1, 0.2]}, r"early_stop is \[0.1, 0.2\]; give one share, or files of samples"),
        ({"early_stop": True}, "early_stop: True is not a finite number"),
        ({"early_stop": 0.95}, "none of 8 anchors is left to learn from"),
        ({"early_stop": "x", "adapt": "closed_form"}, "early_stop ends the steps of adaptation; closed_form has none"),
        ({"early_stop": [{"filter": "layers.0", "value": "x"}, {"value": 0.1}]}, "samples are for the whole model"),
    ],
)
def test_a_wrong_stop_is_one_clear_line(folder, parameters, message):
    with pytest.raises(RecipeError, match=message) as error:
        sm.plan(recipe(folder, parameters), ram=RAM, device="cpu")
    assert "\n" not in str(error.value)


def test_images_are_no_rows_of_tokens(tmp_path):
    for part in ("base", "one", "two"):
        tiny.save(tmp_path / part, "vit")
    samples(tmp_path / "real.jsonl", LENGTHS)
    with pytest.raises(RecipeError, match="takes images, no tokens; give a share of anchors"):
        sm.plan(recipe(tmp_path, {"early_stop": str(tmp_path / "real.jsonl")}), ram=RAM, device="cpu")
