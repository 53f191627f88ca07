"""Our parser beside the safetensors library on generated files, valid and broken.

Whatever we accept the library accepts with the same names, shapes, dtypes, bytes and metadata; so whatever it
rejects we reject. The reverse does not hold: `STRICTER` lists what only we refuse, each with its reason.
"""

import json
import random

import build
import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.errors import CheckpointError
from streammerge.formats.dtypes import DTYPES
from streammerge.formats.header import Header, build_header, parse_header

WHERE = "/m/x.safetensors"
TOKENS = [
    "{",
    "}",
    "[",
    "]",
    ",",
    ":",
    '"',
    " ",
    "\n",
    "-",
    "0",
    "1",
    ".0",
    "e1",
    "null",
    "true",
    "NaN",
    "\\u0061",
]
TOKENS += ["\\ud800", '"a":1,', '"dtype":"F32",', "9223372036854775808", "18446744073709551616", "\x00", "é"]


def ours(file: bytes) -> Header | None:
    length = int.from_bytes(file[:8], "little")
    if len(file) < 8 or length > len(file) - 8:
        return None
    try:
        return parse_header(file[8 : 8 + length], len(file), WHERE)
    except CheckpointError as error:
        line = str(error)
        assert line.startswith(f"{WHERE}: "), line
        assert line.isprintable(), line
        return None


def theirs(file: bytes) -> dict | None:
    try:
        return dict(safetensors.deserialize(file))
    except safetensors.SafetensorError:
        return None


def agree(file: bytes) -> tuple[bool, bool]:
    """(we accept, they accept), after checking that what we accept they read alike."""
    header, library = ours(file), theirs(file)
    if header is not None:
        assert library is not None, f"only we accept {file!r}"
        assert len(header.tensors) == len(library), file
        for spec in header.tensors:
            entry = library[spec.name]
            assert (spec.dtype, list(spec.shape)) == (entry["dtype"], entry["shape"]), file
            assert file[spec.begin : spec.end] == bytes(entry["data"]), file
    return header is not None, library is not None


def name_of(rng: random.Random) -> str:
    return "".join(rng.choice("abz.0_-/é字 ") for _ in range(rng.randint(1, 12)))


def tensor_of(rng: random.Random) -> tuple[str, list[int], int]:
    """dtype, shape and bytes of a tensor that the format allows."""
    while True:
        dtype = rng.choice(list(DTYPES))
        shape = [rng.choice([0, 1, 1, 2, 3, 4, 5, 8]) for _ in range(rng.randint(0, 3))]
        bits = DTYPES[dtype].bits
        for extent in shape:
            bits *= extent
        if bits % 8 == 0:
            return dtype, shape, bits // 8


def table_of(rng: random.Random) -> tuple[dict, int]:
    """A valid header as an object, its entries in any order of their offsets, and the size of its data."""
    entries, at = {}, 0
    for name in {name_of(rng): None for _ in range(rng.randint(0, 5))}:
        dtype, shape, nbytes = tensor_of(rng)
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + nbytes]}
        at += nbytes
    order = rng.sample(list(entries), len(entries))
    table = {name: entries[name] for name in order}
    if rng.random() < 0.4:
        table["__metadata__"] = {name_of(rng): name_of(rng) for _ in range(rng.randint(0, 2))}
    return table, at


def text_of(rng: random.Random, table: dict) -> str:
    separators = rng.choice([(",", ":"), (", ", ": "), (" ,", " :")])
    return json.dumps(table, ensure_ascii=rng.random() < 0.5, separators=separators) + " " * rng.randint(0, 9)


def break_table(rng: random.Random, table: dict) -> None:
    """One change of a field: the kind of lie that leaves the JSON in order."""
    names = [name for name in table if name != "__metadata__"]
    if not names:
        table["__metadata__"] = rng.choice([None, [], "x", {"a": 1}, {"a": None}, {"a": {}}])
        return
    entry = table[rng.choice(names)]
    field = rng.choice(["dtype", "shape", "data_offsets"])
    odd = [None, True, -1, 1.0, "1", [], {}, 2**63, 2**64, 2**62]
    kind = rng.randrange(6)
    if kind == 0:
        del entry[field]
    elif kind == 1:
        entry["strides"] = [1]
    elif kind == 2:
        entry["dtype"] = rng.choice([*DTYPES, "f32", "F128", ""])
    elif kind == 3:
        entry["data_offsets"] = [max(0, offset + rng.choice([-1, 0, 1, 4])) for offset in entry["data_offsets"]]
    elif kind == 4 and entry["shape"]:
        entry["shape"][rng.randrange(len(entry["shape"]))] = rng.choice([*odd, 0, 1, 2, 7])
    else:
        entry[field] = rng.choice([*odd, entry["data_offsets"][:1], [0, 4, 4], [-0.0, 4]])


