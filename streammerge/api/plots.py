"""Plots of a report as SVG: promised against measured, and what methods say of their tensors, by depth.

They are drawn in grey and mid-tones on nothing, so that they can be read on light and on dark pages.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from streammerge.budget import MIB
from streammerge.errors import RecipeError
from streammerge.planner.layers import comes_before

Rows = Mapping[str, Mapping[str, float]]  # tensor -> figure -> value

INK = "#808890"
COLOURS = ("#3b82c4", "#d97b29", "#4a9e5c", "#b04a9a", "#c4453b", "#8a7a2f", "#5f6fd0", "#2f9c9c")
_DEPTH = re.compile(r"\.(\d+)(?:\.|$)")


def memory(report: Mapping[str, Any]) -> str:
    """Measured peak, predicted peak and budget, of the host and of the device."""
    predicted, bars = report["predicted"], []
    for word, key in (("host", "ram"), ("device", "vram")):
        if report.get(f"{key}_budget_bytes"):
            bars.append((f"{word}, measured", report[f"{key}_peak_bytes"]))
            bars.append((f"{word}, predicted", predicted[f"{key}_peak_bytes"]))
            bars.append((f"{word}, budget", report[f"{key}_budget_bytes"]))
    with _figure(6.4, 0.35 * len(bars) + 0.6) as (figure, made):
        axes = figure.subplots()
        values = [value / MIB for _, value in bars]
        shades = (COLOURS[0], COLOURS[1], INK)
        axes.barh([name for name, _ in bars], values, color=[shades[i % 3] for i in range(len(bars))], height=0.7)
        axes.invert_yaxis()
        axes.set_xlabel("MiB")
        for place, value in enumerate(values):
            axes.annotate(f" {value:,.0f}", (value, place), va="center", color=INK)
        axes.margins(x=0.15)
    return made()


def by_depth(rows: Rows) -> str:
    """A panel per figure: its value over the layer, a line per kind of tensor. Figures named x_1, x_2 ... share one."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for place, (name, figures) in enumerate(rows.items()):
        depth, kind = depth_of(name, place)
        for figure, value in figures.items():
            stem, _, number = figure.rpartition("_")
            numbered = stem and number.isdigit()
            line = f"{kind} {number}" if numbered else kind
            panels.setdefault(stem if numbered else figure, {}).setdefault(line, []).append((depth, value))
    kinds = list(dict.fromkeys(depth_of(name, place)[1] for place, name in enumerate(rows)))
    colours = {kind: COLOURS[i % len(COLOURS)] for i, kind in enumerate(kinds)}
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    with _figure(4.6 * across, 2.5 * down + 0.25 * len(kinds)) as (figure, made):
        grid = figure.subplots(down, across, squeeze=False)
        for axes in grid.flat[len(panels) :]:
            axes.set_visible(False)
        for axes, (title, lines) in zip(grid.flat, panels.items(), strict=False):
            for line, points in lines.items():
                kind = line if line in colours else line.rpartition(" ")[0]
                axes.plot(*zip(*sorted(points), strict=True), ".-", lw=1, ms=4, color=colours[kind])
            axes.set_title(title, fontsize=9)
            axes.set_xlabel("layer", fontsize=8)
        keys = [_line(colours[kind]) for kind in kinds]
        figure.legend(keys, kinds, loc="outside lower center", fontsize=7, ncols=2, frameon=False, labelcolor=INK)
    return made()


