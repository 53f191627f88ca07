"""Conversions on every pattern, Philox against published vectors, stale caches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import numerics, reference
from streammerge.kernels.reference import DTYPES, NANS, bits

ONE = np.ones((1, 1), np.float32)


def cast(value: torch.Tensor, name: str) -> torch.Tensor:
    """Through load and store: add_deltas with no expert."""
    out = torch.empty(value.numel(), dtype=DTYPES[name])
    kernel.host("add_deltas").host(reference.span(out), reference.span(value), [], ONE)
    return out


def expected(value: torch.Tensor, name: str) -> torch.Tensor:
    """torch's own cast, one pattern for NaN."""
    result = bits(value.float().to(DTYPES[name]))
    return torch.where(value.float().isnan(), torch.tensor(NANS[name], dtype=result.dtype), result)


def every_pattern(name: str) -> torch.Tensor:
    size = DTYPES[name].itemsize
    return torch.from_numpy(np.arange(256**size, dtype=np.uint16).astype(f"u{size}").view(f"i{size}")).view(
        DTYPES[name]
    )


def random_patterns() -> torch.Tensor:
    """fp32 patterns of all kinds, and the neighbourhood of every tie between 16-bit and between 8-bit values."""
    random = np.random.default_rng(0).integers(0, 1 << 32, 1 << 18, dtype=np.uint32)
    ties = [(np.arange(1 << 16, dtype=np.uint32) << 16) + d for d in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF)]
    fine = [(np.arange(1 << 19, dtype=np.uint32) << 13) + d for d in (0xFFF, 0x1000, 0x1001)]
    edges = np.array([0, 1 << 31, 1, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F800001, 0xFFFFFFFF], np.uint32)
    return torch.from_numpy(np.concatenate([random, *ties, *fine, edges]).view(np.float32))


@pytest.mark.parametrize("source", ["BF16", "F16", "F8_E4M3", "F8_E5M2"])
@pytest.mark.parametrize("target", list(DTYPES))
def test_every_pattern_of_a_narrow_type(source, target):
    value = every_pattern(source)
    assert torch.equal(bits(cast(value, target)), expected(value, target))


@pytest.mark.parametrize("target", list(DTYPES))
def test_fp32_patterns(target):
    value = random_patterns()
    want = expected(value.clamp(-448, 448) if target == "F8_E4M3" else value, target)
    assert torch.equal(bits(cast(value, target)), want)


def test_fp64_is_rounded_to_fp32_first():
    value = torch.tensor([1 + 2**-24 + 2**-40, 1e300, -1e-320, 1 + 2**-8 + 2**-30, -0.0], dtype=torch.float64)
    assert torch.equal(cast(value, "F32"), value.float())
    assert cast(value, "BF16")[3] == 1  # 1 + 2**-8 after the first rounding, a tie for the second
    assert cast(value, "F64")[0] == 1 + 2**-23


def test_patterns_by_hand():
    value = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 3.4e38, float("nan"), -0.0, 2.0**-133])
    assert bits(cast(value, "BF16")).tolist() == [0x3F80, 0x3F82, 0x7F80, 0x7FC0, -0x8000, 1]
    value = torch.tensor([464.0, 1e9, float("inf"), -float("inf"), float("nan"), 2.0**-10])
    assert bits(cast(value, "F8_E4M3")).tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0x7F, 0]


@pytest.mark.parametrize("name", list(DTYPES))
def test_flags_tell_infinities_from_nan(name):
    for value, flag in ((1.0, 0), (float("inf"), 1), (-float("inf"), 1), (float("nan"), 2)):
        tensor = torch.ones(1000)
        tensor[700] = value
        source, out = reference.rounded(tensor, DTYPES[name]), torch.empty(1000)
        found = kernel.host("add_deltas").host(reference.span(out), reference.span(source), [], ONE)
        assert found.dtype == np.uint8
        assert found.tolist() == [0 if name == "F8_E4M3" and flag == 1 else flag]


def philox(counter: tuple[int, ...], key: tuple[int, int]) -> list[int]:
    """Philox4x32-10 as the paper writes it."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        p, r = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (r >> 32) ^ b ^ k0, r & 0xFFFFFFFF, (p >> 32) ^ d ^ k1, p & 0xFFFFFFFF
        k0, k1 = (k0 + 0x9E3779B9) & 0xFFFFFFFF, (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return [a, b, c, d]


KNOWN = [  # Random123's kat_vectors: counter, key, words
    ((0, 0, 0, 0), (0, 0), [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_philox_known_answers(counter, key, words):
    assert philox(counter, key) == words
    first, seed = counter[0] | counter[1] << 32, key[0] | key[1] << 32
    seed = seed - (1 << 64) if seed >= 1 << 63 else seed
    out = np.empty(4, np.uint32)
    numerics.philox(out, np.uint64(first), 1, seed, counter[2], counter[3])
    assert out.tolist() == words


def test_reference_philox_is_philox():
    seed, words = 0x123456789ABCDEF0, reference.philox((1 << 34) + 3, 9, 0x123456789ABCDEF0, 77, 5)
    for i, word in enumerate(words.tolist()):
        q, lane = divmod((1 << 34) + 3 + i, 4)
        assert word == philox((q & 0xFFFFFFFF, q >> 32, 77, 5), (seed & 0xFFFFFFFF, seed >> 32))[lane]


def test_the_cache_entry_names_the_shared_code():
    for loop in (kernel.host("add_deltas")._add, kernel.host("drop_rescale")._norms):
        assert loop.py_func.__qualname__.endswith(numerics.STAMP)
