"""Where output tensors lie: headers to the byte, offsets without holes, shards, index."""

import json
import struct

import numpy as np
import pytest

from streammerge.formats.dtypes import DTYPES
from streammerge.planner.jobs import Job
from streammerge.planner.layout import lay_out_output

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"


def job(name, shape, dtype="F32"):
    return Job(name, None, (), {}, "linear", dtype, shape)


def parsed(header):
    (length,) = struct.unpack("<Q", header[:8])
    assert length == len(header) - 8
    return json.loads(header[8:])


def check(layout):
    """Headers, places and sizes agree, and data starts at a page."""
    for number, shard in enumerate(layout.shards):
        assert len(shard.header) % 4096 == 0
        table = parsed(shard.header)
        table.pop("__metadata__")
        at = len(shard.header)
        places = [place for place in layout.places if place.shard == number]
        assert list(table) == [place.job.name for place in places]
        for place in places:
            size = int(np.prod(place.job.shape, dtype=int)) * DTYPES[place.job.dtype].bits // 8
            assert (place.begin, place.end) == (at, at + size)
            assert place.begin % max(1, DTYPES[place.job.dtype].bits // 8) == 0
            offsets = table[place.job.name]["data_offsets"]
            assert [len(shard.header) + offset for offset in offsets] == [place.begin, place.end]
            at = place.end
        assert shard.size == at
    assert [place.shard for place in layout.places] == sorted(place.shard for place in layout.places)


def test_the_header_to_the_byte():
    layout = lay_out_output([job("w", (2, 3)), job("b", (3,), "BF16")], None, None, {"made": "by hand"})
    text = (
        '{"__metadata__":{"format":"pt","made":"by hand"},'
        '"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},'
        '"b":{"dtype":"BF16","shape":[3],"data_offsets":[24,30]}}'
    )
    (shard,) = layout.shards
    assert shard.header == struct.pack("<Q", 4088) + text.encode().ljust(4088)
    assert (shard.name, shard.size) == ("model.safetensors", 4096 + 30)
    assert [(p.begin, p.end) for p in layout.places] == [(4096, 4120), (4120, 4126)]
    assert layout.index is None
    check(layout)


def test_the_base_keeps_its_shards_order_and_names():
    jobs = [job("z", (4,)), job("a", (4,)), job("m", (0, 7)), job("s", ())]
    layout = lay_out_output(jobs, [(ONE, ["z", "m"]), (TWO, ["a", "s"])], None, {})
    assert [shard.name for shard in layout.shards] == [ONE, TWO]
    assert [place.job.name for place in layout.places] == ["z", "m", "a", "s"]
    index = json.loads(layout.index)
    assert index["weight_map"] == {"z": ONE, "m": ONE, "a": TWO, "s": TWO}
    assert index["metadata"]["total_size"] == 16 + 0 + 16 + 4
    assert layout.index_name == "model.safetensors.index.json"
    check(layout)


def test_one_shard_of_another_name_is_listed():
    layout = lay_out_output([job("a", (4,))], [("weights.safetensors", ["a"])], None, {})
    assert json.loads(layout.index)["weight_map"] == {"a": "weights.safetensors"}


def test_an_order_that_would_misalign_is_sorted_by_item_size():
    jobs = [job("flags", (3,), "BOOL"), job("w", (2,)), job("h", (1,), "F16"), job("d", (1,), "F64")]
    layout = lay_out_output(jobs, None, None, {})
    assert [place.job.name for place in layout.places] == ["d", "w", "h", "flags"]
    check(layout)
    fine = lay_out_output([jobs[1], jobs[2], jobs[0]], None, None, {})
    assert [place.job.name for place in fine.places] == ["w", "h", "flags"]
    check(fine)


@pytest.mark.parametrize(
    ("size", "groups"),
    [
        (16, [["a"], ["b"], ["c"]]),
        (32, [["a", "b"], ["c"]]),
        (47, [["a", "b"], ["c"]]),
        (48, [["a", "b", "c"]]),
        (1, [["a"], ["b"], ["c"]]),
    ],
)
def test_a_shard_size_overrides_the_base(size, groups):
    layout = lay_out_output([job(name, (4,)) for name in "abc"], [("x.safetensors", list("abc"))], size, {})
    found = {}
    for place in layout.places:
        found.setdefault(place.shard, []).append(place.job.name)
    assert list(found.values()) == groups
    if len(groups) == 1:
        assert [shard.name for shard in layout.shards] == ["model.safetensors"]
        assert layout.index is None
    else:
        names = [f"model-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
        assert [shard.name for shard in layout.shards] == names
        assert set(json.loads(layout.index)["weight_map"].values()) == set(names)
    check(layout)
