"""End-to-end merges on a GPU under a small budget of its memory, against the ceilings of the bus and of the disk.

    python benchmarks/gpu_merge.py [--shape 1.3b] [--vram 2GiB] [--dir DIR]

Per method, from files in the page cache and from the disk: seconds, GB/s of checkpoint bytes, the share of what the bus
(pinned copies, measured here) and the disk (floor.py) allow, memory promised and measured, and whether the shards are
those of the CPU. Each merge is a process of its own; the first of each method, on a tiny checkpoint, compiles. The
last line of stdout is one JSON document, and it is written to --json FILE too.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import click
import floor
import identity
import measure
import recipes
import tables
import torch
from checkpoints import SHAPES, Shape, make
from rich.table import Table

METHODS = ("linear", "task_arithmetic", "slerp", "ties", "dare_ties", "model_stock")
NAMES = ("base", "a", "b")
COPY = 256 << 20  # bytes of one measured copy


def bus(device: str) -> dict[str, float]:
    """GB/s of pinned copies: there, back, and there while another goes back."""
    place = torch.device(device)
    host = [torch.empty(COPY, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    there = [torch.empty(COPY, dtype=torch.uint8, device=place) for _ in range(2)]
    streams = [torch.cuda.Stream(place) for _ in range(2)]

    def seconds(*moves: tuple[torch.Tensor, torch.Tensor, torch.cuda.Stream]) -> float:
        best = float("inf")
        for _ in range(5):
            torch.cuda.synchronize(place)
            began = time.perf_counter()
            for target, source, stream in moves:
                with torch.cuda.stream(stream):
                    target.copy_(source, non_blocking=True)
            torch.cuda.synchronize(place)
            best = min(best, time.perf_counter() - began)
        return best

    up, down = (there[0], host[0], streams[0]), (host[1], there[1], streams[1])
    return {
        "there": COPY / seconds(up) / 1e9,
        "back": COPY / seconds(down) / 1e9,
        "both": 2 * COPY / seconds(up, down) / 1e9,
    }


def checkpoints(folder: Path, shape: Shape) -> tuple[Path, tuple[Path, ...]]:
    """A base and two experts, made at the same time unless they are there."""
    with ProcessPoolExecutor(len(NAMES)) as pool:
        jobs = [pool.submit(make, folder / shape.name / name, shape, k) for k, name in enumerate(NAMES)]
        base, *experts = (job.result() for job in jobs)
    return base, tuple(experts)


def merge(recipe: Path, out: Path, *options: str) -> tuple[dict[str, str], dict[str, Any], measure.Usage]:
    """One merge in a process of its own: the shards' hashes, its report, what it took."""
    identity.clean(out)
    usage = measure.run(recipes.command("merge", str(recipe), str(out), "--json", *options))
    hashes = identity.shards(out)
    shutil.rmtree(out)
    return hashes, json.loads(usage.output), usage


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--dir", "work", default="build/benchmarks", show_default=True, type=click.Path(path_type=Path))
@click.option("--shape", default="1.3b", show_default=True, type=click.Choice(sorted(SHAPES)))
@click.option("--vram", default="2GiB", show_default=True)
@click.option("--device", default="cuda:0", show_default=True)
@click.option("--method", "names", multiple=True, default=METHODS, show_default=True)
@click.option("--seconds", default=240, show_default=True, help="Begin no further merge after so long.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the document here too.")
def main(work: Path, shape: str, vram: str, device: str, names: tuple[str, ...], seconds: int, target: Path) -> None:
    began = time.perf_counter()
    work.mkdir(parents=True, exist_ok=True)
    base, experts = checkpoints(work, SHAPES[shape])
    tiny, near = checkpoints(work, recipes.TINY)
    described, rows, out = recipes.described(), [], work / "gpu-out"
    ceilings = bus(device)
    table = Table(title=f"{shape}, --vram {vram}, bus {ceilings['there']:.1f} GB/s there, {ceilings['back']:.1f} back")
    headings = (
        "method",
        "from",
        "s",
        "GB/s",
        "% bus",
        "% disk",
        "reserved MiB",
        "predicted",
        "host MiB",
        "predicted",
        "bytes",
    )
    for heading in headings:
        table.add_column(heading, justify="left" if heading in ("method", "from", "bytes") else "right")
    for name in names:
        about = described[name]
        merge(recipes.case(about, tiny, near).write(work / "recipes" / "tiny"), out, "--device", device, "--vram", vram)
        case = recipes.case(about, base, experts)
        recipe = case.write(work / "recipes" / "gpu")
        wanted, _, plain = merge(recipe, out, "--device", "cpu")
        for state in ("cache", "disk"):
            if time.perf_counter() - began > seconds:
                continue
            if state == "cache":
                measure.make_warm(case.files)
                limit = None
            else:
                measure.make_cold(case.files)
                limit = floor.measure(case.files, case.input_bytes // len(case.models), work)
                measure.make_cold(case.files)
            found, report, usage = merge(recipe, out, "--device", device, "--vram", vram)
            moved = report["read_bytes"] + report["write_bytes"]
            ideal = max(report["read_bytes"] / ceilings["there"], report["write_bytes"] / ceilings["back"]) / 1e9
            row = {
                "method": name,
                "from": state,
                "seconds": report["seconds"],
                "process_seconds": usage.wall_seconds,
                "cpu_process_seconds": plain.wall_seconds,
                "gigabytes_per_second": moved / report["seconds"] / 1e9,
                "share_of_bus": ideal / report["seconds"],
                "share_of_disk": limit.seconds / report["seconds"] if limit else None,
                "vram_reserved_bytes": report["vram_peak_bytes"],
                "vram_predicted_bytes": report["predicted"]["vram_peak_bytes"],
                "ram_peak_bytes": usage.demand_bytes,
                "ram_predicted_bytes": report["predicted"]["ram_peak_bytes"],
                "same_bytes_as_cpu": found == wanted,
            }
            rows.append(row)
            table.add_row(
                name,
                state,
                f"{row['seconds']:.2f}",
                f"{row['gigabytes_per_second']:.2f}",
                f"{row['share_of_bus']:.0%}",
                f"{row['share_of_disk']:.0%}" if limit else "",
                *(f"{row[key] / (1 << 20):.0f}" for key in row if key.endswith("_bytes")),
                "those of the CPU" if row["same_bytes_as_cpu"] else "DIFFER",
            )
    tables.console().print(table)
    machine = measure.machine(work) | {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    document = {
        "benchmark": "gpu_merge",
        "machine": machine,
        "shape": shape,
        "vram": vram,
        "bus": ceilings,
        "rows": rows,
    }
    if target:
        target.write_text(json.dumps(document, indent=1))
    print(json.dumps(document))
    sys.exit(not all(row["same_bytes_as_cpu"] for row in rows))


if __name__ == "__main__":
    main()
