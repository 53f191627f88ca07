"""The same bytes whatever the budget and the number of threads, and after being killed.

    python benchmarks/identity.py [--dir DIR] [--method NAME ...] [--kills 12]

Every method of `streammerge methods` merges the small checkpoints under each budget with each number of threads, and
once under the smallest budget that the planner accepts; the SHA-256 of every output shard must be one. Then merges
are killed with SIGKILL at random moments: the output must be absent or complete, and the same command run again must
end with the same shards, output being cut into small shards here so that there is work to keep. Every second kill
waits until there is unfinished work.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import measure
import recipes
import tables
from bounds import Verdict
from checkpoints import SHAPES
from rich.console import Console
from rich.table import Table

BUDGETS = ("512MiB", "1GiB", "4GiB")
THREADS = (1, 2)
KILLS = 12
SPLIT = ("--shard-size", "32MiB")  # in the killed runs: a finished shard is what a small merge can keep
Shards = dict[str, str]  # file name -> SHA-256


def shards(out: Path) -> Shards:
    found = {}
    for path in sorted(out.glob("*.safetensors")):
        with open(path, "rb") as file:
            digest = hashlib.sha256()
            while piece := file.read(1 << 22):
                digest.update(piece)
        found[path.name] = digest.hexdigest()
    return found


def command(recipe: Path, out: Path, ram: str, threads: int, more: Sequence[str] = ()) -> list[str]:
    return recipes.command("merge", str(recipe), str(out), "--ram", ram, "--threads", str(threads), "--json", *more)


def merge(recipe: Path, out: Path, ram: str, threads: int, more: Sequence[str] = ()) -> tuple[Shards, dict[str, Any]]:
    """Merge (or go on with a merge): the shards, which are removed, and the report."""
    usage = measure.run(command(recipe, out, ram, threads, more))
    found = shards(out)
    shutil.rmtree(out)
    return found, json.loads(usage.output)


def least(recipe: Path) -> str:
    """The smallest budget that the planner accepts, as it says when it is given too little."""
    done = subprocess.run(
        recipes.command("plan", str(recipe), "--ram", "1MiB", "--json"), capture_output=True, text=True
    )
    return str(json.loads(done.stdout)["error"]["least_bytes"])


def across(case: recipes.Case, work: Path) -> tuple[Shards, dict[str, Any], list[str]]:
    """One method under every budget and number of threads: its shards, the first report, the settings that differ."""
    recipe, out = case.write(work / "recipes" / "identity"), work / "identity-out"
    clean(out)
    first, report = merge(recipe, out, BUDGETS[0], THREADS[0])
    settings = [(ram, threads) for ram in (*BUDGETS, least(recipe)) for threads in THREADS][1:]
    differ = [f"{ram}/{n}" for ram, n in settings if merge(recipe, out, ram, n)[0] != first]
    return first, report, differ


def clean(out: Path) -> None:
    for path in (out, out.with_name(out.name + ".partial")):
        shutil.rmtree(path, ignore_errors=True)


def kill(argv: Sequence[str], out: Path, seconds: float, wait: bool, dice: random.Random) -> str:
    """Start a merge and kill it at a random moment of its life: how the output was found."""
    partial = out.with_name(out.name + ".partial")
    began = time.perf_counter()
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while wait and not partial.exists() and child.poll() is None:
        time.sleep(0.001)
    left = seconds - (time.perf_counter() - began)
    time.sleep(dice.uniform(0, max(left, 0.05)))
    os.kill(child.pid, 9)  # not yet waited for, so the number is still its own
    child.wait()
    if out.exists():
        return "complete"
    return "unfinished" if partial.exists() else "absent"


def kills(cases: Sequence[recipes.Case], work: Path, count: int, seed: int) -> Iterator[dict[str, Any]]:
    """Kill, look, go on, compare; one row each. Methods take turns."""
    dice, out = random.Random(seed), work / "identity-out"
    whole: dict[str, tuple[Shards, int, float]] = {}  # undisturbed: shards, bytes read, seconds
    for number in range(count):
        case = cases[number % len(cases)]
        recipe = case.write(work / "recipes" / "identity")
        clean(out)
        if case.method not in whole:
            began = time.perf_counter()
            found, report = merge(recipe, out, BUDGETS[0], 2, SPLIT)
            whole[case.method] = found, report["read_bytes"], time.perf_counter() - began
        wanted, reads, seconds = whole[case.method]
        argv = command(recipe, out, BUDGETS[0], 2, SPLIT)
        state = kill(argv, out, seconds, number % 2 == 1, dice)
        if state == "complete":
            found, kept = shards(out), 1.0
        else:
            found, again = merge(recipe, out, BUDGETS[0], 2, SPLIT)
            kept = 1 - again["read_bytes"] / reads
        clean(out)
        yield {"method": case.method, "found": state, "kept": round(kept, 3), "same": found == wanted}


def check(
    work: Path, console: Console, names: Sequence[str] = (), count: int = KILLS, seed: int = 0
) -> tuple[dict[str, Any], list[Verdict]]:
    """Both checks: figures for the document, verdicts for the table of bounds."""
    base, experts = recipes.trio(work, SHAPES["small"])
    about = {name: row for name, row in recipes.described().items() if not names or name in names}
    table = Table(title=f"shards under {', '.join(BUDGETS)} and the least, with {THREADS} threads")
    for heading in ("method", "reads", "SHA-256 of the shards", "differ under"):
        table.add_column(heading)
    verdicts, cases, hashes = [], [], {}
    for name, row in about.items():
        case = recipes.case(row, base, experts)
        try:
            first, report, differ = across(case, work)
        except measure.ProcessFailed as error:
            click.echo(f"  {error}", err=True)
            verdicts.append(Verdict(f"{name}: same bytes", error.status, "exit code 0", False))
            continue
        cases.append(case)
        hashes[name] = first
        reads = f"{report['read_bytes'] / case.input_bytes:.2f} x"
        table.add_row(name, reads, " ".join(h[:16] for h in first.values()), ", ".join(differ) or "none")
        what = f"{name}: same bytes under budgets and threads"
        verdicts.append(Verdict(what, f"{len(differ)} of {2 * len(BUDGETS) + 1} differ", "0", not differ))
    console.print(table)
    rows = list(kills(cases, work, count, seed)) if cases else []
    kept = Table(title=f"killed at random moments (seed {seed}), then run again")
    for heading in ("method", "found", "work kept", "same bytes"):
        kept.add_column(heading)
    for each in rows:
        kept.add_row(each["method"], each["found"], f"{each['kept']:.0%}", "yes" if each["same"] else "NO")
    console.print(kept)
    good = sum(each["same"] for each in rows)
    verdicts.append(Verdict("kill -9, then resumed: same bytes", f"{good} of {len(rows)}", "all", good == len(rows)))
    return {"shards": hashes, "kills": rows, "seed": seed}, verdicts


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.option("--dir", "work", default="build/benchmarks", show_default=True, type=click.Path(path_type=Path))
@click.option("--method", "names", multiple=True, help="These methods only.")
@click.option("--kills", "count", default=KILLS, show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the moments.")
@click.option("--save", is_flag=True, help="Append to benchmarks/results/identity.jsonl.")
def main(work: Path, names: tuple[str, ...], count: int, seed: int, save: bool) -> None:
    work.mkdir(parents=True, exist_ok=True)
    out = tables.console()
    document, found = check(work, out, names, count, seed)
    out.print(tables.verdicts(found))
    head = {"benchmark": "identity", "machine": measure.machine(work)}
    tables.finish({**head, **document, **tables.plain(found)}, save, "identity")
    sys.exit(any(v.kept is False for v in found))


if __name__ == "__main__":
    main()
