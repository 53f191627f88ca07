"""What the references share: torch's side of numerics.py. Imported inside references, and by tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .numerics import ITEMSIZE, LANES, PARTITION, ROUNDING, Array, Partition, Span, Stochastic

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
INTEGERS = {"I8": torch.int8, "I16": torch.int16, "U8": torch.uint8}  # votes and bits; no kernel computes in them
NAMES = {dtype: name for name, dtype in (DTYPES | INTEGERS).items()}
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
NANS = {"F32": 0x7FC00000, "BF16": 0x7FC0, "F16": 0x7E00, "F64": 0x7FF8 << 48, "F8_E4M3": 0x7F, "F8_E5M2": 0x7F}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The patterns as integers of the same size."""
    return tensor.view(BITS[tensor.element_size()])


def rounded(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 to `dtype`: nearest even, one NaN pattern, F8_E4M3 saturated (older versions of torch give NaN there)."""
    if dtype == torch.float8_e4m3fn:
        value = value.clamp(-448, 448)
    result = value.to(dtype)
    nan = torch.tensor(NANS[NAMES[dtype]], dtype=bits(result).dtype, device=value.device)
    return torch.where(value.isnan(), nan, bits(result)).view(dtype)


def write(out: torch.Tensor, value: torch.Tensor, start: int = 0, rounding: Stochastic | None = None) -> None:
    """Round fp32 values into `out`, whose first element is element `start` of its tensor."""
    if rounding is None:
        bits(out).copy_(bits(rounded(value, out.dtype)))
    else:
        words = philox(start, out.numel(), *rounding, ROUNDING, out.device)
        bits(out).copy_(bits(dithered(value, out.dtype, words)))


def dithered(value: torch.Tensor, dtype: torch.dtype, words: torch.Tensor) -> torch.Tensor:
    """fp32 to `dtype`, up or down by a random word each (philox): numerics.dithered by its definition, in fp64."""
    if dtype in (torch.float32, torch.float64):
        return rounded(value, dtype)
    info, size = torch.finfo(dtype), value.abs().double()
    mantissa = -int(math.log2(info.eps))
    exponent = (torch.frexp(size)[1].long() - 1).clamp(min=int(math.log2(info.smallest_normal)))
    step = ((exponent - mantissa + 1023) << 52).view(torch.float64)
    whole = (size / step).floor()
    part = ((size / step - whole) * 2.0**31).floor()
    result = torch.where((words >> 1) + part >= 2.0**31, whole + 1, whole) * step
    result = torch.where(size > info.max, size, result)
    return rounded(result.float().copysign(value), dtype)


def flags(*tensors: torch.Tensor) -> Array:
    """0 finite, 1 has an infinity, 2 has a NaN; of the fp32 values."""
    found = [2 * int(t.float().isnan().any()) or int(t.float().isinf().any()) for t in tensors]
    return np.array(found, np.uint8)


def magnitude(value: torch.Tensor) -> torch.Tensor:
    """Sort keys of |value|, as int64."""
    key = (value.view(torch.int32) & 0x7FFFFFFF).long()
    return torch.where(value.isnan(), 0x7FC00000, key)


def philox(start: int, numel: int, seed: int, tensor_id: int, stream: int, device: Any = "cpu") -> torch.Tensor:
    """Philox4x32-10 words of elements start ... start + numel - 1, as int64 (whose product wraps: only bits count)."""
    low = 0xFFFFFFFF
    element = torch.arange(start, start + numel, device=device)
    q = element >> 2
    a, b = q & low, (q >> 32) & low
    c, d = torch.full_like(q, tensor_id), torch.full_like(q, stream)
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        p, r = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = ((r >> 32) & low) ^ b ^ k0, r & low, ((p >> 32) & low) ^ d ^ k1, p & low
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    return torch.stack([a, b, c, d]).gather(0, (element & 3)[None])[0]


def partition(start: int, numel: int, groups: int, split: Partition, device: Any = "cpu") -> torch.Tensor:
    """The group of each element, as numerics.group_of says."""
    return philox(start, numel, split.seed, split.tensor_id, PARTITION, device) * groups >> 32


def block_sums(value: torch.Tensor, block: int) -> torch.Tensor:
    """fp64 sums of the logical blocks of a flat tensor, in the order that numerics.py fixes."""
    count, rows = -(-value.numel() // block), -(-block // LANES)
    grid = torch.zeros(count, rows * LANES, dtype=torch.float64, device=value.device)
    padded = torch.nn.functional.pad(value.double(), (0, count * block - value.numel()))
    grid[:, :block] = padded.view(count, block)
    lanes = torch.zeros(count, LANES, dtype=torch.float64, device=value.device)
    for row in grid.view(count, rows, LANES).unbind(1):
        lanes = lanes + row
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


# --- building and passing arguments ---


def tensors(
    numel: int, dtypes: Sequence[str], count: int, device: str, seed: int, odd: bool = True
) -> list[torch.Tensor]:
    """Like an output and its inputs: the first is poisoned, the second a base, the rest near it; dtypes in turn.

    One element in eight of an expert equals the base. `odd`: zeros of both signs and subnormals are among the values
    (a product with a subnormal takes a processor some hundred times as long: not for timing).
    """
    random = torch.Generator().manual_seed(seed)
    base = torch.randn(numel, generator=random)
    if odd:
        base[::97], base[1::97], base[2::97] = 0.0, -0.0, 1e-40
    made = []
    for k in range(count):
        dtype = DTYPES[dtypes[k % len(dtypes)]]
        near = base + 0.1 * torch.randn(numel, generator=random) if k > 1 else base
        near = torch.where(torch.rand(numel, generator=random) < 0.125, base, near)
        value = torch.full((numel,), torch.nan) if k == 0 else near
        made.append(rounded(value, dtype).to(device))
    return made


def span(tensor: torch.Tensor, queue: Any = None) -> Span:
    """The tensor's memory; the caller keeps the tensor. `queue` is for launches on it."""
    assert tensor.is_contiguous()
    return Span(tensor.data_ptr(), NAMES[tensor.dtype], tensor.numel(), queue)


def spans(value: Any, queue: Any = None) -> Any:
    """Arguments of a reference as those of host (or launch): tensors become spans, at any depth of lists and tuples."""
    if isinstance(value, torch.Tensor):
        return span(value, queue)
    if isinstance(value, list) or type(value) is tuple:
        return type(value)(spans(v, queue) for v in value)
    return value


def nbytes(*tensors: Any) -> int:
    """Of tensors or spans."""
    sizes = [ITEMSIZE[t.dtype] * t.numel if isinstance(t, Span) else t.numel() * t.element_size() for t in tensors]
    return sum(sizes)
