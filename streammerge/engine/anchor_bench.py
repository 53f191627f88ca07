"""What the work on units has to hand, and the order of its visits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from streammerge import kernel
from streammerge.engine.anchor_files import AnchorsFile, Given
from streammerge.engine.anchor_inputs import Inputs
from streammerge.engine.anchor_work import Work
from streammerge.engine.places import span
from streammerge.engine.voting import PIECE
from streammerge.formats.dtypes import DTYPES
from streammerge.kernels.numerics import Span
from streammerge.planner.steps import PlannedTensor
from streammerge.store.scatter import ScatterWriter
from streammerge.store.scratch import Scratch

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from streammerge.models.stack import Stack


@dataclass(frozen=True)
class Turn:
    """A visit: to one expert of a unit, or (None) to adapt it."""

    work: Work
    expert: int | None


@dataclass
class Bench:
    """What the work on units has to hand."""

    stack: Stack
    planned: Mapping[str, PlannedTensor]
    anchors: AnchorsFile
    given: Mapping[str, Given]
    done: Mapping[str, Mapping[str, float]]  # anchors that are durable, with what was noted of them
    writer: ScatterWriter
    scratch: Scratch
    inputs: Inputs | None  # real ones, if they decide when to stop
    device: torch.device
    seed: int
    start: Callable[[Work], dict[str, Tensor]] | None
    load: Callable[[Any], Tensor]  # anchors of a file
    note: Callable[[dict[str, Any]], None]
    tell: Callable[[str, float, int], None]  # what is being done, work done since, bytes written
    cancelled: Callable[[], bool]

    def put(self, shard: int, begin: int, values: Tensor, dtype: str) -> None:
        """Have flat fp32 values written at a byte of a shard, piece by piece, rounded once."""
        width = DTYPES[dtype].bits // 8
        for first in range(0, values.numel(), PIECE // 4):
            piece = values[first : first + PIECE // 4].detach().to("cpu").contiguous()
            slot, address = self.writer.place(begin + first * width, piece.numel() * width)
            kernel.run("cast", Span(address, dtype, piece.numel()), span(piece))
            self.writer.put_at(shard, begin + first * width, slot, piece.numel() * width)
