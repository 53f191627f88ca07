"""The header against byte literals, and every rule that rejects one."""

import json
import os
import struct
import time

import build
import numpy as np
import pytest
import safetensors
import safetensors.numpy
import safetensors.torch
import torch

from streammerge.errors import CheckpointError, MachineError
from streammerge.formats.header import MAX_NAME, TensorSpec, build_header, parse_header, read_header, show

VALID = '{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"U8","shape":[],"data_offsets":[8,9]}}'


def entry(dtype='"U8"', shape="[4]", offsets="[0,4]", extra=""):
    return f'{{"t":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}{extra}}}}}'


def parse(header, data=b"", where="/m/x.safetensors"):
    raw = header if isinstance(header, bytes) else header.encode()
    return parse_header(raw, 8 + len(raw) + len(data), where)


def refusal(header, data=b""):
    """The one line, without the file and the advice at its end."""
    with pytest.raises(CheckpointError) as caught:
        parse(header, data)
    line = str(caught.value)
    assert line.startswith("/m/x.safetensors: ")
    assert line.isprintable()
    assert len(line) < 1000
    return line.removeprefix("/m/x.safetensors: ").removesuffix("; download the file again, or save it anew")


def test_reads_a_literal():
    header = parse(VALID, bytes(9))
    start = 8 + len(VALID)
    assert header.tensors == (
        TensorSpec("a", "F32", (2,), "/m/x.safetensors", start, start + 8),
        TensorSpec("b", "U8", (), "/m/x.safetensors", start + 8, start + 9),
    )
    assert (header.tensors[0].numel, header.tensors[0].nbytes) == (2, 8)
    assert (header.tensors[1].numel, header.tensors[1].nbytes) == (1, 1)
    assert (header.metadata, header.data_start, header.file_size) == ({}, start, start + 9)
    assert header.digest == "aff22c45667e10e73aa3786342bc4d826c40cf047f2fcf6ed724e2a7ca76b3cf"


def test_builds_a_literal():
    built = build_header([("b", "BF16", (3, 2)), ("a", "F8_E4M3", (0,)), ("ü", "F4", (4,))], {"format": "pt"})
    text = (
        b'{"__metadata__":{"format":"pt"},"b":{"dtype":"BF16","shape":[3,2],"data_offsets":[0,12]},'
        b'"a":{"dtype":"F8_E4M3","shape":[0],"data_offsets":[12,12]},'
        b'"\xc3\xbc":{"dtype":"F4","shape":[4],"data_offsets":[12,14]}}'
    )
    assert len(built) == 4096
    assert built == b"\xf8\x0f\x00\x00\x00\x00\x00\x00" + text.ljust(4088)


def test_data_starts_on_a_page_whatever_the_header():
    for count in (1, 30, 60, 61, 62, 63, 500):
        built = build_header([(f"layer.{at}", "F32", (at,)) for at in range(count)], {})
        assert len(built) % 4096 == 0
        assert struct.unpack("<Q", built[:8]) == (len(built) - 8,)


