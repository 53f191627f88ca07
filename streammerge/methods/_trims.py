"""Exact ranks of magnitude over whole tensors: what a trim needs to know.

A sample places a bracket around each rank; one round counts what lies below it and, key by key, within it. Counts are
integers and add up in any order: tiles, threads and devices cannot be seen in a threshold.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.kernels.select_threshold import Bracket, Found, drop_largest, keep_largest, narrow
from streammerge.method import BLOCK, SAMPLE, Survey, Tile
from streammerge.methods._sums import fsums, ratio

Histogram: TypeAlias = tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]  # counts, smallest and largest keys
TOP = 1 << 31  # one above every key of magnitude
HISTOGRAMS = 32 << 20  # bytes that all histograms of a survey may hold
BIN = 16  # bytes of a bin: its count, its smallest and its largest key
RESIDENT_BINS = 1 << 14  # of a first bracket where another round costs no read
COPIES = 4  # threads that count at once; more wait, rather than each hold a histogram
SPREAD = 8.0  # how far, in standard deviations of a sampled rank, a first bracket reaches to both sides


@dataclass(frozen=True)
class Window:
    """Of a tensor's elements by falling magnitude: the first `drop` go, of the rest those before `keep` stay."""

    numel: int
    keep: int
    drop: int = 0

    @classmethod
    def largest(cls, numel: int, density: float) -> Window:
        """The largest `density` of them, at least one unless the density is 0."""
        if density >= 1:
            return cls(numel, numel)
        return cls(numel, max(1, int(density * numel)) if density > 0 else 0)

    @classmethod
    def between(cls, numel: int, density: float, gamma: float) -> Window:
        """`density` of them without the `gamma` largest; fewer outliers go if else too few would stay."""
        if density >= 1:
            return cls(numel, numel)
        kept, outliers = int(density * numel), int(gamma * numel)
        smallest = max(0, numel - kept - outliers)
        return cls(numel, numel - smallest, numel - smallest - kept)

    @property
    def whole(self) -> bool:
        """Whether it keeps all or nothing, which needs no threshold."""
        return self.keep - self.drop in (0, self.numel)

    def ranks(self) -> list[int]:
        """Ascending ranks whose keys must be known."""
        return [self.numel - count for count in (self.keep, self.drop) if 0 < count < self.numel]

    def bounds(self, found: dict[int, Found]) -> tuple[int, ...]:
        """A row of sign_elect's `trims`."""
        if self.keep - self.drop == 0:
            return (TOP, 0, 0, -1, 0, 0)
        low = keep_largest(self.numel, self.keep, found.get(self.numel - self.keep))
        return (*low, *drop_largest(self.numel, self.drop, found.get(self.numel - self.drop)))

    def everything(self) -> tuple[int, ...]:
        """The bounds of a window that needs no threshold."""
        return self.bounds({})


def _bins(numel: int, windows: Sequence[Window]) -> int:
    wanted = max(1, sum(len(window.ranks()) for window in windows))
    room = HISTOGRAMS // (BIN * wanted * COPIES)
    return 1 << max(8, min(20, room.bit_length() - 1, max(1, numel).bit_length()))


def histogram_bytes(numel: int, windows: Sequence[Window], threads: int) -> int:
    """What a TrimSurvey holds at most: histograms, and before them the keys of its sample."""
    wanted = sum(len(window.ranks()) for window in windows)
    bins = _bins(numel, windows) + 2
    return max(min(threads, COPIES) * wanted * bins * BIN + 2 * 8 * bins, 4 * min(numel, SAMPLE))


