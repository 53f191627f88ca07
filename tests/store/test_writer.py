"""Shards come out as they were put, whatever the pieces; a folder is complete or not there; failures are one line."""

import errno
import hashlib
import json
import os
import random
import shutil
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
from store.faulty import after, failing, no_direct, short_writes

from streammerge.budget import Budget
from streammerge.errors import MachineError, OutputExists
from streammerge.store import journal, writer
from streammerge.store.ring import PAGE, Closed, Ring
from streammerge.store.writer import MANIFEST, Shard, Writer

MIB = 1 << 20


def content(*sizes):
    """Shards with a header of one page and so many bytes after it; all their bytes."""
    shards, wanted = [], []
    for number, size in enumerate(sizes):
        data = np.random.default_rng(number).integers(0, 256, PAGE + size, np.uint8).tobytes()
        shards.append(Shard(f"s{number}", data[:PAGE], len(data)))
        wanted.append(data)
    return shards, wanted


def feed(made, data, begin, end, dice, most=100_000):
    """Put bytes [begin, end) of a shard in pieces of any size."""
    at = begin
    while at < end:
        size = min(dice.choice([1, 7, PAGE - 1, PAGE, PAGE + 1, dice.randint(1, most)]), end - at)
        slot, _ = made.room(size)
        lead = at % PAGE
        made.ring.bytes_of(slot, lead, lead + size)[:] = data[at : at + size]
        made.put(slot, size)
        at += size


def write(out, shards, wanted, ring, seed=0, digest="d"):
    """A whole run, from where the folder is."""
    made = Writer(out, shards, digest, ring)
    dice = random.Random(seed)
    try:
        for number, data in enumerate(wanted):
            at = made.resume_at(number)
            if at == shards[number].size and shards[number].name in made.hashes:
                continue
            begin = at if at > PAGE else 0
            made.begin(number, begin)
            feed(made, data, max(begin, PAGE), len(data), dice)
            made.end()
        made.drain()
    except Closed:
        made.check()
        raise
    finally:
        made.close()
    return made


def check(out, shards, wanted, hashes):
    for shard, data in zip(shards, wanted, strict=True):
        found = (out / shard.name).read_bytes()
        assert len(found) == shard.size
        assert found == data
        assert hashes[shard.name] == hashlib.sha256(data).hexdigest()


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("direct", [True, False])
def test_any_pieces_make_the_same_file(tmp_path, ring, seed, direct, monkeypatch):
    if not direct:
        no_direct(monkeypatch)
    shards, wanted = content(0, 1, PAGE - 1, PAGE, 1_234_567)
    made = write(tmp_path / "out", shards, wanted, ring, seed)
    check(made.partial, shards, wanted, made.hashes)
    assert made.bytes_written == sum(len(data) for data in wanted)
    assert not (tmp_path / "out").exists()


def test_a_header_of_many_pages_goes_in_pieces(tmp_path, ring, monkeypatch):
    monkeypatch.setattr(writer, "HEADER_PIECE", 5000)
    data = np.random.default_rng(1).integers(0, 256, 7 * PAGE, np.uint8).tobytes()
    made = Writer(tmp_path / "out", [Shard("s", data[: 6 * PAGE], len(data))], "d", ring)
    made.begin(0, 0)
    feed(made, data, 6 * PAGE, len(data), random.Random(0))
    made.end()
    made.drain()
    made.close()
    assert (made.partial / "s").read_bytes() == data


def test_room_is_found_before_the_first_byte(tmp_path, ring):
    shards, _ = content(3_000_000, 5)
    made = Writer(tmp_path / "out", shards, "d", ring)
    for shard in shards:
        found = (made.partial / shard.name).stat()
        assert found.st_size == shard.size
        assert found.st_blocks * 512 >= shard.size
    made.close()


