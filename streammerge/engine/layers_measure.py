"""How many bytes the arithmetic of a stage holds at once, found without doing it.

A layer runs forward and backward on tensors without memory, while every tensor that an operation makes is counted for
as long as something holds it: what autograd saves, gradients, temporaries. What is inside a single operation (packed
panels of a matrix product) is not seen; `plan` allows for it.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Any

from streammerge.models.record import Call, each_tensor, tensors
from streammerge.models.stack import Stack
from streammerge.models.stage import Stage

if TYPE_CHECKING:
    import torch
    from torch import Tensor


def layer_bytes(stack: Stack, stage: Stage, call: Call, hidden: Any, learns: bool) -> int:
    """The most that one layer holds beside weights, arguments and results, forward and backward, for one batch.

    `hidden` maps what the call takes to tensors of the right shapes. Gradients are let go of as they come.
    """
    import torch

    for dtype in (stack.dtype, torch.bfloat16):  # on meta, torch takes grouped products for what GPUs can do
        with suppress(NotImplementedError, RuntimeError):
            scale = int(stack.dtype.itemsize // dtype.itemsize)
            return scale * _peak(stack, stage, call, hidden, learns, torch.device("meta"), dtype)
    return _peak(stack, stage, call, hidden, learns, None, stack.dtype)


def _peak(stack: Stack, stage: Stage, call: Call, hidden: Any, learns: bool, device: Any, dtype: torch.dtype) -> int:
    import torch

    def move(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.is_floating_point() else None
        return tensor.detach().to(device or tensor.device, wanted)

    args, kwargs = each_tensor((call.args, call.kwargs), move)
    moved = Call(args, kwargs, call.takes, call.gives)
    values = {key: move(hidden[key]).requires_grad_(hidden[key].is_floating_point()) for key in call.takes}
    like = next(iter(values.values()))
    weights = {}
    for name, parameter in stage.parameters.items():
        weights[name] = (
            torch.zeros((), dtype=dtype, device=like.device).expand(parameter.shape)
            if device is None
            else (torch.empty(parameter.shape, dtype=dtype, device=device))
        )
    whole = device is not None  # gradients of weights take memory where there is some
    assert stage.module is not None
    buffers = {name: move(buffer) for name, buffer in stage.module.named_buffers()} if device is not None else {}
    live = count_live(
        list(tensors((args, kwargs))) + list(values.values()) + list(weights.values()) + list(buffers.values())
    )
    with live, _fused_attention():
        for name, weight in weights.items():
            leaf = weights[name] = weight.detach().requires_grad_(learns)
            if learns:
                leaf.register_post_accumulate_grad_hook(_let_go)
        with torch.enable_grad():
            results = stack.layer(stage, weights | buffers, moved, values)
        roots = [r for r in results if r.requires_grad]
        if not whole:
            saved = live.now
            largest = max(p.numel() for p in stage.parameters.values()) * dtype.itemsize
            return int(saved + (live.peak - saved) + 2 * largest * learns + saved // 2)
        torch.autograd.backward(roots, [torch.empty_like(r) for r in roots])
    return int(live.peak)


def _fused_attention() -> Any:
    """Without a device torch takes attention apart; devices do it in one operation that keeps no matrix of scores."""
    import torch
    from torch.overrides import TorchFunctionMode

    attention = torch.nn.functional.scaled_dot_product_attention
    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    class Fused(TorchFunctionMode):  # type: ignore[misc]  # torch is untyped here
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if function is not attention or not args[0].is_meta:
                return function(*args, **kwargs)
            query, key, value = args[:3]
            mask = args[3] if len(args) > 3 else kwargs.get("attn_mask")
            if len(args) > 4 or (mask is not None and mask.requires_grad):
                return function(*args, **kwargs)
            groups = query.shape[-3] // key.shape[-3]
            if groups > 1:
                key, value = (each.repeat_interleave(groups, -3) for each in (key, value))
            return fused(
                query, key, value, 0.0, kwargs.get("is_causal", False), attn_mask=mask, scale=kwargs.get("scale")
            )[0]

    return Fused()


def _let_go(leaf: Tensor) -> None:
    leaf.grad = None


def count_live(known: list[Tensor]) -> Any:
    """A mode in which `now` and `peak` are the bytes of the tensors made meanwhile."""
    from torch.multiprocessing.reductions import StorageWeakRef
    from torch.utils._python_dispatch import TorchDispatchMode

    class Live(TorchDispatchMode):  # type: ignore[misc]  # torch is untyped here
        def __init__(self) -> None:
            super().__init__()
            self.now = self.peak = 0
            self._known = {tensor.untyped_storage()._cdata for tensor in known}
            self._alive: dict[int, tuple[Any, int]] = {}

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = function(*args, **(kwargs or {}))
            each_tensor(result, self._note)
            self.now = 0
            for key, (reference, size) in list(self._alive.items()):
                if reference.expired():
                    del self._alive[key]
                else:
                    self.now += size
            self.peak = max(self.peak, self.now)
            return result

        def _note(self, tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in self._alive:
                self._alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
            return tensor

    return Live()
