"""polar_step: one step against its polynomial in fp64, many against the SVD, and the tables of coefficients."""

from __future__ import annotations

import math

import arguments
import numpy as np
import pytest
import torch

from streammerge import kernel
from streammerge.kernels import polar_step, reference
from streammerge.kernels.host.polar_step import CUBIC, MUON, POLAR_EXPRESS, QUINTIC, STEPS
from streammerge.kernels.reference import bits

HOWS = ["host", "ieee", "tf32x3", "bf16x3"]


def step(x, coefficients, how="host"):
    """out, gram and poly of one step on [k, columns]; fresh memory is NaN."""
    rows, columns = x.shape
    made = [torch.full((numel,), torch.nan) for numel in (rows * columns, rows * rows, rows * rows)]
    args = [made[0], x.reshape(-1).contiguous(), made[1], made[2], columns, coefficients]
    if how == "host":
        kernel.host("polar_step").host(*reference.spans(args))
    else:
        arguments.launch(polar_step, [*args, how])
    return made[0].view(rows, columns), made[1].view(rows, rows), made[2].view(rows, rows)


def converge(x, how="host", steps=STEPS):
    for coefficients in steps:
        x, _, _ = step(x, coefficients, how)
    return x.double()


def blocks(rows, columns, count, seed=0):
    """`count` blocks of orthonormal rows one above the other, in fp64: what TSVM makes polar."""
    random = torch.Generator().manual_seed(seed)
    wide = [torch.randn(columns, rows // count, generator=random, dtype=torch.float64) for _ in range(count)]
    return torch.cat([torch.linalg.qr(w)[0].T for w in wide])


def spectrum(rows, columns, condition, seed=0):
    """A matrix whose singular values fall from 1 to 1 / condition, and its polar factor, in fp64."""
    random = torch.Generator().manual_seed(seed)
    u = torch.linalg.qr(torch.randn(rows, rows, generator=random, dtype=torch.float64))[0]
    v = torch.linalg.qr(torch.randn(columns, rows, generator=random, dtype=torch.float64))[0]
    values = torch.logspace(0, -math.log10(condition), rows, dtype=torch.float64)
    return (u * values) @ v.T, u @ v.T


def off(x):
    return (x @ x.T - torch.eye(len(x))).abs().max().item()


@pytest.mark.parametrize("how", HOWS)
def test_by_hand(how):
    out, gram, poly = step(torch.tensor([[3.0, 4.0]]), (2, -0.5, 0.125), how)
    assert (gram.item(), poly.item()) == (25, 65.625)
    assert out.tolist() == [[2 * 3 + 65.625 * 3, 2 * 4 + 65.625 * 4]]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize(("rows", "columns"), [(1, 5), (33, 65), (64, 64), (48, 144)])
def test_one_step_is_a_polynomial_of_the_singular_values(how, rows, columns):
    """Bounds: bf16x3 drops 2**-16 of a product; the sums of gram, poly and out are of numbers below 4."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(rows, columns, generator=random) / math.sqrt(columns)
    a, b, c = coefficients = (1.5, -0.75, 0.25)
    u, s, vt = torch.linalg.svd(x.double(), full_matrices=False)
    out, gram, poly = step(x, coefficients, how)
    bound = 1e-4 if how == "bf16x3" else 1e-5
    assert (out - (u * (a * s + b * s**3 + c * s**5)) @ vt).abs().max() < bound
    assert (gram - x.double() @ x.double().T).abs().max() < bound
    for square in (gram, poly):
        assert torch.equal(bits(square), bits(square.T.contiguous()))


@pytest.mark.parametrize(("how", "bound"), [("host", 1e-5), ("ieee", 1e-5), ("tf32x3", 1e-5), ("bf16x3", 1e-4)])
def test_the_polar_factor_of_blocks(how, bound):
    x = blocks(72, 112, 3)
    u, _, vt = torch.linalg.svd(x, full_matrices=False)
    found = converge((x / (1.01 * math.sqrt(3))).float(), how)
    assert off(found) < bound
    assert (found - u @ vt).abs().max() < bound


def test_tf32_alone_is_not_orthonormal():
    """A guard: were tf32x3 rounded once only, the test above would have to fail."""
    assert off(converge((blocks(48, 64, 3) / (1.01 * math.sqrt(3))).float(), "tf32")) > 1e-4


@pytest.mark.parametrize("condition", [10, 300, 3000])
def test_wide_spectra(condition):
    """What fp32 holds of a singular value of 1 / condition is known to condition * 2**-24."""
    x, polar = spectrum(60, 200, condition)
    found = converge((x / 1.01).float())
    assert off(found) < 1e-5
    assert (found - polar).abs().max() < max(1e-5, condition * 1e-7)


def test_rows_of_zeros_stay():
    x = blocks(40, 80, 2).float() / 1.5
    x[7] = 0
    found = converge(x)
    rest = torch.arange(40) != 7
    assert not found[7].any()
    assert off(found[rest]) < 1e-5


def test_a_cubic_saves_a_product():
    x = blocks(30, 70, 2).float() / 2
    for how in ("host", "ieee"):
        _, gram, poly = step(x, CUBIC, how)
        assert torch.equal(poly, -0.5 * gram)
    assert polar_step.flops(None, x.reshape(-1), None, None, 70, CUBIC) == 30 * 31 * 70 + 2 * 30 * 30 * 70
    assert polar_step.flops(None, x.reshape(-1), None, None, 70, QUINTIC) == 30 * 31 * 100 + 2 * 30 * 30 * 70


def polynomial(s, steps):
    for a, b, c in steps:
        s = a * s + b * s**3 + c * s**5
    return s


def test_coefficients():
    s = np.logspace(-3, 0, 1000) / 1.01
    assert np.abs(polynomial(s, POLAR_EXPRESS) - 1).max() < 0.02
    assert np.abs(polynomial(s, STEPS) - 1).max() < 1e-12
    assert polynomial(0.99, [QUINTIC]) == pytest.approx(1 - 2.5e-6, abs=1e-7)
    assert polynomial(0.99, [CUBIC]) == pytest.approx(1 - 1.5e-4, abs=1e-6)
    muon = polynomial(np.linspace(0.1, 1, 1000), 5 * [MUON])
    assert 0.65 < muon.min() < 0.75
    assert 1.1 < muon.max() < 1.25
