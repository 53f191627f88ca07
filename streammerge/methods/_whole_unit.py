"""A unit of any kind (an encoder's block, attention, one linear map) and its expert's, through autograd.

The induced gradient of a micro-batch is an ordinary backward pass; the derivative of F = sum <g, v> by the anchors is
the backward pass of that one, of one micro-batch at a time. If all anchors are one micro-batch, its graph is kept from
the first pass to the second. Any operation that autograd differentiates twice will do; norms, activations and linear
maps have rules of their own, which take fewer passes over memory (_curved.py, Shifted below).

Linear maps carry differences (`delta-forward`): what the base's took from x0 to y0, the expert's takes to

    y1 = y0 + x1 tau^T + (x1 - x0) W^T

so that y1 - y0 keeps its digits, all the more where operands are rounded. Everything between is fp32, products of
activations too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from streammerge.methods._curved import curved
from streammerge.methods._induced import NOTHING, Tensors, pull
from streammerge.methods._rounded import casts, exact_within, product, products

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[["Tensor", Tensors], "Tensor"]  # what the unit returns for x and weights


class WholeUnit:
    """Base and task vector of every tensor of a unit."""

    def __init__(self, run: Run, base: Tensors, tau: Tensors, distance: str, precision: str = "fp32") -> None:
        """`precision` is that of the operands of linear maps (_rounded.py)."""
        self._run, self._base, self._distance = run, base, distance
        device = next(iter(base.values())).device
        self._exactly = partial(products, precision, device)
        self._rounds, self._precision = casts(precision, device), precision
        self._expert = {name: base[name] + tau[name] for name in base}
        self._changed = {id(self._expert[name]): (base[name], tau[name]) for name in base}
        self._kept: tuple[Tensor, list[Tensor]] | None = None

    def likeness_gradient(self, x: Tensor, anchors: int, names: Sequence[str]) -> list[Tensor]:
        with self._exactly():
            whole = len(x) == anchors
            leaf, found = self._gradients(x, anchors, names, whole)
            self._kept = (leaf, found) if whole else None
            return [gradient.detach() for gradient in found]

    def slope(self, x: Tensor, anchors: int, along: Tensors) -> Tensor:
        import torch

        with self._exactly():
            leaf, found = self._kept or self._gradients(x, anchors, list(along), True)
            self._kept = None
            (slope,) = torch.autograd.grad(found, leaf, list(along.values()))
            return slope

    def _gradients(self, x: Tensor, anchors: int, names: Sequence[str], again: bool) -> tuple[Tensor, list[Tensor]]:
        """A leaf of x, and this micro-batch's share of g; `again`: to be differentiated by x."""
        import torch

        with torch.enable_grad():
            leaf = x.detach().requires_grad_(again)
            weights = {name: value.detach().requires_grad_(name in names) for name, value in self._base.items()}
            with _maps(self._precision, self._rounds) as maps:
                y0 = self._run(leaf, weights)
            with torch.set_grad_enabled(again):
                r = pull(y0, self._of_expert(leaf, maps.seen) - y0, self._distance, anchors)
            wanted = [weights[name] for name in names]
            return leaf, list(torch.autograd.grad(y0, wanted, r, create_graph=again))

    def outputs(self, x: Tensor) -> Tensor:
        import torch

        with torch.no_grad(), self._exactly():
            with _maps(self._precision, self._rounds) as maps:
                self._run(x, self._base)
            return self._of_expert(x, maps.seen)

    def _of_expert(self, x: Tensor, seen: list[Any]) -> Tensor:
        """What the expert returns, from what the base's linear maps were given and returned."""
        with _maps(self._precision, self._rounds, self._changed, seen):
            return self._run(x, self._expert)


def _maps(precision: str, rounds: bool, changed: Any = None, seen: Any = None) -> Any:
    """A mode: linear maps are noted, or, given what was noted, are those of an expert by differences."""
    return _maps_class()(precision, rounds, changed, seen)


