"""Reads and writes what a merge is given and leaves, with json and struct alone; material for end-to-end tests."""

import json
import struct

import build
import numpy as np
from merging import bf16

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
DEFAULTS = {"weight": [0.6, 0.3], "density": [0.5, 0.3], "gamma": [0.05, 0.1], "t": 0.3, "lambda": 0.9}
NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I64": "<i8", "I32": "<i4"}
SHAPES = {"embed": (40, 30), "layers.0.w": (64, 65), "layers.0.norm": (33,), "layers.1.w": (64, 65), "head": (40, 30)}


def read_shard(path):
    """name -> build.Tensor in the order of the data, which must lie without holes to the file's end."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    table.pop("__metadata__", None)
    data, at, found = raw[8 + length :], 0, {}
    for name, entry in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = entry["data_offsets"]
        assert begin == at
        at = end
        found[name] = build.Tensor(entry["dtype"], tuple(entry["shape"]), data[begin:end])
    assert at == len(data)
    return found


def read(folder):
    """The tensors of a checkpoint; an index must name each in the shard that holds it."""
    if not (folder / INDEX).exists():
        return read_shard(folder / WHOLE)
    weight_map = json.loads((folder / INDEX).read_bytes())["weight_map"]
    shards = {file: read_shard(folder / file) for file in sorted(set(weight_map.values()))}
    held = {name: file for file, tensors in shards.items() for name in tensors}
    assert held == weight_map
    assert {path.name for path in folder.glob("*.safetensors")} == set(shards)
    return {name: each for tensors in shards.values() for name, each in tensors.items()}


def values(tensor):
    """The numbers as float64."""
    if tensor.dtype == "BF16":
        return (np.frombuffer(tensor.data, "<u2").astype(np.uint32) << 16).view(np.float32).reshape(tensor.shape) * 1.0
    return np.frombuffer(tensor.data, NUMPY[tensor.dtype]).reshape(tensor.shape).astype(np.float64)


def rounded(array, dtype):
    """A tensor of the dtype, nearest to the numbers."""
    array = np.asarray(array, np.float64)
    if dtype == "BF16":
        return build.Tensor("BF16", array.shape, bf16(array.astype(np.float32)).tobytes())
    return build.Tensor(dtype, array.shape, array.astype(NUMPY[dtype]).tobytes())


def family(count, dtype="F32", shapes=SHAPES, seed=0):
    """A base and `count` experts near it, as name -> build.Tensor."""
    dice = np.random.default_rng(seed)
    base = {name: dice.normal(0, 0.05, shape) for name, shape in shapes.items()}
    near = [{name: each + dice.normal(0, 0.01, each.shape) for name, each in base.items()} for _ in range(count)]
    return [{name: rounded(each, dtype) for name, each in model.items()} for model in (base, *near)]


def write(folder, models, **more):
    """Every model as a checkpoint of one file: folder/0 is the base."""
    return [build.checkpoint(folder / str(i), {WHOLE: model}, **more) for i, model in enumerate(models)]


def close(found, exact, dtype="F32", terms=4):
    """Within one rounding of the dtype, and the few roundings of fp32 before it."""
    steps = {"F32": 2**-24, "BF16": 2**-8, "F16": 2**-11, "F64": 2**-24}
    scale = np.max(np.abs(exact), initial=1e-6)
    bound = 1.01 * steps[dtype] * np.abs(exact) + terms * 2**-23 * scale
    assert np.all(np.abs(found - exact) <= bound), np.max(np.abs(found - exact) / bound)
