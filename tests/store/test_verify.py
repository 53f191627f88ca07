"""A finished folder is re-hashed: one wrong bit is found, and a missing shard; without a manifest it is refused."""

import hashlib
import json

import pytest

from streammerge.errors import CheckpointError
from streammerge.store.verify import read_manifest, verify
from streammerge.store.writer import MANIFEST


@pytest.fixture
def folder(tmp_path):
    shards = {"a.safetensors": b"a" * 5_000_001, "b.safetensors": b"b" * 17, "empty.safetensors": b""}
    for name, data in shards.items():
        (tmp_path / name).write_bytes(data)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in shards.items()}
    (tmp_path / MANIFEST).write_text(json.dumps({"shards": hashes}))
    return tmp_path


def test_a_whole_folder(folder):
    seen = []
    found = verify(folder, lambda done, total: seen.append((done, total)))
    assert found == {"folder": str(folder), "shards": 3, "bytes": 5_000_018, "bad": []}
    assert seen[-1] == (5_000_018, 5_000_018)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("at", [0, 4_194_304, 5_000_000])
def test_one_flipped_bit(folder, at):
    path = folder / "a.safetensors"
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    assert verify(folder)["bad"] == ["a.safetensors"]


def test_a_shard_that_is_missing_shorter_or_longer(folder):
    (folder / "a.safetensors").unlink()
    (folder / "b.safetensors").write_bytes(b"b" * 16)
    (folder / "empty.safetensors").write_bytes(b"x")
    assert verify(folder)["bad"] == ["a.safetensors", "b.safetensors", "empty.safetensors"]


def test_no_manifest(folder):
    (folder / MANIFEST).unlink()
    for where, fault in (
        (folder, f"has no {MANIFEST}; only folders that streammerge wrote"),
        (folder / "nowhere", "no such folder; name one that streammerge wrote"),
        (folder / "b.safetensors", "no such folder; name one that streammerge wrote"),
    ):
        with pytest.raises(CheckpointError, match=fault):
            verify(where)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"shards": []}', "null", "\xff"])
def test_a_damaged_manifest(folder, text):
    (folder / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match="is damaged; merge again"):
        read_manifest(folder)
