"""Tiny checkpoints and broken files for tests, made with json and struct alone.

Nothing here shares code with the package or with the safetensors library, so a mistake in either shows, and
files that neither would write can be made.
"""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

NUMPY_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
}


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def tensor(values: Any) -> Tensor:
    """A tensor from an array; a Tensor stays as it is."""
    if isinstance(values, Tensor):
        return values
    array = np.asarray(values)
    return Tensor(NUMPY_DTYPES[array.dtype.name], array.shape, array.tobytes())


def bf16(values: Any) -> Tensor:
    """BF16 from numbers that it holds exactly; anything else is a mistake in the test."""
    bits = np.asarray(values, np.float32).view(np.uint32)
    assert not (bits & 0xFFFF).any(), "not exact in bfloat16"
    return Tensor("BF16", bits.shape, (bits >> 16).astype("<u2").tobytes())


def raw_file(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    """A file from the text of its header; `length` lies about it."""
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def shard(tensors: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> bytes:
    """A valid file with the tensors one after the other in the order given."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    data = b""
    for name, values in tensors.items():
        dtype, shape, raw = tensor(values)
        table[name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    return raw_file(json.dumps(table), data)


def checkpoint(
    folder: Path,
    shards: Mapping[str, Mapping[str, Any]],
    *,
    index: bool | None = None,
    config: Mapping[str, Any] | None = None,
) -> Path:
    """A checkpoint folder; an index is written for more than one shard, unless `index` says otherwise."""
    folder.mkdir(parents=True, exist_ok=True)
    for file, tensors in shards.items():
        (folder / file).write_bytes(shard(tensors, {"format": "pt"}))
    if index if index is not None else len(shards) > 1:
        write_index(folder, {name: file for file, tensors in shards.items() for name in tensors})
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    index = {"metadata": {"total_size": 0}, "weight_map": dict(weight_map)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def sparse(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]], lead: int = 0, mark: bytes = b"") -> Path:
    """A file of zeros that takes hardly any room on the disk.

    `lead` spaces before the data put it off its alignment; `mark` stands at every mebibyte of the data.
    """
    widths = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "I64": 8, "U8": 1}
    table: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        size = widths[dtype] * int(np.prod(shape, dtype=np.int64))
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(table)
    text += " " * (-len(text) % 8 + lead)
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        start = file.write(raw_file(text))
        file.truncate(start + end)
        for at in range(start, start + end - len(mark), 1 << 20) if mark else ():
            file.seek(at)
            file.write(mark)
    return path


def recipe(path: Path, method: str, models: list[Path], base: Path | None = None, **parameters: Any) -> Path:
    """A recipe file; per-model parameters are lists."""
    rows = []
    for at, model in enumerate(models):
        own = {key: value[at] for key, value in parameters.items() if isinstance(value, list)}
        rows.append({"model": str(model), **({"parameters": own} if own else {})})
    common = {key: value for key, value in parameters.items() if not isinstance(value, list)}
    body: dict[str, Any] = {"merge_method": method, "models": rows}
    if base is not None:
        body["base_model"] = str(base)
    if common:
        body["parameters"] = common
    path.write_text(json.dumps(body))  # JSON is YAML
    return path


ROOT = Path(__file__).resolve().parent.parent


def start(*arguments: Any, before: str = "", **options: Any) -> subprocess.Popen[str]:
    """The command line in a process of its own; `before` is code that it runs first."""
    code = f"{before}\nfrom streammerge.cli import main\nmain()"
    words = [str(argument) for argument in arguments]
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def command(*arguments: Any, before: str = "") -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    child = start(*arguments, before=before)
    out, err = child.communicate(timeout=120)
    return subprocess.CompletedProcess(child.args, child.returncode, out, err)


def watched(child: subprocess.Popen[str]) -> tuple[str, str, int]:
    """Wait for a process; what it printed, its errors, and the most bytes it held, looked at from outside."""
    held = re.compile(r"^Rss(?:Anon|Shmem):\s*(\d+) kB", re.MULTILINE)
    peak, status = 0, Path(f"/proc/{child.pid}/status")
    while child.poll() is None:
        try:
            peak = max(peak, sum(map(int, held.findall(status.read_text()))) * 1024)
        except (FileNotFoundError, ProcessLookupError):
            break
        time.sleep(0.003)
    return *child.communicate(timeout=60), peak


class After:
    """A token that asks a run to stop, at question number `count` whether to."""

    def __init__(self, count: int) -> None:
        self.left = count

    def is_set(self) -> bool:
        self.left -= 1
        return self.left < 0