class TrimSurvey(Survey):
    """The exact keys of magnitude at given ranks, per expert.

    A sample places a bracket around each rank; one round counts what lies below it and, key by key, within it. If
    the rank turns out to lie outside, or the bracket was too wide for single keys, another round looks where it must
    be. With `rescale` a last round adds up the magnitudes that are kept.
    """

    wants_sample = True

    def __init__(self, numel: int, windows: Sequence[Window], rescale: bool = False) -> None:
        self._windows = list(windows)
        self._bins = _bins(numel, windows)
        self._numel = numel
        self._open: dict[tuple[int, int], Bracket] = {}  # (expert, rank) -> where its key may be
        self._likely: dict[tuple[int, int], int] = {}  # (expert, rank) -> the key that the sample suggests
        self._found: dict[tuple[int, int], Found] = {}
        for expert, window in enumerate(self._windows):
            for rank in window.ranks():
                self._open[expert, rank] = self._bracket(0, TOP)
        self._idle: list[dict[tuple[int, int], Histogram]] = []
        self._lock = threading.Lock()
        self._copies = threading.Semaphore(COPIES)
        self._norms = rescale
        self.rescale = np.ones(len(self._windows))
        self.trims = np.zeros((len(self._windows), 6), np.int64)
        self._cuts = np.zeros((len(self._windows), 2), bool)  # bounds at which ties must be ranked

    def sample(self, tiles: Sequence[Tile], resident: bool) -> None:
        bins = min(self._bins, RESIDENT_BINS) if resident else self._bins
        ends = np.cumsum([0, *(tile.numel for tile in tiles)])
        keys = np.empty(ends[-1], np.uint32)
        for expert in sorted({expert for expert, _ in self._open}):
            for tile, lo, hi in zip(tiles, ends, ends[1:], strict=False):
                kernel.call("magnitude_histogram", "keys", tile.base, tile.experts[expert], keys[lo:hi])
            keys.sort()
            for rank in self._windows[expert].ranks():
                self._open[expert, rank] = self._guess(keys, rank, bins)
                self._likely[expert, rank] = int(keys[min(keys.size - 1, rank * keys.size // self._numel)])

    def _guess(self, keys: npt.NDArray[np.uint32], rank: int, bins: int) -> Bracket:
        """A bracket that holds the key of a rank almost surely; all of it if the sample is the tensor."""
        if keys.size == self._numel:
            return self._bracket(int(keys[rank]), int(keys[rank]) + 1)
        share = (rank + 0.5) / self._numel
        reach = SPREAD * math.sqrt(share * (1 - share) / keys.size) + 2 / keys.size
        low = keys[max(0, int((share - reach) * keys.size))]
        high = keys[min(keys.size - 1, int((share + reach) * keys.size) + 1)]
        spare = max(0, bins - (int(high) + 1 - int(low))) // 2
        return self._bracket(max(0, int(low) - spare), min(TOP, int(high) + 1 + spare), bins)

    def _bracket(self, low: int, high: int, bins: int = 0) -> Bracket:
        """Bins over [low, high), single keys if there are enough of them."""
        shift = max(0, (-(-(high - low) // (bins or self._bins)) - 1).bit_length())
        return Bracket(low, shift, -(-(high - low) >> shift) if not shift else -(-(high - low) // (1 << shift)))

    def look(self, tile: Tile) -> Any:
        if not self._open:
            return self._magnitudes(tile)
        with self._copies:
            with self._lock:
                mine = self._idle.pop() if self._idle else {key: _histogram(b) for key, b in self._open.items()}
            for (expert, rank), bracket in self._open.items():
                where = (bracket.low, bracket.shift, *mine[expert, rank], self._likely.get((expert, rank), -1))
                kernel.run("magnitude_histogram", tile.base, tile.experts[expert], *where)
            with self._lock:
                self._idle.append(mine)
        return None

    def settle(self, partials: Sequence[Any]) -> bool:
        if not self._open:
            return self._settle_norms(partials)
        for key, bracket in list(self._open.items()):
            answer = self._answer(bracket, _added([mine[key] for mine in self._idle]), key[1])
            if isinstance(answer, Found):
                self._found[key] = answer
                del self._open[key]
            else:
                self._open[key] = answer
        self._idle.clear()
        if self._open:
            return False
        for expert, window in enumerate(self._windows):
            mine = {rank: found for (who, rank), found in self._found.items() if who == expert}
            self.trims[expert] = window.bounds(mine)
            self._cuts[expert] = [self._split(expert, side) for side in (0, 1)]
        return not self._norms

    def _answer(self, bracket: Bracket, found: Histogram, rank: int) -> Bracket | Found:
        """What one round's counts say about a rank."""
        counts, ends = found
        end = bracket.low + (bracket.bins << bracket.shift)
        if rank < counts[0]:
            return self._bracket(0, bracket.low)
        if rank >= counts[:-1].sum():
            return self._bracket(end, TOP)
        answer = narrow(bracket, counts, rank, ends)
        if isinstance(answer, Bracket):  # cut into as many bins as this survey may have
            return self._bracket(answer.low, answer.low + (answer.bins << answer.shift))
        return answer

    def _magnitudes(self, tile: Tile) -> list[npt.NDArray[np.float64]]:
        """Per expert [blocks, 2]: sums of all magnitudes, and of those strictly within its window's bounds."""
        sums = [np.empty((-(-tile.numel // BLOCK), 2)) for _ in self._windows]
        for expert, trim in enumerate(self.trims):
            kernel.run("window_norms", tile.base, tile.experts[expert], int(trim[0]), int(trim[3]), sums[expert])
        return sums

    def _settle_norms(self, partials: Sequence[Any]) -> bool:
        """r = |delta|_1 / |kept delta|_1; elements that tie at a bound count by how many of them stay."""
        whole, inside = fsums(partials)
        for expert, window in enumerate(self._windows):
            low, first, last, high, high_first, high_last = (int(v) for v in self.trims[expert])
            kept = inside[expert]
            if window.whole:
                continue
            if low == high:
                kept += max(0, min(last, high_last) - max(first, high_first)) * _value(low)
            else:
                kept += (last - first) * _value(low) if 0 <= low < TOP else 0.0
                kept += (high_last - high_first) * _value(high) if 0 <= high < TOP else 0.0
            self.rescale[expert] = ratio(whole[expert], kept)
        return True

    def first_ranks(self) -> npt.NDArray[np.int64] | None:
        """[experts, 2] zeros if at some bound some of the elements that tie stay and some go."""
        return np.zeros((len(self._windows), 2), np.int64) if self._cuts.any() else None

    def ranks(self, tile: Tile, before: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
        """[experts, 2] elements that tie at the lower and the upper bound."""
        counts = np.zeros((len(self._windows), 2), np.int64)
        for expert, side in np.argwhere(self._cuts):
            key, last = int(self.trims[expert, 3 * side]), self.trims[expert, 3 * side + 2]
            if before is None or before[expert, side] < last:  # later ones all lie beyond what stays
                counts[expert, side] = kernel.call(
                    "magnitude_histogram", "count_equal", tile.base, tile.experts[expert], key
                )
        return counts

    def _split(self, expert: int, side: int) -> bool:
        """Whether some elements that tie at a bound stay and some go; if all do the same, nobody need count them."""
        key, first, last = (int(value) for value in self.trims[expert, 3 * side : 3 * side + 3])
        equal = next((f.equal for (who, _), f in self._found.items() if who == expert and f.key == key), 0)
        return last - first not in (0, equal) or int(self.trims[expert, 0]) == int(self.trims[expert, 3])


def _histogram(bracket: Bracket) -> Histogram:
    return bracket.empty(), np.tile(np.array([[TOP, 0]], np.uint32), (bracket.bins, 1))


def _added(several: Sequence[Histogram]) -> Histogram:
    """One histogram out of those of several threads, in the first one's memory."""
    counts, ends = several[0]
    for more, others in several[1:]:
        counts += more
        np.minimum(ends[:, 0], others[:, 0], out=ends[:, 0])
        np.maximum(ends[:, 1], others[:, 1], out=ends[:, 1])
    return counts, ends


def _value(key: int) -> float:
    return float(np.array(key, np.uint32).view(np.float32))
