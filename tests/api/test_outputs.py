"""What comes out: shards of a size, dtypes, config and side files; gradients, filters and slices in the numbers."""

import hashlib
import json
from pathlib import Path

import build
import numpy as np
import pytest
from reading import INDEX, WHOLE, close, family, read, read_shard, values, write

import streammerge as sm
from streammerge import api
from streammerge.errors import RecipeError

RAM = "1GiB"
CONFIG = {"num_hidden_layers": 4, "torch_dtype": "float32", "layer_types": ["full", "full", "sliding", "full"]}
LAYERS = {"embed": (8, 6), **{f"layers.{i}.{part}": (6, 6) for i in range(4) for part in ("attn", "mlp")}, "norm": (6,)}


def merged(recipe, out, **options):
    report = sm.merge(recipe, out, ram=RAM, **options)
    return read(out), report


def rows(models, **parameters):
    """Models of a recipe; lists have one value for each."""
    return [
        {"model": str(each), "parameters": {key: value[at] for key, value in parameters.items()}}
        for at, each in enumerate(models)
    ]


@pytest.fixture
def models(tmp_path):
    """A base and two experts of four layers: (tensors, folders)."""
    tensors = family(2, shapes=LAYERS)
    return tensors, write(tmp_path, tensors, config=CONFIG)


@pytest.mark.parametrize(("size", "shards"), [(200, 9), ("1KB", 2), ("2KiB", 1), (10**9, 1)])
def test_shard_size(tmp_path, models, size, shards):
    tensors, folders = models
    recipe = {"merge_method": "linear", "models": rows(folders, weight=[1.0, 2.0, 3.0])}
    plain, _ = merged(recipe, tmp_path / "plain")
    found, report = merged(recipe, tmp_path / "out", shard_size=size)
    assert found == plain
    assert list(found) == list(tensors[0])
    assert report["shards"] == shards == len(list((tmp_path / "out").glob("*.safetensors")))
    limit = size if isinstance(size, int) else {"1KB": 1000, "2KiB": 2048}[size]
    for path in (tmp_path / "out").glob("*.safetensors"):
        held = read_shard(path)
        assert len(held) == 1 or sum(len(each.data) for each in held.values()) <= limit
        raw = path.read_bytes()
        assert (8 + int.from_bytes(raw[:8], "little")) % 4096 == 0, "data starts at a page"
    assert (tmp_path / "out" / INDEX).exists() == (shards > 1)


