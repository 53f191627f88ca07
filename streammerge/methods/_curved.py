"""Activations, layer norms and softmax for autograd, whose second derivatives are one pass over memory on the CPU.

`curved` maps torch's functions to ours. They are what torch computes going forward; what they return can be
differentiated twice by their input, and once by weights: a second derivative by weights is never asked for.
On other devices, and for what is not fp32, torch's own functions run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from streammerge.methods._loops import over_rows

if TYPE_CHECKING:
    from torch import Tensor


@cache
def curved() -> dict[Callable[..., Any], Callable[..., Any]]:
    """Functions of torch, and what takes their place; that returns None for arguments that it does not know."""
    import torch
    from torch.nn import functional

    norm, bend, shares = _norm(), _bend(), _softmax()

    def known(x: Tensor) -> bool:
        return x.dtype == torch.float32 and x.device.type in ("cpu", "meta")

    def layer_norm(
        x: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> Tensor | None:
        if not known(x) or weight is None or bias is None or len(normalized_shape) != 1:
            return None
        return torch.as_tensor(norm.apply(x, weight, bias, eps))

    def gelu(x: Tensor, approximate: str = "none") -> Tensor | None:
        return torch.as_tensor(bend.apply(x, GELUS[approximate])) if known(x) else None

    def silu(x: Tensor, inplace: bool = False) -> Tensor | None:
        return torch.as_tensor(bend.apply(x, SILU)) if known(x) and not inplace else None

    def softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Tensor | None:
        if not known(x) or dim not in (-1, x.dim() - 1) or dtype not in (None, x.dtype):
            return None
        return torch.as_tensor(shares.apply(x))

    return {
        functional.layer_norm: layer_norm,
        functional.gelu: gelu,
        functional.silu: silu,
        functional.softmax: softmax,
    }


GELUS, SILU = {"none": 0, "tanh": 1}, 2  # as kernels/host/curves.py numbers them


@cache
def _norm() -> Any:
    import torch
    from torch.autograd import Function

    from streammerge.kernels.host import curves

    class Back(Function):  # type: ignore[misc]  # torch is untyped here
        @staticmethod
        def forward(ctx: Any, dy: Tensor, x: Tensor, weight: Tensor, mean: Tensor, r: Tensor) -> Any:
            ctx.save_for_backward(dy, x, weight, mean, r)
            shape = list(x.shape[-1:])
            every = [True, True, True]
            return torch.ops.aten.native_layer_norm_backward(dy, x, shape, mean, r, weight, weight, every)

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            u, dw, db = (each.contiguous() for each in given)
            dy, x, weight, mean, r = (each.contiguous() for each in ctx.saved_tensors)
            n = x.shape[-1]
            to_dy, to_x = torch.empty_like(x), torch.empty_like(x)
            over_rows(curves.norm_twice, n, x, dy, x, u, to_dy, to_x, weight, dw, db, mean, r)
            return to_dy, to_x, None, None, None

    class Norm(Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Any:
            y, mean, r = torch.native_layer_norm(x, x.shape[-1:], weight, bias, eps)
            ctx.save_for_backward(x, weight, mean, r)
            return y

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            return (*Back.apply(given[0], *ctx.saved_tensors), None)

    return Norm


@cache
def _bend() -> Any:
    import torch
    from torch.autograd import Function
    from torch.nn import functional

    from streammerge.kernels.host import curves

    run: list[Callable[[Tensor], Tensor]] = [
        functional.gelu,
        lambda x: functional.gelu(x, approximate="tanh"),
        functional.silu,
    ]

    class Back(Function):  # type: ignore[misc]  # torch is untyped here
        @staticmethod
        def forward(ctx: Any, dy: Tensor, x: Tensor, first: Tensor, second: Tensor) -> Tensor:
            ctx.save_for_backward(dy, first, second)
            return dy * first

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            dy, first, second = ctx.saved_tensors
            to_dy, to_x = torch.empty_like(first), torch.empty_like(first)
            u = given[0].contiguous()
            over_rows(curves.bend_twice, u.shape[-1], u, first, second, dy.contiguous(), u, to_dy, to_x)
            return to_dy, to_x, None, None

    class Bend(Function):  # type: ignore[misc]
        """Both slopes are made in the first turn, and kept for the second."""

        @staticmethod
        def forward(ctx: Any, x: Tensor, kind: int) -> Any:
            x = x.contiguous()
            ctx.save_for_backward(x)
            ctx.kind, ctx.slopes = kind, None
            return run[kind](x)

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            (x,) = ctx.saved_tensors
            if torch.is_grad_enabled():
                if ctx.slopes is None:
                    ctx.slopes = torch.empty_like(x), torch.empty_like(x)
                    over_rows(curves.slopes, x.shape[-1], x, ctx.kind, x, *ctx.slopes)
                return Back.apply(given[0], x, *ctx.slopes), None
            if ctx.slopes is not None:
                return given[0] * ctx.slopes[0], None
            dx = torch.empty_like(x)
            over_rows(curves.bend, x.shape[-1], x, ctx.kind, x, given[0].contiguous(), dx)
            return dx, None

    return Bend


@cache
def _softmax() -> Any:
    import torch
    from torch.autograd import Function

    from streammerge.kernels.host import curves

    class Back(Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, dy: Tensor, x: Tensor, y: Tensor) -> Tensor:
            dy, dx = dy.contiguous(), torch.empty_like(y)
            ctx.save_for_backward(dy, y)
            over_rows(curves.softmax_back, y.shape[-1], y, y, dy, dx)
            return dx

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            dy, y = ctx.saved_tensors
            to_dy, to_x = torch.empty_like(y), torch.empty_like(y)
            over_rows(curves.softmax_twice, y.shape[-1], y, y, dy, given[0].contiguous(), to_dy, to_x)
            return to_dy, to_x, None

    class Softmax(Function):  # type: ignore[misc]
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            x = x.contiguous()
            y = torch.empty_like(x)
            over_rows(curves.softmax, x.shape[-1], x, x, y)
            ctx.save_for_backward(x, y)
            return y

        @staticmethod
        def backward(ctx: Any, *given: Tensor) -> Any:
            return Back.apply(given[0], *ctx.saved_tensors)

    return Softmax