def break_text(rng: random.Random, raw: bytes) -> bytes:
    """One insertion, deletion, replacement or repetition of a piece of the JSON."""
    at, to = sorted(rng.randint(0, len(raw)) for _ in range(2))
    token = rng.choice(TOKENS).encode()
    near = min(to, at + rng.randint(0, 3))
    kind = rng.randrange(5)
    if kind == 0:
        return raw[:at] + token + raw[at:]
    if kind == 1:
        return raw[:at] + raw[near:]
    if kind == 2:
        return raw[:at] + token + raw[near:]
    if kind == 3:
        return raw[:at] + bytes([rng.randrange(256)]) + raw[at + 1 :]
    return raw[:to] + raw[at:to] + raw[to:]


def test_valid_files_are_read_alike():
    rng = random.Random(1)
    for _ in range(1500):
        table, size = table_of(rng)
        file = build.raw_file(text_of(rng, table), rng.randbytes(size))
        assert agree(file) == (True, True), file


def test_lies_in_the_fields():
    rng = random.Random(2)
    verdicts = {(True, True): 0, (False, True): 0, (False, False): 0}
    for _ in range(4000):
        table, size = table_of(rng)
        break_table(rng, table)
        verdicts[agree(build.raw_file(text_of(rng, table), rng.randbytes(size)))] += 1
    assert min(verdicts.values()) > 50, verdicts


def test_damaged_json():
    rng = random.Random(3)
    verdicts = {(True, True): 0, (False, True): 0, (False, False): 0}
    for _ in range(6000):
        table, size = table_of(rng)
        raw = break_text(rng, text_of(rng, table).encode())
        verdicts[agree(build.raw_file(raw, rng.randbytes(size)))] += 1
    assert min(verdicts.values()) > 50, verdicts


def test_damaged_files():
    """Cut short, too long, a wrong length word: never accepted by either."""
    rng = random.Random(4)
    for _ in range(1500):
        table, size = table_of(rng)
        file = build.raw_file(text_of(rng, table), rng.randbytes(size))
        cut = file[: rng.randrange(len(file))]
        longer = file + rng.randbytes(rng.randint(1, 9))
        assert agree(cut) == agree(longer) == (False, False), file
        length = rng.choice([0, 1, 2**40, 2**64 - 1, len(file) - 7])
        assert agree(length.to_bytes(8, "little") + file[8:]) == (False, False), file


def test_built_headers_are_read_alike():
    rng = random.Random(5)
    for _ in range(300):
        table, size = table_of(rng)
        metadata = table.pop("__metadata__", {})
        built = build_header([(n, e["dtype"], tuple(e["shape"])) for n, e in table.items()], metadata)
        assert agree(built + rng.randbytes(size)) == (True, True), built
        assert ours(built + bytes(size)).metadata == metadata


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from(list(DTYPES)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
small = st.integers(0, 8)
entries = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(list(DTYPES)) | json_values,
        "shape": st.lists(small, max_size=2) | json_values,
        "data_offsets": st.tuples(small, small) | json_values,
    }
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.text() | st.just("__metadata__"), entries | json_values, max_size=3),
    st.binary(max_size=16),
)
def test_any_json(table, data):
    agree(build.raw_file(json.dumps(table), data))


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.binary(max_size=60), st.binary(max_size=8))
def test_any_bytes(header, data):
    agree(build.raw_file(header, data))
    agree(build.raw_file(b"{" + header + b"}", data))


T = '"t":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}'
Z = T + ',"z":{"dtype":"U8","shape":[0],"data_offsets":[4,4]}'
STRICTER = {
    "a name twice: parsers differ on which counts": f"{{{T},{T}}}",
    "an unknown field: nobody knows what it means": f'{{{T[:-1]},"strides":[1]}}}}',
    "space before the brace": f" {{{T}}}",
    "more than spaces after the brace": f"{{{T}}}\n\t",
    "metadata null": f'{{"__metadata__":null,{T}}}',
    "an entry as a list": '{"t":["U8",[4],[0,4]]}',
    "a dtype as an object": f"{{{T}}}".replace('"U8"', '{"U8":null}'),
    "no name": f"{{{T}}}".replace('"t"', '""'),
    "a name with a line break": f"{{{T}}}".replace('"t"', '"a\\nb"'),
    "a name of 1,001 characters": f"{{{T}}}".replace('"t"', f'"{"n" * 1001}"'),
    "an extent that torch cannot hold": f"{{{Z}}}".replace("[0]", f"[0,{2**63}]"),
    "extents that overflow beside a zero": f"{{{Z}}}".replace("[0]", f"[0,{2**62},4]"),
    "more dimensions than numpy and torch have": f"{{{T}}}".replace("[4]", f"[4{',1' * 64}]"),
}


@pytest.mark.parametrize("reason", STRICTER)
def test_where_we_are_stricter(reason):
    assert agree(build.raw_file(STRICTER[reason], b"data")) == (False, True)
