"""The same bytes whatever the mode, odd places, broken files and disks; the page cache left as it was found."""

import errno
import mmap
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from store.faulty import no_direct

from streammerge.budget import Budget
from streammerge.errors import CheckpointError, MachineError, RecipeError
from streammerge.store import reader as module
from streammerge.store.reader import MODES, OPEN_FILES, Extent, Reader, evict
from streammerge.store.ring import PAGE, Ring

SIZE = 300_007  # odd, so that the last page is short
SHM = Path("/dev/shm")


@pytest.fixture(params=["disk", "shm"])
def folder(request, tmp_path):
    if request.param == "disk":
        yield tmp_path
        return
    if not SHM.is_dir() or not os.access(SHM, os.W_OK):
        pytest.skip("no /dev/shm")
    made = SHM / f"streammerge-test-{os.getpid()}"
    made.mkdir()
    yield made
    for path in made.iterdir():
        path.unlink()
    made.rmdir()


@pytest.fixture
def data():
    return np.random.default_rng(5).integers(0, 256, SIZE, np.uint8).tobytes()


@pytest.fixture
def ring():
    ring = Ring(Budget(1 << 30), 64 << 20, "a ring")
    yield ring
    ring.close()


def read(ring, mode, *ranges, threads=4):
    """Each (file, begin, end) by one slot that holds all of them."""
    reader = Reader(ring, mode, threads)
    extents, size = [], 0
    for file, begin, end in ranges:
        extents.append(Extent(str(file), begin, end, size + begin % PAGE))
        size = -(-(extents[-1].offset + end - begin) // PAGE) * PAGE
    slot = ring.take(size)
    ring.bytes_of(slot, 0, slot.size)[:] = b"\xee" * slot.size
    try:
        for future in reader.fill(slot, extents):
            future.result()
        found = [bytes(ring.bytes_of(slot, e.offset, e.offset + e.end - e.begin)) for e in extents]
    finally:
        reader.close()
        ring.give(slot)
    assert reader.bytes_read == sum(end - begin for _, begin, end in ranges)
    return found


RANGES = [
    (0, SIZE),
    (0, 1),
    (SIZE - 1, SIZE),
    (PAGE, 2 * PAGE),
    (PAGE - 1, PAGE + 1),
    (17, 100_003),
    (2 * PAGE + 5, 2 * PAGE + 6),
    (SIZE // PAGE * PAGE, SIZE),
    (SIZE // PAGE * PAGE + 3, SIZE),
    (123_457, SIZE),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("warm", [True, False])
def test_every_mode_reads_the_same_bytes(folder, ring, data, mode, warm):
    path = folder / "x"
    path.write_bytes(data)
    for begin, end in RANGES:
        if not warm:
            evict(path)
        assert read(ring, mode, (path, begin, end)) == [data[begin:end]]


@pytest.mark.parametrize("mode", MODES)
def test_many_extents_share_a_slot(folder, ring, data, mode):
    """A read that runs over its pages would spoil a neighbour."""
    paths = []
    for number in range(4):
        paths.append(folder / f"{number}")
        paths[-1].write_bytes(data[number:])
        evict(paths[-1])
    ranges = [(paths[i % 4], a, min(b, SIZE - 9)) for i, (a, b) in enumerate(RANGES * 3) if a < SIZE - 9]
    found = read(ring, mode, *ranges)
    for (path, begin, end), got in zip(ranges, found, strict=True):
        shift = int(path.name)
        assert got == data[begin + shift : end + shift]


def test_auto_settles_on_direct_where_the_disk_has_it(tmp_path, ring, data):
    (tmp_path / "x").write_bytes(data)
    reader = Reader(ring)
    reader.choose([(str(tmp_path / "x"), SIZE)])
    try:
        os.close(os.open(tmp_path / "x", os.O_RDONLY | os.O_DIRECT))
        assert reader.mode == "direct"
    except OSError:
        assert reader.mode == "buffered"
    reader.close()


def test_auto_is_buffered_where_direct_is_refused(tmp_path, ring, data, monkeypatch):
    (tmp_path / "x").write_bytes(data)
    no_direct(monkeypatch)
    reader = Reader(ring)
    reader.choose([(str(tmp_path / "x"), SIZE)])
    reader.close()
    assert reader.mode == "buffered"


def test_one_input_on_a_disk_without_direct_reads_all_the_same(tmp_path, ring, data, monkeypatch):
    (tmp_path / "x").write_bytes(data)
    evict(tmp_path / "x")
    no_direct(monkeypatch)
    assert read(ring, "direct", (tmp_path / "x", 17, SIZE)) == [data[17:]]


def test_a_probe_that_finds_buffered_quicker_says_so(tmp_path, ring, monkeypatch):
    path = tmp_path / "x"
    with open(path, "wb") as file:
        file.truncate(64 << 20)
    monkeypatch.setattr(module, "PROBE_WORTH", 1)
    monkeypatch.setattr(module, "is_local", lambda name: False)
    monkeypatch.setattr(Reader, "_from_cache", lambda *_: False)
    for slow, expected in (("_direct", "buffered"), ("_buffered", "direct")):
        with monkeypatch.context() as patch:
            for name in ("_direct", "_buffered"):
                delay = 0.2 if name == slow else 0.01
                patch.setattr(Reader, name, lambda *_, delay=delay: threading.Event().wait(delay))
            reader = Reader(ring)
            reader.choose([(str(path), 64 << 20)])
            reader.close()
        assert reader.mode == expected


def test_an_unknown_mode_is_refused(ring):
    with pytest.raises(RecipeError, match="unknown reader 'fast'; one of auto, direct"):
        Reader(ring, "fast")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("left", [0, 1, PAGE, 99_999, SIZE - 1])
def test_a_file_that_got_shorter(tmp_path, ring, data, mode, left):
    path = tmp_path / "x"
    path.write_bytes(data[:left])
    evict(path)
    with pytest.raises(CheckpointError) as caught:
        read(ring, mode, (path, 5000, SIZE))
    line = str(caught.value)
    assert line.startswith(f"{path}: ended at byte {max(left, PAGE)} while bytes up to {SIZE} were expected")
    assert "\n" not in line


@pytest.mark.parametrize("mode", MODES)
def test_a_file_that_is_gone(tmp_path, ring, mode):
    with pytest.raises(CheckpointError, match="gone since the merge was planned"):
        read(ring, mode, (tmp_path / "x", 0, 10))


@pytest.mark.parametrize("mode", ["direct", "buffered", "auto"])
@pytest.mark.parametrize("most", [1, 100, PAGE, 5 * PAGE + 512])
def test_short_reads_are_continued(tmp_path, ring, data, mode, most, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(data)
    real, lengths = os.preadv, []

    def short(file, buffers, offset, *flags):
        got = real(file, [buffers[0][: max(most, 1)]], offset, *flags)
        lengths.append(got)
        return got

    end = 3000 if most == 1 else SIZE
    evict(path)
    monkeypatch.setattr(os, "preadv", short)
    assert read(ring, mode, (path, 5, end)) == [data[5:end]]
    assert max(lengths) <= most
    assert len(lengths) >= (end - 5) // most


@pytest.mark.parametrize("mode", ["direct", "buffered", "mmap"])
def test_a_disk_that_fails(tmp_path, ring, data, mode, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(data)
    evict(path)

    def fail(*_, **__):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", fail)
    monkeypatch.setattr(mmap, "mmap", fail)
    with pytest.raises(MachineError) as caught:
        read(ring, mode, (path, 5, 10_000))
    assert str(caught.value) == f"{path}: cannot read bytes 5-10000: Input/output error"


def test_a_file_that_may_not_be_read(tmp_path, ring, monkeypatch):
    real = os.open

    def refuse(path, flags, *more, **named):
        if str(path) == str(tmp_path / "x"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        return real(path, flags, *more, **named)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(MachineError, match="Permission denied"):
        read(ring, "buffered", (tmp_path / "x", 0, 10))


def cached_pages(path):
    """Numbers of the pages of a file that the page cache holds."""
    import ctypes

    size = path.stat().st_size
    with open(path, "r+b") as file, mmap.mmap(file.fileno(), size) as window:
        held = np.zeros(-(-size // mmap.PAGESIZE), np.uint8)
        memory = ctypes.c_char.from_buffer(window)
        where = ctypes.c_void_p(ctypes.addressof(memory))
        assert not ctypes.CDLL(None).mincore(where, ctypes.c_size_t(size), ctypes.c_void_p(held.ctypes.data))
        del memory
    return np.flatnonzero(held & 1).tolist()


@pytest.fixture
def large(tmp_path):
    path = tmp_path / "large"
    path.write_bytes(np.random.default_rng(6).integers(0, 256, 8 << 20, np.uint8).tobytes())
    evict(path)
    if cached_pages(path):
        pytest.skip("this file system does not drop pages")
    return path


@pytest.mark.parametrize("mode", ["direct", "buffered", "mmap"])
def test_cold_reads_leave_the_page_cache_alone(large, ring, mode):
    """Direct reads bring nothing in; the others drop what they brought, but for pages that an end cuts."""
    data = large.read_bytes()
    evict(large)
    for begin, end in ((5, 1 << 20), (1 << 20, 2 << 20), (3 << 20, (7 << 20) + 77)):
        assert read(ring, mode, (large, begin, end)) == [data[begin:end]]
        assert len(cached_pages(large)) <= (0 if mode == "direct" else 1)


@pytest.mark.parametrize("mode", MODES)
def test_what_the_cache_holds_is_taken_from_it_and_stays(large, ring, mode, monkeypatch):
    with open(large, "rb", buffering=0) as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)  # no readahead: exactly these pages
        data = os.pread(file.fileno(), 1 << 20, 2 << 20)
    before = cached_pages(large)
    assert set(range(512, 768)) <= set(before)
    for name in ("_direct", "_buffered", "_mapped"):
        monkeypatch.setattr(Reader, name, lambda *_: pytest.fail("asked the disk"))
    assert read(ring, mode, (large, (2 << 20) + 9, 3 << 20)) == [data[9:]]
    assert cached_pages(large) == before


def test_a_map_begins_where_the_system_lets_it(tmp_path, ring, data, monkeypatch):
    """Some systems map files at multiples of 64 KiB only."""
    path = tmp_path / "x"
    path.write_bytes(data)
    evict(path)
    real, begins = mmap.mmap, []

    def careful(file, length, *more, offset=0, **named):
        assert offset % 65536 == 0
        begins.append(offset)
        return real(file, length, *more, offset=offset, **named)

    monkeypatch.setattr(mmap, "ALLOCATIONGRANULARITY", 65536)
    monkeypatch.setattr(mmap, "mmap", careful)
    for begin, end in ((5 * PAGE + 1, 200_000), (17 * PAGE, SIZE), (SIZE - 1, SIZE)):
        assert read(ring, "mmap", (path, begin, end)) == [data[begin:end]]
    assert 65536 in begins


def open_descriptors(folder):
    links = (Path("/proc/self/fd") / name for name in os.listdir("/proc/self/fd"))
    return sum(1 for link in links if os.path.lexists(link) and str(folder) in os.readlink(link))


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="counts descriptors in /proc")
@pytest.mark.parametrize("mode", ["direct", "buffered"])
def test_descriptors_are_bounded(tmp_path, ring, mode):
    reader = Reader(ring, mode)
    for number in range(3 * OPEN_FILES):
        path = tmp_path / f"{number}"
        path.write_bytes(b"%d" % number * 500)
        slot = ring.take(PAGE)
        for future in reader.fill(slot, [Extent(str(path), 0, 500, 0)]):
            future.result()
        assert bytes(ring.bytes_of(slot, 0, 3)) == (b"%d" % number * 3)[:3]
        ring.give(slot)
        assert open_descriptors(tmp_path) <= OPEN_FILES
    reader.close()
    assert open_descriptors(tmp_path) == 0


def test_a_descriptor_in_use_is_never_closed(tmp_path, ring, monkeypatch):
    """One read hangs while others go through more files than are kept open; it must still read its own file."""
    slow = tmp_path / "slow"
    slow.write_bytes(b"s" * 2 * PAGE)
    hangs, go = threading.Event(), threading.Event()
    real = os.preadv

    def stuck(file, buffers, offset, *flags):
        if not flags and os.readlink(f"/proc/self/fd/{file}") == str(slow) and not go.is_set():
            got = real(file, [buffers[0][:PAGE]], offset)  # half of it, then the disk thinks
            hangs.set()
            assert go.wait(20)
            return got
        return real(file, buffers, offset, *flags)

    monkeypatch.setattr(os, "preadv", stuck)
    monkeypatch.setattr(Reader, "_from_cache", lambda *_: False)
    reader = Reader(ring, "buffered", threads=2)
    slot = ring.take(2 * PAGE)
    (waiting,) = reader.fill(slot, [Extent(str(slow), 0, 2 * PAGE, 0)])
    assert hangs.wait(20)
    for number in range(OPEN_FILES + 10):
        other = tmp_path / f"{number}"
        other.write_bytes(b"o" * 2 * PAGE)
        theirs = ring.take(2 * PAGE)
        for future in reader.fill(theirs, [Extent(str(other), 0, 2 * PAGE, 0)]):
            future.result()
        assert bytes(ring.bytes_of(theirs, 0, 2 * PAGE)) == b"o" * 2 * PAGE
    go.set()
    waiting.result()
    assert bytes(ring.bytes_of(slot, 0, 2 * PAGE)) == b"s" * 2 * PAGE
    reader.close()
