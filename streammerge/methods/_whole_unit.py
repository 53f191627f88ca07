"""A unit of any kind (an encoder's block, attention, one linear map) and its expert's, through autograd.

The induced gradient of a micro-batch is an ordinary backward pass; the derivative of F = sum <g, v> by the anchors is
the backward pass of that one, of one micro-batch at a time. If all anchors are one micro-batch, its graph is kept from
the first pass to the second. Any operation that autograd differentiates twice will do; norms, activations and linear
maps have rules of their own, which take fewer passes over memory (_curved.py, _linear_maps.py).

Linear maps carry differences (`delta-forward`): what the base's took from x0 to y0, the expert's takes to

    y1 = y0 + x1 tau^T + (x1 - x0) W^T

so that y1 - y0 keeps its digits, all the more where operands are rounded. Everything between is fp32, products of
activations too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import TYPE_CHECKING, Any

from streammerge.methods._induced import NOTHING, Tensors, pull
from streammerge.methods._linear_maps import Turn, maps
from streammerge.methods._rounded import products
from streammerge.methods._rounded_matrix import Matrix

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
        self._precision = precision
        self._expert = {name: base[name] + tau[name] for name in base}
        self._changed = {id(self._expert[name]): value for name, value in tau.items()}
        self._matrices = {name: Matrix(base[name], tau[name], precision) for name in base if base[name].dim() == 2}
        self._kept: tuple[Turn, list[Tensor]] | None = None

    def likeness_gradient(self, x: Tensor, anchors: int, names: Sequence[str]) -> list[Tensor]:
        with self._exactly():
            whole = len(x) == anchors
            turn, found = self._gradients(x, anchors, names, whole)
            self._kept = (turn, found) if whole else None
            return [gradient.detach() for gradient in found]

    def slope(self, x: Tensor, anchors: int, along: Tensors) -> Tensor:
        import torch

        with self._exactly():
            turn, found = self._kept or self._gradients(x, anchors, list(along), True)
            self._kept = None
            turn.by_weights = False
            (slope,) = torch.autograd.grad(found, turn.leaf, list(along.values()))
            return slope

    def _gradients(self, x: Tensor, anchors: int, names: Sequence[str], again: bool) -> tuple[Turn, list[Tensor]]:
        """This micro-batch's share of g, and what it is a function of; `again`: to be differentiated by that."""
        import torch

        with torch.enable_grad():
            leaf = x.detach().requires_grad_(again)
            turn = Turn(leaf)
            weights = {name: value.detach().requires_grad_(name in names) for name, value in self._base.items()}
            with self._maps(weights, turn) as base:
                y0 = self._run(leaf, weights)
            with torch.set_grad_enabled(again):
                r = pull(y0, self._of_expert(leaf, turn, base.seen) - y0, self._distance, anchors)
            wanted = [weights[name] for name in names]
            return turn, list(torch.autograd.grad(y0, wanted, r, create_graph=again))

    def outputs(self, x: Tensor) -> Tensor:
        import torch

        turn = Turn(x)
        with torch.no_grad(), self._exactly():
            with self._maps(self._base, turn) as base:
                self._run(x, self._base)
            return self._of_expert(x, turn, base.seen)

    def _maps(self, weights: Tensors, turn: Turn, *of_expert: Any) -> Any:
        matrices = {id(weights[name]): matrix for name, matrix in self._matrices.items()}
        return maps(self._precision, turn, matrices, *of_expert)

    def _of_expert(self, x: Tensor, turn: Turn, seen: list[Any]) -> Tensor:
        """What the expert returns, from what the base's linear maps were given and returned."""
        with self._maps(self._expert, turn, self._changed, seen):
            return self._run(x, self._expert)


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
