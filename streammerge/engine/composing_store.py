"""What a sweep over composed weights keeps for the next one, and where: chosen by what it saves.

    twice     nothing: base and experts are read, and the weights composed, on the way there and on the way back
    memory    composed weights, as they are computed with: base and experts are read once a step
    disk      the same in a file: that is read, and written anew, once a step
    pinned    base and experts, as they are stored: nothing is read

A sweep visits layers there and back, over and over: of what is read a cache of the last ones used would hold nothing
that comes next, so what is kept is chosen once and stays.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from streammerge.errors import MachineError
from streammerge.store.publish import machine

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Place = Literal["twice", "memory", "disk", "pinned"]


@dataclass(frozen=True)
class Sizes:
    """Bytes of one stage: base and experts of all its tensors, of those that learn, and its weights composed."""

    inputs: int
    learned: int
    composed: int

    def moved(self, place: Place) -> int:
        """Bytes that a step reads and writes, at about equal cost."""
        if place == "disk":
            return self.learned + 2 * self.composed
        return {"twice": 2 * self.inputs, "memory": self.learned, "pinned": 0}[place]

    def held(self, place: Place) -> int:
        return {"memory": self.composed, "pinned": self.inputs}.get(place, 0)


def choose_places(stages: Sequence[Sizes], room: int, late: Sequence[bool]) -> list[Place]:
    """Where each stage's weights stay between sweeps, with `room` bytes of memory.

    Memory goes where a byte of it saves the most bytes of a step. `late` stages are updated after the sweep, when
    base and experts are gone: they cannot be composed anew then.
    """
    found: list[Place] = ["twice"] * len(stages)
    for index, sizes in enumerate(stages):
        if not late[index] and sizes.moved("disk") < sizes.moved("twice"):
            found[index] = "disk"
    while True:
        best: tuple[float, int, Place] | None = None
        for index, sizes in enumerate(stages):
            now = found[index]
            for place in ("memory", "pinned"):
                more = sizes.held(place) - sizes.held(now)
                saved = sizes.moved(now) - sizes.moved(place)
                if saved <= 0 or more > room or (place == "memory" and (late[index] or now == "pinned")):
                    continue
                worth = saved / max(more, 1)
                if best is None or worth > best[0]:
                    best = worth, index, place
        if best is None:
            return found
        _, index, place = best
        room -= stages[index].held(place) - stages[index].held(found[index])
        found[index] = place


class Store:
    """Tensors by name: composed ones in memory or in a file, and inputs that stay as they were read."""

    def __init__(self, places: Mapping[str, Place], folder: Path) -> None:
        """`places` of all tensors; a file is made below `folder` if one is needed."""
        self._places, self._folder = places, folder
        self._composed: dict[str, Tensor] = {}
        self._pinned: dict[str, dict[int, Tensor]] = {}
        self._begins: dict[str, int] = {}
        self._file = -1
        self._made: Path | None = None
        self._end = 0
        self.bytes_read = self.bytes_written = 0

    def __contains__(self, name: str) -> bool:
        return name in self._composed or name in self._begins

    def put(self, name: str, weights: Tensor) -> None:
        """Keep a tensor's composed weights, if they have a place: they are copied."""
        if self._places[name] == "memory":
            if name not in self._composed:
                self._composed[name] = weights.cpu().clone()
            else:
                self._composed[name].copy_(weights)
        elif self._places[name] == "disk":
            self._write(name, weights.cpu())

    def fill(self, name: str, weights: Tensor) -> None:
        """Write a tensor's composed weights to where they are computed with."""
        if name in self._composed:
            weights.copy_(self._composed[name])
        elif weights.device.type == "cpu":
            self._read(name, weights)
        else:
            import torch

            held = torch.empty(weights.shape, dtype=weights.dtype)
            self._read(name, held)
            weights.copy_(held)

    def pin(self, name: str, inputs: Mapping[int, Tensor]) -> None:
        """Keep base (0) and experts of a tensor, if that is its place."""
        if self._places[name] == "pinned" and name not in self._pinned:
            self._pinned[name] = {source: tensor.to("cpu", copy=True) for source, tensor in inputs.items()}

    def pinned(self, name: str, device: torch.device) -> dict[int, Tensor] | None:
        """Base and experts of a tensor, if they were kept."""
        found = self._pinned.get(name)
        return None if found is None else {source: tensor.to(device) for source, tensor in found.items()}

    def _write(self, name: str, weights: Tensor) -> None:
        import torch

        view = memoryview(weights.contiguous().view(-1).view(torch.uint8).numpy())
        with machine(self._folder):
            if self._file < 0:
                self._made = Path(tempfile.mkdtemp(prefix="streammerge-", dir=self._folder))
                self._file = os.open(self._made / "composed", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            if name not in self._begins:
                self._begins[name], self._end = self._end, self._end + len(view)
            done = 0
            while done < len(view):
                done += os.pwrite(self._file, view[done:], self._begins[name] + done)
        self.bytes_written += done

    def _read(self, name: str, weights: Tensor) -> None:
        import torch

        view, done = memoryview(weights.view(-1).view(torch.uint8).numpy()), 0
        with machine(self._folder):
            while done < len(view):
                step = os.preadv(self._file, [view[done:]], self._begins[name] + done)
                if not step:
                    raise MachineError(f"{self._folder}: the file of composed weights ended; something changed it")
                done += step
        self.bytes_read += done

    def close(self) -> None:
        """Forget everything, and remove the file."""
        self._composed.clear()
        self._pinned.clear()
        self._begins.clear()
        self._end = 0
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
        if self._made is not None:
            shutil.rmtree(self._made, ignore_errors=True)
            self._made = None
