"""What a plan holds of a GPU, and where a step's bytes lie there. Pure integers.

slots     inputs of steps: one is filled while another is worked on; the tiles of a tensor that must be seen whole
          each have one
outs      results of steps: one is made while another travels back
batches   the small memory of launches: tables, counts, flags
state     what surveys add up over a tensor
solver    what methods on whole matrices compute with. Torch's allocator hands it out, beside the piece that the plan
          lays out: its sizes are the solvers' own
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from streammerge.budget import MIB
from streammerge.formats.dtypes import DTYPES
from streammerge.method import TensorMethod
from streammerge.planner.steps import PlannedTensor, Step

SLOTS = 3  # steps on the device at least: one arriving, one at work, one whose place is being freed
OUTS = 2
BATCHES = 4  # one for each result under way, and as many for surveys
ALIGN = 256
LARGE = 1 << 16  # bytes of a result from which on it is worth a copy of its own, aligned
CONTEXT = 640 * MIB  # what the driver and torch take of a GPU before the first tensor
SEGMENT = 2 * MIB  # torch takes memory from the driver in multiples of this
ANSWER = 4  # bytes of an element of a matrix that is solved and waits to be merged


def align(size: int, unit: int = ALIGN) -> int:
    return -(-size // unit) * unit


@dataclass(frozen=True)
class DeviceLayout:
    """Bytes of one GPU, by what they are for. All but the solver's are taken as one piece, before the first step."""

    slots: int
    slot_bytes: int
    out_bytes: int
    work_bytes: int
    result_bytes: int
    state_bytes: int
    solver_bytes: int = 0

    @property
    def batch_bytes(self) -> int:
        return self.work_bytes + self.result_bytes

    @property
    def arena_bytes(self) -> int:
        parts = self.slots * self.slot_bytes + OUTS * self.out_bytes + BATCHES * self.batch_bytes + self.state_bytes
        return align(parts, SEGMENT)

    @property
    def peak_bytes(self) -> int:
        return self.arena_bytes + self.solver_bytes + CONTEXT

    @property
    def pinned_bytes(self) -> int:
        """Host memory beside the rings: what batches send and receive."""
        return align(BATCHES * self.batch_bytes, 4096)

    def out_at(self, which: int) -> int:
        return self.slots * self.slot_bytes + which * self.out_bytes

    def batch_at(self, which: int) -> int:
        return self.out_at(OUTS) + which * self.batch_bytes

    @property
    def state_at(self) -> int:
        return self.batch_at(BATCHES)


def make_layout(tensors: Sequence[PlannedTensor], step: int, out: int, vram: int) -> DeviceLayout | None:
    """The layout for steps of at most `step` bytes and `out` result bytes; None if it does not fit `vram`.

    More slots than SLOTS only as far as the largest tensor that must be seen whole has a use for them.
    """
    surveys = max((_survey(t) for t in tensors if t.surveyed), default=0)
    costs = max((_cost(t, step) for t in tensors), default=0)
    fixed = DeviceLayout(
        slots=SLOTS,
        slot_bytes=align(step),
        out_bytes=align(out + MIB),
        work_bytes=align(MIB + step // 16 + surveys + costs),
        result_bytes=align(step // 512 + 4096),
        state_bytes=align(surveys + MIB),
        solver_bytes=align(_solver(tensors, step), SEGMENT),
    )
    if fixed.peak_bytes > vram:
        return None
    tiles = max((-(-t.numel * t.width // (step // 2)) for t in tensors if t.surveyed), default=0)
    room = SLOTS + (vram - fixed.peak_bytes) // fixed.slot_bytes
    return DeviceLayout(**{**vars(fixed), "slots": min(room, max(SLOTS, tiles + 2))})


def _survey(tensor: PlannedTensor) -> int:
    """What the survey of a tensor holds in the arena."""
    if isinstance(tensor.method, TensorMethod):
        return 0
    return tensor.method.survey_bytes(tensor.job.shape, len(tensor.job.experts), 1)


def _solver(tensors: Sequence[PlannedTensor], step: int) -> int:
    """The largest solver's bytes, and the answers to the other matrices of a step: all are solved, then all merged."""
    most = small = shared = 0
    for tensor in tensors:
        if tensor.surveyed and isinstance(tensor.method, TensorMethod):
            most = max(most, tensor.method.solver_bytes(tensor.job.shape, len(tensor.job.experts)))
            if tensor.numel * tensor.width <= step:
                small, shared = small + tensor.numel, max(shared, step // tensor.width)
    return most + ANSWER * min(small, shared)


def _cost(tensor: PlannedTensor, step: int) -> int:
    numel = min(tensor.numel, max(1, step // tensor.width))
    return tensor.method.cost(numel, len(tensor.job.experts), "cuda").device


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """One step on a device: what to copy there, where each piece's inputs and result lie, what to copy back.

    Copies are (place in the host's slot, place in the device's, bytes); in `back` the other way round.
    """

    there: tuple[tuple[int, int, int], ...]
    offsets: tuple[tuple[int, ...], ...]
    results: tuple[int, ...]
    back: tuple[tuple[int, int, int], ...]


def place(tensors: Sequence[PlannedTensor], step: Step) -> DeviceStep:
    """Every input at an address that can be read 16 bytes at a time, as far as files allow.

    A range of a file that one piece takes begins at a multiple of ALIGN, whatever its place in the file; one that
    several share keeps its place modulo ALIGN, and with it the alignment of every item.
    """
    shared = {extent.offset: 0 for extent in step.extents}
    starts = sorted(shared)
    found = [[_last(starts, offset) for offset in piece.offsets] if piece.numel else [] for piece in step.pieces]
    for each in found:
        for start in set(each):
            shared[start] += 1
    moved, there, at = {}, [], 0
    for extent in step.extents:
        at = align(at) + (extent.offset % ALIGN if shared[extent.offset] > 1 else 0)
        moved[extent.offset] = at - extent.offset
        there.append((extent.offset, at, extent.end - extent.begin))
        at += extent.end - extent.begin
    offsets = tuple(
        tuple(offset + moved[start] for offset, start in zip(piece.offsets, each, strict=True))
        if each
        else (0,) * len(piece.offsets)
        for piece, each in zip(step.pieces, found, strict=True)
    )
    results, back = _results(tensors, step)
    return DeviceStep(tuple(there), offsets, results, back)


def _last(starts: Sequence[int], offset: int) -> int:
    """The largest start that does not lie behind an offset."""
    return starts[bisect_right(starts, offset) - 1]


def _results(tensors: Sequence[PlannedTensor], step: Step) -> tuple[tuple[int, ...], tuple[tuple[int, int, int], ...]]:
    """Where each piece's result is made, and the copies that bring all of them together on the host."""
    results: list[int] = []
    back: list[tuple[int, int, int]] = []
    at = host = 0
    for piece in step.pieces:
        tensor = tensors[piece.tensor]
        size, width = piece.numel * tensor.out_itemsize, max(1, DTYPES[tensor.out_dtype].bits // 8)
        if size >= LARGE or at % width:
            at = align(at)
        results.append(at)
        if back and back[-1][0] + back[-1][2] == at:
            back[-1] = (back[-1][0], back[-1][1], back[-1][2] + size)
        elif size:
            back.append((at, host, size))
        at, host = at + size, host + size
    return tuple(results), tuple(back)
