"""The safetensors header, read strictly: everything is checked before a byte of data is believed.

    8 bytes      N, little-endian
    N bytes      JSON that starts with `{`, padded at its end with spaces:
                 {"__metadata__": {str: str}, name: {"dtype", "shape", "data_offsets": [begin, end)}, ...}
    the rest     the tensors; offsets count from byte 8 + N, and every byte belongs to exactly one tensor

The format leaves room for parsers that disagree (a name defined twice, unknown fields), and a file that two
parsers read differently is an attack. So this parser accepts a subset of what the safetensors library
accepts, and a test holds that. Names are only ever printed and compared, never used as paths.
Source: the format description of safetensors 0.8 and what its library was seen to accept.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import reprlib
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from streammerge.errors import CheckpointError, MachineError
from streammerge.formats.dtypes import DTYPES, MAX_INT, size_fault

MAX_HEADER = 100_000_000  # bytes, the library's limit too
MAX_NAME = 1_000  # characters of a tensor's name
MAX_RANK = 64
ALIGN = 4096  # our own files start their data on a page, for direct I/O
METADATA = "__metadata__"
LONE = re.compile("[\ud800-\udfff]")  # not text: JSON's escapes can spell it, UTF-8 cannot hold it
FIELDS = ("dtype", "shape", "data_offsets")
AGAIN = "; download the file again, or save it anew"

FOREIGN = (  # what people give instead of safetensors, by its first bytes
    (b"version https://git-lfs", "a Git LFS pointer and not the weights; run git lfs pull"),
    (b"GGUF", "a GGUF file and not safetensors; use the checkpoint that it was made from"),
    (b"PK\x03\x04", "a PyTorch archive and not safetensors; convert it with save_file of safetensors.torch"),
    (b"\x80\x02", "a Python pickle and not safetensors; convert it with save_file of safetensors.torch"),
    (b"<", "a web page and not safetensors; download the file again"),
)


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Where one tensor is: `file` is absolute, `begin` and `end` count from the first byte of that file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    begin: int
    end: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True)
class Header:
    """A checked header: tensors in offset order; `digest` is the SHA-256 of the N bytes of JSON."""

    tensors: tuple[TensorSpec, ...]
    metadata: dict[str, str]
    data_start: int
    digest: str

    @property
    def file_size(self) -> int:
        """Bytes of the whole file, known from the header because the tensors cover the data."""
        return self.tensors[-1].end if self.tensors else self.data_start


class Twice(str):
    """Stands in for a JSON object that defines this key more than once."""

    __slots__ = ()


class Odd(str):
    """The text of a JSON number that is not a whole number from 0 to 2^63 - 1."""

    __slots__ = ()

    __repr__ = str.__str__


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any] | Twice:
    """An object_pairs_hook for json that does not let the last of two equal keys win."""
    table = dict(pairs)
    if len(table) == len(pairs):
        return table
    return Twice(Counter(key for key, _ in pairs).most_common(1)[0][0])


def show(value: object) -> str:
    """A name or value from a file, on one line and of bounded length."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    short.maxlist = 8
    return short.repr(value)


def read_header(path: str | Path) -> Header:
    """Read and check the header of one file; of the file's bytes, only the header's are read."""
    where = str(Path(path).absolute())
    try:
        if not stat.S_ISREG(Path(where).stat().st_mode):  # before open, which would wait for a pipe's writer
            raise CheckpointError(f"{where}: not a regular file; give a safetensors file")
        descriptor = os.open(where, os.O_RDONLY)
        try:
            size = os.fstat(descriptor).st_size
            length = _header_length(descriptor, size, where)
            raw = os.pread(descriptor, length, 8)
        finally:
            os.close(descriptor)
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        raise CheckpointError(f"{where}: {error.strerror}; check the path and its permissions") from error
    except OSError as error:
        raise MachineError(f"{where}: reading the header failed: {error.strerror or error}") from error
    if len(raw) != length:
        bad(where, "the file shrank while its header was read")
    return parse_header(raw, size, where)


def _header_length(descriptor: int, size: int, where: str) -> int:
    """The N of an open file of `size` bytes, if it can be true."""
    start = os.pread(descriptor, 32, 0)
    if size < 8:
        what = f"only {size} bytes long" if size else "empty"
        raise CheckpointError(f"{where}: the file is {what}; download it again")
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER:
        for magic, what in FOREIGN:
            if start.lstrip().startswith(magic):
                raise CheckpointError(f"{where}: this is {what}")
        bad(where, f"the header claims {length:,} bytes, the format allows {MAX_HEADER:,}")
    if length > size - 8:
        bad(where, f"the header claims {length:,} bytes, the file holds {size - 8:,} after the length")
    return length


def parse_header(raw: bytes, file_size: int, where: str) -> Header:
    """Check the N bytes of JSON `raw` of a file of `file_size` bytes; `where` is its absolute path."""
    if not 0 < len(raw) <= min(MAX_HEADER, file_size - 8):
        bad(where, f"a header of {len(raw):,} bytes in a file of {file_size:,}")
    data_start = 8 + len(raw)
    table = _parse_json(raw, where)
    metadata = _check_metadata(table.pop(METADATA, {}), where)
    specs = [_spec(name, entry, data_start, where) for name, entry in table.items()]
    specs.sort(key=lambda spec: (spec.begin, spec.end))
    _check_cover(specs, data_start, file_size, where)
    return Header(tuple(specs), metadata, data_start, hashlib.sha256(raw).hexdigest())


