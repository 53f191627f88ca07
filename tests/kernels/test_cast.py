"""cast: every pattern against torch, rounding by chance against its definition, its average and its edges."""

from __future__ import annotations

from itertools import pairwise

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import cast, reference
from streammerge.kernels.numerics import PARTITION, ROUNDING, Stochastic
from streammerge.kernels.reference import DTYPES, NANS, bits, span

KEY = Stochastic(2026, 5)
NARROW = ["BF16", "F16", "F8_E4M3", "F8_E5M2"]
LARGEST = {"BF16": 0x7F7F, "F16": 0x7BFF, "F8_E4M3": 0x7E, "F8_E5M2": 0x7B}


def on_host(source, name, *options):
    out = torch.empty(source.numel(), dtype=DTYPES[name])
    kernel.host("cast").host(span(out), span(source), *options)
    return out


def launched(source, name, *options):
    out = torch.empty(source.numel(), dtype=DTYPES[name])
    arguments.launch(cast, (out, source, *options))
    return out


def patterns(name: str) -> torch.Tensor:
    size = DTYPES[name].itemsize
    codes = np.arange(256**size, dtype=f"u{size}")
    return torch.from_numpy(codes.view(f"i{size}")).view(DTYPES[name])


def in_torch(source, name):
    """torch's own conversion, by way of fp32; NaN as one pattern, F8_E4M3 saturated."""
    value = source.float()
    result = (value.clamp(-448, 448) if name == "F8_E4M3" else value).to(DTYPES[name])
    return torch.where(value.isnan(), torch.tensor(NANS[name], dtype=bits(result).dtype), bits(result))


def neighbours(value, name):
    """The numbers of a dtype on both sides of each fp32 value, as fp64; the same one twice if it is exact."""
    codes = torch.arange(LARGEST[name] + 1)
    size = DTYPES[name].itemsize
    line = codes.to({1: torch.uint8, 2: torch.int16}[size]).view(DTYPES[name]).double()
    place = torch.searchsorted(line, value.abs().double(), right=True) - 1
    low = line[place]
    high = torch.where(low == value.abs(), low, line[(place + 1).clamp(max=LARGEST[name])])
    return low.copysign(value), high.copysign(value)


@pytest.mark.parametrize("run", [on_host, launched])
@pytest.mark.parametrize("source", NARROW)
@pytest.mark.parametrize("target", list(DTYPES))
def test_every_pattern_is_torchs(run, source, target):
    value = patterns(source)
    assert torch.equal(bits(run(value, target)), in_torch(value, target))


@pytest.mark.parametrize("run", [on_host, launched])
@pytest.mark.parametrize("target", list(DTYPES))
def test_fp32_and_fp64_are_torchs(run, target):
    random = torch.randint(-(1 << 31), (1 << 31) - 1, (40_000,), generator=torch.Generator().manual_seed(0))
    ties = (torch.arange(1 << 16) << 16) + torch.tensor([[0x7FFF], [0x8000], [0x8001]])
    value = torch.cat([random, ties.ravel()]).to(torch.int32).view(torch.float32)
    assert torch.equal(bits(run(value, target)), in_torch(value, target))
    assert torch.equal(bits(run(value.double(), target)), in_torch(value, target))


@pytest.mark.parametrize("run", [on_host, launched])
@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("wide", ["F32", "F64"])
def test_exact_values_stay(run, name, wide):
    value = patterns(name)
    assert torch.equal(bits(run(value.to(DTYPES[wide]), name, 0, KEY)), in_torch(value, name))


def test_wide_outputs_have_nothing_to_round():
    value = torch.randn(5000)
    assert torch.equal(on_host(value, "F32", 0, KEY), value)
    assert torch.equal(on_host(value, "F64", 0, KEY), value.double())


def test_by_hand():
    """1 + 2**-9 is a quarter of the way from 1 to the next BF16: up where the word's upper two bits are 11."""
    words = reference.philox(0, 4000, KEY.seed, KEY.tensor_id, ROUNDING)
    for part, up in ((2**-9, words >> 30 == 3), (2**-8, words >> 31 == 1), (3 * 2**-9, words >> 30 >= 1)):
        for sign in (1, -1):
            got = on_host(torch.full((4000,), sign * (1 + part)), "BF16", 0, KEY)
            assert torch.equal(got.float(), sign * torch.where(up, 1 + 2**-7, 1.0))
    half = on_host(torch.full((4000,), 2.0**-10), "F8_E4M3", 0, KEY)  # between 0 and the smallest number, 2**-9
    assert torch.equal(half.float(), torch.where(words >> 31 == 1, 2.0**-9, 0.0))


