"""From counts of magnitudes to the exact key of a rank, and from keys to the bounds that sign_elect keeps.

Ranks are 0-based in ascending order of the keys: the k-th largest of n has rank n - k. A bracket is narrowed by a
histogram over all parts of a tensor (magnitude_histogram.py) until it holds one key:

    bracket = WHOLE                              # 65,536 brackets of 2**15 keys
    while isinstance(bracket, Bracket):          # twice, whatever the data
        counts = bracket.empty(); ...count every part...
        bracket = narrow(bracket, counts, rank)

Elements with the same key are ordered as a stable descending sort does: the earlier one counts as the larger.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .numerics import Array

NO_LOWER = (-1, 0, 0)  # below every key: all pass
NO_UPPER = (1 << 31, 0, 0)  # above every key: all pass


class Bracket(NamedTuple):
    """`bins` neighbouring ranges of 2**shift keys from `low` on, to be counted."""

    low: int
    shift: int
    bins: int

    def empty(self) -> Array:
        return np.zeros(self.bins + 2, np.int64)


class Found(NamedTuple):
    """The key of a rank, how many keys lie below it, and how many equal it."""

    key: int
    below: int
    equal: int


WHOLE = Bracket(0, 15, 1 << 16)


def narrow(bracket: Bracket, counts: Array, rank: int, ends: Array | None = None) -> Bracket | Found:
    """The bracket to look into next, or the key itself; `ends` are the smallest and largest keys of each range."""
    sums = np.cumsum(counts)
    place = int(np.searchsorted(sums, rank, side="right"))
    assert 1 <= place <= bracket.bins, f"rank {rank} of {int(sums[-1])} lies outside the bracket"
    low = bracket.low + ((place - 1) << bracket.shift)
    if bracket.shift == 0 or (ends is not None and ends[place - 1, 0] == ends[place - 1, 1]):
        key = low if ends is None or bracket.shift == 0 else int(ends[place - 1, 0])
        return Found(key, int(sums[place - 1]), int(counts[place]))
    width = min(bracket.shift, 16)
    return Bracket(low, bracket.shift - width, 1 << width)


def keep_largest(numel: int, count: int, found: Found | None) -> tuple[int, int, int]:
    """(L, L_first, L_last) that keeps the `count` largest; `found` is the key of rank numel - count.

    Of the keys equal to L the first ones stay. Count 0 and count numel need no key.
    """
    if count >= numel:
        return NO_LOWER
    if count <= 0 or found is None:
        return (1 << 31, 0, 0)
    above = numel - found.below - found.equal
    return (found.key, 0, count - above)


def drop_largest(numel: int, count: int, found: Found | None) -> tuple[int, int, int]:
    """(U, U_first, U_last) that drops the `count` largest; `found` is the key of rank numel - count."""
    if count <= 0:
        return NO_UPPER
    if count >= numel or found is None:
        return (-1, 0, 0)
    above = numel - found.below - found.equal
    return (found.key, count - above, found.equal)
