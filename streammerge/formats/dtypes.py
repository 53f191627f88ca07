"""Every dtype of the safetensors format: its size, its torch name, and whether a merge can compute on it.

The header's own strings ("BF16") name dtypes everywhere in this package. A dtype that is not `floating`
(integers, booleans, complex numbers, the scale and the packed formats) is never computed on: its bytes pass
through as they are. F8_E4M3 is torch's float8_e4m3fn. F4 holds two values in a byte, so that torch's last
dimension is half the header's; torch has no six-bit dtype at all.
Source: the safetensors format description, version 0.8.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from streammerge.errors import RecipeError

MAX_INT = 2**63 - 1  # largest extent, offset and number of bits


class DType(NamedTuple):
    """One row of the table; `torch` is the attribute's name in torch, None where it has none."""

    name: str
    bits: int
    torch: str | None
    floating: bool = False


DTYPES: dict[str, DType] = {
    row.name: row
    for row in (
        DType("BOOL", 8, "bool"),
        DType("F4", 4, "float4_e2m1fn_x2"),
        DType("F6_E2M3", 6, None),
        DType("F6_E3M2", 6, None),
        DType("U8", 8, "uint8"),
        DType("I8", 8, "int8"),
        DType("F8_E5M2", 8, "float8_e5m2", floating=True),
        DType("F8_E4M3", 8, "float8_e4m3fn", floating=True),
        DType("F8_E8M0", 8, "float8_e8m0fnu"),
        DType("F8_E4M3FNUZ", 8, "float8_e4m3fnuz"),
        DType("F8_E5M2FNUZ", 8, "float8_e5m2fnuz"),
        DType("I16", 16, "int16"),
        DType("U16", 16, "uint16"),
        DType("F16", 16, "float16", floating=True),
        DType("BF16", 16, "bfloat16", floating=True),
        DType("I32", 32, "int32"),
        DType("U32", 32, "uint32"),
        DType("F32", 32, "float32", floating=True),
        DType("C64", 64, "complex64"),
        DType("F64", 64, "float64", floating=True),
        DType("I64", 64, "int64"),
        DType("U64", 64, "uint64"),
    )
}

SIGNS = "SIGNS"  # no dtype of the format: voted signs beside a tensor, two bits each, stored as U8

# What a recipe may write for a dtype to compute in or to save as: torch's names and three short ones.
RECIPE_NAMES: dict[str, str] = {
    **{row.torch: row.name for row in DTYPES.values() if row.floating and row.torch},
    "bf16": "BF16",
    "fp16": "F16",
    "fp32": "F32",
}


def bits_of(dtype: str) -> int:
    """Bits of one element, of voted signs too."""
    return 2 if dtype == SIGNS else DTYPES[dtype].bits


def from_recipe(name: str) -> str:
    """The header's string for a recipe's dtype name: "bfloat16", "torch.bfloat16" and "BF16" give "BF16"."""
    plain = name.removeprefix("torch.")
    if plain in DTYPES and DTYPES[plain].floating:
        return plain
    if plain not in RECIPE_NAMES:
        raise RecipeError(f"unknown dtype {name!r}; use one of {', '.join(RECIPE_NAMES)}")
    return RECIPE_NAMES[plain]


def size_fault(dtype: str, shape: Sequence[int], nbytes: int) -> str | None:
    """Why `shape` of `dtype` does not fill `nbytes`, or None. Extents beside a zero count too."""
    bits = DTYPES[dtype].bits
    if bits * math.prod(extent for extent in shape if extent) > MAX_INT:
        return f"shape {list(shape)} of {dtype} is more than 2^63 - 1 bits"
    need = bits * math.prod(shape)
    if need % 8:
        return f"shape {list(shape)} of {dtype} is {need:,} bits, which does not fill whole bytes"
    if need != 8 * nbytes:
        return f"shape {list(shape)} of {dtype} needs {need // 8:,} bytes, its offsets span {nbytes:,}"
    return None
