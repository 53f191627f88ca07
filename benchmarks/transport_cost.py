"""What GradFix costs where the model does not fit: peak memory under a budget, seconds, bytes read. Random weights.

    python benchmarks/transport_cost.py                               0.6B on the CPU, --ram 3GiB, 15 x 128 tokens
    python benchmarks/transport_cost.py --device cuda --vram 8GiB     layers of a 13B Llama on a GPU, 16 x 512 tokens
    python benchmarks/transport_cost.py --quick                       a tiny shape on the CPU, a check

Target, source_base and one fine-tuned model in bf16, by the command line, inputs cold. The fewest reads: the target's
weights twice, forward and backward, but for the head and the last layer, where it turns; the other models' once. On a
GPU the 13B is not run whole, its four models would be 104 GB: 4 and then 12 of its 40 layers at full width, with
embedding and head; 40 layers' seconds are extrapolated from the difference, and called so. Layers of a model repeat one
random layer there, to be written in time; arithmetic is bf16. First the GPU's fp32 result on a tiny model must be the
CPU's but for 0.2 % of the weights.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import bounds
import click
import measure
import recipes
import tables
import torch
from bounds import Row, Verdict
from checkpoints import Shape
from rich.table import Table
from safetensors.torch import load_file
from transport_shapes import NAMES, Job, fewer, repeated, samples, whole

from streammerge.budget import parse_size

SIZES = {
    "cpu": Shape("0.6b", 24, 1280, 3456, 32000, 10),
    "cuda": Shape("13b", 40, 5120, 13824, 32000, 40),
    "quick": replace(recipes.TINY, name="tiny-2", layers=2),
}
SAMPLES = {"cpu": (15, 128), "cuda": (16, 512), "quick": (5, 16)}  # samples, tokens of each
PARTS = (4, 12)  # layers of a model that is not run whole
COMPUTE = "bfloat16"  # of the 13B; in fp32 its plan asks for 8.3 GiB
SAME = 2e-3
HEADINGS = ("shape", "layers", "wall s", "own s", "CPU s", "host MiB", "predicted", "GPU MiB", "predicted")
READ = ("read GB", "fewest GB", "from disk GB", "written GB", "loss", "kept")


def jobs(work: Path, kind: str, device: str, ram: str | None, vram: str | None) -> list[Job]:
    """What is measured: a whole model, or two numbers of its layers."""
    shape, (count, tokens) = SIZES[kind], SAMPLES[kind]
    rows = samples(work, shape.vocabulary, count, tokens)
    if kind != "cuda":
        return [Job(shape, whole(work, shape), rows, device, ram, vram)]
    most = replace(shape, layers=max(PARTS), name=f"{shape.name}-{max(PARTS)}")
    with ProcessPoolExecutor(len(NAMES)) as pool:
        for made in [pool.submit(repeated, work / most.name / name, most, name) for name in NAMES]:
            made.result()
    small = [fewer(work, most, layers) for layers in PARTS if layers < most.layers]
    return [
        *(Job(part, folder, rows, device, ram, vram, COMPUTE) for folder, part in small),
        Job(most, work / most.name, rows, device, ram, vram, COMPUTE),
    ]


def agreement(work: Path, device: str) -> Verdict:
    """The device's weights beside the CPU's on a tiny model."""
    shape = SIZES["quick"]
    folder, rows = whole(work, shape), samples(work, shape.vocabulary, *SAMPLES["quick"])
    found = []
    for where in (device, "cpu"):
        out = work / f"out-{where.partition(':')[0]}"
        Job(shape, folder, rows, where, None, None).run(out)
        found.append({k: v for file in out.glob("*.safetensors") for k, v in load_file(file).items()})
        shutil.rmtree(out)
    one, other = found
    share = sum(int((one[name] != other[name]).sum()) for name in other) / sum(v.numel() for v in other.values())
    return Verdict(f"tiny on {device}: weights unlike the CPU's", f"{share:.1e}", f"<= {SAME}", share <= SAME)


def measured(job: Job, work: Path) -> dict[str, Any]:
    """One merge, inputs cold: its row and what the report says."""
    out = work / "out"
    measure.settle(work)
    measure.make_cold(job.files)
    usage, report = job.run(out)
    shutil.rmtree(out)
    total = report["gradfix"]["total"]
    sizes = sum(path.stat().st_size for path in job.files), report["write_bytes"]
    row = Row.of((job.shape.name, "gradfix", "streammerge", "cold"), [usage], sizes, [report])
    return {
        "layers": job.shape.layers,
        "row": row,
        "vram_peak_bytes": report["vram_peak_bytes"],
        "vram_predicted_bytes": report["predicted"]["vram_peak_bytes"],
        "vram_budget_bytes": report["vram_budget_bytes"],
        "fewest_bytes": job.fewest_bytes,
        "loss": report["gradfix"]["loss"],
        "kept": total["kept"] / total["elements"],
    }


def verdicts(found: Sequence[dict[str, Any]]) -> list[Verdict]:
    judged = list(bounds.judge(each["row"] for each in found))
    for each in found:
        at, read = each["row"].shape, each["row"].read_bytes / each["fewest_bytes"]
        judged.append(Verdict(f"{at}: bytes read over the fewest", f"{read:.3f}", "<= 1.01", read <= 1.01))
        if each["vram_budget_bytes"]:
            peak, most = each["vram_peak_bytes"], each["vram_budget_bytes"]
            judged.append(
                Verdict(f"{at}: GPU peak", f"{peak / 2**20:.0f} MiB", f"<= {most / 2**20:.0f} MiB", peak <= most)
            )
    return judged


def table(found: Sequence[dict[str, Any]]) -> Table:
    shown = Table(title="whole processes, one run each, inputs cold")
    for heading in (*HEADINGS, *READ):
        shown.add_column(heading, justify="left" if heading == "shape" else "right")
    for each in found:
        row: Row = each["row"]
        assert row.reported_seconds is not None
        memory = (row.demand_bytes, row.predicted_bytes, each["vram_peak_bytes"], each["vram_predicted_bytes"])
        moved = (row.read_bytes, each["fewest_bytes"], row.disk_read_bytes, row.output_bytes)
        shown.add_row(
            row.shape,
            str(each["layers"]),
            *(f"{spread['p50']:.1f}" for spread in (row.wall_seconds, row.reported_seconds, row.cpu_seconds)),
            *(f"{size / 2**20:.0f}" if size else "" for size in memory),
            *(f"{(size or 0) / 1e9:.2f}" for size in moved),
            f"{each['loss']:.3f}",
            f"{each['kept']:.1%}",
        )
    return shown


def extrapolated(found: Sequence[dict[str, Any]], layers: int) -> dict[str, float] | None:
    """Seconds of all layers, from the difference that some make."""
    if len(found) < 2:
        return None
    few, most = (each["row"].reported_seconds["p50"] for each in found)
    each = (most - few) / (found[1]["layers"] - found[0]["layers"])
    return {"layers": layers, "seconds_per_layer": each, "seconds": most + each * (layers - found[1]["layers"])}


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--dir", "work", default="build/benchmarks/transport", show_default=True, type=click.Path(path_type=Path))
@click.option("--device", default="cpu", show_default=True)
@click.option("--ram", default=None, help="The budget; 3GiB on the CPU if left out, 24GiB beside a GPU.")
@click.option("--vram", default="8GiB", show_default=True, help="Of a GPU.")
@click.option("--quick", is_flag=True, help="A tiny shape.")
@click.option("--save", is_flag=True, help="Append to benchmarks/results/transport_cost.jsonl.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the document here too.")
def main(work: Path, device: str, ram: str | None, vram: str, quick: bool, save: bool, target: Path | None) -> None:
    on_gpu = device.startswith("cuda")
    if on_gpu and not torch.cuda.is_available():
        click.echo("no GPU here; --device cpu measures the CPU", err=True)
        sys.exit(2)
    ram = ram or ("24GiB" if on_gpu else "3GiB")
    parse_size(ram)
    work.mkdir(parents=True, exist_ok=True)
    machine: dict[str, Any] = dict(measure.machine(work))
    if on_gpu:
        machine |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    judged = [agreement(work, device)] if on_gpu else []
    found: list[dict[str, Any]] = []
    kind = "quick" if quick else "cuda" if on_gpu else "cpu"
    if all(verdict.kept for verdict in judged):
        for job in jobs(work, kind, device, ram, vram if on_gpu else None):
            found.append(measured(job, work))
            click.echo(f"  {job.shape.name}: {found[-1]['row'].wall_seconds['p50']:.1f} s", err=True)
        judged += verdicts(found)
    out = tables.console()
    out.print(" ".join(f"{key} {value};" for key, value in machine.items()), soft_wrap=True)
    out.print(table(found), tables.verdicts(judged))
    more = extrapolated(found, SIZES[kind].layers)
    if more:
        out.print(f"extrapolated to {more['layers']} layers, which were not run: {more['seconds']:.0f} s")
    document = {"benchmark": "transport_cost", "machine": machine, "kind": kind, "samples": SAMPLES[kind], "ram": ram}
    document["compute"] = COMPUTE if kind == "cuda" else "float32"
    document |= {"vram": vram if on_gpu else None, "extrapolated": more, **tables.plain(judged)}
    document["rows"] = [{**each, "row": asdict(each["row"])} for each in found]
    if target:
        target.write_text(json.dumps(document, indent=1))
    tables.finish(document, save, "transport_cost")
    sys.exit(any(verdict.kept is False for verdict in judged))


if __name__ == "__main__":
    main()