def heat(rows: Rows, names: Sequence[str]) -> str:
    """Layers across, `names` down: the mean over a layer's tensors of figures c_1, c_2, ..., one for each name.

    Orange is above 0, blue below; what lies outside the layers has columns of its own, in front and behind.
    """
    columns = _columns(list(rows))
    values = [[0.0] * len(columns) for _ in names]
    for at, tensors in enumerate(columns.values()):
        for line in range(len(names)):
            found = [rows[tensor][f"c_{line + 1}"] for tensor in tensors]
            values[line][at] = sum(found) / len(found)
    most = max((abs(value) for line in values for value in line), default=0.0) or 1.0
    with _figure(max(4.6, 0.28 * len(columns) + 2.6), 0.34 * len(names) + 1.2) as (figure, made):
        from matplotlib.colors import LinearSegmentedColormap

        axes = figure.subplots()
        shades = LinearSegmentedColormap.from_list("signed", [COLOURS[0], "#80808018", COLOURS[1]])
        image = axes.imshow(values, cmap=shades, vmin=-most, vmax=most, aspect="auto")
        axes.set_yticks(range(len(names)), names)
        step = -(-len(columns) // 16)
        axes.set_xticks(range(0, len(columns), step), list(columns)[::step])
        axes.set_xlabel("layer")
        bar = figure.colorbar(image, ax=axes)
        bar.ax.tick_params(colors=INK, labelsize=8)
        bar.outline.set_visible(False)
    return made()


def _columns(names: Sequence[str]) -> dict[str, list[str]]:
    """Tensors by layer; those of no layer by whether they come before or behind the layers, or without any."""
    layers: dict[int, list[str]] = {}
    outside: list[list[str]] = [[], []]
    for name in names:
        found = _DEPTH.search(name)
        if found is None:
            outside[comes_before(name)].append(name)
        else:
            layers.setdefault(int(found[1]), []).append(name)
    after, before = outside
    inside = {str(layer): layers[layer] for layer in sorted(layers)}
    return {**({"in": before} if before else {}), **inside, **({"out": after} if after else {})}


def curves(kinds: Mapping[str, Mapping[str, Mapping[str, Sequence[Sequence[float]]]]]) -> str:
    """A panel per kind of loss: a line for each unit and expert, fainter for the first units than for the last."""
    with _figure(4.6 * len(kinds), 3.0) as (figure, made):
        for axes, (kind, units) in zip(figure.subplots(1, len(kinds), squeeze=False).flat, kinds.items(), strict=True):
            for place, lines in enumerate(units.values()):
                shade = 0.25 + 0.75 * (place + 1) / len(units)
                for number, points in enumerate(lines.values()):
                    colour = COLOURS[number % len(COLOURS)]
                    axes.plot(*zip(*points, strict=True), lw=1, color=colour, alpha=shade)
            axes.set_title(f"{kind} loss".replace("_", " "), fontsize=9)
            axes.set_xlabel("step" if kind == "construction" else "epoch", fontsize=8)
        experts = max(len(lines) for units in kinds.values() for lines in units.values())
        if experts > 1:
            keys = [_line(COLOURS[number % len(COLOURS)]) for number in range(experts)]
            names = [f"expert {number}" for number in range(experts)]
            figure.legend(keys, names, loc="outside lower center", fontsize=7, ncols=4, frameon=False, labelcolor=INK)
    return made()


def depth_of(name: str, place: int) -> tuple[int, str]:
    """The layer that a tensor's name tells, else its place in the order; and the name without it: its kind."""
    found = _DEPTH.search(name)
    return (place, name) if found is None else (int(found[1]), name[: found.start(1)] + "*" + name[found.end(1) :])


def _line(colour: str) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], color=colour, marker=".")


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Any, Callable[[], str]]]:
    """A figure to draw on, and what gives it as SVG afterwards.

    Raises:
        RecipeError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise RecipeError("plots need matplotlib; install streammerge[report]") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    parts: list[str] = []
    yield figure, lambda: parts[0]
    _tint(figure.axes)
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    parts.append(text.getvalue()[text.getvalue().index("<svg") :])


def _tint(panels: Sequence[Any]) -> None:
    for axes in panels:
        axes.tick_params(colors=INK, labelsize=8)
        axes.title.set_color(INK)
        axes.xaxis.label.set_color(INK)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(INK)