@pytest.mark.parametrize("name", NARROW)
def test_results_are_neighbours_and_both_occur(name):
    random = torch.Generator().manual_seed(1)
    value = torch.ldexp(torch.randn(50_000, generator=random), torch.randint(-24, 8, (50_000,), generator=random))
    value = value.clamp(-448, 448)
    low, high = neighbours(value, name)
    got = on_host(value, name, 0, KEY).double()
    assert ((got == low) | (got == high)).all()
    between = low != high
    assert between.sum() > 10_000
    share = ((value.double() - low) / (high - low))[between]
    up = (got == high)[between].double()
    assert abs((up - share).sum()) < 5 * (share * (1 - share)).sum().sqrt()


@pytest.mark.parametrize("name", NARROW)
@pytest.mark.parametrize("value", [1.003, -0.7, 300.1, -2.3e-5, 3e-8, 1e-40])
def test_the_mean_is_the_value(name, value):
    """Within five standard errors, for normal and subnormal results; where nothing is that small, zero is right."""
    numel = 1 << 17
    source = torch.full((numel,), value)
    low, high = (side[0] for side in neighbours(source[:1], name))
    share = (source[0].double() - low) / (high - low)
    error = (high - low).abs() * (share * (1 - share) / numel).sqrt()
    got = on_host(source, name, 0, KEY).double()
    assert abs(got.mean() - source[0].double()) <= 5 * error


@pytest.mark.parametrize("run", [on_host, launched])
@pytest.mark.parametrize(
    ("name", "below", "half"),
    [
        ("BF16", "0x1.fefffep127", "0x1.ffp127"),
        ("F16", "0x1.ffdffep15", "0x1.ffep15"),
        ("F8_E5M2", "0x1.dffffep15", "0x1.ep15"),
    ],
)
def test_beyond_the_largest_number(run, name, below, half):
    """To nearest, whatever the words: an infinity from halfway to what would be the next number on."""
    value = torch.tensor([float.fromhex(below), float.fromhex(half), torch.inf]).repeat(100)
    expected = torch.tensor([torch.finfo(DTYPES[name]).max, torch.inf, torch.inf], dtype=torch.float64).repeat(100)
    for sign in (1, -1):
        assert torch.equal(run(sign * value, name, 0, KEY).double(), sign * expected)


@pytest.mark.parametrize("run", [on_host, launched])
def test_nan_stays_and_e4m3_saturates(run):
    value = torch.tensor([449.0, -1e30, torch.inf, -torch.inf, torch.nan]).repeat(100)
    codes = bits(run(value, "F8_E4M3", 0, KEY)).view(100, 5)
    assert (codes == torch.tensor([0x7E, 0xFE, 0x7E, 0xFE, 0x7F])).all()
    for name in NARROW:
        assert (bits(run(torch.full((500,), -torch.nan), name, 0, KEY)) == NANS[name]).all()


@pytest.mark.parametrize("run", [on_host, launched])
@pytest.mark.parametrize("start", [0, 3, (1 << 31) - 2, (1 << 33) + 4])
def test_parts_are_the_whole(run, start):
    value = torch.randn(3000)
    whole = run(value, "BF16", start, KEY)
    for cuts in ((0, 1, 2, 1503, 3000), (0, 512, 1025, 3000)):
        parts = [run(value[a:b], "BF16", start + a, KEY) for a, b in pairwise(cuts)]
        assert torch.equal(bits(torch.cat(parts)), bits(whole))


def test_other_keys_give_other_bits():
    value = torch.randn(4000)
    results = [bits(on_host(value, "BF16", 0, Stochastic(*k))) for k in ((1, 1), (1, 2), (2, 1), (1, 1))]
    assert torch.equal(results[0], results[3])
    for other in results[1:3]:
        assert 0.2 < (results[0] != other).double().mean() < 0.5  # a third: 2 p (1 - p) over a uniform part


def test_no_stream_is_an_experts():
    assert PARTITION != ROUNDING
    assert min(PARTITION, ROUNDING) > 1 << 31


@pytest.mark.parametrize("run", ["host", "launch"])
def test_flags_are_of_the_source(run):
    value = torch.full((1000,), 1e30, dtype=torch.float32)
    for odd, flag in ((1.0, 0), (np.inf, 1), (np.nan, 2)):
        value[700] = odd
        args = (torch.empty(1000, dtype=torch.float16), value)
        found = (
            kernel.host("cast").host(*reference.spans(list(args))) if run == "host" else arguments.launch(cast, args)
        )
        assert found.tolist() == [flag]
