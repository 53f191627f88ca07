"""What transport_cost.py merges: three models of random weights, samples of random tokens, recipes. A part of it.

whole       every tensor drawn for itself (checkpoints.py)
repeated    one random layer, written for every layer: a shard each, so that fewer layers are links to the same files
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import checkpoints
import measure
import numpy as np
import recipes
from checkpoints import Shape

from streammerge.formats.header import build_header
from streammerge.formats.index import build_index

NAMES = ("target", "source_base", "tuned")
HEAD = ("model.norm.weight", "lm_head.weight")


@dataclass(frozen=True)
class Job:
    """One merge: its models in a folder each, and where it runs."""

    shape: Shape
    folder: Path
    samples: Path
    device: str
    ram: str | None
    vram: str | None
    compute: str = "float32"

    def write(self) -> Path:
        recipe = {
            "merge_method": "gradfix",
            "base_model": str(self.folder / NAMES[0]),
            "source_base": str(self.folder / NAMES[1]),
            "models": [{"model": str(self.folder / NAMES[2])}],
            "data": {"train": str(self.samples)},
            "parameters": {"alpha": 1.0},
            "dtype": "bfloat16",
            "compute": self.compute,
        }
        path = self.folder / "gradfix.yml"
        path.write_text(json.dumps(recipe, indent=1))
        return path

    @property
    def files(self) -> list[Path]:
        return [path.resolve() for name in NAMES for path in sorted((self.folder / name).glob("*.safetensors"))]

    @property
    def fewest_bytes(self) -> int:
        """The target's embedding and layers twice, its head and last layer once, the other models' weights once."""
        sizes = {name: 2 * int(np.prod(form)) for name, form in self.shape.tensors()}
        turn = (*HEAD, f"model.layers.{self.shape.layers - 1}.")  # where the forward pass turns back
        return 4 * sum(sizes.values()) - sum(size for name, size in sizes.items() if name.startswith(turn))

    def run(self, out: Path) -> tuple[measure.Usage, dict[str, Any]]:
        """The merge in a process of its own; the output stays."""
        limits = [word for key in ("ram", "vram") if (value := getattr(self, key)) for word in (f"--{key}", value)]
        options = ("--device", self.device, *limits, "--json", "--overwrite", "--no-resume")
        usage = measure.run(recipes.command("merge", str(self.write()), str(out), *options))
        return usage, json.loads(usage.output)


def samples(folder: Path, vocabulary: int, count: int, tokens: int) -> Path:
    """Random tokens."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{count}x{tokens}.jsonl"
    rows = np.random.default_rng(0).integers(0, vocabulary, (count, tokens)).tolist()
    path.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    return path


def seeds(name: str) -> dict[str, int]:
    """Another pre-training has other weights; a fine-tuned model those of its source and a task vector: tuned, or
    tuned-2 and so on for several.
    """
    kind, _, number = name.partition("-")
    return {"expert": int(number or kind == "tuned"), "seed": int(kind != "target")}


def whole(folder: Path, shape: Shape, names: Sequence[str] = NAMES) -> Path:
    """The models, every tensor drawn for itself."""
    for name in names:
        checkpoints.make(folder / shape.name / name, shape, **seeds(name))
    return folder / shape.name


def repeated(folder: Path, shape: Shape, name: str) -> None:
    """One model of a shard per layer, all with the bits of the first, unless it is there."""
    if (folder / "config.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, list[np.ndarray]] = {}
    weight_map, total = {}, 0
    for part, tensors in parts(shape).items():
        file = f"{part}.safetensors"
        with open(folder / file, "wb") as out:
            out.write(build_header([(tensor, "BF16", form) for tensor, form in tensors], {"format": "pt"}))
            for tensor, form in tensors:
                own = tensor.removeprefix(f"{part}.") if ".layers." in tensor else tensor
                if own not in drawn:
                    given = seeds(name)
                    drawn[own] = list(
                        checkpoints.pieces(given["seed"], given["expert"], len(drawn), int(np.prod(form)))
                    )
                for piece in drawn[own]:
                    out.write(piece.data)
                weight_map[tensor] = file
                total += 2 * int(np.prod(form))
    (folder / "model.safetensors.index.json").write_bytes(build_index(weight_map, total))
    (folder / "config.json").write_text(json.dumps(shape.config()))


def parts(shape: Shape) -> dict[str, list[tuple[str, tuple[int, ...]]]]:
    """Tensors by the layer that they are of, the others for themselves."""
    found: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for tensor, form in shape.tensors():
        words = tensor.split(".")
        at = ".".join(words[:3]) if words[1] == "layers" else tensor.removesuffix(".weight")
        found.setdefault(at, []).append((tensor, form))
    return found


def fewer(folder: Path, shape: Shape, layers: int, names: Sequence[str] = NAMES) -> tuple[Path, Shape]:
    """The same models with fewer layers, their shards linked."""
    small = replace(shape, layers=layers, name=f"{shape.name}-{layers}")
    for name in names:
        there, here = folder / shape.name / name, folder / small.name / name
        here.mkdir(parents=True, exist_ok=True)
        weight_map = {}
        for part, tensors in parts(small).items():
            file = f"{part}.safetensors"
            if not (here / file).exists():
                os.link(there / file, here / file)
            weight_map |= {tensor: file for tensor, _ in tensors}
        total = sum(2 * int(np.prod(form)) for _, form in small.tensors())
        (here / "model.safetensors.index.json").write_bytes(build_index(weight_map, total))
        (here / "config.json").write_text(json.dumps(small.config()))
    return folder / small.name, small
