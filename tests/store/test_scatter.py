"""Tensors put in any order and in any pieces make the same shards; what the journal calls durable is."""

import errno
import hashlib
import json
import os
import random
import time
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from store.faulty import after, failing, no_direct, short_writes

from streammerge.budget import Budget
from streammerge.errors import MachineError
from streammerge.store import journal
from streammerge.store.ring import PAGE, Closed, Ring
from streammerge.store.scatter import ScatterWriter
from streammerge.store.writer import Shard

MIB = 1 << 20
SIZES = [[1, 5000, 0, 4095, 4096, 300_001], [2, 2, 2, 70_000], [123_456]]


def content(sizes=SIZES, header=PAGE):
    """Shards, their bytes, and where each tensor lies: (shard, name) -> (begin, end)."""
    shards, wanted, where = [], [], {}
    for number, each in enumerate(sizes):
        at = header
        for place, size in enumerate(each):
            where[number, f"t{place}"] = (at, at + size)
            at += size
        data = np.random.default_rng(number).integers(0, 256, at, np.uint8).tobytes()
        shards.append(Shard(f"s{number}", data[:header], at))
        wanted.append(data)
    return shards, wanted, where


def members(where):
    found = {}
    for shard, name in where:
        found.setdefault(shard, []).append(name)
    return found


def put(made, data, shard, begin, end, dice):
    """One tensor in pieces, themselves in any order."""
    edges = sorted({begin, end, *(dice.randint(begin, end) for _ in range(dice.choice([0, 1, 5])))})
    pieces = list(pairwise(edges))
    dice.shuffle(pieces)
    for first, last in pieces:
        slot, address = made.place(first, last - first)
        assert address % PAGE == first % PAGE
        lead = first % PAGE
        made.ring.bytes_of(slot, lead, lead + last - first)[:] = data[first:last]
        made.put_at(shard, first, slot, last - first)


def write(out, shards, wanted, where, ring, seed=0, stop=None, park=True, each=3):
    """A run from where the folder is; ended before tensor number `stop` if that is given."""
    dice = random.Random(seed)
    made = ScatterWriter(out, shards, "d", ring, members(where))
    left = [key for key in where if key[1] not in made.sealed(key[0])]
    dice.shuffle(left)
    try:
        for first in range(0, len(left), each):
            for key in left[first : first + each]:
                if stop == 0:
                    if park:
                        made.park()
                    return made
                put(made, wanted[key[0]], key[0], *where[key], dice)
                stop = None if stop is None else stop - 1
            made.seal(left[first : first + each], [{"copied": name} for _, name in left[first : first + each]])
        made.drain()
    except Closed:
        made.check()
        raise
    finally:
        made.close()
    return made


def check(made, shards, wanted):
    for shard, data in zip(shards, wanted, strict=True):
        assert (made.partial / shard.name).read_bytes() == data
        assert made.hashes[shard.name] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("direct", [True, False])
def test_any_order_makes_the_same_files(tmp_path, ring, seed, direct, monkeypatch):
    if not direct:
        no_direct(monkeypatch)
    shards, wanted, where = content()
    made = write(tmp_path / "out", shards, wanted, where, ring, seed)
    check(made, shards, wanted)
    assert made.bytes_written == sum(map(len, wanted))


def test_headers_of_many_pages(tmp_path, ring):
    shards, wanted, where = content(header=9 * PAGE)
    check(write(tmp_path / "out", shards, wanted, where, ring), shards, wanted)


@pytest.mark.parametrize("park", [True, False])
@pytest.mark.parametrize("stop", range(11))
def test_an_interrupted_run_is_taken_up_again(tmp_path, ring, stop, park):
    shards, wanted, where = content()
    one = write(tmp_path / "out", shards, wanted, where, ring, seed=stop, stop=stop, park=park)
    found = journal.read(tmp_path / "out.partial")
    durable = {(int(shard[1:]), name) for shard, names in found.tensors.items() for name in names}
    assert len(durable) == stop // 3 * 3
    assert set(found.notes) == {json.dumps({"copied": name}) for _, name in durable}
    for shard, name in durable:
        begin, end = where[shard, name]
        assert (one.partial / f"s{shard}").read_bytes()[begin:end] == wanted[shard][begin:end]
    two = write(tmp_path / "out", shards, wanted, where, ring, seed=99)
    check(two, shards, wanted)
    again = sum(where[key][1] - where[key][0] for key in where if key not in durable)
    assert again <= two.bytes_written <= again + 3 * PAGE


