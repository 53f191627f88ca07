"""What methods share whose result at an element is any function of the experts' task vectors at that element.

    tau_i   = weight_i (expert_i - base), fp32
    merged  = base + lambda combine(tau_1 ... tau_T), added in fp32, rounded once

Every tensor is merged this way, vectors and embeddings too. All is done in pieces of PIECE elements, whatever the
tile, so no cut can be seen; an element whose combined task vector is zero keeps the base's bits. CPU only so far.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.kernels.numerics import Span
from streammerge.method import Cost, Flags, PerExpert, Tile, TileMethod, param, spread

FP32 = 4
PIECE = 1 << 15  # elements that are combined at once: few enough to stay in a core's cache
TEMPORARIES = 8  # arrays of a piece beside the task vectors
COPY = np.ones((1, 1), np.float32)


@dataclass(frozen=True)
class Elementwise(TileMethod):
    """Base of the family."""

    kernels = ("add_deltas",)

    weight: PerExpert = param(1.0, "factor on the expert's task vector", per_expert=True, kind=float)
    lambda_: float = param(1.0, "factor on the merged task vector")

    @abstractmethod
    def combine(self, deltas: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """The merged task vector [n] of [experts, n] weighted ones, which it may change."""

    def refusal(self, device: str) -> str:
        return "" if device == "cpu" else "runs on the CPU so far; give --device cpu"

    def cost(self, numel: int, experts: int, device: str) -> Cost:
        return Cost(host=FP32 * min(numel, PIECE) * (experts + TEMPORARIES))

    def merge(self, tile: Tile, survey: None) -> Flags:
        assert tile.out is not None
        weights = spread(self.weight, len(tile.experts))
        flags: Flags = np.zeros(len(tile.experts) + 1, np.uint8)
        room = np.empty((len(tile.experts) + 1, min(PIECE, tile.numel)), np.float32)
        for at in range(0, tile.numel, PIECE):
            part = tile.part(at, min(at + PIECE, tile.numel))
            base, deltas = room[0, : part.numel], room[1:, : part.numel]
            kernel.run("add_deltas", _span(base), part.base, (), COPY)
            for k, (expert, weight) in enumerate(zip(part.experts, weights, strict=True)):
                one = np.array([[0.0, weight]], np.float32)
                found = kernel.run("add_deltas", _span(deltas[k]), part.base, (expert,), one)
                flags[[0, k + 1]] = np.maximum(flags[[0, k + 1]], found)
            with np.errstate(invalid="ignore", over="ignore"):  # of NaN and infinities the flags tell
                step = np.float32(self.lambda_) * self.combine(deltas)
                np.add(base, step, out=base, where=step != 0)
            assert part.out is not None
            kernel.run("add_deltas", part.out, _span(base), (), COPY)
        return flags


def _span(values: npt.NDArray[np.float32]) -> Span:
    return Span(values.ctypes.data, "F32", values.size)
