"""Folders of anchors: what a run keeps for others, and takes up from them.

    DIR/model.safetensors    layers.{i}.expert.{e}, fp32 [anchors, d] or [anchors, tokens, d]
    DIR/anchors.json         layers[i]: the unit's name, and experts[e]: loss, steps, seconds, distance

i counts the units of the model from 0, e the recipe's models. Units that were not run have no tensors, and no experts
in the list.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.errors import CheckpointError, OutputExists, RecipeError
from streammerge.formats.header import TensorSpec, build_header
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.publish import machine
from streammerge.store.writer import Shard

TENSORS, NOTES = "model.safetensors", "anchors.json"
KEPT = "anchors.safetensors"  # in the unfinished output folder
NOTED = ("loss", "steps", "seconds", "distance")
FORMAT = {"format": "pt", "streammerge": "anchors", "version": "1"}


def key(unit: int, expert: int) -> str:
    return f"layers.{unit}.expert.{expert}"


@dataclass(frozen=True)
class AnchorsFile:
    """A shard of anchors in the unfinished output folder; `begins` are its tensors' places by name."""

    number: int
    shard: Shard
    begins: Mapping[str, int]

    @classmethod
    def of(cls, number: int, shapes: Mapping[str, tuple[int, ...]]) -> AnchorsFile:
        """Anchors of these shapes, one behind the other."""
        header = build_header([(name, "F32", shape) for name, shape in shapes.items()], FORMAT)
        begins, at = {}, len(header)
        for name, shape in shapes.items():
            begins[name] = at
            at += 4 * math.prod(shape)
        return cls(number, Shard(KEPT, header, at), begins)

    def spec(self, name: str, shape: tuple[int, ...], folder: Path) -> TensorSpec:
        """Where a tensor lies while the work is unfinished."""
        begin = self.begins[name]
        return TensorSpec(name, "F32", shape, str(folder / KEPT), begin, begin + 4 * math.prod(shape))


@dataclass(frozen=True)
class Given:
    """Anchors that were made before: their place in a file, and what was noted of them."""

    spec: TensorSpec
    figures: Mapping[str, Any]


def read_folders(folders: Sequence[Path]) -> dict[str, Given]:
    """All anchors in some folders; the first that has one counts.

    Raises:
        CheckpointError: a folder holds no anchors.
    """
    found: dict[str, Given] = {}
    for folder in folders:
        if not (folder / TENSORS).is_file() or not (folder / NOTES).is_file():
            raise CheckpointError(f"{folder}: holds no anchors ({TENSORS}, {NOTES}); give a folder of save_anchors")
        checkpoint = Checkpoint.open(folder / TENSORS)
        try:
            layers = json.loads((folder / NOTES).read_bytes())["layers"]
            notes = {key(i, e): dict(row) for i, unit in enumerate(layers) for e, row in enumerate(unit["experts"])}
        except (ValueError, KeyError, TypeError, OSError) as error:
            raise CheckpointError(f"{folder / NOTES}: cannot be read ({error}); write it again") from None
        for name, spec in checkpoint.tensors.items():
            if spec.dtype != "F32":
                raise CheckpointError(f"{spec.file}: tensor {name!r} is {spec.dtype}, anchors are F32")
            found.setdefault(name, Given(spec, notes.get(name, {})))
    return found


def check_folder(folder: Path, out: Path, partial: Path, overwrite: bool, own: bool) -> None:
    """Refuse a place for anchors that is taken (unless by this work: `own`), or that goes away.

    Raises:
        RecipeError: it lies in the output folder.
        OutputExists: it holds something.
    """
    if folder in (out, partial) or out in folder.parents or partial in folder.parents:
        raise RecipeError(f"save_anchors: {folder} lies in the output folder; choose another place")
    taken = [name for name in (TENSORS, NOTES) if (folder / name).exists()]
    if taken and not overwrite and not own:
        raise OutputExists(f"{folder}: holds {taken[0]} already; --overwrite replaces it")


def save_folder(folder: Path, kept: Path, names: Sequence[str], notes: Mapping[tuple[int, int], Any]) -> None:
    """Link (or copy) the file of anchors to its folder, and write what was noted; each comes there whole."""
    layers: list[dict[str, Any]] = [{"unit": name, "experts": []} for name in names]
    for (unit, _), row in sorted(notes.items()):
        layers[unit]["experts"].append(row)
    with machine(folder):
        folder.mkdir(parents=True, exist_ok=True)
        new = folder / f"{TENSORS}.new"
        new.unlink(missing_ok=True)
        try:
            os.link(kept, new)
        except OSError:  # another file system, or one without links
            shutil.copyfile(kept, new)
        os.replace(new, folder / TENSORS)
        text = folder / f"{NOTES}.new"
        text.write_text(json.dumps({"layers": layers}, indent=1))
        os.replace(text, folder / NOTES)
