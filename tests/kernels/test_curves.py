"""Derivatives of activations and norms in one pass, against autograd in fp64."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from streammerge.kernels.host import aim, curves
from streammerge.methods._curved import curved

ACTIVATIONS = {
    curves.GELU: functional.gelu,
    curves.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
    curves.SILU: functional.silu,
}


def twice(f, x, dy, u):
    """dx, and what u pulls back through it to dy and x, in fp64."""
    x, dy = (each.double().requires_grad_() for each in (x, dy))
    (dx,) = torch.autograd.grad(f(x), x, dy, create_graph=True)
    return dx.detach(), *torch.autograd.grad(dx, (dy, x), u.double())


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations(kind):
    x = torch.cat([torch.linspace(-12, 12, 9001), torch.tensor([0.0, -0.0, 1e-30, 80.0, -80.0, 1e4, -1e4])])
    dy, u = torch.randn_like(x), torch.randn_like(x)
    dx, first, second, to_dy, to_x = (torch.empty_like(x) for _ in range(5))
    curves.bend(1, x.numel(), kind, x.data_ptr(), dy.data_ptr(), dx.data_ptr())
    curves.slopes(1, x.numel(), kind, *(each.data_ptr() for each in (x, first, second)))
    curves.bend_twice(1, x.numel(), *(each.data_ptr() for each in (first, second, dy, u, to_dy, to_x)))
    wanted = twice(ACTIVATIONS[kind], x, dy, u)
    for found, exact, size in zip((dx, to_dy, to_x), wanted, (dy, u, dy * u), strict=True):
        assert float(((found - exact) / (1 + size.abs())).abs().max()) < 3e-7


def network(x, weights, maps):
    """A norm, an activation, a norm."""
    norm, act = maps
    width = (x.shape[-1],)
    h = act(norm(x, width, weights["a"], weights["b"], 1e-5))
    return norm(h + x, width, weights["c"], weights["d"], 1e-5)


@pytest.mark.parametrize("shape", [(7, 33), (3, 5, 64), (1, 1030)])
@pytest.mark.parametrize("name", ["gelu", "silu"])
def test_a_graph_of_a_graph_with_them_is_that_of_torch(shape, name, one_thread):
    torch.manual_seed(0)
    x, r = torch.randn(shape), torch.randn(shape)
    weights = {each: 1 + 0.3 * torch.randn(shape[-1]) for each in "abcd"}
    along = {each: torch.randn(shape[-1]) for each in "abcd"}

    def slope(x, r, weights, along, maps):
        x = x.requires_grad_()
        leaves = {each: value.requires_grad_() for each, value in weights.items()}
        found = torch.autograd.grad(network(x, leaves, maps), list(leaves.values()), r, create_graph=True)
        return torch.autograd.grad(found, x, list(along.values()))[0]

    act = getattr(functional, name)
    ours = slope(x.clone(), r, dict(weights), along, (curved()[functional.layer_norm], curved()[act]))
    wide = [{each: value.double() for each, value in one.items()} for one in (weights, along)]
    exact = slope(x.double(), r.double(), *wide, (functional.layer_norm, act))
    assert float((ours - exact).norm() / exact.norm()) < 1e-6


@pytest.mark.parametrize("shape", [(2, 3, 5, 5), (4, 200)])
def test_softmax(shape):
    torch.manual_seed(0)
    x, dy, u = (3 * torch.randn(shape) for _ in range(3))
    x[..., 1] = -torch.inf
    ours = curved()[functional.softmax](x.requires_grad_(), dim=-1)
    (dx,) = torch.autograd.grad(ours, x, dy.requires_grad_(), create_graph=True)
    found = (ours, dx, *torch.autograd.grad(dx, (dy, x), u))
    wanted = twice(lambda x: functional.softmax(x, dim=-1), x.detach(), dy.detach(), u)
    wanted = (functional.softmax(x.detach().double(), dim=-1), *wanted)
    for one, exact in zip(found, wanted, strict=True):
        assert float((one.detach() - exact).abs().max()) < 3e-6
    assert curved()[functional.softmax](x, dim=0) is None


def test_threads_change_no_bit():
    torch.manual_seed(0)
    x = torch.randn(900, 48)
    norm, gelu = curved()[functional.layer_norm], curved()[functional.gelu]
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf, weight = x.clone().requires_grad_(), torch.ones(48, requires_grad=True)
            y = gelu(norm(leaf, (48,), weight, torch.zeros(48), 1e-5))
            (g,) = torch.autograd.grad(y, weight, x, create_graph=True)
            found.append(torch.autograd.grad(g, leaf, torch.ones(48))[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], each) for each in found[1:])


def test_what_is_not_fp32_is_left_to_torch():
    x = torch.randn(3, 8, dtype=torch.float64)
    assert curved()[functional.gelu](x) is None
    assert curved()[functional.layer_norm](x, (8,), torch.ones(8), torch.zeros(8)) is None
    assert curved()[functional.layer_norm](x.float(), (8,)) is None


@pytest.mark.parametrize("numel", [1, 127, 4096, 20001])
def test_the_turn_towards_a_task_vector(numel):
    torch.manual_seed(numel)
    g, t = torch.randn(numel), torch.randn(numel)
    found = np.empty(2)
    aim.dots(g.data_ptr(), t.data_ptr(), numel, found)
    exact = [float(g.double() @ each.double()) for each in (t, g)]
    assert found == pytest.approx(exact, abs=1e-6 * exact[1])
    wanted = 0.3 * g - 2.5 * t
    aim.turn(g.data_ptr(), t.data_ptr(), numel, 0.3, -2.5)
    assert torch.allclose(g, wanted, rtol=1e-6, atol=1e-6)
