"""What a killed run may trust: whole lines, one owner, one plan."""

import errno
import json
import os

import pytest

from streammerge.errors import MachineError, OutputExists
from streammerge.store import journal
from streammerge.store.journal import NAME, Journal


def written(folder):
    made = Journal(folder, "d")
    made.append({"shard": "a", "done": 4096})
    made.append({"shard": "a", "done": 8192})
    made.append({"shard": "b", "sha256": "h"})
    made.close()
    return folder / NAME


def test_what_is_written_reads_back(tmp_path):
    path = written(tmp_path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"digest": "d", "version": 1},
        {"shard": "a", "done": 4096},
        {"shard": "a", "done": 8192},
        {"shard": "b", "sha256": "h"},
    ]
    found = journal.read(tmp_path)
    assert (found.digest, found.done, found.finished) == ("d", {"a": 8192}, {"b": "h"})


def test_no_journal_is_no_progress(tmp_path):
    assert journal.read(tmp_path) == journal.Progress()


def test_a_journal_cut_anywhere_says_less_and_never_something_else(tmp_path):
    """And whatever is appended after the cut is understood."""
    whole = written(tmp_path).read_bytes()
    stages = [
        ("", {}, {}),
        ("d", {}, {}),
        ("d", {"a": 4096}, {}),
        ("d", {"a": 8192}, {}),
        ("d", {"a": 8192}, {"b": "h"}),
    ]
    for cut in range(len(whole) + 1):
        (tmp_path / NAME).write_bytes(whole[:cut])
        found = journal.read(tmp_path)
        lines = (whole[:cut] + b"\n").count(b"}\n")
        assert (found.digest, found.done, found.finished) == stages[lines]
        again = Journal(tmp_path, "d")
        assert again.found == found
        again.append({"shard": "c", "done": 1})
        again.close()
        after = journal.read(tmp_path)
        assert (after.digest, after.done, after.finished) == ("d", {**found.done, "c": 1}, found.finished)


def test_lines_that_are_not_ours_are_ignored(tmp_path):
    (tmp_path / NAME).write_bytes(
        b'{"digest":"d"}\n\0\0\0\n12\n[]\n{"done":3}\nnull\n\xff\xfe\n{"shard":"a","done":5}\n'
    )
    found = journal.read(tmp_path)
    assert (found.digest, found.done, found.finished) == ("d", {"a": 5}, {})


def test_a_second_writer_is_refused_in_one_line(tmp_path):
    first = Journal(tmp_path, "d")
    with pytest.raises(OutputExists) as caught:
        Journal(tmp_path, "d")
    assert str(caught.value) == f"{tmp_path}: another run is writing here; wait for it or choose another folder"
    with pytest.raises(OutputExists, match="another run is writing here"):
        journal.discard(tmp_path)
    assert (tmp_path / NAME).exists()
    first.close()
    Journal(tmp_path, "d").close()


def test_another_plan_is_refused(tmp_path):
    Journal(tmp_path, "one").close()
    with pytest.raises(OutputExists, match="unfinished work of another plan; --no-resume discards it"):
        Journal(tmp_path, "two")
    Journal(tmp_path, "one").close()


def test_discarding_takes_the_folder(tmp_path):
    for name in (NAME, None):
        folder = tmp_path / "x"
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"x")
        if name:
            Journal(folder, "d").close()
        journal.discard(folder)
        assert not folder.exists()


def test_blank_is_what_a_kill_at_the_very_start_leaves(tmp_path):
    assert journal.is_blank(tmp_path)
    (tmp_path / NAME).write_bytes(b'{"dig')
    assert journal.is_blank(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"x")
    assert not journal.is_blank(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / NAME).write_bytes(b'{"digest": "d"}')
    assert not journal.is_blank(tmp_path)


@pytest.mark.parametrize("fault", ["refuses", "cuts short"])
def test_a_full_disk(tmp_path, monkeypatch, fault):
    def full(file, data):
        if fault == "refuses":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return len(data) // 2

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(MachineError) as caught:
            Journal(tmp_path, "d")
    assert str(caught.value).startswith(f"{tmp_path / NAME}: cannot write the journal: No space left on device")
    Journal(tmp_path, "d").close()  # and the lock was given back


def test_locks_that_the_file_system_lacks_are_done_without(tmp_path, monkeypatch):
    import fcntl

    def lacking(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", lacking)
    Journal(tmp_path, "d").close()
