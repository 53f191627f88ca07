"""The shard index: read strictly, written as a literal."""

import json

import pytest

from streammerge.errors import CheckpointError
from streammerge.formats.index import build_index, file_fault, read_index


def write(tmp_path, text):
    path = tmp_path / "model.safetensors.index.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_reads_map_and_metadata_in_order(tmp_path):
    text = '{"metadata":{"total_size":12.0},"weight_map":{"z":"b.safetensors","a":"a.safetensors"},"more":1}'
    weights, metadata = read_index(write(tmp_path, text))
    assert list(weights.items()) == [("z", "b.safetensors"), ("a", "a.safetensors")]
    assert metadata == {"total_size": 12}


def test_metadata_may_be_missing(tmp_path):
    assert read_index(write(tmp_path, '{"weight_map":{"a":"a.safetensors"}}')) == ({"a": "a.safetensors"}, {})


def test_builds_a_literal(tmp_path):
    built = build_index({"ü": "model-00002-of-00002.safetensors", "a": "model-00001-of-00002.safetensors"}, 10)
    assert built.decode() == (
        "{\n"
        '  "metadata": {\n'
        '    "total_size": 10\n'
        "  },\n"
        '  "weight_map": {\n'
        '    "a": "model-00001-of-00002.safetensors",\n'
        '    "ü": "model-00002-of-00002.safetensors"\n'
        "  }\n"
        "}\n"
    )
    weights, metadata = read_index(write(tmp_path, built))
    assert (len(weights), metadata) == (2, {"total_size": 10})


A = '{"weight_map":{"a":"a.safetensors"}'


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "bad JSON: Expecting value: line 1 column 1 (char 0)"),
        ("{", "bad JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        (A, "bad JSON: Expecting ',' delimiter: line 1 column 36 (char 35)"),
        (A + "}}", "bad JSON: Extra data: line 1 column 37 (char 36)"),
        (b'{"\xff":1}', "not UTF-8 at byte 2"),
        ("[" * 200_000, "nested too deeply"),
        ("9" * 5000, None),
        ("[]", "the file is [], it must be an object"),
        ("{}", "it has no weight_map"),
        ('{"weight_map":{}}', "its weight_map is empty"),
        ('{"weight_map":[]}', "weight_map is [], it must be an object"),
        (A + ',"metadata":null}', "metadata is None, it must be an object"),
        (A + ',"weight_map":{}}', "bad JSON: the key 'weight_map' stands twice in one object"),
        (
            '{"weight_map":{"a":"a.safetensors","\\u0061":"b.safetensors"}}',
            "bad JSON: the key 'a' stands twice in one object",
        ),
        ('{"weight_map":{"a":null}}', "tensor 'a': its file is None, it must be a file name"),
        (
            '{"weight_map":{"a":["a.safetensors"]}}',
            "tensor 'a': its file is ['a.safetensors'], it must be a file name",
        ),
        ('{"weight_map":{"a":"a.bin"}}', "tensor 'a': 'a.bin' is not a .safetensors file"),
        (
            '{"weight_map":{"a":"\\u0000.safetensors"}}',
            "tensor 'a': '\\x00.safetensors' has characters that cannot be printed",
        ),
    ],
    ids=lambda value: ascii(value)[:40],
)
def test_refused(tmp_path, text, line):
    path = write(tmp_path, text)
    with pytest.raises(CheckpointError) as caught:
        read_index(path)
    message = str(caught.value)
    assert message.isprintable()
    assert line is None or message == f"{path}: {line}; download the file again, or save it anew"


@pytest.mark.parametrize(
    "file",
    [
        "/etc/a.safetensors",
        "../a.safetensors",
        "sub/a.safetensors",
        "./a.safetensors",
        "a.safetensors/",
        "..",
        ".",
        "",
        "..a.safetensors",
        ".hidden.safetensors",
        ".safetensors",
        "sub\\a.safetensors",
        "..\\a.safetensors",
        "C:a.safetensors",
        "C:\\a.safetensors",
    ],
)
def test_an_index_cannot_leave_its_folder(tmp_path, file):
    assert "is not a plain file name" in file_fault(file)
    with pytest.raises(CheckpointError, match=r"tensor 'a': .* is not a plain file name, and a shard must lie beside"):
        read_index(write(tmp_path, json.dumps({"weight_map": {"a": file}})))


@pytest.mark.parametrize(
    "file", ["a.safetensors", "model-00001-of-00002.safetensors", "a b..c.safetensors", "é.safetensors"]
)
def test_plain_file_names(file):
    assert file_fault(file) is None


def test_missing_and_unreadable_files(tmp_path):
    for path in (tmp_path / "none.json", tmp_path):
        with pytest.raises(CheckpointError, match=f"^{path}: .*; check the path and its permissions$"):
            read_index(path)
