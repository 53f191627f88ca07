"""AdamW on the coefficients of many tensors, a tensor at a time, in fp64; what it holds survives an interruption.

    c <- (1 - rate decay) c;   m <- 0.9 m + 0.1 g;   v <- 0.999 v + 0.001 g^2;   c <- c - rate m^ / (sqrt(v^) + 1e-8)

as torch.optim.AdamW, Loshchilov & Hutter 2019. A tensor is updated as soon as its gradient is known. Those of `late`,
or all of them if the norm of the whole gradient is clipped, wait for `finish`.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from streammerge.errors import MachineError
from streammerge.store.publish import machine

Table = npt.NDArray[np.float64]  # [experts, groups]
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True)
class Block:
    """A tensor's coefficients, before anything is learned."""

    name: str
    init: tuple[tuple[float, ...], ...]  # [experts][groups]
    rate: float
    decay: float
    learns: bool


@dataclass(frozen=True)
class Course:
    """How the learning goes, for all tensors."""

    steps: int
    cosine: bool
    clip: float = 0.0
    late: frozenset[str] = frozenset()

    def factor(self, step: int) -> float:
        """Of the learning rate, at step `step`, 0 the first."""
        return 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.cosine else 1.0


@dataclass
class Learner:
    """Coefficients by tensor, their moments, and the losses so far."""

    blocks: Mapping[str, Block]
    course: Course
    step: int = 0
    losses: list[float] = field(default_factory=list)
    tried: list[tuple[int, float]] = field(default_factory=list)  # step, loss on validation samples
    best: int = -1  # the step after which the coefficients are kept
    norm: float = 0.0  # of the last gradient, where it is clipped
    coefficients: dict[str, Table] = field(init=False)
    kept: dict[str, Table] = field(init=False)  # those of the step `best`

    def __post_init__(self) -> None:
        self.coefficients = {name: np.array(block.init, np.float64) for name, block in self.blocks.items()}
        self.kept = {}
        shown = {name: table for name, table in self.coefficients.items() if self.blocks[name].learns}
        self._first = {name: np.zeros_like(table) for name, table in shown.items()}
        self._second = {name: np.zeros_like(table) for name, table in shown.items()}
        self._waiting: dict[str, Table] = {}

    def take(self, name: str, gradient: Table) -> bool:
        """A tensor's gradient of this step; whether its coefficients changed already."""
        if self.course.clip or name in self.course.late:
            self._waiting[name] = gradient
            return False
        self._update(name, gradient)
        return True

    def finish(self, loss: float) -> None:
        """All gradients of a step were taken; what waited is updated, in the order of the names."""
        scale = 1.0
        if self.course.clip:
            self.norm = math.sqrt(math.fsum(float((g * g).sum()) for g in self._waiting.values()))
            scale = min(1.0, self.course.clip / (self.norm + 1e-6))
        for name in sorted(self._waiting):
            self._update(name, scale * self._waiting[name])
        self._waiting = {}
        self.losses.append(loss)
        self.step += 1

    def _update(self, name: str, gradient: Table) -> None:
        block, count = self.blocks[name], self.step + 1
        rate = block.rate * self.course.factor(self.step)
        values, first, second = self.coefficients[name], self._first[name], self._second[name]
        first += (1 - BETA1) * (gradient - first)
        second += (1 - BETA2) * (gradient * gradient - second)
        scale = np.sqrt(second / (1 - BETA2**count)) + EPSILON
        values *= 1 - rate * block.decay
        values -= rate / (1 - BETA1**count) * first / scale

    def keep(self, loss: float) -> None:
        """The coefficients as they are have this loss on validation samples; the best ones are kept."""
        self.tried.append((self.step, loss))
        least = min((each for _, each in self.tried[:-1] if math.isfinite(each)), default=math.inf)
        if self.best < 0 or loss < least:
            self.best = self.step
            self.kept = {name: table.copy() for name, table in self.coefficients.items()}

    def chosen(self) -> dict[str, Table]:
        """The coefficients that were learned: the last ones, or the best where there are validation samples."""
        return self.kept or self.coefficients

    def save(self, path: Path) -> None:
        """Write everything, so that the file is there whole or as it was."""
        arrays: dict[str, Any] = {
            "step": self.step, "best": self.best, "losses": self.losses, "tried": np.array(self.tried, np.float64),
        }  # fmt: skip
        for kind, tables in self._tables().items():
            arrays |= {f"{kind}{number}": table for number, table in enumerate(tables.values())}
        content = BytesIO()
        np.savez(content, **arrays)
        new = path.with_name(path.name + ".new")
        with machine(path):
            with open(new, "wb") as file:
                file.write(content.getbuffer())
                file.flush()
                os.fsync(file.fileno())
            os.replace(new, path)

    def load(self, path: Path) -> None:
        """Go on where a file of `save` ends; without a file, from the start.

        Raises:
            MachineError: the file is damaged.
        """
        if not path.exists():
            return
        try:
            with np.load(BytesIO(path.read_bytes()), allow_pickle=False) as found:
                self.step, self.best = int(found["step"]), int(found["best"])
                self.losses = [float(loss) for loss in found["losses"]]
                self.tried = [(int(step), float(loss)) for step, loss in found["tried"].reshape(-1, 2)]
                self.kept = dict(self.coefficients) if self.best >= 0 else {}
                for kind, tables in self._tables().items():
                    for number, name in enumerate(list(tables)):
                        tables[name] = found[f"{kind}{number}"].reshape(tables[name].shape)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise MachineError(f"{path}: damaged ({error}); --no-resume starts over") from None

    def _tables(self) -> dict[str, dict[str, Table]]:
        return {"c": self.coefficients, "m": self._first, "v": self._second, "k": self.kept}
