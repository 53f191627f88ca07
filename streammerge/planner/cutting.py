"""Cuts a plan's work to the budget: bytes of a step, of the rings, and how many matrices are solved side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, NoReturn

from streammerge.budget import MIB, human
from streammerge.errors import BudgetTooSmall
from streammerge.method import TensorMethod
from streammerge.planner.device import SLOTS, DeviceLayout, make_layout
from streammerge.planner.steps import Cut, PlannedTensor, is_whole, sample_bytes, smallest_step
from streammerge.store.ring import PAGE, round_up
from streammerge.store.writer import HEADER_PIECE

if TYPE_CHECKING:
    from streammerge.planner.plan import Limits

TILE = 8 * MIB  # bytes of one input in a step, at most: more does not make a disk faster
GPU_TILES = 2  # times that on a GPU, where a step passes the bus in less time than it takes to ask for it
DEPTH = 4  # steps the ring holds where nothing must be resident: one read, one merged, two on their way
FP32 = 4
AT_ONCE = 4  # matrices that are solved side by side at most, in memory of their own


def cut_to_fit(
    tensors: Sequence[PlannedTensor], limits: Limits, held: int, threads: int
) -> tuple[Cut, int, int, int, DeviceLayout | None]:
    """The largest steps that fit: (cut, bytes of the ring, of the result ring, of the methods, what a GPU holds)."""
    inputs = max((len(t.inputs) for t in tensors), default=1)
    smallest = smallest_step(tensors)
    surveyed = [tensor for tensor in tensors if tensor.surveyed]
    sample = max(map(sample_bytes, surveyed), default=0)
    free = limits.ram - held
    step = max(inputs * TILE * (GPU_TILES if limits.on_gpu else 1), smallest)
    there: DeviceLayout | None = None
    while True:
        step = max(step, smallest)
        extra = max((_cost(t, step, threads, limits.on_gpu) for t in tensors), default=0)
        out = _out_bytes(tensors, step)
        ring = max(DEPTH * step, sample + PAGE)
        there = make_layout(tensors, step, out // DEPTH, limits.vram) if limits.on_gpu else None
        pinned = there.pinned_bytes if there else 0
        extra += pinned + (SLOTS * step if there else 0)  # with samples of the tiles that went to the device
        if ring + out + extra <= free and (there or not limits.on_gpu):
            break
        if step == smallest:
            _refuse(tensors, limits, held + ring + out + extra + MIB, step, out)
        step //= 2
    if there:
        return Cut(step, ring, there.slots), ring, out, extra, there
    if surveyed:
        room = max(whole_bytes(tensor, step) for tensor in surveyed) + 2 * step  # the largest, and the next step
        ring = max(ring, min(free - out - extra, room))
    return Cut(step, ring), ring, out, extra, None


def whole_bytes(tensor: PlannedTensor, step: int) -> int:
    """A bound on what a tensor's inputs take in the ring, cut into steps."""
    whole = tensor.numel * tensor.width
    return whole + whole // (step // 2) * len(tensor.inputs) * 2 * PAGE


def side_by_side(tensors: Sequence[PlannedTensor], cut: Cut, threads: int, free: int) -> tuple[int, int, int]:
    """How many matrices to solve at once, and the bytes that all but the first take in the ring and of the methods."""
    room, solver, count = 0, 0, 0
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor.method, TensorMethod):
            continue
        if tensor.method.fills_cores(tensor.job.shape):
            return 1, 0, 0
        if is_whole(tensors, index, cut):
            count += 1
            room = max(room, whole_bytes(tensor, cut.step))
            solver = max(solver, _cost(tensor, cut.step, threads, on_gpu=False) - tensor.method.shared_bytes)
    waiting = FP32 * 2 * cut.step // min((t.width for t in tensors), default=1)  # solved, not merged
    more = max(0, min(threads, AT_ONCE, count, 1 + (free - waiting) // max(1, room + solver)) - 1)
    return 1 + more, more * room, more * solver + (waiting if more else 0)


def _refuse(tensors: Sequence[PlannedTensor], limits: Limits, ram: int, step: int, out: int) -> NoReturn:
    """Say what is missing: `ram` bytes of the host (another process may hold a little more), or of the device."""
    least = round_up(ram, MIB)
    if least > limits.ram:
        raise BudgetTooSmall(
            f"this merge needs at least {human(least)} of memory and {human(limits.ram)} are "
            f"allowed; give --ram {least // MIB}MiB or more",
            least,
        )
    layout = make_layout(tensors, step, out // DEPTH, 1 << 62)
    assert layout is not None
    least = round_up(replace(layout, slots=SLOTS).peak_bytes, MIB)
    raise BudgetTooSmall(
        f"this merge needs at least {human(least)} of device memory and {human(limits.vram)} are "
        f"allowed; give --vram {least // MIB}MiB or more, or --device cpu",
        least,
    )


def _cost(tensor: PlannedTensor, step: int, threads: int, on_gpu: bool) -> int:
    numel = min(tensor.numel, max(1, step // tensor.width))
    experts = len(tensor.job.experts)
    here = tensor.surveyed and not (on_gpu and isinstance(tensor.method, TensorMethod))
    kept = tensor.method.survey_bytes(tensor.job.shape, experts, threads) if here else 0
    return tensor.method.cost(numel, experts, "cpu").host * threads + kept


def _out_bytes(tensors: Sequence[PlannedTensor], step: int) -> int:
    """The result ring: as many slots as the ring has steps, of the largest result a step can have."""
    total = sum(t.end - t.begin for t in tensors)
    ratio = max(((t.end - t.begin) / (t.numel * t.width) for t in tensors if t.numel), default=1.0)
    largest = min(total, int(step * ratio) + 1)
    return round_up(DEPTH * (max(largest, HEADER_PIECE) + 2 * PAGE))
