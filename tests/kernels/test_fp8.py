"""Block-scaled numbers of eight bits: against torch's casts, errors, idempotence, edges, and cut into rows."""

from __future__ import annotations

import itertools

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import fp8_dequant, fp8_quant, reference
from streammerge.kernels.numerics import Span
from streammerge.kernels.queue import Queue
from streammerge.kernels.reference import DTYPES, bits, span

FORMATS = {"F8_E4M3": (448.0, 2**-4, 2**-10), "F8_E5M2": (57344.0, 2**-3, 2**-17)}  # largest, half steps
SHAPES = [(1, 1), (127, 129), (300, 257), (128, 256), (5, 1000)]


def count(length, block):
    return -(-length // block)


def dequant(codes, scales, dtype="F32", row=0, block=(128, 128)):
    """`codes` is [rows, columns], `scales` [rows of blocks, blocks across]; also what they hold."""
    out = torch.full(codes.shape, torch.nan).to(DTYPES[dtype])
    args = span(out.view(-1)), span(codes.reshape(-1)), span(scales.reshape(-1)), codes.shape[1], row, block
    return out, kernel.host("fp8_dequant").host(*args).tolist()


def quant(x, name="F8_E4M3", power=False, block=(128, 128)):
    rows, columns = x.shape
    codes = torch.zeros(rows, columns, dtype=DTYPES[name])
    scales = torch.full((count(rows, block[0]), count(columns, block[1])), torch.nan)
    args = span(codes.view(-1)), span(scales.view(-1)), span(x.reshape(-1)), columns, 0, block, power
    return codes, scales, kernel.host("fp8_quant").host(*args).tolist()


def spread(scales, shape, block=(128, 128)):
    return scales.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[: shape[0], : shape[1]]


def normal(shape, seed=0, dtype="F32"):
    value = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (value * torch.logspace(-3, 2, shape[0])[:, None]).to(DTYPES[dtype])


def test_by_hand():
    codes = torch.tensor([[1.0, -2.0, 0.5], [448.0, 0.0, -0.0]]).to(torch.float8_e4m3fn)
    out, found = dequant(codes, torch.tensor([[2.0, 10.0], [0.5, 3.0]]), block=(1, 2))
    assert out.tolist() == [[2.0, -4.0, 5.0], [224.0, 0.0, 0.0]]
    assert bits(out)[1, 2] == -(1 << 31)
    assert found == [0, 0]
    codes, scales, found = quant(torch.tensor([[4.48, -0.01, 0.16], [0.0, -0.0, 0.0]]), block=(1, 3))
    assert codes.tolist() == [[448.0, -1.0, 16.0], [0.0, 0.0, 0.0]]
    assert bits(codes)[1].tolist() == [0, 0x80, 0]
    assert scales[0, 0] == np.float32(4.48) / np.float32(448)
    assert scales[1, 0] == 1
    assert found == [0]


@pytest.mark.parametrize("target", list(DTYPES))
@pytest.mark.parametrize("name", list(FORMATS))
def test_every_code_times_one_is_torchs_cast(name, target):
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).view(2, 128)
    out, found = dequant(codes, torch.ones(1, 1), target)
    assert torch.equal(bits(out), bits(reference.rounded(codes.float(), DTYPES[target])))
    assert found == [2, 0]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_codes_are_torchs_cast_of_the_quotient(name, shape, dtype):
    x = normal(shape, dtype=dtype)
    codes, scales, _ = quant(x, name)
    tiles = torch.zeros(count(shape[0], 128) * 128, count(shape[1], 128) * 128)
    tiles[: shape[0], : shape[1]] = x.float().abs()
    largest = tiles.view(tiles.shape[0] // 128, 128, tiles.shape[1] // 128, 128).amax((1, 3))
    assert torch.equal(scales, largest / torch.tensor(FORMATS[name][0]))
    quotient = x.float() / spread(scales, shape)
    assert torch.equal(bits(codes), bits(quotient.clamp(-FORMATS[name][0], FORMATS[name][0]).to(DTYPES[name])))


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", list(FORMATS))
def test_what_comes_back_is_within_half_a_step(name, shape, power):
    _, relative, absolute = FORMATS[name]
    x = normal(shape, seed=1)
    codes, scales, _ = quant(x, name, power)
    out, _ = dequant(codes, scales, "F64")
    bound = torch.maximum(relative * x.abs(), absolute * spread(scales, shape)).double() * (1 + 2**-20)
    assert ((out - x.double()).abs() <= bound).all()


@pytest.mark.parametrize("name", list(FORMATS))
def test_codes_with_power_of_two_scales_come_back(name):
    random = torch.Generator().manual_seed(2)
    codes = torch.randint(0, 256, (300, 257), generator=random, dtype=torch.uint8)
    finite = 0x7E if name == "F8_E4M3" else 0x7B
    codes = torch.where((codes & 0x7F) > finite, 0x80, codes).to(torch.uint8)
    codes[::128, ::128] = finite  # in every block
    codes = codes.view(DTYPES[name])
    scales = 2.0 ** torch.randint(-100, 90, (3, 3), generator=random)
    again, same, _ = quant(dequant(codes, scales)[0], name, power=True)
    assert torch.equal(same, scales)
    assert torch.equal(bits(again), bits(codes))


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("name", list(FORMATS))
def test_quantising_again_changes_nothing(name, power):
    codes, scales, _ = quant(normal((300, 257), seed=3), name, power)
    once, _ = dequant(codes, scales)
    again, others, _ = quant(once, name, power)
    if power:
        assert torch.equal(bits(dequant(again, others)[0]), bits(once))
    else:
        assert torch.equal(bits(again), bits(codes))
        assert torch.allclose(others, scales, rtol=2**-23, atol=0)


def test_a_power_of_two_that_halves_gives_the_same_values():
    """225 / 448 needs a scale of 1 and becomes 224, which fits a scale of 1/2."""
    codes, scales, _ = quant(torch.tensor([[225.0, 3.0]]), power=True)
    assert codes.tolist() == [[224.0, 3.0]]
    assert scales.item() == 1
    again, scales, _ = quant(codes.float(), power=True)
    assert again.tolist() == [[448.0, 6.0]]
    assert scales.item() == 0.5


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("name", list(FORMATS))
def test_small_and_large_blocks(name, power):
    """Scales stay normal, nothing finite overflows, nothing is divided by zero."""
    tops = torch.tensor([0.0, 1e-45, 1e-40, 2.0**-126, 1e-36, 1e-30, 3e38 if power else torch.finfo().max])
    x = tops[:, None] * torch.tensor([1.0, -1.0, 0.5, 0.0])
    codes, scales, found = quant(x, name, power, block=(1, 4))
    assert found == [0]
    assert scales[0] == 1
    assert (scales >= 2.0**-126).all()
    assert codes.float().isfinite().all()
    out, _ = dequant(codes, scales, "F64", block=(1, 4))
    bound = torch.maximum(FORMATS[name][1] * x.abs().double(), FORMATS[name][2] * scales.double())
    assert ((out - x.double()).abs() <= bound * (1 + 2**-20)).all()
    if power:
        assert (torch.frexp(scales).mantissa == 0.5).all()


@pytest.mark.parametrize("name", list(FORMATS))
def test_powers_of_two_round_the_largest_number_beyond_fp32(name):
    codes, scales, _ = quant(torch.tensor([[torch.finfo().max]]), name, power=True)
    assert codes.double().item() * scales.double().item() == 2.0**128
    assert dequant(codes, scales)[0].item() == torch.inf


@pytest.mark.parametrize(("name", "infinite"), [("F8_E4M3", 0x7E), ("F8_E5M2", 0x7C)])
def test_what_is_not_finite_has_no_say_in_the_scale(name, infinite):
    x = torch.tensor([[1.0, torch.inf, -torch.inf, torch.nan, -2.0]])
    codes, scales, found = quant(x, name)
    assert scales.item() == np.float32(2) / np.float32(FORMATS[name][0])
    assert bits(codes)[0, 1:4].tolist() == [infinite, infinite | 0x80, 0x7F]
    assert codes[0, 4].float() == -FORMATS[name][0]
    assert found == [2]
    codes, scales, found = quant(x[:, 1:3], name)
    assert scales.item() == 1
    assert bits(codes)[0].tolist() == [infinite, infinite | 0x80]
    assert found == [1]


def test_products_that_are_not_finite():
    codes = torch.tensor([[0.0, 1.0, 448.0, -448.0]]).to(torch.float8_e4m3fn)
    out, found = dequant(codes, torch.tensor([[torch.inf]]), "BF16")
    assert bits(out)[0].tolist() == [0x7FC0, 0x7F80, 0x7F80, 0xFF80 - 65536]
    assert found == [0, 1]
    out, found = dequant(codes, torch.tensor([[1e38]]), "BF16")  # the product alone overflows
    assert out[0].tolist() == [0.0, out[0, 1].item(), torch.inf, -torch.inf]
    assert found == [0, 0]
    assert dequant(codes, torch.tensor([[torch.nan]]))[0].isnan().all()


@pytest.mark.parametrize("where", ["host", "launch"])
@pytest.mark.parametrize("name", list(FORMATS))
def test_scales_that_are_exponents(name, where):
    exponents = torch.tensor([[0, 1, 127], [200, 254, 255]], dtype=torch.uint8)
    codes = normal((5, 7)).to(DTYPES[name])
    want = torch.zeros(5, 7)
    expected = fp8_dequant.reference(want.view(-1), codes.view(-1), exponents.view(-1), 7, 0, (4, 3))
    out = torch.full((5, 7), torch.nan, device=arguments.DEVICE)
    on, queue = [t.to(arguments.DEVICE) for t in (codes, exponents)], Queue.on(arguments.DEVICE)
    if where == "host":
        out, on = out.cpu(), [codes, exponents]
    spans = span(out.view(-1)), span(on[0].view(-1)), Span(on[1].data_ptr(), "F8_E8M0", 6)
    if where == "host":
        found = kernel.host("fp8_dequant").host(*spans, 7, 0, (4, 3))
    else:
        found = fp8_dequant.launch(queue, *spans, 7, 0, (4, 3))
        queue.end().wait()
    assert torch.equal(bits(out.cpu()), bits(want))
    assert want[0, 3] == codes[0, 3].float() * 2.0**-126
    assert want[0, 0] == codes[0, 0].float() * 2.0**-127
    assert want[4, 6].isnan()
    assert found.tolist() == expected.tolist() == [0, 2]


@pytest.mark.parametrize("where", ["host", "launch"])
@pytest.mark.parametrize(("shape", "block"), [((300, 257), (128, 128)), ((40, 30), (4, 7)), ((9, 33), (1, 33))])
def test_rows_are_the_whole(shape, block, where):
    """Cut anywhere for one, at blocks for the other; the flags of the parts are those of the whole."""
    rows, columns = shape
    x = normal(shape, seed=4)
    x[-1, -1] = torch.nan
    codes, scales, found = quant(x, block=block)
    scales[0, 0] = torch.inf
    out, flags = dequant(codes, scales, "BF16", block=block)

    def run(module, *args):
        if where == "launch":
            return arguments.launch(module, args)
        return kernel.host(module.__name__.rpartition(".")[2]).host(*reference.spans(args))

    cuts = [0, 1, rows // 3, rows // 2 + 1, rows]
    parts, each = torch.full_like(out, torch.nan), []
    for at, end in itertools.pairwise(cuts):
        part, some = parts[at:end].reshape(-1), codes[at:end].reshape(-1)
        each.append(run(fp8_dequant, part, some, scales.view(-1), columns, at, block))
        parts[at:end] = part.view(-1, columns)
    assert torch.equal(bits(parts), bits(out))
    assert np.max(each, 0).tolist() == flags == [2, 1]

    scales[0, 0], step = quant(x, block=block)[1][0, 0], block[0] * 2
    parts, into, each = torch.zeros_like(codes), torch.full_like(scales, torch.nan), []
    for at in range(0, rows, step):
        part, some = parts[at : at + step].reshape(-1), x[at : at + step].reshape(-1)
        each.append(run(fp8_quant, part, into.view(-1), some, columns, at, block))
        parts[at : at + step] = part.view(-1, columns)
    assert torch.equal(bits(parts), bits(codes))
    assert torch.equal(into, scales)
    assert np.max(each, 0).tolist() == found == [2]


@pytest.mark.parametrize("power", [False, True])
@pytest.mark.parametrize("source", list(DTYPES))
@pytest.mark.parametrize("name", list(FORMATS))
def test_launch_on_awkward_blocks(name, source, power):
    """Zeros, subnormals and the largest numbers, a block each, on whatever runs the launch."""
    tops = torch.tensor([0.0, 1e-45, 1e-38, 1e-30, 1.0, 1e4, 3e38])
    x = reference.rounded((tops[:, None] * torch.linspace(-1, 1, 32)).view(-1), DTYPES[source])
    codes, scales = torch.zeros(x.numel(), dtype=DTYPES[name]), torch.full((7,), torch.nan)
    args = [codes, scales, x, 32, 0, (1, 32), power]
    arguments.agree(fp8_quant, args)
    arguments.launch_agrees(fp8_quant, args)


@pytest.mark.parametrize("target", list(DTYPES))
@pytest.mark.parametrize("name", list(FORMATS))
def test_launch_of_every_code_at_every_size(name, target):
    """Codes times scales that make results subnormal, ordinary and infinite; one block of them has NaN."""
    codes = torch.arange(256, dtype=torch.uint8).view(DTYPES[name]).repeat(3)
    out = torch.full((768,), torch.nan).to(DTYPES[target])
    scales = torch.tensor([1e-45, 3e-40, 2e-7, 0.3, 1.0, 77.0, 3e36, -3e38, 0.0, torch.inf, torch.nan, 5.0])
    args = [out, codes, scales, 256, 0, (1, 64)]
    arguments.agree(fp8_dequant, args)
    arguments.launch_agrees(fp8_dequant, args)


def test_arguments_that_do_not_fit():
    x, codes, scales = torch.zeros(6), torch.zeros(6).to(torch.float8_e4m3fn), torch.zeros(1)
    spans = reference.spans([x, codes, scales])
    for columns, row, block in ((4, 0, (2, 2)), (3, 0, (1, 3)), (3, 2, (2, 3)), (3, 0, (0, 3))):
        with pytest.raises(AssertionError):
            kernel.host("fp8_dequant").host(*spans, columns, row, block)
    for row, block in ((1, (2, 3)), (0, (1 << 14, 3)), (0, (1, 8193))):
        with pytest.raises(AssertionError):
            kernel.host("fp8_quant").host(spans[1], spans[2], spans[0], 3, row, block)


def test_rows_beyond_32_bits():
    """Tall blocks, so that the scales are few."""
    height = 1 << 30
    codes, scales = torch.ones(10 * 32).to(torch.float8_e4m3fn), torch.tensor([1.0, 2.0, 3.0, 4.0])
    args = [torch.zeros(10 * 32), codes, scales, 32, 3 * height - 4, (height, 128)]
    arguments.agree(fp8_dequant, args)
    arguments.launch_agrees(fp8_dequant, args)
    kernel.host("fp8_dequant").host(*reference.spans(args))
    assert args[0].view(10, 32)[:, 0].tolist() == [3.0] * 4 + [4.0] * 6
