"""Kernel arguments in tests: copies, parts, comparison to the bit, and where they hold NaN or infinities."""

from __future__ import annotations

import numpy as np
import torch

from streammerge import kernel
from streammerge.kernels import reference
from streammerge.kernels.queue import Queue

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def copy(value):
    if isinstance(value, torch.Tensor):
        return value.clone()
    if isinstance(value, np.ndarray):
        return value.copy()
    return [copy(v) for v in value] if isinstance(value, list) else value


def same(one, two) -> bool:
    """To the bit for tensors; arrays may differ in a NaN's payload."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(reference.bits(one), reference.bits(two))
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two, equal_nan=one.dtype.kind == "f")
    if isinstance(one, list):
        return len(one) == len(two) and all(map(same, one, two))
    return True


def agree(module, args) -> None:
    """host and reference give the same results and leave the same in every argument."""
    _agree(module, args, lambda ours: kernel.host(module.__name__.rpartition(".")[2]).host(*reference.spans(ours)))


def launch_agrees(module, args) -> None:
    """launch and reference: on a GPU where there is one, in the interpreter elsewhere."""
    _agree(module, args, lambda ours: launch(module, ours))


def launch(module, args):
    """The kernel on a device, waited for; arrays and tensors among the arguments are changed as it changes them."""
    on_device = [moved(a, DEVICE) for a in args]
    queue = Queue.on(DEVICE)
    with np.errstate(all="ignore"):  # the interpreter computes with numpy, which warns of NaN and overflow
        got = module.launch(queue, *reference.spans(on_device, queue))
        queue.end().wait()
    queue.finish()
    for one, other in zip(tensors_in(args), tensors_in(on_device), strict=True):
        reference.bits(one).copy_(reference.bits(other))
    return got


def moved(value, device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    return [moved(v, device) for v in value] if isinstance(value, list) else value


def _agree(module, args, run) -> None:
    ours, theirs = [copy(a) for a in args], [copy(a) for a in args]
    got, expected = run(ours), module.reference(*theirs)
    assert (got is None) == (expected is None)
    assert got is None or np.array_equal(got, expected), (got, expected)
    for i, (one, two) in enumerate(zip(ours, theirs, strict=True)):
        assert same(one, two), f"argument {i} differs"


def tensors_in(args):
    for a in args:
        if isinstance(a, torch.Tensor):
            yield a
        elif isinstance(a, list):
            yield from tensors_in(a)


def poison(args, odd: tuple[float, ...] = (float("nan"), float("inf"), -float("inf"))) -> None:
    """NaN and infinities at places that differ from input to input."""
    for k, tensor in enumerate(tensors_in(args)):
        for i, value in enumerate(odd):
            at = torch.arange(tensor.numel())[3 + 7 * k + i :: 41 + k]
            tensor[at] = torch.full_like(at, value, dtype=torch.float32).to(tensor.dtype)


def shifted(args, by: int):
    """The same values at addresses `by` elements further: item-aligned, no more."""

    def move(value):
        if isinstance(value, torch.Tensor):
            room = torch.empty(value.numel() + by, dtype=value.dtype)
            reference.bits(room[by:]).copy_(reference.bits(value))
            return room[by:]
        return [move(v) for v in value] if isinstance(value, list) else value

    return [move(a) for a in args]
