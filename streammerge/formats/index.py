"""The index of a sharded checkpoint: which shard holds which tensor.

    {"metadata": {"total_size": bytes of all tensors}, "weight_map": {tensor name: shard file name}}

A file name must name a file beside the index, so that an index cannot reach out of its folder. Whether the
shards really hold what the index says is checked where the checkpoint is opened.
Source: the sharding convention of the Hugging Face libraries.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from streammerge.errors import CheckpointError, MachineError
from streammerge.formats.header import MAX_HEADER, Twice, bad, show, unique


def read_index(path: str | Path) -> tuple[dict[str, str], dict[str, object]]:
    """(tensor name -> shard file name, metadata) of an index file, in the file's order."""
    where = str(Path(path).absolute())
    index = load_object(where)
    if "weight_map" not in index:
        bad(where, "it has no weight_map")
    weights = _object(index["weight_map"], "weight_map", where)
    metadata = _object(index.get("metadata", {}), "metadata", where)
    if not weights:
        bad(where, "its weight_map is empty")
    faults: dict[str, str | None] = {}
    for name, file in weights.items():
        if type(file) is not str:
            bad(where, f"tensor {show(name)}: its file is {show(file)}, it must be a file name")
        if file not in faults:
            faults[file] = file_fault(file)
        if fault := faults[file]:
            bad(where, f"tensor {show(name)}: {fault}")
    return weights, metadata


def build_index(weight_map: Mapping[str, str], total_size: int) -> bytes:
    """The bytes of an index file; `total_size` is the sum of the tensors' bytes, headers not counted."""
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(weight_map)}
    return (json.dumps(index, ensure_ascii=False, indent=2, sort_keys=True) + "\n").encode()


def file_fault(file: str) -> str | None:
    """Why `file` cannot be the name of a shard beside its index; None if it can."""
    if not file or file[0] == "." or {PurePosixPath(file).name, PureWindowsPath(file).name} != {file}:
        return f"{show(file)} is not a plain file name, and a shard must lie beside its index"
    if not file.isprintable():
        return f"{show(file)} has characters that cannot be printed"
    if not file.endswith(".safetensors"):
        return f"{show(file)} is not a .safetensors file"
    return None


def load_object(where: str) -> dict[str, Any]:
    """The JSON object in the file at `where`, for the small JSON files of a checkpoint."""
    try:
        with open(where, "rb") as file:
            raw = file.read(MAX_HEADER + 1)
        if len(raw) > MAX_HEADER:
            bad(where, f"the file has more than {MAX_HEADER:,} bytes")
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise CheckpointError(f"{where}: {error.strerror}; check the path and its permissions") from error
    except OSError as error:
        raise MachineError(f"{where}: reading failed: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        bad(where, f"not UTF-8 at byte {error.start:,}")
    except RecursionError:
        bad(where, "nested too deeply")
    except ValueError as error:  # JSONDecodeError, a key twice, or a number of thousands of digits
        bad(where, f"bad JSON: {error}")
    return _object(value, "the file", where)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = unique(pairs)
    if isinstance(table, Twice):
        raise ValueError(f"the key {show(table)} stands twice in one object")
    return table


def _object(value: Any, what: str, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        bad(where, f"{what} is {show(value)}, it must be an object")
    return value
