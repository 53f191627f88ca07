"""`inspect`, `diff`, `verify`, `report`, `methods` and `demo`."""

from __future__ import annotations

import json
import math
from typing import Any

import click

from streammerge import api
from streammerge.budget import human
from streammerge.cli import show

_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
_debug = click.option("--debug", is_flag=True, help="Show tracebacks.")


@click.command()
@click.argument("model")
@_json
@_debug
def inspect(model: str, as_json: bool, debug: bool) -> None:
    """Show what the checkpoint MODEL holds, from its headers."""
    body = api.inspect(model)
    if as_json:
        click.echo(json.dumps(body))
        return
    rows = [
        [e["name"], e["dtype"], "x".join(map(str, e["shape"])), human(e["bytes"]), e["shard"]] for e in body["entries"]
    ]
    show.table(None, ["tensor", "dtype", "shape", "size", "shard"], rows, right=[3])
    kinds = ", ".join(f"{count:,} {dtype}" for dtype, count in body["dtypes"].items())
    total = f"{show.count(body['tensors'], 'tensor')}, {kinds}, {human(body['bytes'])}"
    click.echo(f"{total} in {show.count(body['shards'], 'shard')}")


@click.command()
@click.argument("one")
@click.argument("other")
@_json
@_debug
def diff(one: str, other: str, as_json: bool, debug: bool) -> None:
    """Show what changed from checkpoint ONE to OTHER, tensor by tensor."""
    found = list(api.diff(one, other))
    changed = [row for row in found if row["state"] == "changed"]
    odd = [row for row in found if row["state"] not in ("changed", "same")]
    if as_json:
        rows = [{key: _finite(value) for key, value in row.items()} for row in found]
        body = {"same": len(found) - len(changed) - len(odd), "changed": len(changed), "odd": len(odd), "rows": rows}
        click.echo(json.dumps(body))
        return
    if changed:
        table = [[row["name"], *_figures(row)] for row in changed]
        show.table(None, ["tensor", "elements changed", "|b-a| / |a|", "largest"], table, right=[1, 2, 3])
    for row in odd:
        click.echo(f"{row['name']}: {row['state']}")
    same = len(found) - len(changed) - len(odd)
    click.echo(f"{show.count(len(changed), 'tensor')} changed, {same} the same, {len(odd)} without a match")


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _figures(row: dict[str, Any]) -> list[str]:
    share = f"{100 * row['changed'] / row['numel']:.2f} %"
    return [share, *("" if row[key] is None else f"{row[key]:.3g}" for key in ("relative", "largest"))]


@click.command()
@click.argument("out")
@_json
@_debug
@click.pass_context
def verify(ctx: click.Context, out: str, as_json: bool, debug: bool) -> None:
    """Hash the shards of OUT again and compare with its manifest; exit code 2 if one differs."""
    body = api.verify(out)
    if as_json:
        click.echo(json.dumps(body))
    elif not body["bad"]:
        click.echo(f"{out}: {show.count(body['shards'], 'shard')}, {human(body['bytes'])}, all as written")
    for name in body["bad"]:
        click.secho(f"streammerge: {out}: shard {name} is missing or differs from its manifest; merge again", err=True)
    ctx.exit(2 if body["bad"] else 0)


@click.command()
@click.argument("out")
@click.option("--to", type=click.Path(), help="The page to write. Default: OUT/report.html.")
@_json
@_debug
def report(out: str, to: str | None, as_json: bool, debug: bool) -> None:
    """Write an HTML page with plots of the merge that made OUT: promised against measured."""
    path = api.report(out, to)
    click.echo(json.dumps({"page": str(path)}) if as_json else str(path))


@click.command()
@click.argument("name", required=False)
@_json
@_debug
def methods(name: str | None, as_json: bool, debug: bool) -> None:
    """List the merge methods, or show one with its parameters."""
    rows = api.describe_methods(name)
    if as_json:
        click.echo(json.dumps(rows[0] if name else {"methods": rows}))
    elif name is None:
        shown = [[_spelled(r), r["summary"], ", ".join(p["name"] for p in r["parameters"]), r["source"]] for r in rows]
        show.table(None, ["method", "what it does", "parameters", "source"], shown)
    else:
        (row,) = rows
        click.echo(f"{row['name']}: {row['summary']}")
        if row["post"]:
            click.echo(
                f"beside any merge_method: post: {row['name']}, or post: {{{row['name']}: {{parameter: value}}}}"
            )
        click.echo(f"source: {row['source']}; sees one {row['sees']} at a time; base_model {row['base_model']}")
        click.echo(f"kernels: {', '.join(row['kernels'])}")
        shown = [
            [p["name"], _default(p), "per model" if p["per_expert"] else "", p["meaning"]] for p in row["parameters"]
        ]
        show.table(None, ["parameter", "default", "", "meaning"], shown)


def _spelled(row: dict[str, Any]) -> str:
    return f"post: {row['name']}" if row["post"] else str(row["name"])


def _default(parameter: dict[str, Any]) -> str:
    value = parameter["default"]
    return "needed" if parameter["required"] else str(value).lower() if isinstance(value, bool) else str(value)


@click.command()
@click.argument("folder", default="demo", type=click.Path(file_okay=False))
@click.option("--ram", default="512MiB", show_default=True, help="Budget of each merge.")
@click.option("--fresh", is_flag=True, help="Start over instead of using what is there.")
@_json
@_debug
def demo(folder: str, ram: str, fresh: bool, as_json: bool, debug: bool) -> None:
    """Train a tiny base model and three experts, merge them by every method, compare, all in FOLDER."""
    body = api.demo(folder, ram=ram, fresh=fresh, quiet=as_json)
    if as_json:
        click.echo(json.dumps(body))
