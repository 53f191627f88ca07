"""What a step of learned coefficients costs where the models do not fit: seconds, bytes, peak. Random weights.

    python benchmarks/compose_cost.py                               0.6B, base and three experts, --ram 3GiB and more
    python benchmarks/compose_cost.py --device cuda --vram 8GiB     layers of a 13B Llama on a GPU, base and two experts
    python benchmarks/compose_cost.py --quick                       a tiny shape on the CPU, a check

By the command line, inputs cold, STEPS steps of all samples. *Promised* bytes are the plan's, which the run must meet;
*sets* are a step's bytes over those of base and experts: 1 where composed weights are kept, nearly 2 where nothing is,
0 where everything is. On a GPU the 13B is not run whole: 4 and then 12 of its 40 layers at full width, with embedding
and head; a step of 40 layers is extrapolated from the difference, and called so.
"""

from __future__ import annotations

import json
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import measure
import recipes
import tables
import torch
from bounds import Verdict
from checkpoints import Shape
from rich.table import Table
from transport_shapes import fewer, repeated, samples, whole

SIZES = {
    "cpu": Shape("0.6b", 24, 1280, 3456, 32000, 10),
    "cuda": Shape("13b", 40, 5120, 13824, 32000, 40),
    "quick": replace(recipes.TINY, name="tiny-2", layers=2),
}
MODELS = {"cpu": 4, "cuda": 3, "quick": 3}  # base and experts
SAMPLES = {"cpu": (16, 128), "cuda": (16, 512), "quick": (5, 16)}  # samples, tokens of each
RAMS = {"cpu": ("1500MiB", "3GiB", "6GiB", "12GiB"), "cuda": ("24GiB", "64GiB"), "quick": ("2GiB",)}
PARTS = (4, 12)  # layers of a model that is not run whole
STEPS = 3
HEADINGS = ("shape", "layers", "--ram", "kept", "s a step", "whole s", "step GB", "sets", "host MiB", "predicted")


@dataclass(frozen=True)
class Job:
    """Models in a folder, and where they are learned on."""

    shape: Shape
    folder: Path
    names: tuple[str, ...]
    samples: Path
    device: str
    ram: str
    vram: str | None

    @property
    def files(self) -> list[Path]:
        return [path.resolve() for name in self.names for path in sorted((self.folder / name).glob("*.safetensors"))]

    def run(self, work: Path) -> dict[str, Any]:
        """One merge in a process of its own, inputs cold: its figures."""
        base, *experts = (str(self.folder / name) for name in self.names)
        recipe = {
            "merge_method": "atlas",
            "base_model": base,
            "models": [{"model": name} for name in experts],
            "data": {"train": str(self.samples)},
            "parameters": {"steps": STEPS, "batch": "all"},
        }
        path, out = self.folder / "atlas.yml", work / "out"
        path.write_text(json.dumps(recipe, indent=1))
        measure.settle(work)
        measure.make_cold(self.files)
        limits = [word for key in ("ram", "vram") if (value := getattr(self, key)) for word in (f"--{key}", value)]
        options = ("--device", self.device, *limits, "--json", "--overwrite", "--no-resume")
        usage = measure.run(recipes.command("merge", str(path), str(out), *options))
        report = json.loads(usage.output)
        shutil.rmtree(out)
        learn = report["predicted"]["learn"]
        return {
            "shape": self.shape.name,
            "layers": self.shape.layers,
            "ram": self.ram,
            "stages": learn["stages"],
            "step_seconds": report["atlas"]["seconds"] / STEPS,
            "whole_seconds": usage.wall_seconds,
            "step_read_bytes": learn["step_read_bytes"],
            "set_bytes": sum(file.stat().st_size for file in self.files),
            "composed_read_bytes": report["atlas"]["composed_read_bytes"],
            "composed_written_bytes": report["atlas"]["composed_written_bytes"],
            "read_bytes": report["read_bytes"],
            "promised_bytes": report["predicted"]["read_bytes"],
            "ram_peak_bytes": max(usage.demand_bytes, report["ram_peak_bytes"]),
            "ram_predicted_bytes": report["predicted"]["ram_peak_bytes"],
            "ram_budget_bytes": report["ram_budget_bytes"],
            "vram_peak_bytes": report["vram_peak_bytes"],
            "vram_predicted_bytes": report["predicted"]["vram_peak_bytes"],
            "vram_budget_bytes": report["vram_budget_bytes"],
            "losses": report["atlas"]["loss"],
        }


