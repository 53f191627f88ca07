"""Fits sweeps and merges of one recipe into one budget."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from streammerge.budget import MIB, human
from streammerge.engine.layers_loss import Loss
from streammerge.engine.layers_plan import Limits as SweepLimits
from streammerge.engine.layers_plan import SweepPlan, plan_sweep
from streammerge.engine.places import STATE, WORK
from streammerge.engine.voting import PIECE
from streammerge.errors import BudgetTooSmall
from streammerge.models.stack import Batch, Stack
from streammerge.planner.dialect import Resolution
from streammerge.planner.plan import COMPILER, Limits, Plan, make_plan
from streammerge.planner.recipe import Recipe
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.ring import PAGE, round_up

RING = round_up(4 * (PIECE + 2 * PAGE))  # bytes in which results wait for the disk
LAUNCHES_HERE, LAUNCHES_THERE = (
    2 * WORK + COMPILER,
    STATE + WORK + PIECE + MIB,
)  # of the host and of a GPU, if one is used
SPARE = 64 * MIB  # by which a process may grow between two plans


class Fit:
    """Plans the parts of a recipe; those that do not fit are planned all the same, so that the refusal names a budget
    that would do for all of them.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._least = {"--ram": 0, "--vram": 0}
        self._what = ""

    def tiled(self, recipe: Recipe, resolution: Resolution, checkpoints: Mapping[str, Checkpoint]) -> Plan:
        """What is merged as tiles, on the CPU: disks are slower. The ring of results is larger than it would be."""
        within = replace(self._limits, device="cpu", vram=0, ram=max(self._limits.ram - RING, 1))
        try:
            return make_plan(recipe, resolution, checkpoints, within)
        except BudgetTooSmall as error:
            least = error.least or 0
            self.short("this merge", "--ram", least + RING)
            return make_plan(recipe, resolution, checkpoints, replace(within, ram=least + SPARE))

    def sweep(
        self,
        stack: Stack,
        checkpoints: list[Checkpoint],
        batches: Sequence[Batch],
        loss: Loss | None,
        hooks: Any,
        beside: int = 0,
    ) -> SweepPlan:
        """A sweep within what the ring of results, what launches need on a GPU, and `beside`, bytes of the host that
        stay from sweep to sweep, leave of the budget. Without a loss it goes forward to the last layer, and no further.
        """
        limits = self._limits
        there, here = LAUNCHES_THERE, self.here + beside
        ram, vram = max(limits.ram - here, 1), max(limits.vram - there, 1)
        while True:
            allowed = SweepLimits(ram, vram if limits.on_gpu else None, limits.device)
            try:
                return plan_sweep(stack, checkpoints, batches, loss, hooks, allowed)
            except BudgetTooSmall as error:
                least = error.least or 0
                if "--vram" in str(error):
                    vram = least + SPARE
                    self.short("a sweep over the layers", "--vram", least + there)
                else:
                    ram = least + SPARE
                    self.short("a sweep over the layers", "--ram", least + here)

    def resident(
        self, stack: Stack, checkpoints: list[Checkpoint], batches: Sequence[Batch], loss: Loss, hooks: Any, beside: int
    ) -> SweepPlan | None:
        """A sweep with all layers in memory at once, each run once; None if that does not fit."""
        limits, layers = self._limits, len(stack.layers)
        ram, vram = limits.ram - self.here - beside, limits.vram - LAUNCHES_THERE
        allowed = SweepLimits(max(ram, 1), max(vram, 1) if limits.on_gpu else None, limits.device, layers, 1, True)
        try:
            return plan_sweep(stack, checkpoints, batches, loss, hooks, allowed)
        except BudgetTooSmall:
            return None

    @property
    def here(self) -> int:
        """Bytes of the host beside a sweep's own."""
        return RING + (LAUNCHES_HERE if self._limits.on_gpu else 0)

    @property
    def on_gpu(self) -> bool:
        return self._limits.on_gpu

    def short(self, what: str, option: str, least: int) -> None:
        """Note that something needs so much of a budget, which has less."""
        if least > self._least[option]:
            self._least[option] = least
            self._what = what

    def check(self, hint: str = "") -> None:
        """Refuse what does not fit; `hint` is another way out.

        Raises:
            BudgetTooSmall: some part did not; `least` would do for all.
        """
        for option, limit in (("--ram", self._limits.ram), ("--vram", self._limits.vram)):
            if self._least[option]:
                least = round_up(self._least[option] + MIB, MIB)
                raise BudgetTooSmall(
                    f"{self._what} needs at least {human(least)} and {human(limit)} are allowed; give {option} "
                    f"{least // MIB}MiB or more{hint}",
                    least,
                )
