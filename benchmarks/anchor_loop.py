"""Construction of one (layer, expert) of the encoder: a plain loop of double backward, and ours, in turn. A part of
anchors.py.

The plain loop does what the authors' code does: both networks forward, the likeness's gradient with a graph, the sum of
cosines, backward to the anchors and, as they are leaves that require it, to the base's weights. All on one thread, the
same noise, the key's bias left out of both. Each runs in processes of its own, in turn; ours has the C library keep its
memory from step to step, as the engine does. Seconds are medians of steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch
from bounds import Verdict
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import cosine_similarity

from streammerge.engine.anchor_work import PIECES
from streammerge.methods._anchors import Construction, gaussian, random_of
from streammerge.methods._whole_unit import WholeUnit, without_gradient
from streammerge.models.build import return_freed_memory

WAYS = {"plain": None, "ours, fp32": "fp32", "ours, bf16": "bf16"}
ROUNDS = 2
LAYER, ANCHORS, TOKENS = 0, 64, 5
RATE = 1e-2
FASTER = 2.0
SAME = 0.02  # of the loss after the last step
WARM = 3  # steps that are not timed


def compare(base: Path, expert: Path, steps: int) -> dict[str, Any]:
    """Seconds of a step and the loss after the last, by the way."""
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    losses: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name in WAYS:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                found, losses[name] = process.submit(measured, name, base, expert, steps).result()
            seconds[name] += found[WARM:]
    return {name: {"step_seconds": median(seconds[name]), "loss": losses[name]} for name in WAYS}


def measured(way: str, base: Path, expert: Path, steps: int) -> tuple[list[float], float]:
    """Seconds of every step, and the loss before the last."""
    from transformers import AutoModel

    torch.set_num_threads(1)
    model = AutoModel.from_pretrained(base, attn_implementation="eager").eval()
    layer = model.encoder.layer[LAYER]
    theta = {name: value.detach() for name, value in layer.named_parameters()}
    theirs = load_file(expert / "model.safetensors")
    tau = {name: theirs[f"encoder.layer.{LAYER}.{name}"] - value for name, value in theta.items()}

    def run(x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        out = torch.func.functional_call(layer, dict(weights), (x,))
        found: Tensor = out[0] if isinstance(out, tuple) else out
        return found

    start = gaussian(random_of(0, "loop", 0), (ANCHORS, TOKENS, theta["output.dense.bias"].numel()), 0.01)
    masks = without_gradient(run, theta, gaussian(random_of(1, "loop", 0), (4, *start.shape[1:]), 1.0))
    if WAYS[way] is None:
        step = _plain(run, theta, tau, start, {name for name, mask in masks.items() if bool(mask.all())})
    else:
        return_freed_memory(PIECES)
        network = WholeUnit(run, theta, tau, "cosine", WAYS[way])
        step = _ours(Construction(network, tau, start.clone(), RATE, steps, 1024, masks))
    seconds, loss = [], 0.0
    for _ in range(steps + WARM):
        began = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - began)
    return seconds, loss


def _plain(run: Any, theta: Any, tau: Any, start: Tensor, leave: set[str]) -> Callable[[], float]:
    x = start.clone().requires_grad_()
    weights = {name: value.clone().requires_grad_() for name, value in theta.items()}
    expert = {name: theta[name] + tau[name] for name in theta}
    names = [name for name in theta if name not in leave]
    adam = torch.optim.AdamW([x], lr=RATE)

    def step() -> float:
        likeness = cosine_similarity(run(x, weights).flatten(1), run(x, expert).flatten(1)).mean()
        found = torch.autograd.grad(likeness, [weights[name] for name in names], create_graph=True)
        cosines = [cosine_similarity(g.flatten(), tau[n].flatten(), dim=0) for g, n in zip(found, names, strict=True)]
        loss = len(cosines) - torch.stack(cosines).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        return float(loss.detach())

    return step


def _ours(course: Construction) -> Callable[[], float]:
    def step() -> float:
        loss = float(course.loss())
        course.step()
        return loss

    return step


def table(found: Mapping[str, Any]) -> Table:
    shown = Table(title="one layer and expert, one thread: medians of steps")
    for heading in ("", "ms per step", "200 steps, s", "loss"):
        shown.add_column(heading, justify="right" if heading else "left")
    for name, row in found.items():
        seconds = row["step_seconds"]
        shown.add_row(name, f"{1e3 * seconds:.1f}", f"{200 * seconds:.1f}", f"{row['loss']:.4f}")
    return shown


def verdicts(found: Mapping[str, Any], whole: bool) -> Iterator[Verdict]:
    plain = found["plain"]
    for name, row in found.items():
        if name == "plain":
            continue
        apart = abs(row["loss"] - plain["loss"])
        yield Verdict(f"{name}: loss from plain", f"{apart:.4f}", f"<= {SAME}", apart <= SAME)
    ratio = plain["step_seconds"] / found["ours, bf16"]["step_seconds"]
    yield Verdict("faster than plain", f"{ratio:.2f} x", f">= {FASTER} x", ratio >= FASTER if whole else None)
