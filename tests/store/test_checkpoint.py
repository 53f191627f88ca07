"""Opening checkpoints: what is found, in which order, and what is refused."""

import builtins
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import build
import numpy as np
import pytest

from streammerge.errors import CheckpointError
from streammerge.store.checkpoint import Checkpoint

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
F = np.float32


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    line = str(caught.value)
    assert line.isprintable()
    return line


def sharded(folder):
    first = {"b": build.bf16([1.0, 2.0]), "a": np.zeros((2, 3), F)}
    return build.checkpoint(folder, {TWO: {"c": np.ones(3, np.float16)}, ONE: first}, config={"model_type": "x"})


def test_a_sharded_folder(tmp_path):
    opened = Checkpoint.open(sharded(tmp_path / "m"))
    assert list(opened.shards) == [ONE, TWO]
    assert [(s.name, s.dtype, s.shape) for s in opened.tensors.values()] == [
        ("b", "BF16", (2,)),
        ("a", "F32", (2, 3)),
        ("c", "F16", (3,)),
    ]
    assert list(opened.tensors) == ["b", "a", "c"]
    assert opened.metadata == {"format": "pt"}
    assert opened.config == {"model_type": "x"}
    c = opened.tensors["c"]
    assert Path(c.file).read_bytes()[c.begin : c.end] == np.ones(3, np.float16).tobytes()
    assert c.file == str(tmp_path / "m" / TWO)


def test_a_relative_path_becomes_absolute(tmp_path, monkeypatch):
    sharded(tmp_path / "m")
    monkeypatch.chdir(tmp_path)
    opened = Checkpoint.open("m")
    assert opened.path == tmp_path / "m"
    assert opened.tensors["a"].file == str(tmp_path / "m" / ONE)


def test_the_model_index_decides_over_others(tmp_path):
    sharded(tmp_path)
    (tmp_path / "other.safetensors.index.json").write_text('{"weight_map":{"x":"consolidated.safetensors"}}')
    (tmp_path / "consolidated.safetensors").write_bytes(build.shard({"x": np.zeros(1, F)}))
    assert list(Checkpoint.open(tmp_path).shards) == [ONE, TWO]


def test_one_other_index_is_used(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors.index.json").rename(tmp_path / "unet.fp16.safetensors.index.json")
    (tmp_path / "stray.safetensors").write_bytes(build.shard({"x": np.zeros(1, F)}))
    assert list(Checkpoint.open(tmp_path).shards) == [ONE, TWO]


def test_model_safetensors_decides_over_others(tmp_path):
    build.checkpoint(
        tmp_path,
        {"model.safetensors": {"a": np.zeros(1, F)}, "z.safetensors": {"a": np.ones(1, F)}},
        index=False,
    )
    assert list(Checkpoint.open(tmp_path).shards) == ["model.safetensors"]


def test_other_names_and_several_without_index(tmp_path):
    build.checkpoint(
        tmp_path, {"y.safetensors": {"b": np.zeros(1, F)}, "x.safetensors": {"a": np.ones(1, F)}}, index=False
    )
    (tmp_path / "._x.safetensors").write_bytes(b"not for us")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"nor this")
    assert list(Checkpoint.open(tmp_path).tensors) == ["a", "b"]
    (tmp_path / "y.safetensors").unlink()
    assert list(Checkpoint.open(tmp_path).tensors) == ["a"]


def test_one_file(tmp_path):
    sharded(tmp_path)
    opened = Checkpoint.open(tmp_path / TWO)
    assert (list(opened.shards), list(opened.tensors)) == ([TWO], ["c"])
    assert (opened.side_files, opened.config) == ((), None)


def test_metadata_of_the_first_shard_wins(tmp_path):
    (tmp_path / "a.safetensors").write_bytes(build.shard({"a": np.zeros(1, F)}, {"format": "pt", "x": "1"}))
    (tmp_path / "b.safetensors").write_bytes(build.shard({"b": np.zeros(1, F)}, {"format": "np", "y": "2"}))
    assert Checkpoint.open(tmp_path).metadata == {"format": "pt", "x": "1", "y": "2"}


def test_links_as_in_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = sharded(tmp_path / "blobs"), tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for number, file in enumerate(sorted(blobs.iterdir())):
        file.chmod(0o444)
        blob = file.rename(blobs / f"sha{number}")
        (snapshot / file.name).symlink_to(Path("../../blobs") / blob.name)
    opened = Checkpoint.open(snapshot)
    assert list(opened.shards) == [ONE, TWO]
    assert [file.name for file in opened.side_files] == ["config.json"]
    assert opened.config == {"model_type": "x"}


