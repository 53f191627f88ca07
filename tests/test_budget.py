"""Sizes as people write them, and the account of bytes."""

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streammerge.budget import Budget, default_ram, human, parse_size, resident
from streammerge.errors import BudgetTooSmall, RecipeError

GIB = 1 << 30


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 * GIB),
        ("4GB", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("500M", 500_000_000),
        ("1.5 GiB", 3 * GIB // 2),
        ("  2 mib ", 2 << 20),
        ("64ki", 64 << 10),
        ("1kb", 1000),
        ("1TiB", 1 << 40),
        ("1048576", 1 << 20),
        ("17B", 17),
        (12345, 12345),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "4 iB", "four", "-1GiB", "4GiBs", "1,5G", "1e9", "4 G iB", "0x10", "."])
def test_what_is_no_size(text):
    with pytest.raises(RecipeError, match="is not a size; write it as 4GiB"):
        parse_size(text)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (512 << 20, "512 MiB"),
        (int(7.9 * GIB), "7.9 GiB"),
        (3 << 40, "3 TiB"),
    ],
)
def test_human(size, text):
    assert human(size) == text


@given(st.integers(0, 1 << 45))
def test_human_reads_back(size):
    assert parse_size(human(size).replace("bytes", "B")) == pytest.approx(size, rel=0.06)


def test_the_account():
    budget = Budget(1000, taken=100)
    budget.take(600, "tiles")
    assert (budget.free, budget.taken, budget.peak) == (300, 700, 700)
    budget.give(500)
    with budget.lease(300, "a survey"):
        assert budget.taken == 500
    assert (budget.taken, budget.peak) == (200, 700)
    budget.take(800, "all of the rest")
    assert (budget.free, budget.peak) == (0, 1000)


def test_taking_more_than_is_free_is_refused_with_what_would_do():
    budget = Budget(3000, taken=1000)
    with pytest.raises(BudgetTooSmall) as caught:
        budget.take(2001, "the ring")
    assert str(caught.value) == "the ring needs 2.0 KiB, 2.0 KiB of 2.9 KiB are free; give at least 2.9 KiB"
    assert caught.value.least == 3001
    assert budget.taken == 1000


def test_a_lease_ends_with_its_block():
    budget = Budget(10)
    with pytest.raises(ZeroDivisionError), budget.lease(10, "x"):
        raise ZeroDivisionError
    assert budget.taken == 0


def test_giving_what_was_not_taken_is_a_bug():
    budget = Budget(10)
    budget.take(4, "x")
    for size in (5, -1):
        with pytest.raises(AssertionError):
            budget.give(size)


def test_many_threads_keep_one_account():
    budget = Budget(8 * 7)

    def work():
        for _ in range(2000):
            with budget.lease(7, "x"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert budget.taken == 0
    assert 7 <= budget.peak <= 56


def test_resident_memory_is_counted():
    before = resident().demand
    held = bytearray(b"x" * (64 << 20))
    assert resident().demand - before > 60 << 20
    del held
    assert 0 < default_ram() < 1 << 50
