"""What a unit's products of bfloat16 go through, and the pull of a cosine, against fp64 and torch."""

import pytest
import torch

from streammerge.kernels.host import widen
from streammerge.methods import _rounded_matrix
from streammerge.methods._induced import pull
from streammerge.methods._rounded import products
from streammerge.methods._rounded_matrix import Matrix

M, N, K = 7, 33, 20


def cosine_pull(y0, dy, anchors):
    """df / dy0 of a mean cosine, by autograd in whatever dtype."""
    y1 = (y0 + dy).detach()
    leaf = y0.detach().requires_grad_()
    f = torch.nn.functional.cosine_similarity(leaf.flatten(1), y1.flatten(1)).sum() / anchors
    return torch.autograd.grad(f, leaf)[0]


def closed_pull(y0, dy, anchors):
    a, c = y0.flatten(1), dy.flatten(1)
    norm = a.norm(dim=1, keepdim=True)
    across = c - a * (a * c).sum(1, keepdim=True) / norm**2
    return (across / ((a + c).norm(dim=1, keepdim=True) * norm * anchors)).view_as(y0)


@pytest.mark.parametrize("relative", [1.0, 1e-3])
@pytest.mark.parametrize("shape", [(4, 3, 50), (2, 1000), (5, 3)])
def test_the_pull_of_a_cosine_and_its_derivative(shape, relative):
    torch.manual_seed(0)
    y0, dy, u = torch.randn(shape), relative * torch.randn(shape), torch.randn(shape)
    wide = [each.double().requires_grad_() for each in (y0, dy)]
    exact = closed_pull(*wide, 9)
    if relative == 1.0:
        assert torch.allclose(exact, cosine_pull(y0.double(), dy.double(), 9), atol=1e-12)
    leaves = [each.requires_grad_() for each in (y0, dy)]
    found = pull(*leaves, "cosine", 9)
    size = 1e-6 * (float(exact.detach().abs().max()) + relative * 1e-1)
    assert float((found - exact).detach().abs().max()) <= size
    for one, wanted in zip(
        torch.autograd.grad(found, leaves, u), torch.autograd.grad(exact, wide, u.double()), strict=True
    ):
        assert float((one - wanted).abs().max()) <= 1e-6 * (1 + float(wanted.abs().max()))


def test_a_pull_does_not_depend_on_threads():
    torch.manual_seed(0)
    y0, dy = torch.randn(3000, 9), torch.randn(3000, 9)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(pull(y0, dy, "cosine", 3000))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], each) for each in found[1:])


@pytest.mark.parametrize("minus", [False, True])
def test_operands_side_by_side(minus):
    torch.manual_seed(0)
    one, other, less = torch.randn(M, N), torch.randn(M, N), torch.randn(M, N)
    one[0, :5] = torch.tensor([torch.nan, torch.inf, -torch.inf, 3.4e38, 1e-42])
    out = torch.empty(M, 2 * N, dtype=torch.bfloat16)
    widen.beside(M, N, one.data_ptr(), other.data_ptr(), less.data_ptr() if minus else 0, out.data_ptr())
    wanted = torch.cat([one, other - less if minus else other], 1).bfloat16()
    assert torch.equal(out.nan_to_num(7.0), wanted.nan_to_num(7.0))


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_sums_of_a_rounded_product(plus, bias):
    torch.manual_seed(0)
    x, more, row, out = torch.randn(M, N).bfloat16(), torch.randn(M, N), torch.randn(N), torch.empty(M, N)
    widen.sum_up(M, N, x.data_ptr(), more.data_ptr() if plus else 0, row.data_ptr() if bias else 0, out.data_ptr())
    wanted = x.float() + (more if plus else 0.0) + (row if bias else 0.0)
    assert torch.equal(out, wanted)


def test_both_halves_of_a_product():
    x = torch.randn(M, 2 * N).bfloat16()
    sums, minus = torch.empty(M, N), torch.empty(M, N)
    widen.split(M, N, x.data_ptr(), sums.data_ptr(), minus.data_ptr())
    assert torch.equal(sums, x[:, :N].float() + x[:, N:].float())
    assert torch.equal(minus, -x[:, N:].float())


def results(matrix, given):
    x, x0, y0, g, u, along, bias = given
    return [
        matrix.of(x, bias),
        matrix.of(x, None),
        matrix.gradient(g, x),
        matrix.differences(x, x0, y0, bias),
        matrix.differences(x, None, y0, None),
        matrix.back(g),
        matrix.back(g, _rounded_matrix.TAU),
        *matrix.back_both(g),
        *matrix.along(u, x, g, along, bias),
        *matrix.along(None, x, g, along, None),
    ]


def exactly(w, tau, given):
    w, tau, x, x0, y0, g, u, along, bias = (each.double() for each in (w, tau, *given))
    shifted = y0 + x @ tau.T + (x - x0) @ w.T + bias
    return [
        *(x @ w.T + bias, x @ w.T, g.T @ x, shifted, y0 + x @ tau.T, g @ w, g @ tau, g @ (w + tau), -g @ w),
        *(u @ w.T + x @ along.T + bias, g @ along, x @ along.T, g @ along),
    ]


@pytest.mark.parametrize("where", ["a CPU without bfloat16", "a CPU with it", "a device"])
@pytest.mark.parametrize(("precision", "most"), [("fp32", 2e-6), ("bf16", 1e-2)])
def test_products_of_a_matrix(precision, most, where, monkeypatch):
    monkeypatch.setattr(_rounded_matrix, "multiplies_bf16", lambda device: where != "a CPU without bfloat16")
    monkeypatch.setattr(_rounded_matrix, "here", lambda x: where != "a device")
    torch.manual_seed(0)
    w, tau, along = torch.randn(N, K), 0.1 * torch.randn(N, K), torch.randn(N, K)
    given = (*(torch.randn(M, width) for width in (K, K, N, N, K)), along, torch.randn(N))
    with products(precision, w.device):
        found = results(Matrix(w, tau, precision), given)
    for one, exact in zip(found, exactly(w, tau, given), strict=True):
        assert one.dtype == torch.float32
        assert float((one - exact).norm() / exact.norm()) < most
