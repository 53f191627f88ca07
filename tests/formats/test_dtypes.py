"""The table of dtypes against torch and against the library's own reading of each dtype."""

import json
import math

import build
import pytest
import safetensors
import torch

from streammerge.errors import RecipeError
from streammerge.formats.dtypes import DTYPES, RECIPE_NAMES, from_recipe, size_fault

FORMAT = [
    "BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ",
    "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16", "I32", "U32", "F32", "C64", "F64", "I64", "U64",
]  # fmt: skip


def test_every_dtype_of_the_format_is_there():
    assert sorted(DTYPES) == sorted(FORMAT)
    assert all(name == row.name for name, row in DTYPES.items())


@pytest.mark.parametrize("name", FORMAT)
def test_bits_are_those_of_the_library(name):
    """Four elements fill whole bytes in every dtype; the library accepts the right number of bytes only."""
    right = DTYPES[name].bits * 4 // 8
    for nbytes in range(40):
        entry = {"dtype": name, "shape": [4], "data_offsets": [0, nbytes]}
        file = build.raw_file(json.dumps({"t": entry}), bytes(nbytes))
        if nbytes == right:
            assert safetensors.deserialize(file)[0][1]["dtype"] == name
        else:
            with pytest.raises(safetensors.SafetensorError):
                safetensors.deserialize(file)


@pytest.mark.parametrize("name", [name for name in FORMAT if DTYPES[name].torch])
def test_torch_names(name):
    """Torch's dtype has the table's size (F4 is two to a byte there) and, where computed on, is a float."""
    dtype = getattr(torch, DTYPES[name].torch)
    assert dtype.itemsize * 8 == DTYPES[name].bits * (2 if name == "F4" else 1)
    assert dtype.is_floating_point or not DTYPES[name].floating


def test_what_can_be_computed_on():
    floating = {name for name in FORMAT if DTYPES[name].floating}
    assert floating == {"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"}


@pytest.mark.parametrize(
    ("written", "dtype"),
    [
        ("bfloat16", "BF16"),
        ("torch.bfloat16", "BF16"),
        ("BF16", "BF16"),
        ("float16", "F16"),
        ("float32", "F32"),
        ("float64", "F64"),
        ("float8_e4m3fn", "F8_E4M3"),
        ("float8_e5m2", "F8_E5M2"),
    ],
)
def test_recipe_names(written, dtype):
    assert from_recipe(written) == dtype


@pytest.mark.parametrize("written", ["int64", "I64", "float", "", "torch.", "bfloat17"])
def test_other_recipe_names_are_refused(written):
    with pytest.raises(RecipeError, match="unknown dtype") as caught:
        from_recipe(written)
    assert all(name in str(caught.value) for name in RECIPE_NAMES)


@pytest.mark.parametrize(
    ("dtype", "shape", "nbytes", "fault"),
    [
        ("F32", [], 4, None),
        ("F32", [2, 3], 24, None),
        ("F32", [0, 7], 0, None),
        ("F4", [2, 3], 3, None),
        ("F6_E2M3", [4], 3, None),
        ("F32", [2, 3], 20, "shape [2, 3] of F32 needs 24 bytes, its offsets span 20"),
        ("F4", [3], 2, "shape [3] of F4 is 12 bits, which does not fill whole bytes"),
        ("F64", [2**31, 2**31], 2**65, f"shape [{2**31}, {2**31}] of F64 is more than 2^63 - 1 bits"),
        ("U8", [0, 2**62, 2**62], 0, f"shape [0, {2**62}, {2**62}] of U8 is more than 2^63 - 1 bits"),
    ],
)
def test_size_fault(dtype, shape, nbytes, fault):
    assert size_fault(dtype, shape, nbytes) == fault
    if fault is None:
        assert math.prod(shape) * DTYPES[dtype].bits == 8 * nbytes