def build_header(entries: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length word and JSON for (name, dtype, shape) laid end to end in this order; data starts on a page."""
    table: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    at = 0
    for name, dtype, shape in entries:
        assert name not in table, f"{name} is laid out twice"
        assert (fault := _name_fault(name)) is None, f"{name!r}: {fault}"
        end = at + DTYPES[dtype].bits * math.prod(shape) // 8
        assert (fault := size_fault(dtype, shape, end - at)) is None, f"{name}: {fault}"
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % ALIGN)
    if len(text) > MAX_HEADER:
        raise CheckpointError(f"a header of {len(text):,} bytes exceeds {MAX_HEADER:,}; use smaller shards")
    return len(text).to_bytes(8, "little") + text


def bad(where: str, fault: str) -> NoReturn:
    raise CheckpointError(f"{where}: {fault}{AGAIN}")


def _natural(text: str) -> int | Odd:
    """A JSON integer as int where it is one from 0 to 2^63 - 1; "-0" is not, the library refuses it too."""
    if text[0] == "-" or len(text) > 19 or int(text) > MAX_INT:
        return Odd(text)
    return int(text)


_loads = partial(json.loads, object_pairs_hook=unique, parse_int=_natural, parse_float=Odd, parse_constant=Odd)


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    if raw[:1] != b"{":
        bad(where, f"the header starts with {show(raw[:8])[1:]} and not with a brace")
    body = raw.rstrip(b" ")
    if body[-1:] != b"}":
        bad(where, f"the header ends in {show(body[-8:])[1:]}; only spaces may follow its closing brace")
    try:
        table = _loads(body.decode("utf-8"))
    except UnicodeDecodeError as error:
        bad(where, f"the header is not UTF-8 at its byte {error.start:,}")
    except json.JSONDecodeError as error:
        bad(where, f"the header is not JSON: {error.msg} at its character {error.pos:,}")
    except RecursionError:
        bad(where, "the header is nested too deeply")
    if isinstance(table, Twice):
        bad(where, f"the header defines {show(table)} twice")
    assert isinstance(table, dict)
    return table


def _check_metadata(value: Any, where: str) -> dict[str, str]:
    if isinstance(value, Twice):
        bad(where, f"{METADATA} defines {show(value)} twice")
    if not isinstance(value, dict):
        bad(where, f"{METADATA} is {show(value)}, it must map strings to strings")
    for key, text in value.items():
        if type(text) is not str:
            bad(where, f"{METADATA} has {show(text)} for {show(key)}, it must map strings to strings")
        if LONE.search(key) or LONE.search(text):
            bad(where, f"{METADATA} has half a surrogate pair in {show(key)}")
    return value


def _spec(name: str, entry: Any, data_start: int, where: str) -> TensorSpec:
    fault = _name_fault(name) or _entry_fault(entry)
    if fault:
        bad(where, f"tensor {show(name)}: {fault}")
    begin, end = entry["data_offsets"]
    return TensorSpec(name, entry["dtype"], tuple(entry["shape"]), where, data_start + begin, data_start + end)


def _name_fault(name: str) -> str | None:
    if not name or name == METADATA:
        return "a tensor must have a name of its own"
    if len(name) > MAX_NAME:
        return f"its name has {len(name):,} characters, {MAX_NAME:,} at most"
    return None if name.isprintable() else "its name has control characters or others that cannot be printed"


def _entry_fault(entry: Any) -> str | None:
    """What is wrong with one entry: fields of the right kinds, and offsets that fit dtype and shape."""
    if isinstance(entry, Twice):
        return f"it defines {show(entry)} twice"
    if type(entry) is not dict:
        return f"its entry is {show(entry)}, not an object"
    for field in FIELDS:
        if field not in entry:
            return f"it has no {field}"
    if len(entry) != len(FIELDS):
        return f"unknown field {show(next(field for field in entry if field not in FIELDS))}"
    if type(entry["dtype"]) is not str or entry["dtype"] not in DTYPES:
        return f"unknown dtype {show(entry['dtype'])}"
    shape, offsets = entry["shape"], entry["data_offsets"]
    if type(shape) is not list or any(type(extent) is not int for extent in shape):
        return f"shape is {show(shape)}, it must be a list of whole numbers from 0 to 2^63 - 1"
    if len(shape) > MAX_RANK:
        return f"it has {len(shape):,} dimensions, {MAX_RANK} at most"
    if type(offsets) is not list or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
        return f"data_offsets is {show(offsets)}, it must be two whole numbers from 0 to 2^63 - 1"
    if offsets[0] > offsets[1]:
        return f"it ends at byte {offsets[1]:,}, before it begins at byte {offsets[0]:,}"
    return size_fault(entry["dtype"], shape, offsets[1] - offsets[0])


def _check_cover(specs: list[TensorSpec], data_start: int, file_size: int, where: str) -> None:
    """Every byte after the header belongs to one tensor; offsets are printed as the header has them."""
    at, before = data_start, "where the data begins"
    for spec in specs:
        if spec.begin != at:
            place = f"begins at byte {spec.begin - data_start:,} and not at {at - data_start:,}, {before}"
            what = "the bytes between belong to no tensor" if spec.begin > at else "the two overlap"
            bad(where, f"tensor {show(spec.name)} {place}: {what}")
        at, before = spec.end, f"where {show(spec.name)} ends"
    if at > file_size:
        missing = f"{at - file_size:,} of {at:,} bytes are missing"
        raise CheckpointError(f"{where}: the file is cut short: {missing}; download it again")
    if at < file_size:
        bad(
            where,
            f"the last tensor ends at byte {at:,}, the file at byte {file_size:,}: what follows is no tensor",
        )