def test_side_files(tmp_path):
    sharded(tmp_path)
    side = ["LICENSE", "chat_template.jinja", "generation_config.json", "merges.txt", "modeling_x.py"]
    side += ["tokenizer.json", "tokenizer.model", "vocab.txt"]
    not_side = [
        "README.md",
        ".gitattributes",
        ".hidden",
        "pytorch_model.bin",
        "a.pt",
        "a.pth",
        "a.gguf",
        "tf_model.h5",
    ]
    not_side += ["flax_model.msgpack", "a.onnx", "streammerge.json", "a.lock", "pytorch_model.bin.index.json"]
    for name in side + not_side:
        (tmp_path / name).write_text("{}")
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "params.json").write_text("{}")
    (tmp_path / "dangling.txt").symlink_to("nowhere")
    os.mkfifo(tmp_path / "pipe.txt")
    assert Checkpoint.open(tmp_path).side_files == tuple(tmp_path / name for name in sorted([*side, "config.json"]))


@pytest.mark.parametrize(
    ("config", "fault"),
    [
        ('{"a": 1,}', "bad JSON: "),
        ("[]", "the file is [], it must be an object"),
        ('{"a":{"b":1,"b":2}}', "bad JSON: the key 'b' stands twice in one object"),
        pytest.param("[" * 100_000, "nested too deeply", id="deep"),
    ],
)
def test_a_broken_config(tmp_path, config, fault):
    sharded(tmp_path)
    (tmp_path / "config.json").write_text(config)
    assert refusal(tmp_path).startswith(f"{tmp_path / 'config.json'}: {fault}")


def test_no_config(tmp_path):
    sharded(tmp_path)
    (tmp_path / "config.json").unlink()
    assert Checkpoint.open(tmp_path).config is None


INDEX = "model.safetensors.index.json"
AGAIN = "; download index and shards again"


@pytest.mark.parametrize(
    ("weight_map", "line"),
    [
        (
            {"a": ONE, "b": TWO, "c": TWO},
            f"tensor 'b' should be in {TWO}, which does not hold it; {ONE} does{AGAIN}",
        ),
        (
            {"a": ONE, "b": ONE, "c": TWO, "d": TWO},
            f"tensor 'd' should be in {TWO}, which does not hold it; no other shard does{AGAIN}",
        ),
        ({"a": ONE, "c": TWO}, f"tensor 'b' of {ONE} is not listed{AGAIN}"),
        ({"a": ONE, "b": ONE}, None),
    ],
)
def test_index_and_shards_must_agree(tmp_path, weight_map, line):
    """The last case lists one of the two shards: one that the index leaves out is not part of the model."""
    sharded(tmp_path)
    build.write_index(tmp_path, weight_map)
    if line is None:
        assert list(Checkpoint.open(tmp_path).shards) == [ONE]
    else:
        assert refusal(tmp_path) == f"{tmp_path / INDEX}: {line}"


def test_a_missing_shard_is_named_with_its_tensors(tmp_path):
    sharded(tmp_path)
    (tmp_path / ONE).unlink()
    line = f"{tmp_path / INDEX}: tensor 'b' and 1 more should be in {ONE}, which is missing; download it"
    assert refusal(tmp_path) == line
    shutil.rmtree(tmp_path)
    sharded(tmp_path)
    (tmp_path / TWO).unlink()
    assert refusal(tmp_path) == f"{tmp_path / INDEX}: tensor 'c' should be in {TWO}, which is missing; download it"


def test_a_tensor_in_two_shards(tmp_path):
    shards = {ONE: {"a": np.zeros(1, F), "b": np.zeros(1, F)}, TWO: {"a": np.zeros(1, F)}}
    line = f"{tmp_path}: tensor 'a' is in two shards, {ONE} and {TWO}; remove one of them"
    build.checkpoint(tmp_path, shards, index=False)
    assert refusal(tmp_path) == line
    build.write_index(tmp_path, {"a": ONE, "b": TWO})
    assert refusal(tmp_path) == line


def test_a_broken_shard_is_named(tmp_path):
    sharded(tmp_path)
    with (tmp_path / ONE).open("r+b") as file:
        file.truncate((tmp_path / ONE).stat().st_size - 5)
    assert refusal(tmp_path).startswith(f"{tmp_path / ONE}: the file is cut short: 5 of ")


def test_a_numbered_set_must_be_complete(tmp_path):
    """Without an index nothing else tells that a download stopped halfway."""
    sharded(tmp_path)
    (tmp_path / INDEX).unlink()
    assert list(Checkpoint.open(tmp_path).shards) == [ONE, TWO]
    (tmp_path / ONE).unlink()
    assert refusal(tmp_path) == f"{tmp_path}: {ONE} is missing; download it"


def test_two_ways_to_read_one_folder_are_refused(tmp_path):
    sharded(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(build.shard({"a": np.zeros(1, F)}))
    line = f"holds both model.safetensors and {INDEX}, which does not list it; remove one of them"
    assert refusal(tmp_path) == f"{tmp_path}: {line}"
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / INDEX).rename(tmp_path / "a.safetensors.index.json")
    shutil.copy(tmp_path / "a.safetensors.index.json", tmp_path / "b.safetensors.index.json")
    line = "holds 2 indexes, 'a.safetensors.index.json', 'b.safetensors.index.json'; leave one"
    assert refusal(tmp_path) == f"{tmp_path}: {line}"


