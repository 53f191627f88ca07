"""Linear maps and products of activations for autograd, as a unit and its expert's need them.

`Maps` is a mode in which a unit runs. The base's linear maps are noted; given what was noted, those of an expert are
differences from them (`Shifted`). Gradients are asked for in two turns: by weights, to be differentiated, then by the
input, from that; `Turn` says which it is, since autograd asks our functions for all that they could give.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any

from streammerge.methods._curved import curved
from streammerge.methods._rounded import exact_within
from streammerge.methods._rounded_matrix import TAU, Matrix

if TYPE_CHECKING:
    from torch import Tensor


class Turn:
    """Of one graph: its input, and whether gradients by weights are wanted, or by the input."""

    def __init__(self, leaf: Tensor) -> None:
        self.leaf, self.by_weights = leaf, True


def maps(precision: str, turn: Turn, matrices: Mapping[int, Matrix], changed: Any = None, seen: Any = None) -> Any:
    """A mode: linear maps are noted, or, given what was noted, are those of an expert by differences.

    `matrices` are those of the weights that the unit is run with, by id; `changed` has the changes of all weights.
    """
    return _maps_class()(precision, turn, matrices, changed, seen)


@cache
def _maps_class() -> Any:
    import torch
    from torch.nn import functional
    from torch.overrides import TorchFunctionMode

    linear, plain, shifted, exact = functional.linear, _plain_class(), _shifted_class(), _exact_class()
    bilinear = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.bmm, torch.Tensor.bmm)

    class Maps(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
        def __init__(self, precision: str, turn: Turn, matrices: Any, changed: Any, seen: Any) -> None:
            super().__init__()
            self.seen: list[tuple[Tensor, ...]] = []
            self._turn, self._matrices, self._changed, self._before = turn, matrices, changed, iter(seen or ())
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
            matrix = self._matrices.get(id(weight))
            if matrix is None or x.dim() < 2:  # not one of the unit's own tensors, or no rows
                return function(*args, **kwargs)
            if self._changed is None:
                y = plain.apply(x, weight, bias, matrix, x is self._turn.leaf, self._turn)
                self.seen.append((x, y))
                return y
            x0, y0 = next(self._before)
            return shifted.apply(y0, x, None if x is x0 else x0, matrix, self._changed.get(id(bias)))

    return Maps


@cache
def _plain_class() -> Any:
    from torch.autograd import Function
    from torch.autograd.function import once_differentiable

    class Back(Function):  # type: ignore[misc]  # torch is untyped here
        """g W, g^T x and the sum of g; its derivatives by g and x, each one tensor for all its sums."""

        @staticmethod
        def forward(ctx: Any, g: Tensor, x: Tensor, matrix: Matrix, wanted: tuple[bool, ...]) -> Any:
            ctx.save_for_backward(g, x)
            ctx.matrix = matrix
            ctx.set_materialize_grads(False)
            flat, to_x, by_weight, by_bias = g.flatten(0, -2), *wanted
            return (
                matrix.back(flat).view(x.shape) if to_x else None,
                matrix.gradient(flat, x.flatten(0, -2)) if by_weight else None,
                flat.sum(0) if by_bias else None,
            )

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, u: Any, to_weight: Any, to_bias: Any) -> Any:
            g, x = ctx.saved_tensors
            flat, to_g, to_x = g.flatten(0, -2), None, None
            u = None if u is None else u.flatten(0, -2)
            if to_weight is not None:
                to_g, to_x = ctx.matrix.along(u, x.flatten(0, -2), flat, to_weight, to_bias)
                to_x = to_x.view(x.shape)
            elif u is not None:
                to_g = ctx.matrix.of(u, to_bias)
            elif to_bias is not None:
                to_g = to_bias.expand(flat.shape)
            return None if to_g is None else to_g.view(g.shape), to_x, None, None

    class Plain(Function):  # type: ignore[misc]
        """x W^T + b. A gradient by x where that is the input itself (`first`) is wanted in the second turn only."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, matrix: Matrix, first: bool, turn: Turn) -> Tensor:
            ctx.save_for_backward(x)
            ctx.matrix, ctx.first, ctx.turn = matrix, first, turn
            return matrix.of(x.flatten(0, -2), bias).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            by_x, *by_weights = ctx.needs_input_grad[:3]
            wanted = (by_x and not ctx.first, *by_weights) if ctx.turn.by_weights else (by_x, False, False)
            return (*Back.apply(_dense(given[0]), *ctx.saved_tensors, ctx.matrix, wanted), None, None, None)

    return Plain


@cache
def _shifted_class() -> Any:
    from torch.autograd import Function
    from torch.autograd.function import once_differentiable

    class Shifted(Function):  # type: ignore[misc]  # torch is untyped here
        """y0 + x tau^T + (x - x0) W^T + bias, without the second product where x is x0."""

        @staticmethod
        def forward(ctx: Any, y0: Tensor, x: Tensor, x0: Tensor | None, matrix: Matrix, bias: Any) -> Tensor:
            ctx.matrix, ctx.same = matrix, x0 is None
            x0 = None if x0 is None else x0.flatten(0, -2)
            return matrix.differences(x.flatten(0, -2), x0, y0.flatten(0, -2), bias).view_as(y0)

        @staticmethod
        @once_differentiable  # type: ignore[untyped-decorator]
        def backward(ctx: Any, *given: Tensor) -> Any:
            g, shape = given[0].flatten(0, -2), (*given[0].shape[:-1], -1)
            if ctx.same:
                return given[0], ctx.matrix.back(g, TAU).view(shape), None, None, None
            to_x, to_x0 = ctx.matrix.back_both(g)
            return given[0], to_x.view(shape), to_x0.view(shape), None, None

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