def test_built_headers_are_read_by_the_library(tmp_path):
    rng = np.random.default_rng(3)
    arrays = {
        "z.first": rng.standard_normal((3, 5)).astype(np.float32),
        "scalar": np.array(2.5, np.float64),
        "none": np.zeros((0, 4), np.float16),
        "counts": rng.integers(-9, 9, 7, dtype=np.int16),
        "flag": np.array([True, False, True]),
    }
    built = [build.tensor(array) for array in arrays.values()]
    header = build_header([(n, t.dtype, t.shape) for n, t in zip(arrays, built, strict=True)], {"a": "ß\n"})
    file = tmp_path / "x.safetensors"
    file.write_bytes(header + b"".join(t.data for t in built))
    loaded = safetensors.numpy.load_file(file)
    in_torch = safetensors.torch.load_file(file)
    assert sorted(loaded) == sorted(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(loaded[name], array, strict=True)
        torch.testing.assert_close(in_torch[name], torch.from_numpy(array), rtol=0, atol=0)
    with safetensors.safe_open(file, "np") as opened:
        assert opened.metadata() == {"a": "ß\n"}
    ours = read_header(file)
    assert [spec.name for spec in ours.tensors] == list(arrays)
    assert ours.metadata == {"a": "ß\n"}
    assert ours.data_start == len(header)


def test_bf16_and_fp8_round_trip_through_torch(tmp_path):
    values = torch.tensor([[1.5, -2.0], [0.25, 448.0]])
    tensors = {"bf": values.to(torch.bfloat16), "e4": values.to(torch.float8_e4m3fn)}
    entries = [("bf", "BF16", (2, 2)), ("e4", "F8_E4M3", (2, 2))]
    data = b"".join(bytes(t.view(torch.uint8).flatten().tolist()) for t in tensors.values())
    (tmp_path / "x.safetensors").write_bytes(build_header(entries, {}) + data)
    loaded = safetensors.torch.load_file(tmp_path / "x.safetensors")
    for name, t in tensors.items():
        assert loaded[name].dtype == t.dtype
        torch.testing.assert_close(loaded[name].float(), t.float(), rtol=0, atol=0)


def test_names_are_data_and_offsets_decide_the_order():
    header = '{"../../etc/x":{"dtype":"U8","shape":[1],"data_offsets":[1,2]},' + entry(shape="[1]", offsets="[0,1]")[1:]
    assert [spec.name for spec in parse(header, bytes(2)).tensors] == ["t", "../../etc/x"]


def test_misaligned_padded_and_empty_headers_are_read():
    odd = entry('"F32"', "[1]") + " "  # whatever its length, one of the two is not a multiple of 4
    for header in (odd, odd + " "):
        assert parse(header, bytes(4)).tensors[0].begin == 8 + len(header)
    assert parse("{}").tensors == ()
    assert parse('{"__metadata__":{"k":"v"}}').metadata == {"k": "v"}
    assert parse("{}").file_size == 10


def test_zero_sized_tensors_share_an_offset():
    header = (
        '{"x":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"y":{"dtype":"F32","shape":[0,3],"data_offsets":[4,4]},'
        '"z":{"dtype":"U8","shape":[1],"data_offsets":[4,5]},"w":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}}'
    )
    assert [spec.name for spec in parse(header, bytes(5)).tensors] == ["w", "x", "y", "z"]


NATURALS = "it must be a list of whole numbers from 0 to 2^63 - 1"
PAIR = "it must be two whole numbers from 0 to 2^63 - 1"
PRINT = "its name has control characters or others that cannot be printed"


@pytest.mark.parametrize(
    ("header", "line"),
    [
        # the JSON as a whole
        (" " + entry(), 'the header starts with \' {"t":{"\' and not with a brace'),
        ("[1]", "the header starts with '[1]' and not with a brace"),
        ("\ufeff" + entry(), "the header starts with '\\xef\\xbb\\xbf{\"t\":' and not with a brace"),
        (entry() + "\n", "the header ends in '[0,4]}}\\n'; only spaces may follow its closing brace"),
        (entry() + "\0", "the header ends in '[0,4]}}\\x00'; only spaces may follow its closing brace"),
        (entry() + " {}", "the header is not JSON: Extra data at its character 54"),
        ("{", "the header ends in '{'; only spaces may follow its closing brace"),
        ('{"t":}', "the header is not JSON: Expecting value at its character 5"),
        (
            "{'t':1}",
            "the header is not JSON: Expecting property name enclosed in double quotes at its character 1",
        ),
        (b'{"\xff":1}', "the header is not UTF-8 at its byte 2"),
        ('{"a":' + "[" * 200_000 + "]" * 200_000 + "}", "the header is nested too deeply"),
        (entry()[:-1] + "," + entry()[1:], "the header defines 't' twice"),
        (entry()[:-1] + ',"\\u0074":1}', "the header defines 't' twice"),
        ('{"__metadata__":{},"__metadata__":{}}', "the header defines '__metadata__' twice"),
        # __metadata__
        ('{"__metadata__":null}', "__metadata__ is None, it must map strings to strings"),
        ('{"__metadata__":[]}', "__metadata__ is [], it must map strings to strings"),
        ('{"__metadata__":{"k":1}}', "__metadata__ has 1 for 'k', it must map strings to strings"),
        ('{"__metadata__":{"k":1.5}}', "__metadata__ has 1.5 for 'k', it must map strings to strings"),
        ('{"__metadata__":{"k":null}}', "__metadata__ has None for 'k', it must map strings to strings"),
        (
            '{"__metadata__":{"k":{"a":1,"a":2}}}',
            "__metadata__ has 'a' for 'k', it must map strings to strings",
        ),
        ('{"__metadata__":{"k":"a","k":"b"}}', "__metadata__ defines 'k' twice"),
        ('{"__metadata__":{"k":"\\ud800"}}', "__metadata__ has half a surrogate pair in 'k'"),
        # names
        ('{"":1}', "tensor '': a tensor must have a name of its own"),
        ('{"a\\nb":1}', f"tensor 'a\\nb': {PRINT}"),
        ('{"\\u001b[2J":1}', f"tensor '\\x1b[2J': {PRINT}"),
        ('{"\\ud800":1}', f"tensor '\\ud800': {PRINT}"),
        ('{"a\\u202eb":1}', f"tensor 'a\\u202eb': {PRINT}"),
        (
            '{"%s":1}' % ("n" * 1001),
            f"tensor {show('n' * 1001)}: its name has 1,001 characters, 1,000 at most",
        ),
        # entries
        ('{"t":1}', "tensor 't': its entry is 1, not an object"),
        ('{"t":["U8",[4],[0,4]]}', "tensor 't': its entry is ['U8', [4], [0, 4]], not an object"),
        ('{"t":{}}', "tensor 't': it has no dtype"),
        ('{"t":{"dtype":"U8","data_offsets":[0,4]}}', "tensor 't': it has no shape"),
        ('{"t":{"dtype":"U8","shape":[4]}}', "tensor 't': it has no data_offsets"),
        (entry(extra=',"strides":[1]'), "tensor 't': unknown field 'strides'"),
        (entry(extra=',"dtype":"I8"'), "tensor 't': it defines 'dtype' twice"),
        (entry('"F33"'), "tensor 't': unknown dtype 'F33'"),
        (entry('"u8"'), "tensor 't': unknown dtype 'u8'"),
        (entry("null"), "tensor 't': unknown dtype None"),
        (entry("1.5"), "tensor 't': unknown dtype 1.5"),
        (entry("[]"), "tensor 't': unknown dtype []"),
        (entry('{"U8":null}'), "tensor 't': unknown dtype {'U8': None}"),
        # shapes
        (entry(shape="4"), f"tensor 't': shape is 4, {NATURALS}"),
        (entry(shape="null"), f"tensor 't': shape is None, {NATURALS}"),
        (entry(shape="{}"), f"tensor 't': shape is {{}}, {NATURALS}"),
        (entry(shape="[4.0]"), f"tensor 't': shape is [4.0], {NATURALS}"),
        (entry(shape="[4e0]"), f"tensor 't': shape is [4e0], {NATURALS}"),
        (entry(shape="[true,4]"), f"tensor 't': shape is [True, 4], {NATURALS}"),
        (entry(shape='["4"]'), f"tensor 't': shape is ['4'], {NATURALS}"),
        (entry(shape="[-4]"), f"tensor 't': shape is [-4], {NATURALS}"),
        (entry(shape="[-0]", offsets="[0,0]"), f"tensor 't': shape is [-0], {NATURALS}"),
        (entry(shape="[NaN]"), f"tensor 't': shape is [NaN], {NATURALS}"),
        (entry(shape="[Infinity]"), f"tensor 't': shape is [Infinity], {NATURALS}"),
        (entry(shape=f"[0,{2**63}]"), f"tensor 't': shape is [0, {2**63}], {NATURALS}"),
        (entry(shape=f"[{'9' * 5000}]"), f"tensor 't': shape is [{'9' * 48}...{'9' * 49}], {NATURALS}"),
        (entry(shape=str([1] * 65)), "tensor 't': it has 65 dimensions, 64 at most"),
        # offsets
        (entry(offsets="[0]"), f"tensor 't': data_offsets is [0], {PAIR}"),
        (entry(offsets="[0,4,4]"), f"tensor 't': data_offsets is [0, 4, 4], {PAIR}"),
        (entry(offsets="[0,4.0]"), f"tensor 't': data_offsets is [0, 4.0], {PAIR}"),
        (entry(offsets="[-4,0]"), f"tensor 't': data_offsets is [-4, 0], {PAIR}"),
        (entry(offsets="[false,4]"), f"tensor 't': data_offsets is [False, 4], {PAIR}"),
        (entry(offsets='"04"'), f"tensor 't': data_offsets is '04', {PAIR}"),
        (entry(offsets=f"[0,{2**64 + 4}]"), f"tensor 't': data_offsets is [0, {2**64 + 4}], {PAIR}"),
        (entry(offsets="[4,0]"), "tensor 't': it ends at byte 0, before it begins at byte 4"),
        # shape against offsets
        (entry(offsets="[0,5]"), "tensor 't': shape [4] of U8 needs 4 bytes, its offsets span 5"),
        (
            entry('"F4"', "[3]", "[0,2]"),
            "tensor 't': shape [3] of F4 is 12 bits, which does not fill whole bytes",
        ),
        (
            entry(shape=f"[{2**62},{2**62}]"),
            f"tensor 't': shape [{2**62}, {2**62}] of U8 is more than 2^63 - 1 bits",
        ),
        (
            entry(shape=f"[0,{2**62},4]", offsets="[0,0]"),
            f"tensor 't': shape [0, {2**62}, 4] of U8 is more than 2^63 - 1 bits",
        ),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_refused(header, line):
    assert refusal(header, bytes(4)) == line


GAP = "the bytes between belong to no tensor"


def two(first, second):
    shape = [int(pair.split(",")[1][:-1]) - int(pair.split(",")[0][1:]) for pair in (first, second)]
    return (
        entry(shape=f"[{shape[0]}]", offsets=first)[:-1]
        + ","
        + (f'"u":{{"dtype":"U8","shape":[{shape[1]}],"data_offsets":{second}}}}}')
    )


@pytest.mark.parametrize(
    ("first", "second", "size", "line"),
    [
        ("[0,4]", "[6,9]", 9, f"tensor 'u' begins at byte 6 and not at 4, where 't' ends: {GAP}"),
        ("[2,4]", "[4,9]", 9, f"tensor 't' begins at byte 2 and not at 0, where the data begins: {GAP}"),
        ("[0,4]", "[3,9]", 9, "tensor 'u' begins at byte 3 and not at 4, where 't' ends: the two overlap"),
        ("[0,4]", "[0,4]", 4, "tensor 'u' begins at byte 0 and not at 4, where 't' ends: the two overlap"),
        ("[0,8]", "[4,4]", 8, "tensor 'u' begins at byte 4 and not at 8, where 't' ends: the two overlap"),
        (
            "[0,4]",
            "[4,9]",
            10,
            "the last tensor ends at byte 122, the file at byte 123: what follows is no tensor",
        ),
    ],
)
def test_every_byte_belongs_to_one_tensor(first, second, size, line):
    assert refusal(two(first, second), bytes(size)) == line


def test_a_truncated_file_says_what_is_missing():
    line = refusal(entry(shape="[4000]", offsets="[0,4000]"), bytes(1500))
    assert line == "the file is cut short: 2,500 of 4,067 bytes are missing; download it again"


def test_lengths_in_memory_are_checked_too():
    for raw, size in ((b"", 8), (b"", 100), (b"{}", 9)):
        with pytest.raises(CheckpointError, match="a header of"):
            parse_header(raw, size, "/m/x.safetensors")


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "the file is empty; download it again"),
        (b"\x02\0\0\0", "the file is only 4 bytes long; download it again"),
        (build.raw_file("{}", length=0), "a header of 0 bytes in a file of 10"),
        (build.raw_file("{}", length=3), "the header claims 3 bytes, the file holds 2 after the length"),
        (
            build.raw_file("{}", length=100_000_000),
            "the header claims 100,000,000 bytes, the file holds 2 after the length",
        ),
        (
            build.raw_file("{}", length=100_000_001),
            "the header claims 100,000,001 bytes, the format allows 100,000,000",
        ),
        (
            build.raw_file("{}", length=2**64 - 1),
            "the header claims 18,446,744,073,709,551,615 bytes, the format allows 100,000,000",
        ),
        (
            b"version https://git-lfs.github.com/spec/v1\n",
            "this is a Git LFS pointer and not the weights; run git lfs pull",
        ),
        (
            b"GGUF\3\0\0\0aaaaaaaa",
            "this is a GGUF file and not safetensors; use the checkpoint that it was made from",
        ),
        (
            b"PK\3\4\0\0\x08\x08aaaa",
            "this is a PyTorch archive and not safetensors; convert it with save_file of safetensors.torch",
        ),
        (b"\n<!DOCTYPE html>", "this is a web page and not safetensors; download the file again"),
    ],
)
def test_files_that_are_no_safetensors(tmp_path, content, line):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        read_header(file)
    text = str(caught.value).removesuffix("; download the file again, or save it anew")
    assert text == f"{file}: {line}"


