"""What a sweep will read and hold, from headers, shapes and the batches, before a weight is read.

    peak = process + ring + constants of the batches + room + kept between layers
    room = over all visits, the most of: units in memory + arithmetic of the largest batch + what the method holds

Arithmetic is measured on tensors without memory (layers_measure.py). What is kept between layers takes what the budget
has left, and files take the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from streammerge import kernel
from streammerge.budget import MIB, Budget, default_ram, human, parse_size, resident
from streammerge.engine.layers_hooks import Hooks
from streammerge.engine.layers_loss import CrossEntropy
from streammerge.engine.layers_loss import Loss as Loss
from streammerge.engine.layers_measure import layer_bytes
from streammerge.engine.layers_order import Sources, Visit, alive, fresh, layer_order, sweep_order
from streammerge.engine.layers_weights import ring_bytes
from streammerge.errors import BudgetTooSmall, RecipeError
from streammerge.models.build import return_freed_memory
from streammerge.models.record import Key, Record
from streammerge.models.stack import Batch, Stack
from streammerge.models.stage import Stage
from streammerge.planner.device import CONTEXT
from streammerge.store.checkpoint import Checkpoint

if TYPE_CHECKING:
    import torch
    from torch import Tensor

PIECE = 32 * MIB  # freed memory below it is kept where layers keep their graphs: fresh pages would cost more
ALLOWANCE = 48 * MIB  # thread stacks, packed panels of matrix products, the allocator's slack


@dataclass(frozen=True)
class SweepPlan:
    """One forward and one backward pass, or one visit to every layer. Bytes are integers."""

    sources: Sources
    hooks: Hooks
    loss: Loss | None
    visits: tuple[Visit, ...]
    group: int  # layers that are resident together
    prefetch: int  # visits that are read ahead
    place: torch.device
    ram_budget_bytes: int
    vram_budget_bytes: int
    process_bytes: int
    ring_bytes: int
    constants_bytes: int
    room_bytes: int
    work_bytes: tuple[int, ...]  # of each visit, a part of the room
    scratch_bytes: int  # kept between layers, at most: on the device, in memory, the rest in files
    scratch_device_bytes: int
    scratch_host_bytes: int
    scratch_dtype: torch.dtype | None
    graphs: bool = False  # no layer runs again on the way back: all stay in memory, with what autograd keeps of them

    @property
    def read_bytes(self) -> int:
        return sum(unit.read_bytes for units in fresh(self.visits, self.prefetch) for unit in units)

    @property
    def passes(self) -> int:
        """How often a layer is read at most."""
        return 1 + (self.visits[-1].backward and not self.visits[0].backward)

    @property
    def on_gpu(self) -> bool:
        return str(self.place.type) != "cpu"

    @property
    def ram_peak_bytes(self) -> int:
        held = 0 if self.on_gpu else self.constants_bytes + self.room_bytes
        return self.process_bytes + self.ring_bytes + held + self.scratch_host_bytes

    @property
    def vram_peak_bytes(self) -> int:
        if not self.on_gpu:
            return 0
        return CONTEXT + self.constants_bytes + self.room_bytes + self.scratch_device_bytes

    @property
    def scratch_disk_bytes(self) -> int:
        return max(0, self.scratch_bytes - self.scratch_device_bytes - self.scratch_host_bytes)

    def budgets(self) -> tuple[Budget, Budget | None]:
        """The host's and the device's, with what is not leased piece by piece taken already."""
        fixed = self.constants_bytes + self.room_bytes
        if not self.on_gpu:
            return Budget(self.ram_budget_bytes, self.process_bytes + fixed), None
        return Budget(self.ram_budget_bytes, self.process_bytes), Budget(self.vram_budget_bytes, CONTEXT + fixed)

    def as_dict(self) -> dict[str, Any]:
        names = (
            "group prefetch passes read_bytes ram_budget_bytes ram_peak_bytes vram_budget_bytes vram_peak_bytes "
            "room_bytes scratch_bytes scratch_device_bytes scratch_host_bytes scratch_disk_bytes"
        )
        return {name: getattr(self, name) for name in names.split()} | {"device": str(self.place)}


@dataclass(frozen=True)
class Limits:
    """What a sweep may use. `prefetch` None: one visit ahead if that fits."""

    ram: int | str | None = None
    vram: int | str | None = None
    device: str = "cpu"
    group: int = 1
    prefetch: int | None = None
    graphs: bool = False  # with all layers in one group: see SweepPlan
    scratch: torch.dtype | None = None  # what hidden states and their gradients are kept in; None: as computed


def plan_sweep(
    stack: Stack,
    checkpoints: Sequence[Checkpoint],
    batches: Sequence[Batch],
    loss: Loss | None,
    hooks: Hooks,
    limits: Limits | None = None,
) -> SweepPlan:
    """The plan of a sweep over batches of these shapes, or smaller ones.

    The model runs with the first checkpoint; `hooks.reads` may ask for the others. Hooks that want no gradients get a
    forward pass alone; without a loss it ends behind the last layer.

    Raises:
        BudgetTooSmall: it does not fit; `least` would do.
        CheckpointError: a checkpoint's tensors do not fit the model.
    """
    limits = limits or Limits()
    if limits.group < 1:
        raise RecipeError(f"{limits.group} layers at a time; give 1 or more")
    sources = Sources(stack, checkpoints)
    visits = sweep_order(sources, hooks, limits.group)
    if loss is None:
        assert hooks.gradients == "none", "gradients are those of a loss"
        visits = visits[:-1]
    shapes = _Shapes(stack, batches)
    works = [_work(stack, hooks, loss, visit, shapes) for visit in visits]
    if limits.graphs:
        assert limits.group >= len(stack.layers), "layers that leave memory cannot keep their graphs"
        assert not hooks.panels
    held = shapes.constants + (shapes.graphs(loss) + 2 * PIECE if limits.graphs else 0)
    plan = fit_visits(sources, hooks, loss, visits, works, held, shapes.kept(limits, hooks.gradients != "none"), limits)
    return replace(plan, graphs=limits.graphs)


def plan_layers(
    stack: Stack, checkpoints: Sequence[Checkpoint], hooks: Hooks, limits: Limits | None = None
) -> SweepPlan:
    """The plan of one visit to every layer, each alone, without batches."""
    limits = limits or Limits()
    sources = Sources(stack, checkpoints)
    visits = layer_order(sources, hooks)
    works = [hooks.cost(stack.stages[visit.stages[0]], True) for visit in visits]
    found = [cost.host if limits.device == "cpu" else cost.device for cost in works]
    return fit_visits(sources, hooks, None, visits, found, 0, 0, limits)


class _Shapes:
    """One record, on tensors without values, for every shape of batch; and sizes."""

    def __init__(self, stack: Stack, batches: Sequence[Batch]) -> None:
        import torch

        self._stack = stack
        self.kinds: dict[str, tuple[Record, dict[Key, Tensor], Batch]] = {}
        self._counts: dict[str, int] = {}
        self._measured: dict[str, int] = {}
        for batch in batches:
            key = str([(name, value.shape) for name, value in batch.items() if isinstance(value, torch.Tensor)])
            self._counts[key] = self._counts.get(key, 0) + 1
            if key not in self.kinds:
                record = stack.enter({}, batch)
                self.kinds[key] = record, record.shapes, batch
        self.constants = sum(
            self._counts[key] * sum(_bytes(tensor) for tensor in record.constants())
            for key, (record, _, _) in self.kinds.items()
        )

    def arithmetic(self, stage: Stage, kind: str, loss: Loss | None, learns: bool) -> int:
        """What a stage holds for one batch of a kind, beside weights and their gradients' sums."""
        record, values, batch = self.kinds[kind]
        hidden = _bytes(values[0, 0])
        if stage.kind != "layer":
            tokens = values[0, 0].numel() // values[0, 0].shape[-1]
            return 16 * hidden + (_logits_bytes(self._stack, loss, tokens, batch) if stage.kind == "head" else 0)
        call = record.calls[stage.index - 1]
        key = str((kind, type(stage.module), [p.shape for p in stage.parameters.values()], call.describe()))
        if key not in self._measured:
            self._measured[key] = layer_bytes(self._stack, stage, call, values, learns)
        return self._measured[key] + 4 * hidden

    def graphs(self, loss: Loss | None) -> int:
        """What autograd keeps of all layers and batches, at most."""
        layers = [stage for stage in self._stack.stages if stage.kind == "layer"]
        each = {kind: sum(self.arithmetic(stage, kind, loss, True) for stage in layers) for kind in self.kinds}
        return sum(self._counts[kind] * size for kind, size in each.items())

    def kept(self, limits: Limits, learns: bool) -> int:
        """Bytes of hidden states and gradients that are kept at once, at most; forward, the latest states."""
        layers = len(self._stack.layers)
        boundaries = -(-layers // limits.group) + 1 if learns else 0
        found = 0
        for key, (record, shapes, _) in self.kinds.items():
            hidden = _bytes(shapes[0, 0], limits.scratch) * (boundaries + 1 + limits.group)
            carried = sum(2 * _bytes(shapes[other], limits.scratch) for other in record.wanted)
            found += self._counts[key] * (hidden + carried)
        return found


def _bytes(tensor: Tensor, dtype: torch.dtype | None = None) -> int:
    kept = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    return int(tensor.numel() * kept.itemsize)


def _work(stack: Stack, hooks: Hooks, loss: Loss | None, visit: Visit, shapes: _Shapes) -> int:
    """The most that the arithmetic of a visit holds at once, and the method beside it."""
    most = 0
    for index in visit.stages:
        stage = stack.stages[index]
        cost = hooks.cost(stage, visit.backward)
        learns = hooks.gradients != "none"  # the forward pass too keeps a graph, of one batch and one layer
        own = [p.numel() * p.dtype.itemsize for p in stage.parameters.values()]
        held = 0
        if learns and visit.backward:
            held = sum(p.numel() * max(4, p.dtype.itemsize) for p in stage.parameters.values())
            held *= hooks.gradients == "sum"
            held += 0 if stage.kind == "layer" else 2 * max(own, default=0)
        for kind in shapes.kinds:
            work = shapes.arithmetic(stage, kind, loss, learns)
            most = max(most, work + held + max(cost.host, cost.device))
    return most


def _logits_bytes(stack: Stack, loss: Loss | None, tokens: int, batch: Batch) -> int:
    """Logits in fp32, logarithms of probabilities, the gradients of both; where the model or the loss makes more of
    them, two temporaries too.
    """
    import torch

    if stack.vocabulary is None:
        return 0
    words = int(stack.vocabulary.out_features)
    chunk = loss.chunk if isinstance(loss, CrossEntropy) else None
    few = isinstance(loss, CrossEntropy) and words <= (chunk or words) and stack.dtype == torch.float32
    some = torch.empty((1, 1, words), device="meta")
    return tokens * min(words, chunk or words) * 4 * (4 if few and stack.logits(batch, some) is some else 6)


def fit_visits(
    sources: Sources,
    hooks: Hooks,
    loss: Loss | None,
    visits: tuple[Visit, ...],
    works: list[int],
    constants: int,
    scratch: int,
    limits: Limits,
) -> SweepPlan:
    """Read ahead if that fits; keep between layers as much as the budgets leave."""
    import torch

    from streammerge.engine.device import find

    name, free = find(limits.device)
    on_gpu = name != "cpu"
    ram = default_ram() if limits.ram is None else parse_size(limits.ram)
    vram = (free * 8 // 10 if limits.vram is None else parse_size(limits.vram)) if on_gpu else 0
    if on_gpu:
        works = [work + work // 8 for work in works]  # torch hands out blocks of its own sizes
    if not on_gpu and any(read.dtype != read.spec.dtype for v in visits for u in v.units for read in u.reads):
        kernel.describe("cast", "cpu")  # loaded now, it counts as part of the process
    return_freed_memory()
    process = resident().demand + ALLOWANCE
    ring = ring_bytes(visits)
    for prefetch in (1, 0) if limits.prefetch is None else (limits.prefetch,):
        held = [sum(unit.size for unit in units) for units in alive(visits, prefetch)]
        room = max(map(sum, zip(held, works, strict=True)), default=0)
        there = CONTEXT + constants + room
        here = process + ring + (0 if on_gpu else constants + room)
        if here <= ram and (not on_gpu or there <= vram):
            break
    else:
        short, need, limit = ("--vram", there, vram) if on_gpu and there > vram else ("--ram", here, ram)
        raise BudgetTooSmall(
            f"a sweep needs {human(need)}, {short} is {human(limit)}; give at least {human(need)}", need
        )
    on_device = min(scratch, vram - there) if on_gpu else 0
    return SweepPlan(
        sources,
        hooks,
        loss,
        visits,
        limits.group,
        prefetch,
        torch.device(name),
        ram,
        vram,
        process,
        ring,
        constants,
        room,
        tuple(works),
        scratch,
        on_device,
        min(scratch - on_device, ram - here),
        limits.scratch,
    )