def test_hashes_that_a_stop_left_are_taken_up(tmp_path, ring):
    """All tensors are durable, and the run ended before a hash: nothing is written but headers."""
    shards, wanted, where = content()
    write(tmp_path / "out", shards, wanted, where, ring)
    path = tmp_path / "out.partial" / journal.NAME
    lines = [line for line in path.read_text().splitlines() if "sha256" not in line]
    path.write_text("\n".join(lines) + "\n")
    made = write(tmp_path / "out", shards, wanted, where, ring)
    check(made, shards, wanted)
    assert made.bytes_written == 3 * PAGE


def test_a_shard_that_somebody_touched_is_written_again(tmp_path, ring):
    shards, wanted, where = content()
    write(tmp_path / "out", shards, wanted, where, ring, stop=10)
    os.truncate(tmp_path / "out.partial" / "s0", 5000)
    (tmp_path / "out.partial" / "s2").unlink()
    check(write(tmp_path / "out", shards, wanted, where, ring), shards, wanted)


def test_a_line_is_never_ahead_of_the_disk(tmp_path, ring, monkeypatch):
    real, faults = os.pwrite, []

    def slow(file, data, at):
        if random.random() < 0.3:
            time.sleep(0.003)
        return real(file, data, at)

    shards, wanted, where = content()
    append = journal.Journal.append

    def checked(self, *entries):
        for entry in entries:
            if "tensor" in entry:
                shard = int(entry["shard"][1:])
                begin, end = where[shard, entry["tensor"]]
                with open(folder / "out.partial" / entry["shard"], "rb") as file:
                    file.seek(begin)
                    if file.read(end - begin) != wanted[shard][begin:end]:
                        faults.append(entry)
        append(self, *entries)

    monkeypatch.setattr(os, "pwrite", slow)
    monkeypatch.setattr(journal.Journal, "append", checked)
    for seed in range(5):
        folder = tmp_path / str(seed)
        check(write(folder / "out", shards, wanted, where, ring, seed, each=2), shards, wanted)
    assert not faults


@pytest.mark.parametrize(
    ("call", "number", "line"),
    [
        ("pwrite", errno.ENOSPC, "the disk is full; make room and run the same command again"),
        ("fdatasync", errno.EIO, "Input/output error; mend it and run the same command again"),
        ("ftruncate", errno.EROFS, "Read-only file system; mend it and run the same command again"),
    ],
)
def test_a_disk_that_fails_half_way(tmp_path, monkeypatch, call, number, line):
    shards, wanted, where = content()
    ring = Ring(Budget(4 * MIB), MIB, "a ring")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, after(0 if call == "ftruncate" else 5, getattr(os, call), failing(number)))
        with pytest.raises(MachineError) as caught:
            write(tmp_path / "out", shards, wanted, where, ring)
    assert str(caught.value).startswith(f"{tmp_path}/out.partial: {line}")
    ring.close()
    ring = Ring(Budget(4 * MIB), MIB, "a ring")
    check(write(tmp_path / "out", shards, wanted, where, ring), shards, wanted)
    ring.close()


@pytest.mark.parametrize("most", [1000, PAGE, PAGE + 512])
@pytest.mark.parametrize("direct", [True, False])
def test_writes_that_are_cut_short_are_continued(tmp_path, ring, most, direct, monkeypatch):
    if not direct:
        no_direct(monkeypatch)
    short_writes(monkeypatch, most)
    shards, wanted, where = content()
    check(write(tmp_path / "out", shards, wanted, where, ring), shards, wanted)


def test_other_shards_are_written_in_order_beside_it(tmp_path, ring):
    """The same folder, journal and lock: one shard in any order, then another from its start to its end."""
    shards, wanted, where = content([[50_000, 3], [70_000]])
    scattered = {key: place for key, place in where.items() if key[0] == 0}
    made = ScatterWriter(tmp_path / "out", shards, "d", ring, members(scattered))
    dice = random.Random(0)
    for key, (begin, end) in reversed(scattered.items()):
        put(made, wanted[0], 0, begin, end, dice)
        made.seal([key])
    made.begin(1, 0)
    slot, _ = made.room(70_000)
    made.ring.bytes_of(slot, 0, 70_000)[:] = wanted[1][PAGE:]
    made.put(slot, 70_000)
    made.end()
    made.drain()
    made.close()
    check(made, shards, wanted)
    made.publish({}, [], b"{}", overwrite=False)
    assert (tmp_path / "out" / "s0").read_bytes() == wanted[0]


def test_descriptors_are_given_back(tmp_path, ring):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts descriptors in /proc")
    shards, wanted, where = content()
    before = len(os.listdir("/proc/self/fd"))
    write(tmp_path / "out", shards, wanted, where, ring, stop=5)
    write(tmp_path / "out", shards, wanted, where, ring)
    assert len(os.listdir("/proc/self/fd")) == before
