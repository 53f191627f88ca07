"""One HTML page of what a merge promised and did: a file without anything outside it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from streammerge.api import plots
from streammerge.budget import human
from streammerge.errors import MachineError
from streammerge.store.verify import read_manifest

PAGE = "report.html"
STYLE = """
:root { color-scheme: light dark }
body { font: 15px/1.45 system-ui, sans-serif; max-width: 62em; margin: 2em auto; padding: 0 1em }
h1 { font-size: 1.4em } h2 { font-size: 1.1em; margin-top: 2em }
table { border-collapse: collapse } td, th { padding: .15em 1em .15em 0; text-align: left; vertical-align: top }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums } th { border-bottom: 1px solid #8886 }
code, pre { font-size: .9em; overflow-wrap: anywhere } .dim { opacity: .65 } svg { max-width: 100%; height: auto }
details table { font-size: .85em }
"""


def report(out: str | Path, to: str | Path | None = None) -> Path:
    """Write the page of a merged folder, by default OUT/report.html; where it lies.

    Raises:
        CheckpointError: `out` is no folder that streammerge wrote.
        RecipeError: matplotlib is not installed.
        MachineError: the page cannot be written.
    """
    folder = Path(out)
    target = folder / PAGE if to is None else Path(to)
    text = page(folder.name or str(folder), read_manifest(folder))
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise MachineError(f"{target}: cannot be written: {error.strerror}; choose another place with --to") from error
    return target


def page(name: str, manifest: Mapping[str, Any]) -> str:
    """The page of a manifest."""
    found = manifest["report"]
    title = f"{escape(name)}: {escape(found['method'])}"
    parts = [
        f"<h1>{title}</h1>",
        _table(("", "measured", "promised"), _figures(found), numbers=(1, 2)),
        "<h2>Memory</h2>",
        plots.memory(found),
        *_learned(found.get("atlas")),
        *_sections(found),
        "<h2>Recipe</h2>",
        f"<pre>{escape(json.dumps(manifest['recipe'], indent=2))}</pre>",
        "<h2>Inputs</h2>",
        _table(("path", "size"), ((i["path"], human(i["bytes"])) for i in manifest["inputs"]), numbers=(1,)),
        "<h2>Shards</h2>",
        _table(("file", "SHA-256"), manifest["shards"].items()),
        f"<p class=dim>streammerge {escape(found['version'])}, plan {escape(manifest['digest'])}</p>",
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width'><title>{title}</title>"
    return (
        f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _figures(found: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    promised = found["predicted"]
    yield "memory held", human(found["ram_peak_bytes"]), human(promised["ram_peak_bytes"])
    if found["vram_budget_bytes"]:
        yield f"held on {found['device']}", human(found["vram_peak_bytes"]), human(promised["vram_peak_bytes"])
    yield "read", human(found["read_bytes"]), human(promised["read_bytes"])
    yield "written", human(found["write_bytes"]), human(promised["write_bytes"])
    yield "seconds", f"{found['seconds']:.1f}", ""
    yield "read and written per second", human(found["bytes_per_second"]), ""
    yield "tensors", f"{found['tensors']:,}", ""
    yield "copied, the same in all inputs", f"{found['copied_tensors']:,}", ""
    for how, count in found.get("solvers", {}).items():
        yield f"matrices by {how}", f"{count:,}", ""
    for each in found["nonfinite"]:
        yield f"{each['tensor']} of {each['file']}", f"holds {each['holds']}", ""


def _learned(found: Mapping[str, Any] | None) -> Iterator[str]:
    """Coefficients: layers by experts, and every tensor's; the losses of the steps."""
    if found is None:
        return
    yield f"<h2>Coefficients</h2>{plots.heat(found['tensors'], list(map(_short, found['models'])))}"
    yield "<p class=dim>The mean over the tensors of a layer; in: before the layers, out: behind them.</p>"
    if len(found.get("loss", ())) > 1:
        yield plots.by_depth({f"step.{at}.loss": {"loss of a step": loss} for at, loss in enumerate(found["loss"])})
    for step, loss in found.get("validation", ()):
        yield f"<p>validation loss after step {step}: {loss:.5g}{' (kept)' if step == found['kept'] else ''}</p>"
    yield from _sections({"Coefficients by tensor": found["tensors"]})
    if "rounding" in found:
        yield from _sections({"What rounding to the output's dtype left": found["rounding"]["tensors"]})


def _short(model: str) -> str:
    """The last part of a path."""
    return model.rstrip("/").rpartition("/")[2] or model


def _sections(found: Mapping[str, Any]) -> Iterator[str]:
    """What methods said of their tensors: every entry of the report that has figures by tensor."""
    for key, rows in found.items():
        if not isinstance(rows, dict) or not rows or not all(_is_row(row) for row in rows.values()):
            continue
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        cells = ([tensor, *(f"{row[n]:.4g}" if n in row else "" for n in names)] for tensor, row in rows.items())
        table = _table(("tensor", *names), cells, numbers=range(1, len(names) + 1))
        yield f"<h2>{escape(key.replace('_', ' ').capitalize())}</h2>{plots.by_depth(rows)}"
        yield f"<details><summary>{len(rows)} rows</summary>{table}</details>"
        if curves := found.get(f"{key}_curves"):
            yield plots.curves(curves)


def _is_row(row: Any) -> bool:
    return isinstance(row, dict) and bool(row) and all(isinstance(value, (int, float)) for value in row.values())


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    def row(tag: str, cells: Sequence[str]) -> str:
        marks = (" class=n" if i in numbers else "" for i in range(len(cells)))
        return "".join(f"<{tag}{mark}>{escape(str(cell))}</{tag}>" for cell, mark in zip(cells, marks, strict=True))

    body = "".join(f"<tr>{row('td', cells)}</tr>" for cells in rows)
    return f"<table><tr>{row('th', head)}</tr>{body}</table>"