@cache
def _maps_class() -> Any:
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    linear, shifted, exact = functional.linear, _shifted_class(), _exact_class()
    bilinear = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)

    class Maps(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
        def __init__(self, precision: str, rounds: bool, changed: Any, seen: Any) -> None:
            super().__init__()
            self.seen: list[tuple[Tensor, ...]] = []
            self._rounds, self._changed, self._before = rounds, changed, iter(seen or ())
            self._curved, self._precision = curved(), precision

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is torch.addmm and len(args) == 3 and not kwargs:  # transformers' Conv1D
                return args[0] + exact.apply(*args[1:], self._precision)
            if function in bilinear and len(args) == 2 and min(each.dim() for each in args) > 1:
                batch = torch.broadcast_shapes(*(each.shape[:-2] for each in args))
                return exact.apply(*(_dense(each.expand(*batch, *each.shape[-2:])) for each in args), self._precision)
            if function in self._curved and torch.is_grad_enabled():
                found = self._curved[function](*args, **kwargs)
                return function(*args, **kwargs) if found is None else found
            if function is not linear:
                return function(*args, **kwargs)
            x, weight = args[:2]
            bias = args[2] if len(args) > 2 else kwargs.get("bias")
            if self._changed is None:
                y = self._map(x, weight, bias)
                self.seen.append((x, y))
                return y
            x0, y0 = next(self._before)
            base, tau = self._changed[id(weight)]
            shift = None if bias is None else self._changed[id(bias)][1]
            return shifted.apply(y0, x, None if x is x0 else x0, tau, base, shift, self._rounds)

        def _map(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            if not self._rounds:
                return torch.as_tensor(linear(x, weight, bias))
            y = product(x, weight.T, True)
            return y if bias is None else y + bias

    return Maps


@cache
def _shifted_class() -> Any:
    import torch
    from torch.autograd import Function
    from torch.autograd.function import once_differentiable

    class Shifted(Function):  # type: ignore[misc]  # torch is untyped here
        """y0 + x tau^T + (x - x0) W^T + bias, without the second product where x is x0: one tensor for all sums."""

        @staticmethod
        def forward(
            ctx: Any, y0: Tensor, x: Tensor, x0: Tensor | None, tau: Tensor, base: Tensor, bias: Any, rounds: bool
        ) -> Tensor:
            ctx.weights, ctx.rounds, ctx.same = (tau, base), rounds, x0 is None
            y = y0.flatten(0, -2).clone() if bias is None else y0.flatten(0, -2) + bias
            add(y, x.flatten(0, -2), tau.T, rounds)
            if x0 is not None:
                add(y, (x - x0).flatten(0, -2), base.T, rounds)
            return y.view_as(y0)

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, *given: Tensor) -> Any:
            g, (tau, base) = given[0].flatten(0, -2), ctx.weights
            shape = (*given[0].shape[:-1], tau.shape[1])
            if ctx.same:
                return given[0], product(g, tau, ctx.rounds).view(shape), None, None, None, None, None
            to_x = product(g, base, ctx.rounds)
            to_x0 = -to_x
            add(to_x, g, tau, ctx.rounds)
            return given[0], to_x.view(shape), to_x0.view(shape), None, None, None, None

    def add(total: Tensor, one: Tensor, other: Tensor, rounds: bool) -> None:
        if rounds:
            total += product(one, other, True)
        else:
            torch.addmm(total, one, other, out=total)

    return Shifted


@cache
def _exact_class() -> Any:
    import torch
    from torch.autograd import Function

    class Exact(Function):  # type: ignore[misc]  # torch is untyped here
        """a b in fp32 within `products(precision)`, and so its derivatives: products of activations are few."""

        @staticmethod
        def forward(ctx: Any, a: Tensor, b: Tensor, precision: str) -> Tensor:
            ctx.save_for_backward(a, b)
            ctx.precision = precision
            with exact_within(precision, a.device):
                return torch.matmul(a, b)

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            g, (a, b) = _dense(given[0]), ctx.saved_tensors
            return Exact.apply(g, b.mT, ctx.precision), Exact.apply(a.mT, g, ctx.precision), None

    return Exact


def _dense(x: Tensor) -> Tensor:
    """Copied now if products would do so, that their derivatives need not."""
    return x if x.is_contiguous() or x.mT.is_contiguous() else x.contiguous()


@cache
def _wide_class() -> Any:
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    class Wide(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
        """Softmax in the dtype of its input, whatever a model asks for."""

        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is functional.softmax:
                kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
            return function(*args, **kwargs)

    return Wide


def without_gradient(run: Run, base: Tensors, x: Tensor) -> dict[str, Tensor]:
    """Which entries of vectors (biases, norms) no x moves the result by: a mask for each that has some.

    A key's bias adds the same to all scores of a query, which softmax does not see. In fp32 its gradient is noise of
    any direction, in fp64 it is 1e-16 of the others. `x` are a few random inputs; the cotangent is random too.
    """
    import torch

    with torch.enable_grad():
        weights = {name: value.double().requires_grad_(value.dim() == 1) for name, value in base.items()}
        names = [name for name, value in weights.items() if value.requires_grad]
        x = x.double()
        with _wide_class()():
            y = run(x, weights)
        cotangent = y.detach() + (x if x.shape == y.shape else 1.0)
        found = torch.autograd.grad(y, [weights[name] for name in names], cotangent)
    most = max(float(each.abs().max()) for each in found)
    masks = {name: each.abs() <= NOTHING * most for name, each in zip(names, found, strict=True)}
    return {name: mask for name, mask in masks.items() if bool(mask.any())}
