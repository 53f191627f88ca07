"""A checkpoint: named tensors in a folder of safetensors shards, opened by reading headers only.

What a folder is taken for, first match first: shards listed by `model.safetensors.index.json`, or by the
one other `*.safetensors.index.json`; `model.safetensors`; all other `*.safetensors` together. Index and
shards must agree to the last tensor: where they differ, two loaders would read two different models.
Symbolic links are followed, since the cache of the Hugging Face Hub is made of them.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from streammerge.errors import CheckpointError
from streammerge.formats.header import Header, TensorSpec, read_header, show
from streammerge.formats.index import file_fault, load_object, read_index

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
ADAPTER = ("adapter_model.safetensors", "adapter_model.bin", "adapter_config.json")
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
OTHERS = (
    ".safetensors",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".index.json",
    ".lock",
    ".incomplete",
)
NOT_SIDE = (*PICKLES, *OTHERS)  # endings of what is no side file
NUMBERED = re.compile(r"(.*)-(\d+)-of-(\d+)\.safetensors")


@dataclass(frozen=True)
class Checkpoint:
    """`tensors` in shard order, then offset order; `shards` sorted by name; `config` from config.json."""

    path: Path
    tensors: dict[str, TensorSpec]
    shards: dict[str, Header]
    metadata: dict[str, str]
    side_files: tuple[Path, ...]
    config: dict[str, Any] | None

    @classmethod
    def open(cls, path: str | Path) -> Checkpoint:
        """Read the headers of a checkpoint folder, or of one safetensors file, and check that all agree."""
        path = Path(path).absolute()
        try:
            names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else []
            shards = _open_folder(path, names) if path.is_dir() else _open_file(path)
            side_files = tuple(path / name for name in names if _is_side_file(path / name))
        except OSError as error:
            raise CheckpointError(f"{path}: {error.strerror}; check the path and its permissions") from error
        config = load_object(str(path / "config.json")) if "config.json" in names else None
        tensors = {spec.name: spec for header in shards.values() for spec in header.tensors}
        if not tensors:
            _refuse(path, "holds no tensors; give a checkpoint with weights")
        metadata: dict[str, str] = {}
        for header in shards.values():  # the first shard to say a thing is right
            metadata = header.metadata | metadata
        return cls(path, tensors, shards, metadata, side_files, config)

    def fingerprint(self) -> str:
        """SHA-256 over names, headers and sizes of the shards: the same inputs, for a run that resumes."""
        parts = [[name, header.digest, header.file_size] for name, header in self.shards.items()]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _refuse(where: Path, fault: str) -> NoReturn:
    raise CheckpointError(f"{where}: {fault}")


def _open_file(path: Path) -> dict[str, Header]:
    if not path.exists():
        _refuse(path, "no such file or folder; check the path")
    if path.suffix != ".safetensors":
        _refuse(path, "not a safetensors file; give a folder with safetensors shards, or a .safetensors file")
    return {path.name: read_header(path)}


def _open_folder(folder: Path, names: list[str]) -> dict[str, Header]:
    index = _index_name(folder, names)
    return _open_indexed(folder, index) if index else _open_loose(folder, names)


def _index_name(folder: Path, names: list[str]) -> str | None:
    """The index that decides, if there is one."""
    if INDEX in names:
        return INDEX
    indexes = [name for name in names if name.endswith(".safetensors.index.json") and name[0] != "."]
    if len(indexes) > 1:
        _refuse(folder, f"holds {len(indexes)} indexes, {', '.join(map(show, indexes))}; leave one")
    return indexes[0] if indexes else None


def _open_indexed(folder: Path, index: str) -> dict[str, Header]:
    """The shards that an index lists, once each holds what the index says and nothing else."""
    weights, _ = read_index(folder / index)
    listed: dict[str, list[str]] = {}
    for name, file in weights.items():
        listed.setdefault(file, []).append(name)
    if SINGLE not in listed and (folder / SINGLE).exists():
        _refuse(folder, f"holds both {SINGLE} and {index}, which does not list it; remove one of them")
    for file, names in sorted(listed.items()):
        if not (folder / file).exists():
            more = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            tensors = f"tensor {show(names[0])}{more}"
            _refuse(folder / index, f"{tensors} should be in {file}, which is missing; download it")
    shards = {file: read_header(folder / file) for file in sorted(listed)}
    _check_index(folder / index, weights, _holders(folder, shards))
    return shards


def _check_index(index: Path, weights: dict[str, str], holder: dict[str, str]) -> None:
    for name, file in weights.items():
        if holder.get(name) != file:
            actual = f"{holder[name]} does" if name in holder else "no other shard does"
            fault = f"tensor {show(name)} should be in {file}, which does not hold it; {actual}"
            _refuse(index, f"{fault}; download index and shards again")
    for name, file in holder.items():
        if name not in weights:
            _refuse(index, f"tensor {show(name)} of {file} is not listed; download index and shards again")


def _open_loose(folder: Path, names: list[str]) -> dict[str, Header]:
    """The shards of a folder without an index."""
    files = [name for name in names if name.endswith(".safetensors") and name[0] != "." and name not in ADAPTER]
    if SINGLE in files:
        files = [SINGLE]
    if not files:
        _refuse_folder(folder, names)
    for file in files:
        if fault := file_fault(file):
            _refuse(folder, f"{fault}; rename it")
    _check_numbering(folder, files)
    shards = {file: read_header(folder / file) for file in files}
    _holders(folder, shards)
    return shards


def _holders(folder: Path, shards: dict[str, Header]) -> dict[str, str]:
    """Tensor name -> the one shard that holds it."""
    holder: dict[str, str] = {}
    for file, header in shards.items():
        for spec in header.tensors:
            if holder.setdefault(spec.name, file) != file:
                both = f"{holder[spec.name]} and {file}"
                _refuse(folder, f"tensor {show(spec.name)} is in two shards, {both}; remove one of them")
    return holder


def _check_numbering(folder: Path, files: list[str]) -> None:
    """model-00001-of-00003 and its like must be complete: nothing else would tell that one is missing."""
    matches = [match for match in map(NUMBERED.fullmatch, files) if match]
    for stem, width, total in {(match[1], len(match[2]), match[3]): None for match in matches}:
        for number in range(1, min(int(total), len(files) + 1) + 1):
            name = f"{stem}-{number:0{width}}-of-{total}.safetensors"
            if name not in files:
                _refuse(folder, f"{name} is missing; download it")


def _refuse_folder(folder: Path, names: list[str]) -> NoReturn:
    """Say what a folder without usable shards is."""
    for name in names:
        if name in ADAPTER:
            _refuse(folder, f"an adapter ({name}) and not a model; merge it into its base model first")
    for name in names:
        if name.endswith(PICKLES):
            _refuse(folder, f"only pickles ({show(name)}), never opened here; convert them to safetensors")
        if name.endswith(".gguf"):
            _refuse(folder, f"only GGUF ({show(name)}); use the safetensors checkpoint that it was made from")
    _refuse(folder, "no .safetensors file in it; give the folder of a checkpoint")


def _is_side_file(path: Path) -> bool:
    """What belongs to a model beside its weights: config, tokenizer, chat template, licence, code."""
    name = path.name
    if name.startswith(".") or name.endswith(NOT_SIDE) or name in ("README.md", "streammerge.json"):
        return False
    return path.is_file()
