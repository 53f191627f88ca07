"""What compose.py stands beside: coefficients by plain autograd, base and task vectors resident, nothing streamed.

Every step composes the whole model under autograd, base + sum_k c_k tau_k tensor by tensor, and runs it by
functional_call. `scope` says how many coefficients an expert has: one for each tensor ("block"), or one ("expert").
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from compose_subjects import Subject
from safetensors.torch import load_file
from torch import Tensor

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class Learned:
    """Weights with the learned coefficients, the losses of the steps, and the seconds that learning took."""

    weights: Weights
    losses: list[float]
    seconds: float


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: value for path in sorted(folder.glob("*.safetensors")) for name, value in load_file(path).items()}


class Resident:
    """Base and task vectors in memory."""

    def __init__(self, subject: Subject) -> None:
        self.subject, self.model = subject, subject.load()
        self.base = tensors(subject.base)
        self.deltas = {name: [] for name in self.base}
        for folder in subject.experts.values():
            for name, value in tensors(folder).items():
                self.deltas[name].append(value - self.base[name])

    def added(self, factor: float) -> Weights:
        """Task arithmetic."""
        return {name: value + factor * sum(self.deltas[name]) for name, value in self.base.items()}

    def put(self, weights: Weights) -> Any:
        """The model with these weights."""
        self.model.load_state_dict(dict(weights), strict=False)
        return self.model

    def learn(self, steps: int, scope: str, rate: float, decay: float) -> Learned:
        self.put(self.base)
        batches, began = self.subject.steps(steps), time.perf_counter()
        shared = torch.zeros(len(self.subject.experts), requires_grad=True)
        leaves = {
            name: shared if scope == "expert" else torch.zeros_like(shared, requires_grad=True) for name in self.base
        }
        adam = torch.optim.AdamW(list({id(leaf): leaf for leaf in leaves.values()}.values()), rate, weight_decay=decay)
        schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda at: (1 + math.cos(math.pi * at / steps)) / 2)
        losses = []
        for batch in batches:
            adam.zero_grad()
            weights = self._composed(leaves)
            inputs = {name: value for name, value in batch.items() if name not in ("labels", "domains")}
            loss = self.subject.loss(torch.func.functional_call(self.model, weights, (), inputs), batch)
            loss.backward()
            adam.step()
            schedule.step()
            losses.append(float(loss.detach()))
        with torch.no_grad():
            weights = {name: value.detach() for name, value in self._composed(leaves).items()}
        return Learned(weights, losses, time.perf_counter() - began)

    def _composed(self, leaves: Weights) -> dict[str, Tensor]:
        found = {}
        for name, value in self.base.items():
            for factor, delta in zip(leaves[name], self.deltas[name], strict=True):
                value = value + factor * delta
            found[name] = value
        return found