def test_publishing_completes_the_folder_and_moves_it(tmp_path, ring):
    shards, wanted = content(100, 5000)
    made = write(tmp_path / "out", shards, wanted, ring)
    side = tmp_path / "tokenizer.json"
    side.write_text("{}")
    made.publish({"config.json": b"{1}"}, [side], b'{"m": 1}', overwrite=False)
    out = tmp_path / "out"
    assert sorted(entry.name for entry in out.iterdir()) == ["config.json", "s0", "s1", MANIFEST, "tokenizer.json"]
    assert (out / MANIFEST).read_bytes() == b'{"m": 1}'
    assert not made.partial.exists()
    check(out, shards, wanted, made.hashes)


def test_an_old_folder_is_replaced_only_if_asked(tmp_path, ring):
    shards, wanted = content(100)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("old")
    made = write(tmp_path / "out", shards, wanted, ring)
    with pytest.raises(OutputExists, match="--overwrite replaces it"):
        made.publish({}, [], b"{}", overwrite=False)
    assert (tmp_path / "out" / "old").exists()
    made = write(tmp_path / "out2", shards, wanted, ring)
    (tmp_path / "out2").mkdir()
    (tmp_path / "out2" / "old").write_text("old")
    made.publish({}, [], b"{}", overwrite=True)
    assert sorted(entry.name for entry in (tmp_path / "out2").iterdir()) == ["s0", MANIFEST]
    assert not (tmp_path / "out2.replaced").exists()


def interrupted(out, shards, wanted, ring, stop, park=True, seed=0):
    """A run that came to byte `stop` of the last shard."""
    made = Writer(out, shards, "d", ring)
    dice = random.Random(seed)
    for number, data in enumerate(wanted):
        last = number == len(wanted) - 1
        made.begin(number, 0)
        feed(made, data, PAGE, stop if last else len(data), dice)
        if not last:
            made.end()
    if park:
        made.park()
    made.close()