def jobs(work: Path, kind: str, device: str, rams: tuple[str, ...], vram: str | None) -> list[Job]:
    """Models that are made unless they are there, and what is measured on them."""
    shape, (count, tokens) = SIZES[kind], SAMPLES[kind]
    names = ("source_base", *(f"tuned-{number}" for number in range(1, MODELS[kind])))
    rows = samples(work, shape.vocabulary, count, tokens)
    if kind != "cuda":
        folder = whole(work, shape, names)
        return [Job(shape, folder, names, rows, device, ram, vram) for ram in rams]
    most = replace(shape, layers=max(PARTS), name=f"{shape.name}-{max(PARTS)}")
    with ProcessPoolExecutor(len(names)) as pool:
        for made in [pool.submit(repeated, work / most.name / name, most, name) for name in names]:
            made.result()
    small = [fewer(work, most, layers, names) for layers in PARTS if layers < most.layers]
    shapes = [*((part, folder) for folder, part in small), (most, work / most.name)]
    return [Job(part, folder, names, rows, device, ram, vram) for ram in rams for part, folder in shapes]


def verdicts(row: dict[str, Any]) -> list[Verdict]:
    at = f"{row['shape']}, {row['ram']}"
    found = [Verdict(f"{at}: bytes read over promised", f"{row['read_bytes'] / row['promised_bytes']:.6f}", "= 1",
                     row["read_bytes"] == row["promised_bytes"])]  # fmt: skip
    for key, word in (("ram", "host"), ("vram", "GPU")):
        peak, predicted, limit = (row[f"{key}_{name}_bytes"] for name in ("peak", "predicted", "budget"))
        if limit:
            held = peak <= predicted <= limit
            found.append(Verdict(f"{at}: {word} peak", f"{peak >> 20} MiB", f"<= {predicted >> 20} MiB", held))
    return found


def table(rows: list[dict[str, Any]]) -> Table:
    shown = Table(title=f"{STEPS} steps, one run each, inputs cold")
    for heading in HEADINGS:
        shown.add_column(heading, justify="left" if heading in ("shape", "kept") else "right")
    for row in rows:
        shown.add_row(
            row["shape"],
            str(row["layers"]),
            row["ram"],
            ", ".join(f"{count} {place}" for place, count in row["stages"].items()),
            f"{row['step_seconds']:.1f}",
            f"{row['whole_seconds']:.1f}",
            f"{row['step_read_bytes'] / 1e9:.2f}",
            f"{row['step_read_bytes'] / row['set_bytes']:.2f}",
            f"{row['ram_peak_bytes'] >> 20}",
            f"{row['ram_predicted_bytes'] >> 20}",
        )
    return shown


def extrapolated(rows: list[dict[str, Any]], layers: int) -> dict[str, float]:
    """Seconds of a step with all layers, for every budget, from the difference that some make."""
    found = {}
    for ram in dict.fromkeys(row["ram"] for row in rows):
        few, most = (row for row in rows if row["ram"] == ram)
        each = (most["step_seconds"] - few["step_seconds"]) / (most["layers"] - few["layers"])
        found[ram] = most["step_seconds"] + each * (layers - most["layers"])
    return found


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--dir", "work", default="build/benchmarks/compose", show_default=True, type=click.Path(path_type=Path))
@click.option("--device", default="cpu", show_default=True)
@click.option("--ram", "rams", multiple=True, help="Budgets, one run each; 1500MiB to 12GiB on the CPU if left out.")
@click.option("--vram", default="8GiB", show_default=True, help="Of a GPU.")
@click.option("--quick", is_flag=True, help="A tiny shape.")
@click.option("--save", is_flag=True, help="Append to benchmarks/results/compose_cost.jsonl.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the document here too.")
def main(
    work: Path, device: str, rams: tuple[str, ...], vram: str, quick: bool, save: bool, target: Path | None
) -> None:
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        click.echo("no GPU here; --device cpu measures the CPU", err=True)
        sys.exit(2)
    work.mkdir(parents=True, exist_ok=True)
    machine: dict[str, Any] = dict(measure.machine(work))
    if on_gpu:
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    kind = "quick" if quick else "cuda" if on_gpu else "cpu"
    rows = []
    for job in jobs(work, kind, device, rams or RAMS[kind], vram if on_gpu else None):
        rows.append(job.run(work))
        click.echo(f"  {job.shape.name}, {job.ram}: {rows[-1]['step_seconds']:.1f} s a step", err=True)
    judged = [verdict for row in rows for verdict in verdicts(row)]
    out = tables.console()
    out.print(" ".join(f"{key} {value};" for key, value in machine.items()), soft_wrap=True)
    out.print(table(rows), tables.verdicts(judged))
    more = extrapolated(rows, SIZES[kind].layers) if on_gpu else {}
    for ram, seconds in more.items():
        out.print(f"--ram {ram}: extrapolated to {SIZES[kind].layers} layers, not run: {seconds:.0f} s a step")
    document = {"benchmark": "compose_cost", "machine": machine, "kind": kind, "samples": SAMPLES[kind], "rows": rows}
    document |= {"vram": vram if on_gpu else None, "extrapolated": more, **tables.plain(judged)}
    if target is not None:
        target.write_text(json.dumps(document))
    tables.finish(document, save, "compose_cost")
    sys.exit(any(verdict.kept is False for verdict in judged))


if __name__ == "__main__":
    main()
