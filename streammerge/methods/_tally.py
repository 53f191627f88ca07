"""What is counted while tensors are masked: by kernels, some of which fill their answers in later."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from streammerge.method import BLOCK, Flags, Survey, Tile

KEPT, TIES, LOST, NANS = range(4)  # places of what sign_mask counts
EVERYTHING = (KEPT, TIES, LOST, NANS)

Counts = npt.NDArray[np.int64]


class Noted:
    """The answers of kernels about one tile. On a GPU they are there once its work is done, and not before."""

    def __init__(self) -> None:
        self._counts: list[tuple[Counts, list[int]]] = []
        self._flags: list[tuple[Flags, Sequence[int]]] = []
        self.squares: list[npt.NDArray[np.float64]] = []

    def count(self, which: Sequence[int] = EVERYTHING) -> Counts:
        """Zeros for sign_mask to add to; only those places count."""
        self._counts.append((np.zeros(4, np.int64), list(which)))
        return self._counts[-1][0]

    def found(self, flags: Flags, places: Sequence[int]) -> None:
        """What a kernel says of its inputs; `places` are theirs among the tensor's, -1 for what is none of them."""
        self._flags.append((flags, places))

    def distance(self, numel: int) -> npt.NDArray[np.float64]:
        """Zeros for the squared distances between result and target, per block."""
        self.squares.append(np.zeros((-(-numel // BLOCK), 1)))
        return self.squares[-1]

    def counts(self) -> Counts:
        total = np.zeros(4, np.int64)
        for counts, which in self._counts:
            total[which] += counts[which]
        return total

    def flags(self, inputs: int) -> Flags:
        """Per input, the target first, whether it held what is not finite."""
        flags = np.zeros(inputs, np.uint8)
        for found, places in self._flags:
            for flag, place in zip(found, places, strict=False):
                if place >= 0:
                    flags[place] = max(flags[place], flag)
        return flags


class Tally(Survey):
    """Adds up what was noted about the tiles of a tensor. It asks nothing of the tensor before it is merged.

    Ties are the mean over `sets` of signs that are looked at. `alpha` is the factor that they are merged with.
    """

    section = "gradfix"

    def __init__(self, numel: int, sets: int = 1, alpha: float = 1.0) -> None:
        self._numel, self._sets, self._alpha = numel, sets, alpha
        self._counts = np.zeros(4, np.int64)
        self._squares: list[npt.NDArray[np.float64]] = []
        self._late: list[Noted] = []
        self._lock = threading.Lock()

    def look(self, tile: Tile) -> Any:
        raise NotImplementedError

    def settle(self, partials: Sequence[Any]) -> bool:
        raise NotImplementedError

    def take(self, noted: Noted, late: bool) -> None:
        """Enter one tile's; `late`: its answers are filled in before `told` and `flags` are asked for."""
        with self._lock:
            self._squares += noted.squares
            if late:
                self._late.append(noted)
            else:
                self._counts += noted.counts()

    def flags(self, inputs: int) -> Flags:
        """What late answers say of the inputs."""
        found = [np.zeros(inputs, np.uint8), *(noted.flags(inputs) for noted in self._late)]
        return np.asarray(np.max(found, 0), np.uint8)

    @property
    def figures(self) -> dict[str, float]:  # type: ignore[override]  # settled when the tensor is merged
        """What became of the elements, and how far all of them moved."""
        counts = self._counts + sum(noted.counts() for noted in self._late)
        return {
            "alpha": self._alpha,
            "elements": self._numel,
            "kept": int(counts[KEPT]),
            "ties": int(counts[TIES]) / self._sets,
            "unchanged": int(counts[LOST]),
            "nan": int(counts[NANS]),
            "displacement": math.sqrt(math.fsum(v for part in self._squares for v in part.ravel())),
        }