@pytest.mark.parametrize("stop", [PAGE, PAGE + 1, 2 * PAGE, 500_001, 900_000])
def test_a_parked_run_is_taken_up_again(tmp_path, ring, stop):
    shards, wanted = content(3000, 900_000 - PAGE)
    interrupted(tmp_path / "out", shards, wanted, ring, stop)
    found = journal.read(tmp_path / "out.partial")
    assert found.finished == {"s0": hashlib.sha256(wanted[0]).hexdigest()}
    assert found.done == {"s1": stop // PAGE * PAGE}
    made = write(tmp_path / "out", shards, wanted, ring, seed=9)
    check(made.partial, shards, wanted, made.hashes)
    rest = len(wanted[1]) - stop // PAGE * PAGE
    assert made.bytes_written == (rest if stop >= 2 * PAGE else len(wanted[1])), "more was written than was left"


def test_what_ends_a_run_without_parking_is_in_the_journal_too(tmp_path, ring):
    """Reading may have failed: what was written is kept all the same."""
    shards, wanted = content(900_000)
    interrupted(tmp_path / "out", shards, wanted, ring, 500_000, park=False)
    assert journal.read(tmp_path / "out.partial").done == {"s0": 500_000 // PAGE * PAGE}


def test_the_journal_follows_every_so_many_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SYNC_EVERY", 100_000)
    ring = Ring(Budget(MIB), MIB, "a ring")
    shards, wanted = content(1_000_000)
    made = write(tmp_path / "out", shards, wanted, ring)
    ring.close()
    lines = [json.loads(line) for line in (made.partial / journal.NAME).read_text().splitlines()]
    marks = [line["done"] for line in lines if "done" in line]
    assert 4 <= len(marks) <= 10
    assert marks == sorted(marks)
    assert all(mark % PAGE == 0 and 0 < mark <= shards[0].size for mark in marks)


def test_a_mark_is_never_ahead_of_the_disk(tmp_path, monkeypatch):
    """Writes are slow and a journal line may not wait for nothing: at each line the file must hold what it says."""
    monkeypatch.setattr(writer, "SYNC_EVERY", 50_000)
    real, faults = os.pwrite, []

    def slow(file, data, at):
        if random.random() < 0.3:
            time.sleep(0.005)
        return real(file, data, at)

    monkeypatch.setattr(os, "pwrite", slow)
    shards, wanted = content(600_000)
    append = journal.Journal.append

    def checked(self, entry):
        if "done" in entry:
            with open(tmp_path / "out.partial" / "s0", "rb") as file:
                if file.read(entry["done"]) != wanted[0][: entry["done"]]:
                    faults.append(entry)
        append(self, entry)

    monkeypatch.setattr(journal.Journal, "append", checked)
    ring = Ring(Budget(MIB), MIB, "a ring")
    write(tmp_path / "out", shards, wanted, ring)
    ring.close()
    assert not faults


@pytest.mark.parametrize("damage", ["gone", "shorter", "longer"])
def test_a_shard_that_somebody_touched_is_written_again(tmp_path, ring, damage):
    """The journal's word counts only for files that are as they were left."""
    shards, wanted = content(50_000, 900_000)
    interrupted(tmp_path / "out", shards, wanted, ring, 500_000)
    for shard in shards:
        path = tmp_path / "out.partial" / shard.name
        if damage == "gone":
            path.unlink()
        else:
            os.truncate(path, 5000 if damage == "shorter" else shard.size + 1)
    made = write(tmp_path / "out", shards, wanted, ring)
    check(made.partial, shards, wanted, made.hashes)


def test_a_disk_without_room_is_found_at_once(tmp_path, ring, monkeypatch):
    usage = namedtuple("usage", "total used free")
    shards, wanted = content(3_000_000)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, MIB))
        with pytest.raises(MachineError) as caught:
            Writer(tmp_path / "out", shards, "d", ring)
    needs = "the output needs 2.9 MiB more, 1 MiB are free on this disk; make room or write elsewhere"
    assert str(caught.value) == f"{tmp_path}/out.partial: {needs}"
    assert list(tmp_path.iterdir()) == [], "nothing was begun, nothing stays"
    interrupted(tmp_path / "out", shards, wanted, ring, MIB)
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", failing(errno.ENOSPC))
        with pytest.raises(MachineError, match=r"s0: no room for 2\.9 MiB: No space left on device"):
            Writer(tmp_path / "out", shards, "d", ring)
    assert journal.read(tmp_path / "out.partial").done["s0"] >= MIB - PAGE, "work that was done was thrown away"


def test_a_file_system_that_cannot_promise_room(tmp_path, ring, monkeypatch):
    monkeypatch.setattr(os, "posix_fallocate", failing(errno.EOPNOTSUPP))
    shards, wanted = content(300_000)
    made = write(tmp_path / "out", shards, wanted, ring)
    check(made.partial, shards, wanted, made.hashes)


@pytest.mark.parametrize(
    ("call", "number", "line"),
    [
        ("pwrite", errno.ENOSPC, "the disk is full; make room and run the same command again"),
        ("pwrite", errno.EDQUOT, "the disk is full; make room and run the same command again"),
        ("pwrite", errno.EIO, "Input/output error; mend it and run the same command again"),
        ("fdatasync", errno.EIO, "Input/output error; mend it and run the same command again"),
        ("fsync", errno.EIO, "Input/output error; mend it and run the same command again"),
        ("ftruncate", errno.EROFS, "Read-only file system; mend it and run the same command again"),
    ],
)
def test_a_disk_that_fails_half_way(tmp_path, monkeypatch, call, number, line):
    monkeypatch.setattr(writer, "SYNC_EVERY", 100_000)
    shards, wanted = content(200_000, 700_001)
    ring = Ring(Budget(MIB), MIB, "a ring")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, after(3 if call != "ftruncate" else 1, getattr(os, call), failing(number)))
        with pytest.raises(MachineError) as caught:
            write(tmp_path / "out", shards, wanted, ring)
    assert str(caught.value).startswith(f"{tmp_path}/out.partial: {line}")
    ring.close()
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.partial").exists()
    ring = Ring(Budget(MIB), MIB, "a ring")
    made = write(tmp_path / "out", shards, wanted, ring)
    ring.close()
    check(made.partial, shards, wanted, made.hashes)


