"""What one unit of the 13B shape costs: an MLP of 5120 x 13824, two experts, by the command line. A part of anchors.py.

Random weights in bf16, a task vector of 1 % of them. On the CPU 64 anchors; on a GPU 8,192 anchors, 200 steps, as
published. The whole model is never run: its 40 units' seconds are this unit's times 40, and called so.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import checkpoints
import measure
import recipes
from bounds import Verdict
from checkpoints import Shape
from rich.table import Table

from streammerge.budget import parse_size

LAYERS = 40  # of Llama-2-13B
SHAPE = Shape("13b-layer", 1, 5120, 13824, 512, 40)
SMALL = Shape("small-layer", 1, 256, 688, 512, 4)
ANCHORS = {"cpu": 64, "cuda": 8192}
STEPS = 200
HOUR = 3600.0


@dataclass(frozen=True)
class Cost:
    """One unit with two experts. Seconds of construction are those of one expert."""

    shape: str
    device: str
    anchors: int
    steps: int
    precision: str
    construct_seconds: tuple[float, ...]
    adapt_seconds: float
    seconds: float
    losses: tuple[float, ...]
    ram_peak_bytes: int
    ram_predicted_bytes: int
    vram_peak_bytes: int
    vram_predicted_bytes: int
    vram_budget_bytes: int

    @property
    def whole_seconds(self) -> float:
        """Arithmetic of all units of the model, by multiplication."""
        return LAYERS * (sum(self.construct_seconds) + self.adapt_seconds)


def unit(work: Path, device: str, ram: str, vram: str | None, quick: bool) -> Cost:
    """Make the models and run the merge."""
    shape, kind = SMALL if quick else SHAPE, device.partition(":")[0]
    folders = [checkpoints.make(work / shape.name / f"model-{e}", shape, expert=e) for e in range(3)]
    parameters = {
        "unit": "mlp",
        "anchors": ANCHORS[kind],
        "construct_steps": 3 if quick else STEPS,
        "batch": 8192,
        "adapt_epochs": 1 if quick else 50,
        "precision": "fp32" if kind == "cpu" else "bf16",
    }
    recipe = {
        "merge_method": "fda",
        "base_model": str(folders[0].resolve()),
        "models": [{"model": str(folder.resolve())} for folder in folders[1:]],
        "start": {"merge_method": "task_arithmetic", "parameters": {"lambda": 0.5}},
        "parameters": parameters,
    }
    path = work / shape.name / "fda.yml"
    path.write_text(json.dumps(recipe, indent=1))
    limits = ["--ram", ram, *(("--vram", vram) if vram else ())]
    options = ("--device", device, "--json", "--overwrite", *limits)
    usage = measure.run(recipes.command("merge", str(path), str(work / shape.name / "out"), *options))
    report = json.loads(usage.output)
    (row,) = report["fda"].values()
    return Cost(
        shape.name,
        report["device"],
        parameters["anchors"],
        parameters["construct_steps"],
        parameters["precision"],
        tuple(row[f"seconds_{e}"] for e in range(2)),
        row["adaptation_seconds"],
        report["seconds"],
        tuple(row[f"loss_{e}"] for e in range(2)),
        usage.demand_bytes,
        report["predicted"]["ram_peak_bytes"],
        report["vram_peak_bytes"],
        report["predicted"]["vram_peak_bytes"],
        parse_size(vram) if vram else 0,
    )


def table(cost: Cost) -> Table:
    shown = Table(title=f"{cost.shape} on {cost.device}: {cost.anchors} anchors, {cost.steps} steps, {cost.precision}")
    for heading in ("s per expert", "adapt s", "all s", "losses", "host MiB", "predicted", "GPU MiB", "predicted"):
        shown.add_column(heading, justify="right")
    sizes = (cost.ram_peak_bytes, cost.ram_predicted_bytes, cost.vram_peak_bytes, cost.vram_predicted_bytes)
    shown.add_row(
        " ".join(f"{each:.1f}" for each in cost.construct_seconds),
        f"{cost.adapt_seconds:.1f}",
        f"{cost.seconds:.1f}",
        " ".join(f"{each:.3f}" for each in cost.losses),
        *(f"{size / 2**20:.0f}" if size else "" for size in sizes),
    )
    return shown


def verdicts(cost: Cost) -> Iterator[Verdict]:
    figure, bound = (f"{size / 2**20:.0f} MiB" for size in (cost.ram_peak_bytes, cost.ram_predicted_bytes))
    yield Verdict("unit: host peak", figure, f"<= {bound}", cost.ram_peak_bytes <= cost.ram_predicted_bytes)
    if cost.vram_budget_bytes:
        figure, bound = (f"{size / 2**20:.0f} MiB" for size in (cost.vram_peak_bytes, cost.vram_budget_bytes))
        yield Verdict("unit: GPU peak", figure, f"<= {bound}", cost.vram_peak_bytes <= cost.vram_budget_bytes)
        told = f"{cost.whole_seconds:.0f} s, one unit's times {LAYERS}"
        judged = cost.whole_seconds <= HOUR if cost.shape == SHAPE.name else None
        yield Verdict("13B, two experts", told, f"<= {HOUR:.0f} s", judged)