def test_only_the_header_is_read(tmp_path):
    """A terabyte of data that is a hole in the file costs nothing."""
    text = entry('"U8"', f"[{2**40}]", f"[0,{2**40}]")
    file = tmp_path / "x.safetensors"
    with file.open("wb") as out:
        out.write(build.raw_file(text))
        out.truncate(8 + len(text) + 2**40)
    started = time.perf_counter()
    assert read_header(str(file)).tensors[0].nbytes == 2**40
    assert time.perf_counter() - started < 5


def test_paths_become_absolute_and_links_are_followed(tmp_path, monkeypatch):
    (tmp_path / "blob").write_bytes(build.raw_file(VALID, bytes(9)))
    (tmp_path / "blob").chmod(0o444)
    (tmp_path / "x.safetensors").symlink_to("blob")
    monkeypatch.chdir(tmp_path)
    assert read_header("x.safetensors").tensors[0].file == str(tmp_path / "x.safetensors")


def test_a_shard_must_be_a_regular_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe.safetensors", "folder.safetensors"):
        with pytest.raises(CheckpointError, match=f"{name}: not a regular file"):
            read_header(tmp_path / name)
    with pytest.raises(CheckpointError, match=r"no\.safetensors: No such file or directory"):
        read_header(tmp_path / "no.safetensors")