def test_no_line_follows_a_sync_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "SYNC_EVERY", 1)
    shards, wanted = content(200_000)
    ring = Ring(Budget(MIB), MIB, "a ring")
    monkeypatch.setattr(writer.ShardFile, "sync", failing(errno.EIO))
    with pytest.raises(MachineError):
        write(tmp_path / "out", shards, wanted, ring)
    ring.close()
    found = journal.read(tmp_path / "out.partial")
    assert (found.done, found.finished) == ({}, {})


@pytest.mark.parametrize("most", [1000, PAGE, PAGE + 512, 50_000])
@pytest.mark.parametrize("direct", [True, False])
def test_writes_that_are_cut_short_are_continued(tmp_path, ring, most, direct, monkeypatch):
    if not direct:
        no_direct(monkeypatch)
    short_writes(monkeypatch, most)
    shards, wanted = content(300_001)
    made = write(tmp_path / "out", shards, wanted, ring)
    check(made.partial, shards, wanted, made.hashes)


def test_direct_writes_that_are_refused_go_through_the_cache(tmp_path, ring, monkeypatch):
    """Some file systems take O_DIRECT when a file is opened and refuse it when it is written."""
    import fcntl

    real = os.pwrite

    def refuse(file, data, at):
        if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return real(file, data, at)

    monkeypatch.setattr(os, "pwrite", refuse)
    shards, wanted = content(300_001)
    made = write(tmp_path / "out", shards, wanted, ring)
    check(made.partial, shards, wanted, made.hashes)


@pytest.mark.parametrize("call", ["copyfile", "write_bytes", "rename"])
def test_publishing_that_fails_is_one_line_and_can_be_tried_again(tmp_path, ring, monkeypatch, call):
    shards, wanted = content(100)
    side = tmp_path / "tokenizer.json"
    side.write_text("{}")
    made = write(tmp_path / "out", shards, wanted, ring)
    owner = {"copyfile": shutil, "write_bytes": Path, "rename": os}[call]
    with monkeypatch.context() as patch:
        patch.setattr(owner, call, failing(errno.ENOSPC))
        with pytest.raises(MachineError, match="the disk is full; make room"):
            made.publish({"config.json": b"{}"}, [side], b"{}", overwrite=False)
    assert not (tmp_path / "out").exists()
    if call != "rename":  # the manifest is in: only the rename is missing
        again = write(tmp_path / "out", shards, wanted, ring)
        assert again.bytes_written == 0
        again.publish({"config.json": b"{}"}, [side], b"{}", overwrite=False)
        check(tmp_path / "out", shards, wanted, again.hashes)


def test_descriptors_are_given_back(tmp_path, ring):
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("counts descriptors in /proc")
    shards, wanted = content(100, 900_000)
    before = len(os.listdir("/proc/self/fd"))
    interrupted(tmp_path / "out", shards, wanted, ring, 500_000)
    write(tmp_path / "out", shards, wanted, ring)
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_folder_is_held_until_it_is_published(tmp_path, ring, monkeypatch):
    shards, wanted = content(100)
    made = write(tmp_path / "out", shards, wanted, ring)
    said = []

    def copy(*_):
        with pytest.raises(OutputExists, match="another run is writing here"):
            Writer(tmp_path / "out", shards, "d", ring)
        said.append(True)

    monkeypatch.setattr(shutil, "copyfile", copy)
    (made.partial / "tokenizer.json").write_text("{}")
    made.publish({}, [tmp_path / "tokenizer.json"], b"{}", overwrite=False)
    assert said
    check(tmp_path / "out", shards, wanted, made.hashes)
