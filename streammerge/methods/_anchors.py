"""Construction of anchors: inputs whose induced gradient has the direction of an expert's task vector.

AdamW on the anchors (betas 0.9 and 0.999, decay 0.01), a constant rate, all anchors in every step; the anchors of least
loss are kept. They start as rows of the expert's matrices that read the unit's input, or as small Gaussian noise, drawn
by Philox: the key is the seed, then the unit's name and the expert's place, so nothing depends on the order of work.

A linear map under l2 needs no steps (fda.py): the top right singular vectors of its task vector are the optimum.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from streammerge.errors import RecipeError
from streammerge.methods._induced import Network, Tensors, aim, inner

if TYPE_CHECKING:
    from torch import Tensor

BETAS, EPS, DECAY = (0.9, 0.999), 1e-8, 0.01
INITS = ("weights", "gaussian")
KEEP = 200  # points of a curve that a report shows, at most


def random_of(seed: int, unit: str, expert: int, use: int = 0) -> np.random.Generator:
    """The generator of one unit and expert; `use` tells what for."""
    key = (seed, zlib.crc32(unit.encode()) << 32 | use << 16 | expert)
    return np.random.Generator(np.random.Philox(key=np.array(key, np.uint64)))


def gaussian(random: np.random.Generator, shape: Sequence[int], sigma: float) -> Tensor:
    """sigma N(0, 1), fp32."""
    import torch

    found = random.standard_normal(tuple(shape), dtype=np.float32)
    return torch.from_numpy(found).mul_(sigma)


def rows_of(random: np.random.Generator, matrices: Sequence[Tensor], shape: Sequence[int]) -> Tensor:
    """Rows of matrices [rows, d], drawn without replacement; behind the last, midpoints of pairs. fp32 on their device.

    Raises:
        RecipeError: no matrix has rows of that length.
    """
    import torch

    wanted, width = math.prod(shape[:-1]), shape[-1]
    matrices = [matrix for matrix in matrices if matrix.dim() == 2 and matrix.shape[1] == width]
    rows = sum(matrix.shape[0] for matrix in matrices)
    if not rows:
        raise RecipeError(f"init: weights finds no matrix with rows of {width} elements; use init: gaussian")
    chosen = random.permutation(rows)[:wanted]
    extra = max(0, wanted - rows)
    pairs = random.integers(0, rows, (2, extra))
    out = torch.empty((wanted, width), dtype=torch.float32, device=matrices[0].device)
    _gather(matrices, chosen, out[: len(chosen)])
    if extra:
        other = torch.empty_like(out[len(chosen) :])
        _gather(matrices, pairs[0], out[len(chosen) :])
        _gather(matrices, pairs[1], other)
        out[len(chosen) :].add_(other).mul_(0.5)
    return out.view(tuple(shape))


def _gather(matrices: Sequence[Tensor], rows: np.ndarray, out: Tensor) -> None:
    """Rows of matrices that lie below each other."""
    import torch

    first = 0
    for matrix in matrices:
        here = np.flatnonzero((rows >= first) & (rows < first + matrix.shape[0]))
        if len(here):
            which = torch.from_numpy(rows[here] - first).to(matrix.device)
            out[torch.from_numpy(here).to(out.device)] = matrix[which].float()
        first += matrix.shape[0]


def micro_batch(shape: Sequence[int], rows: int) -> int:
    """Anchors that run at once: of at most so many tokens, all micro-batches alike, as holes in memory then fit too."""
    most = max(1, rows // max(1, math.prod(shape[1:-1])))
    return -(-shape[0] // -(-shape[0] // most))


class Construction:
    """Anchors of one unit and expert, step by step. `best` are those of the least loss so far."""

    def __init__(
        self, network: Network, tau: Tensors, start: Tensor, lr: float, steps: int, rows: int, masks: Tensors
    ) -> None:
        """`start` [anchors, (tokens,) d] is changed in place. `rows`: tokens of a micro-batch. `masks`: entries of task
        vectors that no anchor reaches.
        """
        import torch

        self._network, self._lr, self._steps = network, lr, steps
        self.anchors = start
        self._micro = micro_batch(start.shape, rows)
        aims = {n: torch.where(masks[n], 0.0, t) if n in masks else t for n, t in tau.items()}
        norms = {name: inner(value, value).sqrt() for name, value in aims.items()}
        self._tau = {name: value for name, value in aims.items() if start.is_meta or float(norms[name])}
        self._norms = {name: norms[name] for name in self._tau}
        self._gradients: dict[str, Tensor] = {}
        self.best = start.clone()
        self._moments = torch.zeros_like(start), torch.zeros_like(start)
        self._step = 0

    def loss(self) -> Tensor:
        """The loss of the anchors as they are, fp64; what `step` needs is left behind."""
        self._gradients.clear()
        for x in self.anchors.split(self._micro):
            for name, g in zip(
                self._tau, self._network.likeness_gradient(x, len(self.anchors), list(self._tau)), strict=True
            ):
                if name in self._gradients:
                    self._gradients[name] += g
                else:
                    self._gradients[name] = g.contiguous()
        return aim(self._gradients, self._tau, self._norms)

    def step(self) -> None:
        """One step of AdamW, with what `loss` left behind."""
        self._step += 1
        first, second = self._moments
        for x, m, v in zip(*(each.split(self._micro) for each in (self.anchors, first, second)), strict=True):
            g = self._network.slope(x, len(self.anchors), self._gradients)
            m.lerp_(g, 1 - BETAS[0])
            v.mul_(BETAS[1]).addcmul_(g, g, value=1 - BETAS[1])
            x.mul_(1 - self._lr * DECAY)
            scale = 1 - BETAS[1] ** self._step
            x.addcdiv_(m, (v / scale).sqrt_().add_(EPS), value=-self._lr / (1 - BETAS[0] ** self._step))

    def run(self, told: Callable[[int, float], None]) -> list[float]:
        """All steps; the loss before each and after the last. `told` hears the number of steps done and the loss.

        Raises:
            RecipeError: the loss is no number.
        """
        losses: list[float] = []
        for number in range(self._steps + 1):
            loss = float(self.loss())
            if not math.isfinite(loss):
                raise RecipeError(f"the construction loss is {loss} after {number} steps; give a smaller construct_lr")
            if not losses or loss < min(losses):
                self.best.copy_(self.anchors)
            losses.append(loss)
            told(number, loss)
            if number < self._steps:
                self.step()
        return losses


def thin(curve: Sequence[float], most: int = KEEP) -> list[list[float]]:
    """[step, value] of a curve, first and last among them."""
    count = min(len(curve), most)
    places = sorted({round(at * (len(curve) - 1) / max(1, count - 1)) for at in range(count)})
    return [[at, curve[at]] for at in places]


def linear_optimum(tau: Tensor, anchors: int) -> tuple[Tensor, float]:
    """Anchors of a linear map under l2: the top right singular vectors of tau, and the loss.

    cos <= sqrt(sum of the anchors' largest s^2 / sum of all), attained by equal norms.
    """
    import torch

    rows, columns = tau.shape
    small = tau.T @ tau if columns <= rows else tau @ tau.T
    values, vectors = torch.linalg.eigh(small.double())
    count = min(anchors, len(values))
    top = vectors[:, -count:].flip(1)
    values = values.clamp_min_(0)
    cosine = float((values[-count:].sum() / values.sum()).sqrt()) if float(values.sum()) else 1.0
    if columns > rows:
        top = torch.nn.functional.normalize(tau.double().T @ top, dim=0)
    found = torch.zeros((anchors, columns), dtype=torch.float32, device=tau.device)
    found[:count] = top.T.float()
    return found, 1 - cosine


__all__ = ["INITS", "Construction", "gaussian", "linear_optimum", "micro_batch", "random_of", "rows_of", "thin"]
