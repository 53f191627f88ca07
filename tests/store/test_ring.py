"""A ring against a model of it: order, wrap-around, waiting, and that no two slots ever share a byte."""

import random
import threading
import time
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streammerge.budget import Budget
from streammerge.errors import BudgetTooSmall
from streammerge.store.ring import PAGE, Closed, Ring


@pytest.fixture
def ring():
    ring = Ring(Budget(1 << 30), 8 * PAGE, "a ring")
    yield ring
    ring.close()


class Taker:
    """Takes one slot on a thread of its own, so that waiting can be seen."""

    def __init__(self, ring, size):
        self.slot = self.error = None
        self._thread = threading.Thread(target=self._run, args=(ring, size))
        self._thread.start()

    def _run(self, ring, size):
        try:
            self.slot = ring.take(size)
        except Closed as error:
            self.error = error

    def waits(self):
        self._thread.join(0.05)
        return self._thread.is_alive()

    def done(self):
        self._thread.join(10)
        assert not self._thread.is_alive(), "still waiting"
        return self.slot


def test_slots_are_pages_in_order(ring):
    slots = [ring.take(size) for size in (1, PAGE, PAGE + 1, 0)]
    assert [(s.offset // PAGE, s.size // PAGE) for s in slots] == [(0, 1), (1, 1), (2, 2), (4, 1)]
    assert all(slot.address % PAGE == 0 for slot in slots)
    assert slots[2].address - slots[0].address == 2 * PAGE


def test_a_slot_is_the_memory_it_names(ring):
    slot = ring.take(PAGE)
    ring.bytes_of(slot, 3, 6)[:] = b"abc"
    memory = np.ctypeslib.as_array((np.ctypeslib.ctypes.c_uint8 * 8).from_address(slot.address))
    assert bytes(memory) == b"\0\0\0abc\0\0"
    assert bytes(ring.bytes_of(slot, 2, 7)) == b"\0abc\0"


def test_taking_waits_for_room(ring):
    first, second = ring.take(5 * PAGE), ring.take(3 * PAGE)
    taker = Taker(ring, PAGE)
    assert taker.waits()
    ring.give(first)
    assert taker.done().offset == 0
    ring.give(second)


def test_slots_given_out_of_order_wait_for_the_oldest(ring):
    first, second = ring.take(4 * PAGE), ring.take(4 * PAGE)
    taker = Taker(ring, PAGE)
    ring.give(second)
    assert taker.waits()
    ring.give(first)
    assert taker.done() is not None


def test_a_slot_does_not_wrap_around(ring):
    first, second = ring.take(3 * PAGE), ring.take(3 * PAGE)
    ring.give(first)
    third = ring.take(3 * PAGE)  # two pages are left at the end: it starts over
    assert third.offset == 0
    taker = Taker(ring, PAGE)
    assert taker.waits(), "room that was skipped was handed out"
    ring.give(second)
    assert taker.done().offset == 3 * PAGE


def test_a_slot_may_be_the_whole_ring(ring):
    for _ in range(3):
        slot = ring.take(8 * PAGE)
        assert (slot.offset, slot.size) == (0, 8 * PAGE)
        ring.give(slot)
    ring.give(ring.take(PAGE))
    assert ring.take(8 * PAGE).offset == 0, "an empty ring stands at its beginning"


def test_more_than_the_ring_is_a_bug(ring):
    with pytest.raises(AssertionError, match="a slot of"):
        ring.take(8 * PAGE + 1)


def test_stop_wakes_who_waits_and_refuses_who_comes(ring):
    ring.take(8 * PAGE)
    taker = Taker(ring, PAGE)
    assert taker.waits()
    ring.stop()
    taker.done()
    assert isinstance(taker.error, Closed)
    with pytest.raises(Closed):
        ring.take(1)


def test_the_budget_knows_of_the_ring():
    budget = Budget(10 * PAGE)
    ring = Ring(budget, 9 * PAGE + 1, "a ring")
    assert budget.taken == 10 * PAGE
    with pytest.raises(BudgetTooSmall, match="another ring needs"):
        Ring(budget, 1, "another ring")
    ring.close()
    assert budget.taken == 0


class Model:
    """The same promises in the plainest way: a list of the slots in use."""

    def __init__(self, pages):
        self.pages, self.slots = pages, []  # (first page, pages, given)

    def place(self, pages):
        """Where the next slot must go; None if there is no room yet."""
        if not self.slots:
            return 0 if pages <= self.pages else None
        tail, head = self.slots[0][0], self.slots[-1][0] + self.slots[-1][1]
        if head > tail:
            if head + pages <= self.pages:
                return head
            return 0 if pages <= tail else None
        return head if head + pages <= tail else None

    def give(self, at):
        self.slots[at][2] = True
        while self.slots and self.slots[0][2]:
            self.slots.pop(0)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.lists(st.integers(-12, 12).filter(bool), max_size=60))
def test_places_are_those_of_the_model(pages, moves):
    """Positive moves take so many pages if there is room, negative ones give back one of the slots in use."""
    ring, model, held = Ring(Budget(1 << 20), pages * PAGE, "a ring"), Model(pages), []
    for move in moves:
        if move > 0 and (at := model.place(move)) is not None:
            slot = ring.take(move * PAGE)
            assert (slot.offset, slot.size) == (at * PAGE, move * PAGE)
            row = [at, move, False]
            model.slots.append(row)
            held.append((slot, row))
        elif move < 0 and held:
            slot, row = held.pop(-move % len(held))
            ring.give(slot)
            model.give(next(i for i, other in enumerate(model.slots) if other is row))
    ring.close()


@pytest.mark.parametrize("seed", range(3))
def test_two_threads_never_share_a_byte(seed):
    """One thread takes and marks its slots, the other checks the marks and gives them back in any order."""
    dice = random.Random(seed)
    ring = Ring(Budget(1 << 20), 16 * PAGE, "a ring")
    sizes = [dice.randint(1, 6 * PAGE) for _ in range(1500)]
    ready, faults = deque(), []

    def check():
        seen, held = 0, []
        while seen < len(sizes):
            while ready:
                held.append(ready.popleft())
            if not held:
                time.sleep(0)
                continue
            slot, mark = held.pop(dice.randrange(len(held)) if dice.random() < 0.5 else 0)
            ring_bytes = ring.bytes_of(slot, 0, slot.size)
            if ring_bytes != bytes([mark]) * slot.size:
                faults.append((slot, mark))
            ring.give(slot)
            seen += 1

    checker = threading.Thread(target=check)
    checker.start()
    for number, size in enumerate(sizes):
        slot = ring.take(size)
        assert slot.offset + slot.size <= ring.size
        mark = number % 251
        ring.bytes_of(slot, 0, slot.size)[:] = bytes([mark]) * slot.size
        ready.append((slot, mark))
    checker.join(20)
    assert not checker.is_alive()
    assert not faults
    ring.close()