def test_a_file_that_shrinks_meanwhile(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    file.write_bytes(build.raw_file(VALID, bytes(9)))
    monkeypatch.setattr("os.pread", lambda descriptor, count, at, real=os.pread: real(descriptor, min(count, 60), at))
    with pytest.raises(CheckpointError, match="the file shrank while its header was read"):
        read_header(file)


def test_an_io_error_is_the_machine_s_fault(tmp_path, monkeypatch):
    file = tmp_path / "x.safetensors"
    file.write_bytes(build.raw_file(VALID, bytes(9)))

    def fail(*_):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("os.pread", fail)
    with pytest.raises(MachineError, match="reading the header failed: Input/output error"):
        read_header(file)


def test_building_checks_its_input():
    for entries in (
        [("a", "F32", (1,)), ("a", "F32", (1,))],
        [("", "F32", (1,))],
        [("__metadata__", "F32", (1,))],
        [("a\n", "F32", (1,))],
        [("n" * (MAX_NAME + 1), "F32", (1,))],
        [("a", "F4", (3,))],
    ):
        with pytest.raises(AssertionError):
            build_header(entries, {})


def test_twenty_thousand_tensors_parse_quickly():
    names = [f"model.layers.{at // 50}.mlp.experts.{at % 50}.down_proj.weight" for at in range(20_000)]
    built = build_header([(name, "BF16", (64, 32)) for name in names], {"format": "pt"})
    seconds = []
    for _ in range(3):
        started = time.process_time()
        header = parse_header(built[8:], len(built) + 20_000 * 4096, "/m/x.safetensors")
        seconds.append(time.process_time() - started)
    assert [spec.name for spec in header.tensors] == names
    assert min(seconds) < 0.8, f"{min(seconds):.2f} s of processor time"


def test_a_hostile_header_is_refused_in_linear_time():
    keys = ",".join(f'"{at}":0' for at in range(100_000))
    started = time.process_time()
    assert refusal(f"{{{keys},{keys}}}") == "the header defines '0' twice"
    wide = json.dumps({"t": {"dtype": "U8", "shape": [2**62] * 200_000, "data_offsets": [0, 0]}})
    assert refusal(wide) == "tensor 't': it has 200,000 dimensions, 64 at most"
    assert time.process_time() - started < 3
