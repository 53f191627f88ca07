"""Hands the gradients of one stage to the method, each as soon as the backward pass has it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from streammerge.engine.layers_hooks import Hooks, Loaded
from streammerge.errors import RecipeError

if TYPE_CHECKING:
    from torch import Tensor, nn


def leaves(loaded: Loaded, hooks: Hooks) -> dict[str, Tensor]:
    """A stage's parameters as leaves of a graph. Those of a finished stage too: what requires a gradient decides which
    kernels torch takes, and with them the last bits. A tied head's weight gets its gradient at the embedding.
    """
    own = {loaded.stage.parts[name].parameter for name in loaded.stage.tensors}
    wanted = hooks.gradients != "none"
    return {name: t.detach().requires_grad_(wanted and name in own) for name, t in loaded.parameters.items()}


class Gradients:
    """While open, `leaves` are the stage's parameters as a graph's leaves. `batch` is the one whose backward runs.

    Sums over batches are kept in fp32 where the weights are of 16 bits. With `held`, gradients stay with their leaves,
    for a second backward to add to.
    """

    def __init__(self, loaded: Loaded, hooks: Hooks, shown: bool) -> None:
        self._stage, self._hooks = loaded.stage, hooks
        self._sums: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        self._inputs: tuple[Tensor, Tensor] | None = None  # of the linear layer that ran last, and the same as a panel
        self.batch = 0
        self.held = False
        self._names: dict[str, list[str]] = {}  # parameter -> its tensors, where gradients are shown
        if shown and hooks.gradients != "none":
            for name in self._stage.tensors:
                self._names.setdefault(self._stage.parts[name].parameter, []).append(name)
        panels = self._panels() if hooks.panels and self._stage.module is not None else set()
        self.leaves = leaves(loaded, hooks)
        for name in self._names:
            if name in panels:
                self.leaves[name].requires_grad_(False)
            else:
                self._handles.append(self.leaves[name].register_post_accumulate_grad_hook(self._arrived(name)))

    def _arrived(self, name: str) -> Callable[[Tensor], None]:
        def arrived(leaf: Tensor) -> None:
            if self.held:
                return
            gradient, leaf.grad = leaf.grad, None
            assert gradient is not None
            if self._hooks.gradients == "each":
                self._show(name, gradient.contiguous(), self.batch)
            elif name in self._sums:
                self._sums[name] += gradient
            else:
                self._sums[name] = gradient.float() if gradient.dtype.itemsize < 4 else gradient

        return arrived

    def _show(self, parameter: str, gradient: Tensor, batch: int | None) -> None:
        views = self._stage.views({parameter: gradient})
        for name in self._names[parameter]:
            self._hooks.learn(self._stage, name, views[name], batch)

    def finish(self) -> None:
        """All batches have had their backward: show the sums, and let go of everything."""
        for name in self._names:
            if name in self._sums:
                self._show(name, self._sums.pop(name).contiguous(), None)
        for handle in self._handles:
            handle.remove()
        self.leaves, self._inputs = {}, None

    def _panels(self) -> set[str]:
        """Watch the linear layers; the parameters that `panel` is called for."""
        from torch import nn

        found = set()
        assert self._stage.module is not None
        for path, module in self._stage.module.named_modules():
            parameter = f"{self._stage.name}.{path}.weight"
            names = self._names.get(parameter, [])
            if isinstance(module, nn.Linear) and len(names) == 1:
                found.add(parameter)
                self._handles.append(module.register_forward_hook(self._called(names[0])))
        return found

    def _called(self, name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        seen: list[int] = []

        def called(module: nn.Module, args: Any, output: Tensor) -> None:
            if not output.requires_grad:
                return
            if self.batch in seen:
                raise RecipeError(f"{name} is used twice in its layer: it has no single panel")
            seen[:] = [self.batch]
            if self._inputs is None or self._inputs[0] is not args[0]:
                self._inputs = args[0], args[0].detach().flatten(0, -2)
            inputs = self._inputs[1]

            def arrived(gradient: Tensor) -> None:
                self._hooks.panel(self._stage, name, inputs, gradient.flatten(0, -2).contiguous(), self.batch)

            output.register_hook(arrived)

        return called
