"""What the methods of the task-vector family share: one formula, with parts left out or put in.

    v_k    = w_k r_k m_k (expert_k - base)      m_k keeps some elements, r_k restores the norm of what was dropped
    merged = base + lambda sum_k v_k / divisor   summed over the v_k that agree with the elected sign, if one is elected

Elected is the sign of sum_k v_k (zero counts as plus). The divisor is 1, or with `normalize` the sum of the w_k that
were summed. Semantics and defaults as mergekit 0.1.5 has them, computed in fp32 with one rounding at the end.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.errors import RecipeError
from streammerge.kernels.host.sign_elect import Drop
from streammerge.method import Cost, Flags, PerExpert, Survey, Tile, TileMethod, param, spread
from streammerge.methods._sums import DropSurvey
from streammerge.methods._trims import TrimSurvey, Window, histogram_bytes


@dataclass(frozen=True)
class TaskVectors(TileMethod):
    """Base of the family; `elects` says whether signs are elected."""

    elects: ClassVar[bool] = False

    weight: PerExpert = param(meaning="weight of the expert's task vector", per_expert=True)
    density: PerExpert = param(1.0, "fraction of the task vector that is kept", per_expert=True)
    lambda_: float = param(1.0, "factor on the merged task vector")
    normalize: bool = param(False, "divide by the sum of the weights that took part")
    rescale: bool = param(False, "scale what is kept to the L1 norm of the whole task vector")

    def divisor(self, weights: npt.NDArray[np.float64]) -> float:
        """What the weighted sum is divided by where no sign is elected."""
        total = float(weights.sum())
        return total if self.normalize and abs(total) >= 1e-8 else 1.0

    def kept(self, experts: int) -> npt.NDArray[np.float64]:
        """Density per expert, in [0, 1]: at 1 and above nothing is dropped, at 0 and below everything is."""
        return np.clip(spread(self.density, experts), 0.0, 1.0)


@dataclass(frozen=True)
class Trimmed(TaskVectors):
    """Keeps elements by the rank of their magnitude within the tensor; ties go by index."""

    kernels = ("magnitude_histogram", "window_norms", "sign_elect")

    def uses(self) -> tuple[str, ...]:
        return self.kernels if self.rescale else ("magnitude_histogram", "sign_elect")

    def rounds(self, experts: int) -> int:
        return 2 if self.rescale else 1  # thresholds, then the norms of what they keep

    def windows(self, numel: int, experts: int) -> list[Window]:
        """Which ranks of magnitude each expert keeps."""
        raise NotImplementedError

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey | None:
        numel = int(np.prod(shape, dtype=np.int64))
        windows = self.windows(numel, experts)
        if all(window.whole for window in windows) or not numel:
            return None
        return TrimSurvey(numel, windows, rescale=self.rescale)

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        numel = int(np.prod(shape, dtype=np.int64))
        return histogram_bytes(numel, self.windows(numel, experts), threads)

    def merge(self, tile: Tile, survey: TrimSurvey | None) -> Flags:
        experts = len(tile.experts)
        weights = spread(self.weight, experts).astype(np.float32)
        if survey is None:
            trims, rescale = None, np.ones(experts)
            if not np.all(self.kept(experts) >= 1):
                trims = np.array([window.everything() for window in self.windows(0, experts)], np.int64)
        else:
            trims, rescale = survey.trims, survey.rescale
        flags: Flags = kernel.run(
            "sign_elect",
            tile.out,
            tile.base,
            tile.experts,
            weights,
            rescale,
            self.lambda_,
            self.normalize,
            self.elects,
            trims,
            tile.ranks,
            None,
        )
        return flags


@dataclass(frozen=True)
class Dropped(TaskVectors):
    """Keeps elements at random (DARE); what is kept is scaled to the whole task vector's L1 norm.

    Random numbers are Philox4x32-10, keyed by the seed and counted by tensor, expert and element: neither the cut
    into tiles nor the order of tensors changes a mask.
    """

    kernels = ("drop_rescale", "sign_elect")

    rescale: bool = param(True, "scale what is kept to the L1 norm of the whole task vector")

    def __post_init__(self) -> None:
        if not np.all(np.isfinite(np.asarray(self.density, float))):
            raise RecipeError(f"density is {self.density}; it must be a number between 0 and 1")

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey | None:
        kept = self.kept(experts)
        return DropSurvey(kept) if self.rescale and np.any((kept > 0) & (kept < 1)) else None

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        return DropSurvey.bytes_kept(int(np.prod(shape, dtype=np.int64)), experts)

    def cost(self, numel: int, experts: int, device: str) -> Cost:
        return Cost(host=DropSurvey.bytes_kept(numel, 1))

    def merge(self, tile: Tile, survey: DropSurvey | None) -> Flags:
        experts = len(tile.experts)
        rescale = np.ones(experts) if survey is None else survey.rescale
        flags: Flags = kernel.run(
            "sign_elect",
            tile.out,
            tile.base,
            tile.experts,
            spread(self.weight, experts).astype(np.float32),
            rescale,
            self.lambda_,
            self.normalize,
            self.elects,
            None,
            None,
            Drop(self.kept(experts), tile.seed, tile.tensor_id, range(experts), tile.start),
        )
        return flags
