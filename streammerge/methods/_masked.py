"""Task vectors of another model, masked by signs and added to the target: what GradFix does to one tensor.

    tau_t = expert_t - source                 fp32, t = 1 ... T
    mask  = kernels/host/sign_mask.py         agreement, or force; `random` forces signs that are drawn
    out   = target + (alpha / T) sum_t mask(tau_t, s_t)        mask_then_merge
          = target + (alpha / T) mask(sum_t tau_t, s)          merge_then_mask

Inputs of a tile: the target is its base; its experts are the T fine-tuned models, the model that they were fine-tuned
from, then the signs: one set for all, or one for each of the T. Signs are votes (I8, I16), packed signs (SIGNS) or a
gradient, whose negative they are the signs of. The factor 1 / T is a part of the step, so each result is rounded once.
Other rules than the mean are in _masked_whole.py.

Signs are drawn by Philox4x64-10: bit i of the stream of words for key (seed, CRC-32 of the tensor's name) is the sign
of element i, 1 for minus. `pass` adds the mean task vector as it is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from streammerge import kernel
from streammerge.kernels.numerics import Span
from streammerge.method import BLOCK, SIGNS, Cost, Flags, Tile, TileMethod
from streammerge.methods._tally import EVERYTHING, KEPT, LOST, NANS, TIES, Noted, Tally

PIECE, PIECE_THERE = 1 << 16, 1 << 22  # elements that several task vectors are added up for at once: CPU, GPU
DRAWN = 256  # signs of one step of the generator's counter: four words of 64 bits


@dataclass(frozen=True)
class Masked(TileMethod):
    """Masked task vectors of `sources` models, averaged. `voters` is the number of sets of signs that come along."""

    summary = "masked task vectors on top of another model"
    source = "arXiv:2510.09658"
    kernels = ("sign_mask", "add_deltas", "norms_and_dots")

    alpha: float
    mode: str
    order: str
    sources: int
    voters: int

    @property
    def apart(self) -> bool:
        """Whether every task vector is masked for itself."""
        return self.sources > 1 and self.order == "mask_then_merge" and self.mode != "pass"

    @property
    def added_up(self) -> bool:
        """Whether a sum of task vectors is made."""
        return self.sources > 1 or self.mode == "pass"

    @property
    def kept_whole(self) -> bool:
        """Whether nothing of that sum is left to be masked."""
        return self.apart or self.mode == "pass"

    @property
    def drawn(self) -> bool:
        return self.mode == "random"

    @property
    def rule(self) -> str:
        """The kernel's mode."""
        return "agreement" if self.mode == "agreement" else "force"

    def cost(self, numel: int, experts: int, device: str) -> Cost:
        piece = min(numel, PIECE if device == "cpu" else PIECE_THERE)
        held = 4 * piece * (1 + self.kept_whole) if self.added_up else 0
        drawn = piece // 2 if self.drawn else 0
        norms = 8 * -(-numel // BLOCK) + 1024
        return Cost(held + drawn + norms) if device == "cpu" else Cost(drawn, held + norms)

    def keeps_equal(self) -> bool:
        return False

    def refusal(self, device: str) -> str:
        return "" if device == "cpu" else "merges by votes at hand on the CPU; give --device cpu"

    def tally(self, shape: tuple[int, ...]) -> Tally | None:
        return Tally(math.prod(shape), self.sources if self.apart else 1, self.alpha)

    def merge(self, tile: Tile, survey: Any) -> Flags:
        assert tile.out is not None
        noted = Noted()
        for part in self._pieces(tile):
            self._part(part, survey, noted)
        if isinstance(survey, Tally):
            kernel.run("norms_and_dots", (tile.out,), tile.base, BLOCK, noted.distance(tile.numel))
            survey.take(noted, late=tile.out.queue is not None)
        return noted.flags(1 + len(tile.experts))

    def delta(self, tile: Tile, survey: Any) -> None:
        """Write what an alpha of 1 adds to the target to `tile.out`, which is fp32 and holds zeros."""
        one = replace(self, alpha=1.0)
        for part in one._pieces(replace(tile, base=tile.out)):
            one._part(part, survey, Noted())

    def _pieces(self, tile: Tile) -> Iterator[Tile]:
        assert tile.out is not None
        size = PIECE if tile.out.queue is None else PIECE_THERE
        if not self.added_up and not self.drawn:
            size = max(tile.numel, 1)
        for first in range(0, tile.numel, size):
            yield tile.part(first, min(first + size, tile.numel))

    def _part(self, tile: Tile, survey: Any, noted: Noted) -> None:
        *experts, source = tile.experts[: self.sources + 1]
        signs = Signs(tile, tile.experts[self.sources + 1 :])
        if not self.added_up:
            found = self._step(tile, experts[0], source, signs.spans[0], self.rule, self.alpha, noted)
            noted.found(found, (0, 1, 2))
            return
        assert tile.out is not None
        total, scale = Room(tile.numel, tile.out.queue), self.alpha / self.sources
        if self.apart:
            self._each(experts, source, signs.spans, total, noted)
        else:
            ones = np.ones((1, self.sources + 1), np.float32)
            ones[0, 0] = 0
            found = kernel.run("add_deltas", total.span, source, tuple(experts), ones)
            noted.found(found, (self.sources + 1, *range(1, self.sources + 1)))
            total.ready()
        if self.kept_whole:
            downhill = total.negative()
            found = self._step(tile, total.span, None, downhill.span, "agreement", scale, noted, (KEPT, LOST))
        else:
            found = self._step(tile, total.span, None, signs.spans[0], self.rule, scale, noted)
        noted.found(found, (0,))

    def _each(self, experts: Sequence[Span], source: Span, signs: Sequence[Span], total: Room, noted: Noted) -> None:
        """Add up the task vectors, each masked by its own signs."""
        total.clear()
        for number, expert in enumerate(experts):
            vote, counts = signs[number % len(signs)], noted.count((TIES, NANS))
            found = kernel.run("sign_mask", total.span, total.span, expert, source, vote, self.rule, 1.0, counts)
            noted.found(found, (-1, number + 1, self.sources + 1))

    def _step(
        self,
        tile: Tile,
        expert: Span,
        source: Span | None,
        signs: Span,
        rule: str,
        scale: float,
        noted: Noted,
        counted: Sequence[int] = EVERYTHING,
    ) -> Flags:
        counts = noted.count(counted)
        found: Flags = kernel.run("sign_mask", tile.out, tile.base, expert, source, signs, rule, scale, counts)
        return found


class Room:
    """Memory for fp32 values beside a tile, on its device; `span` is valid as long as this lives."""

    def __init__(self, numel: int, queue: Any) -> None:
        self._queue = queue
        if queue is None:
            self._values: Any = np.empty(numel, np.float32)
            address = self._values.ctypes.data
        else:
            import torch

            with queue.current():
                self._values = torch.empty(numel, dtype=torch.float32, device=queue.device)
            address = self._values.data_ptr()
        self.span = Span(address, "F32", numel, queue)

    def ready(self) -> None:
        """Small launches wait for the end of their batch: have them made now."""
        if self._queue is not None:
            self._queue.flush()

    def clear(self) -> None:
        if self._queue is None:
            self._values.fill(0)
        else:
            self._queue.run(self._values.zero_)

    def negative(self) -> Room:
        """The values with their signs turned: a gradient whose step downhill they are."""
        other = Room(self.span.numel, self._queue)
        if self._queue is None:
            np.negative(self._values, out=other._values)
        else:
            values, result = self._values, other._values
            self._queue.run(lambda: result.copy_(values).neg_())
        return other


class Signs:
    """The signs of a tile as kernels take them: those that came with it, or, if none did, drawn ones.

    `spans` are valid as long as this lives.
    """

    def __init__(self, tile: Tile, given: Sequence[Span]) -> None:
        self._tile, self._given = tile, given

    @cached_property
    def spans(self) -> list[Span]:
        packed = [span._replace(dtype="U8", numel=-(-span.numel // 4)) for span in self._given if span.dtype == SIGNS]
        return packed or list(self._given) or [self._draw(self._tile)]

    def _draw(self, tile: Tile) -> Span:
        assert tile.start % DRAWN == 0
        words = np.random.Philox(key=[tile.seed, tile.tensor_id], counter=tile.start // DRAWN)
        bits = np.asarray(words.random_raw(-(-tile.numel // 64)), "<u8").view(np.uint8)
        size, queue = -(-tile.numel // 4), tile.anchor.queue
        self._drawn: Any = _PAIRS[bits].view(np.uint8)[:size]
        if queue is None:
            return Span(self._drawn.ctypes.data, "U8", size)
        import torch

        with queue.current():
            self._drawn = torch.from_numpy(self._drawn).to(queue.device)
        return Span(self._drawn.data_ptr(), "U8", size, queue)


def _pairs() -> npt.NDArray[np.uint16]:
    """Per byte of eight sign bits, the two bytes of the eight packed signs: 1 is 01, -1 is 11."""
    byte, place = np.arange(256)[:, None], np.arange(8)
    pairs = (1 | (byte >> place & 1) << 1) << 2 * place
    return np.asarray(pairs.sum(1), "<u2")


_PAIRS = _pairs()