def test_the_manifest_names_inputs_and_shards_by_hash(tmp_path, models):
    _, folders = models
    recipe = {"merge_method": "linear", "models": rows(folders, weight=[1.0, 2.0, 3.0])}
    _, report = merged(recipe, tmp_path / "out", shard_size="1KB")
    manifest = json.loads((tmp_path / "out" / "streammerge.json").read_bytes())
    assert manifest["report"] == report
    assert manifest["digest"] == report["digest"]
    assert [each["path"] for each in manifest["inputs"]] == [str(each) for each in folders]
    hashes = {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in (tmp_path / "out").glob("*.safetensors")}
    assert manifest["shards"] == hashes
    assert api.verify(tmp_path / "out")["bad"] == []
    assert report["write_bytes"] == sum(p.stat().st_size for p in (tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(("dtype", "stored"), [("bfloat16", "BF16"), ("float16", "F16"), ("float32", "F32")])
@pytest.mark.parametrize("key", ["dtype", "out_dtype"])
def test_a_dtype_reaches_tensors_and_config(tmp_path, models, key, dtype, stored):
    tensors, folders = models
    body = {"merge_method": "linear", "models": rows(folders[:2], weight=[1.0, 2.0]), key: dtype}
    found, _ = merged(body, tmp_path / "out")
    for name, each in found.items():
        assert each.dtype == stored
        close(values(each), (values(tensors[0][name]) + 2 * values(tensors[1][name])) / 3, stored)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {**CONFIG, "torch_dtype": dtype}


def test_side_files_come_from_the_base_or_from_the_named_model(tmp_path, models):
    _, folders = models
    for number, folder in enumerate(folders):
        (folder / "tokenizer.json").write_text(f'{{"of": {number}}}')
        (folder / "README.md").write_text("a card that would no longer be true")
        (folder / "pytorch_model.bin").write_bytes(b"no")
    body = {"merge_method": "task_arithmetic", "base_model": str(folders[0])}
    body["models"] = rows(folders[1:], weight=[0.5, 0.5])
    for number, source in ((0, None), (0, "base"), (2, str(folders[2]))):
        out = tmp_path / f"out{source is None}{number}"
        merged({**body, **({"tokenizer_source": source} if source else {})}, out)
        assert json.loads((out / "tokenizer.json").read_text()) == {"of": number}
        assert {p.name for p in out.iterdir()} == {WHOLE, "config.json", "tokenizer.json", "streammerge.json"}
        assert json.loads((out / "config.json").read_text()) == CONFIG


def test_gradients_and_filters_reach_the_numbers(tmp_path, models):
    tensors, folders = models
    slope = [{"filter": "mlp", "value": [0.0, 0.6]}, {"filter": "norm", "value": 0.9}, {"value": 0.5}]
    body = {
        "merge_method": "task_arithmetic",
        "base_model": str(folders[0]),
        "models": [
            {"model": str(folders[1]), "parameters": {"weight": slope}},
            {"model": str(folders[2]), "parameters": {"weight": [1.0, 0.0]}},
        ],
        "parameters": {"lambda": [{"filter": "embed", "value": 2.0}, {"value": 1.0}]},
    }
    found, _ = merged(body, tmp_path / "out")
    for name, each in found.items():
        layer = int(name.split(".")[1]) if name.startswith("layers") else None
        t = 0.0 if layer is None else layer / 3
        first = 0.6 * t if "mlp" in name else 0.9 if name == "norm" else 0.5
        base, one, two = (values(model[name]) for model in tensors)
        exact = base + (2.0 if name == "embed" else 1.0) * (first * (one - base) + (1 - t) * (two - base))
        close(values(each), exact)


def test_a_gradient_of_t_over_slices(tmp_path, models):
    """Depth counts within the slice; what is outside the layers lies at the first point."""
    tensors, folders = models
    source = [{"model": str(folder), "layer_range": [1, 4]} for folder in folders[:2]]
    body = {"merge_method": "linear", "slices": [{"sources": source}], "parameters": {"normalize": False}}
    source[0]["parameters"] = {"weight": [0.0, 1.0]}
    source[1]["parameters"] = {"weight": [1.0, 0.0]}
    found, _ = merged(body, tmp_path / "out")
    assert list(found) == [n for n in LAYERS if not n.startswith("layers.3")]
    for name, each in found.items():
        inside = name.startswith("layers")
        origin = f"layers.{int(name[7]) + 1}{name[8:]}" if inside else name
        t = int(name[7]) / 2 if inside else 0.0
        close(values(each), t * values(tensors[0][origin]) + (1 - t) * values(tensors[1][origin]))


def test_a_stack_of_layers_from_two_models(tmp_path, models):
    tensors, folders = models
    parts = [(0, 0, 2), (1, 1, 4), (0, 3, 4)]
    body = {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(folders[m]), "layer_range": [a, b]}]} for m, a, b in parts],
    }
    found, report = merged(body, tmp_path / "out")
    origin = [(m, layer) for m, first, end in parts for layer in range(first, end)]
    wanted = {"embed": tensors[0]["embed"]}
    for at, (model, layer) in enumerate(origin):
        for part in ("attn", "mlp"):
            wanted[f"layers.{at}.{part}"] = tensors[model][f"layers.{layer}.{part}"]
    wanted["norm"] = tensors[0]["norm"]
    assert list(found.items()) == list(wanted.items())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["full", "full", "full", "sliding", "full", "full"]
    assert report["tensors"] == len(wanted)


def test_scaled_layers(tmp_path, models):
    """The recipe that scales some layers of a stack to nothing."""
    tensors, folders = models
    scale = [{"filter": "attn", "value": 0.0}, {"value": 1.0}]
    source = {"model": str(folders[0]), "layer_range": [0, 2], "parameters": {"scale": scale}}
    found, _ = merged({"merge_method": "passthrough", "slices": [{"sources": [source]}]}, tmp_path / "out")
    for name, each in found.items():
        assert np.array_equal(values(each), 0 * values(each) if "attn" in name else values(tensors[0][name]))


def test_models_beside_the_recipe_are_found(tmp_path, monkeypatch):
    folder = tmp_path / "elsewhere"
    tensors = family(1)
    write(folder, tensors)
    recipe = build.recipe(folder / "r.yml", "linear", [Path("0"), Path("1")], weight=[1.0, 1.0])
    monkeypatch.chdir(tmp_path)
    found, _ = merged(recipe, Path("out"))
    assert (tmp_path / "out" / WHOLE).exists(), "OUT counts from the current folder"
    close(values(found["head"]), (values(tensors[0]["head"]) + values(tensors[1]["head"])) / 2)
    with pytest.raises(RecipeError, match=r"no model "):
        sm.plan({"merge_method": "passthrough", "models": [{"model": "./0"}]})
