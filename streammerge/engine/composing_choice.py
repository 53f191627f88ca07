"""A budget of experts: which ones a tensor keeps, and checkpoints that are put together from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from streammerge.planner.steps import PlannedTensor
from streammerge.store.checkpoint import Checkpoint


def largest(sizes: Sequence[float], count: int) -> list[int]:
    """The experts of the `count` largest gradients, in the recipe's order; the first of equal ones."""
    return sorted(sorted(range(len(sizes)), key=lambda at: (-sizes[at], at))[:count])


def mosaics(
    opened: Sequence[Checkpoint], planned: Mapping[str, PlannedTensor], chosen: Mapping[str, Sequence[int]], count: int
) -> list[Checkpoint]:
    """The base, and `count` experts put together from those that each tensor keeps; for a plan, from the largest."""
    base, *experts = opened
    found = [dict(base.tensors) for _ in range(count)]
    for name in planned:
        if any(name not in expert.tensors for expert in experts):
            continue
        sizes = [expert.tensors[name].nbytes for expert in experts]
        largest = sorted(range(len(experts)), key=lambda at: (-sizes[at], at))[:count]
        for number, at in enumerate(sorted(chosen.get(name, largest))):
            found[number][name] = experts[at].tensors[name]
    return [base, *(replace(base, tensors=tensors) for tensors in found)]
