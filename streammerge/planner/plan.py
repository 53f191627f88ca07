"""Recipe -> Plan, from headers alone: what is read, held and written, in which order, and the peak before it happens.

The one dial is the budget. From what it leaves after the process itself come the bytes of a step (one slot: the same
slices of every input), of the ring that steps live in, and of the ring that results live in. The result depends on
none of them.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

from streammerge import __version__, kernel
from streammerge.budget import MIB, cores, resident
from streammerge.errors import RecipeError
from streammerge.method import LayerMethod, TensorMethod, TileMethod, build, find, find_post
from streammerge.planner.cutting import cut_to_fit, side_by_side
from streammerge.planner.device import DeviceLayout
from streammerge.planner.dialect import Resolution
from streammerge.planner.jobs import Job
from streammerge.planner.layout import Layout, lay_out_output
from streammerge.planner.recipe import Recipe
from streammerge.planner.steps import Cut, PlannedTensor, Step, merge_steps
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.ring import PAGE

ALLOWANCE = 16 * MIB  # thread stacks, the allocator's slack, journal and progress
NOMINAL_RATE = 1e9  # bytes a second that `seconds` assumes of a disk; no weight is read to find out
COMPILER = 128 * MIB  # of the host while a GPU is used: Triton compiles a kernel when it first meets a dtype
LIBRARIES = 128 * MIB  # of the host while matrices are solved there: an allowance for cuBLAS and cuSOLVER, not measured
NUMERICS = 5  # raised when a change alters the bits of any result, so that no resumed run mixes two


@dataclass(frozen=True)
class Plan:
    """What a merge will do. Bytes are integers; nothing here was measured but what the process holds already."""

    recipe: Recipe
    tensors: tuple[PlannedTensor, ...]
    layout: Layout
    cut: Cut
    ring_bytes: int
    out_bytes: int
    digest: str
    seed: int
    threads: int
    device: str
    ram_budget_bytes: int
    ram_peak_bytes: int
    read_bytes: int
    write_bytes: int
    passes: int
    steps: int
    donor: Checkpoint
    config: dict[str, Any] | None
    inputs: tuple[Checkpoint, ...]
    warnings: tuple[str, ...] = ()
    vram_budget_bytes: int = 0
    vram_peak_bytes: int = 0
    device_layout: DeviceLayout | None = None  # None: the CPU computes
    kernels: dict[str, str] = field(default_factory=dict)
    held_bytes: int = 0  # what the process holds beside rings and methods, with an allowance
    at_once: int = 1  # matrices that are solved side by side, each on one core
    stamp: str = ""  # of the input files as they are now; unlike the digest, another copy of them has another

    @property
    def solvers(self) -> dict[str, int]:
        """How matrices are solved that a method must see whole, and how many of them."""
        return dict(
            Counter(
                tensor.method.solver_name(tensor.job.shape, len(tensor.job.experts))
                for tensor in self.tensors
                if isinstance(tensor.method, TensorMethod)
            )
        )

    @property
    def unfinished(self) -> str:
        """Names this work in a journal: the digest, on just these files."""
        return f"{self.digest}-{self.stamp}"

    @property
    def seconds(self) -> float:
        """At the nominal rate of a disk, reads and writes after each other."""
        return (self.read_bytes + self.write_bytes) / NOMINAL_RATE

    def work(self, first: int = 0, start: int = 0) -> Iterator[Step]:
        """The steps from element `start` of tensor `first` on."""
        return merge_steps(self.tensors, self.cut, first, start)

    def as_dict(self) -> dict[str, Any]:
        """The stable keys of `plan --json`."""
        return {
            "method": self.recipe.merge_method,
            "device": self.device,
            "ram_budget_bytes": self.ram_budget_bytes,
            "ram_peak_bytes": self.ram_peak_bytes,
            "vram_budget_bytes": self.vram_budget_bytes,
            "vram_peak_bytes": self.vram_peak_bytes,
            "read_bytes": self.read_bytes,
            "write_bytes": self.write_bytes,
            "passes": self.passes,
            "tensors": len(self.tensors),
            "shards": len(self.layout.shards),
            "steps": self.steps,
            "step_bytes": self.cut.step,
            "seconds": round(self.seconds, 3),
            "digest": self.digest,
            "seed": self.seed,
            "kernels": self.kernels,
            "solvers": self.solvers,
            "solved_at_once": self.at_once,
            "warnings": list(self.warnings),
        }


@dataclass(frozen=True)
class Limits:
    """What the user allows: bytes of memory, threads, device, and how the output is cut."""

    ram: int
    threads: int = 0
    device: str = "cpu"
    shard_size: int | None = None
    seed: int = 0
    in_memory: bool = False  # results are handed out as whole tensors instead of written
    vram: int = 0  # of the device, unless that is the CPU

    @property
    def on_gpu(self) -> bool:
        return self.device != "cpu"


def make_plan(
    recipe: Recipe,
    resolution: Resolution,
    checkpoints: Mapping[str, Checkpoint],
    limits: Limits,
) -> Plan:
    """Cut the work to the budget. The kernels are loaded here, so that what they hold is counted.

    Raises:
        BudgetTooSmall: no cut fits; `least` would.
        RecipeError: a method that this engine cannot run.
    """
    layout = lay_out_output(resolution.jobs, resolution.shards, limits.shard_size, resolution.donor.metadata)
    tensors = tuple(_planned(layout, recipe.where, limits))
    threads = limits.threads or cores()
    used = dict.fromkeys(name for tensor in tensors for name in tensor.method.uses())
    kernels = {name: kernel.describe(name, limits.device) for name in used}
    solved_there = limits.on_gpu and any(isinstance(tensor.method, TensorMethod) for tensor in tensors)
    held = resident().demand + ALLOWANCE + (COMPILER if limits.on_gpu else 0) + (LIBRARIES if solved_there else 0)
    held += 2 * max((t.end - t.begin for t in tensors), default=0) if limits.in_memory else 0
    cut, ring, out, extra, layout_there = cut_to_fit(tensors, limits, held, threads)
    at_once = 1
    if not limits.on_gpu:
        at_once, room, solvers = side_by_side(tensors, cut, threads, limits.ram - held - ring - out - extra)
        ring, extra = ring + room, extra + solvers
    read = passes = steps = slots = 0
    for step in merge_steps(tensors, cut):
        read += step.read_bytes
        steps += 1
        surveyed = step.kind == "survey"
        passes = max(passes, 1 + (_rounds(tensors[step.pieces[0].tensor]) if surveyed else 0))
        slots += step.size
    ring = min(ring, max(slots, PAGE))
    return Plan(
        recipe=recipe,
        tensors=tensors,
        layout=layout,
        cut=cut,
        ring_bytes=ring,
        out_bytes=out,
        digest=_digest(recipe, layout, checkpoints, limits.seed, solved_there),
        seed=limits.seed,
        threads=threads,
        device=limits.device,
        ram_budget_bytes=limits.ram,
        ram_peak_bytes=held + ring + out + extra,
        read_bytes=read,
        write_bytes=sum(shard.size for shard in layout.shards),
        passes=passes,
        steps=steps,
        donor=resolution.donor,
        config=resolution.config,
        inputs=tuple(checkpoints.values()),
        warnings=resolution.warnings,
        vram_budget_bytes=limits.vram,
        vram_peak_bytes=layout_there.peak_bytes if layout_there else 0,
        device_layout=layout_there,
        kernels=kernels,
        held_bytes=held,
        at_once=at_once,
        stamp=_stamp(tensors),
    )


def _planned(layout: Layout, where: str, limits: Limits) -> Iterator[PlannedTensor]:
    made: dict[tuple[Any, ...], TileMethod | LayerMethod] = {}
    for place in layout.places:
        job = place.job
        post, after = job.post or ("", {})
        key = (job.method, *sorted(job.parameters.items()), post, *sorted(after.items()))
        if key not in made:
            try:
                made[key] = _method(job)
            except RecipeError as error:
                raise RecipeError(f"{where}: tensor {job.name!r}: {error}") from None
        method = made[key].for_tensor(job.name, job.shape, len(job.experts))
        if job.base is not None and not method.takes_base():
            job = replace(job, base=None)
        if why := method.refusal(limits.device):
            raise RecipeError(f"{job.method} {why}")
        surveyed = method.survey(job.shape, len(job.experts)) is not None
        yield PlannedTensor(job, method, surveyed, place.shard, place.begin, place.end)


def _method(job: Job) -> TileMethod | LayerMethod:
    """What merges a job's tensor: its method, or what is done to that one's merge."""
    method = build(find(job.method), job.parameters)
    assert isinstance(method, (TileMethod, LayerMethod))
    if job.post is None:
        return method
    name, parameters = job.post
    return cast(TileMethod, build(find_post(name), {"of": method, **parameters}))


def _rounds(tensor: PlannedTensor) -> int:
    return tensor.method.rounds(len(tensor.job.experts))


def _digest(
    recipe: Recipe, layout: Layout, checkpoints: Mapping[str, Checkpoint], seed: int, solved_there: bool
) -> str:
    """Names the work: the same recipe on the same inputs with the same output layout gives the same bytes."""
    work = {
        "version": __version__,
        "numerics": NUMERICS,
        "recipe": recipe.canonical(),
        "inputs": {name: checkpoint.fingerprint() for name, checkpoint in checkpoints.items()},
        "layout": [hashlib.sha256(shard.header).hexdigest() for shard in layout.shards],
        "seed": seed,
        **({"solved_on": "cuda"} if solved_there else {}),  # its libraries round differently from the CPU's
    }
    return hashlib.sha256(json.dumps(work, sort_keys=True).encode()).hexdigest()


def _stamp(tensors: Sequence[PlannedTensor]) -> str:
    """Sizes and times of the input files: work on files that changed since must not be taken up again."""
    files = sorted({spec.file for tensor in tensors for spec in tensor.inputs if spec.file})
    seen = [(file, status.st_size, status.st_mtime_ns) for file in files if (status := os.stat(file))]
    return hashlib.sha256(json.dumps(seen).encode()).hexdigest()


def describe_inputs(plan: Plan) -> list[dict[str, Any]]:
    """Inputs for the manifest: path, bytes, header hash."""
    return [
        {
            "path": str(Path(checkpoint.path)),
            "bytes": sum(spec.nbytes for spec in checkpoint.tensors.values()),
            "headers_sha256": checkpoint.fingerprint(),
        }
        for checkpoint in plan.inputs
    ]
