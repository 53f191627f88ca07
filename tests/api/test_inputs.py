"""What may come in: shards, orders, alignments, every dtype of the format, tensors of no or one element."""

import build
import numpy as np
import pytest
import torch
from reading import SHAPES, WHOLE, close, family, read, read_shard, rounded, values, write

import streammerge as sm
from streammerge.errors import CheckpointError

RAM = "1GiB"
# every dtype of the format with the bits of an element; the floating ones merge, all others pass through
BITS = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FLOATING = {"F8_E5M2", "F8_E4M3", "F16", "BF16", "F32", "F64"}


def linear(models, **more):
    rows = [{"model": str(each), "parameters": {"weight": 1 + at}} for at, each in enumerate(models)]
    return {"merge_method": "linear", "models": rows, **more}


def merged(recipe, out, **options):
    report = sm.merge(recipe, out, ram=RAM, **options)
    return read(out), report


def halves(model):
    """The tensors in two shards."""
    names = list(model)
    first, second = names[: len(names) // 2], names[len(names) // 2 :]
    return {
        "model-00001-of-00002.safetensors": {name: model[name] for name in first},
        "model-00002-of-00002.safetensors": {name: model[name] for name in second},
    }


def test_shards_and_orders_do_not_matter(tmp_path):
    base, *experts = family(2)
    plain, _ = merged(linear(write(tmp_path / "plain", [base, *experts])), tmp_path / "one")
    exact = [(values(base[key]) + 2 * values(experts[0][key]) + 3 * values(experts[1][key])) / 6 for key in SHAPES]
    for found, wanted in zip(plain.values(), exact, strict=True):
        close(values(found), wanted)
    sharded = build.checkpoint(tmp_path / "sharded", halves(base))
    backwards = build.checkpoint(tmp_path / "backwards", {WHOLE: dict(reversed(experts[0].items()))})
    halved = build.checkpoint(tmp_path / "halved", halves(dict(reversed(experts[1].items()))))
    again, report = merged(linear([sharded, backwards, halved]), tmp_path / "two")
    assert again == plain
    assert report["shards"] == 2
    for name, tensors in halves(base).items():
        assert list(read_shard(tmp_path / "two" / name)) == list(tensors), "the base's shards and order are kept"


@pytest.mark.parametrize("dtype", ["F32", "BF16", "F64", "F16"])
@pytest.mark.parametrize("lead", [1, 2, 3, 4, 7])
def test_headers_of_odd_length(tmp_path, dtype, lead):
    """Data that starts anywhere in a file, each input elsewhere."""
    models = family(2, dtype)
    plain, _ = merged(linear(write(tmp_path, models)), tmp_path / "plain")
    folders = []
    for number, model in enumerate(models):
        raw = build.shard(model)
        length = int.from_bytes(raw[:8], "little")
        spaces = (lead * (number + 1) - 8 - length) % 8
        folder = tmp_path / f"odd{number}"
        folder.mkdir()
        (folder / WHOLE).write_bytes(build.raw_file(raw[8 : 8 + length] + b" " * spaces, raw[8 + length :]))
        folders.append(folder)
    odd, _ = merged(linear(folders), tmp_path / "odd")
    assert odd == plain


def every_dtype(fill):
    """One tensor of every dtype, of three rows of eight elements."""
    return {f"a.{name}": build.Tensor(name, (3, 8), fill(name, 3 * bits)) for name, bits in BITS.items()}


def test_every_dtype_passes_through(tmp_path):
    """A copy is a copy, whatever the bytes mean."""
    dice = np.random.default_rng(1)
    model = every_dtype(lambda name, size: dice.bytes(size))
    (folder,) = write(tmp_path, [model])
    copy, _ = merged({"merge_method": "passthrough", "models": [{"model": str(folder)}]}, tmp_path / "out")
    assert copy == model
    for name, tensor in sm.stream({"merge_method": "passthrough", "models": [{"model": str(folder)}]}, ram=RAM):
        assert tensor.reshape(-1).view(torch.uint8).numpy().tobytes() == model[name].data
        if BITS[name[2:]] >= 8:
            assert tuple(tensor.shape) == (3, 8)
        else:
            assert tensor.numel() in (12, 18), "torch has pairs of four bits, and no six bits"


def test_what_no_arithmetic_is_defined_on_is_the_bases(tmp_path):
    one, two = (every_dtype(lambda name, size, byte=byte: bytes([byte]) * size) for byte in (0x30, 0x31))
    found, report = merged(linear(write(tmp_path, [one, two])), tmp_path / "out")
    for name, tensor in found.items():
        if name[2:] in FLOATING:
            assert tensor.data != one[name].data
        else:
            assert tensor == one[name]
    (warning,) = report["warnings"]
    assert warning.startswith(f"{len(BITS) - len(FLOATING)} tensors no arithmetic can merge, copied from ")


def test_fp8_without_scales_merges(tmp_path):
    pair = []
    for number in range(2):
        numbers = torch.randn(50, 30, generator=torch.Generator().manual_seed(number)).to(torch.float8_e4m3fn)
        pair.append({"w": build.Tensor("F8_E4M3", (50, 30), numbers.view(torch.uint8).numpy().tobytes())})
    found, _ = merged(linear(write(tmp_path, pair)), tmp_path / "out")
    a, b = (torch.frombuffer(bytearray(each["w"].data), dtype=torch.float8_e4m3fn).double() for each in pair)
    exact = ((a + 2 * b) / 3).float().to(torch.float8_e4m3fn)
    result = torch.frombuffer(bytearray(found["w"].data), dtype=torch.float8_e4m3fn)
    assert (exact.view(torch.uint8) != result.view(torch.uint8)).sum() <= 2, "near a tie fp32 may fall the other way"
    assert ((exact.double() - result.double()).abs() <= 0.13 * exact.double().abs() + 2**-9).all()


@pytest.mark.parametrize("method", ["linear", "ties", "slerp", "dare_ties", "model_stock", "breadcrumbs"])
def test_tensors_of_no_and_of_one_element(tmp_path, method):
    shapes = {"none": (0,), "scalar": (), "one": (1,), "rows": (0, 5), "columns": (5, 0), "w": (3, 3), "last": (2, 0)}
    base, *experts = family(2, shapes=shapes)
    root, *near = write(tmp_path, [base, *experts])
    parameters = {"linear": {"weight": 1.0}, "slerp": {"t": 0.5}, "model_stock": {}}.get(method, {"weight": 1.0})
    near = near[:1] if method == "slerp" else near
    body = build.recipe(tmp_path / "r.yml", method, near, None if method == "linear" else root, **parameters)
    found, _ = merged(body, tmp_path / "out")
    assert {name: each.shape for name, each in found.items()} == shapes
    assert all(np.isfinite(values(each)).all() for each in found.values())
    assert [(name, tuple(each.shape)) for name, each in sm.stream(body, ram=RAM)] == list(shapes.items())


def test_equal_tensors_are_copied_to_the_bit(tmp_path):
    """Frozen embeddings survive any method that keeps them, odd bit patterns too, and are counted."""
    base, *experts = family(2)
    frozen = np.array([-0.0, 0.0, 1e-40, 3.4e38, -1e-45, 0.1], np.float32)
    for model in (base, *experts):
        model["frozen"] = rounded(frozen, "F32")
    root, *near = write(tmp_path, [base, *experts])
    for method in ("linear", "ties", "task_arithmetic", "dare_ties"):
        recipe = build.recipe(tmp_path / "r.yml", method, near, None if method == "linear" else root, weight=0.7)
        found, report = merged(recipe, tmp_path / method)
        assert found["frozen"].data == frozen.tobytes()
        assert report["copied_tensors"] == 1


def test_a_float_of_double_precision_is_computed_in_single(tmp_path):
    one, two = ({"w": rounded(np.array([1.0, 1 + 2**-40, 1e-300]) * k, "F64")} for k in (1, 3))
    found, _ = merged(linear(write(tmp_path, [one, two])), tmp_path / "out")
    assert found["w"].dtype == "F64"
    np.testing.assert_allclose(values(found["w"]), [7 / 3, 7 / 3, 0], rtol=2e-7)
    same, _ = merged(
        linear(
            [
                tmp_path / "1",
                tmp_path / "1",
            ][:1]
        ),
        tmp_path / "copy",
    )
    assert same["w"] == two["w"], "what is copied keeps all its bits"


def test_a_missing_tensor_and_one_too_many(tmp_path):
    base, expert = family(1)
    less = {name: each for name, each in expert.items() if name != "head"}
    root, near = write(tmp_path, [base, less])
    with pytest.raises(CheckpointError, match=r"no tensor 'head', which .* has; its head may be tied"):
        sm.plan(linear([root, near]))
    found, report = merged(linear([near, root]), tmp_path / "out")
    assert list(found) == list(less)
    assert report["warnings"] == [f"{root}: 1 tensor that {near} lacks, left out (head)"]