@pytest.mark.parametrize(
    ("files", "line"),
    [
        ([], "no .safetensors file in it; give the folder of a checkpoint"),
        (["config.json"], "no .safetensors file in it; give the folder of a checkpoint"),
        (
            ["pytorch_model.bin"],
            "only pickles ('pytorch_model.bin'), never opened here; convert them to safetensors",
        ),
        (
            ["consolidated.00.pth"],
            "only pickles ('consolidated.00.pth'), never opened here; convert them to safetensors",
        ),
        (
            ["adapter_config.json", "adapter_model.bin"],
            "an adapter (adapter_config.json) and not a model; merge it into its base model first",
        ),
        (
            ["adapter_model.safetensors"],
            "an adapter (adapter_model.safetensors) and not a model; merge it into its base model first",
        ),
        (
            ["m.Q4_K_M.gguf"],
            "only GGUF ('m.Q4_K_M.gguf'); use the safetensors checkpoint that it was made from",
        ),
        (["a\nb.safetensors"], "'a\\nb.safetensors' has characters that cannot be printed; rename it"),
    ],
)
def test_folders_that_are_no_checkpoint(tmp_path, files, line):
    for file in files:
        (tmp_path / file).write_bytes(b"{}")
    assert refusal(tmp_path) == f"{tmp_path}: {line}"


def test_paths_that_are_no_checkpoint(tmp_path):
    assert refusal(tmp_path / "none") == f"{tmp_path / 'none'}: no such file or folder; check the path"
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    assert refusal(tmp_path / "model.gguf") == (
        f"{tmp_path / 'model.gguf'}: not a safetensors file; "
        "give a folder with safetensors shards, or a .safetensors file"
    )
    (tmp_path / "empty.safetensors").write_bytes(build.raw_file("{}"))
    assert refusal(tmp_path / "empty.safetensors") == (
        f"{tmp_path / 'empty.safetensors'}: holds no tensors; give a checkpoint with weights"
    )
    long = tmp_path / ("n" * 300)
    assert refusal(long) == f"{long}: File name too long; check the path and its permissions"


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_shard_must_be_a_regular_file(tmp_path, make):
    sharded(tmp_path)
    (tmp_path / ONE).unlink()
    make(tmp_path / ONE)
    assert refusal(tmp_path) == f"{tmp_path / ONE}: not a regular file; give a safetensors file"


def test_the_fingerprint_follows_names_headers_and_sizes(tmp_path):
    prints = [Checkpoint.open(sharded(tmp_path / "m")).fingerprint()]
    assert prints[0] == Checkpoint.open(shutil.copytree(tmp_path / "m", tmp_path / "copy")).fingerprint()
    assert len(prints[0]) == 64
    (tmp_path / "m" / "config.json").unlink()
    assert Checkpoint.open(tmp_path / "m").fingerprint() == prints[0]
    shape = build.shard({"c": np.ones(4, np.float16)}, {"format": "pt"})
    name = build.shard({"d": np.ones(3, np.float16)}, {"format": "pt"})
    for number, content in enumerate((shape, name)):
        (tmp_path / f"{number}.safetensors").write_bytes(content)
        prints.append(Checkpoint.open(tmp_path / f"{number}.safetensors").fingerprint())
    (tmp_path / "2.safetensors").write_bytes(name)
    prints.append(Checkpoint.open(tmp_path / "2.safetensors").fingerprint())
    assert len(set(prints)) == 4


def test_opening_reads_no_weights(tmp_path, monkeypatch):
    """Every byte asked of a shard lies before its data."""
    sharded(tmp_path)
    asked = []

    def pread(descriptor, count, at, real=os.pread):
        asked.append((Path(f"/proc/self/fd/{descriptor}").readlink(), at + count))
        return real(descriptor, count, at)

    def opened(file, *args, real=builtins.open, **kwargs):
        assert not str(file).endswith(".safetensors")
        return real(file, *args, **kwargs)

    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(builtins, "open", opened)
    shards = Checkpoint.open(tmp_path).shards
    assert {file.name for file, _ in asked} == set(shards)
    assert all(end <= shards[file.name].data_start for file, end in asked)


def test_a_large_checkpoint_opens_quickly(tmp_path):
    """20,000 tensors in 40 shards, as a mixture of experts has."""
    shards, weight_map = 40, {}
    for at in range(shards):
        file = f"model-{at + 1:05}-of-{shards:05}.safetensors"
        names = [f"model.layers.{at}.mlp.experts.{expert}.up_proj.weight" for expert in range(500)]
        table = {n: {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i, n in enumerate(names)}
        (tmp_path / file).write_bytes(build.raw_file(json.dumps(table), bytes(500)))
        weight_map |= dict.fromkeys(names, file)
    build.write_index(tmp_path, weight_map)
    started = time.process_time()
    assert list(Checkpoint.open(tmp_path).tensors) == list(weight_map)
    assert time.process_time() - started < 1.5


def test_torch_and_the_hub_are_not_imported():
    code = "import sys, streammerge.store.checkpoint, streammerge.store.hub; print(*sys.modules)"
    root = Path(__file__).parents[2]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "streammerge.formats.header" in ran.stdout.split()
    assert not {"torch", "huggingface_hub"} & set(ran.stdout.split())
