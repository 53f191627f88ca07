"""What is kept between sweeps: where the choice falls, and that what is kept comes back."""

import itertools

import pytest
import torch

from streammerge.engine.composing_store import Sizes, Store, choose_places

MANY = Sizes(9 * 2, 9 * 2, 4)  # eight experts in bf16, composed in fp32
FEW = Sizes(3 * 2, 3 * 2, 4)  # two


@pytest.mark.parametrize(
    ("sizes", "room", "late", "wanted"),
    [
        (MANY, 0, False, "disk"),  # 18 + 8 bytes moved instead of 36
        (FEW, 0, False, "twice"),  # 6 + 8 instead of 12
        (MANY, 4, False, "memory"),
        (MANY, 17, False, "memory"),
        (MANY, 18, False, "pinned"),
        (FEW, 4, False, "memory"),
        (FEW, 6, False, "pinned"),
        (MANY, 17, True, "twice"),
        (MANY, 18, True, "pinned"),
        (Sizes(6, 0, 4), 0, False, "disk"),  # nothing learns: 8 instead of 12, composed once
    ],
)
def test_one_stage(sizes, room, late, wanted):
    assert choose_places([sizes], room, [late]) == [wanted]


def test_composed_weights_come_before_pinned_ones_where_they_save_more():
    assert choose_places([MANY] * 4, 3 * 4, [False] * 4) == ["memory"] * 3 + ["disk"]
    assert choose_places([MANY] * 4, 4 * 4 + 13, [False] * 4) == ["memory"] * 4
    assert choose_places([MANY] * 4, 4 * 4 + 14, [False] * 4) == ["pinned"] + ["memory"] * 3
    assert choose_places([MANY] * 4, 1000, [False] * 4) == ["pinned"] * 4


@pytest.mark.parametrize("late", [False, True])
def test_more_room_never_moves_more_and_is_never_exceeded(late):
    stages = [MANY, FEW, Sizes(40, 10, 12), Sizes(7, 7, 30), Sizes(0, 0, 0)]
    before = None
    for room in range(0, 120):
        found = choose_places(stages, room, [late] * len(stages))
        assert sum(size.held(place) for size, place in zip(stages, found, strict=True)) <= room
        moved = sum(size.moved(place) for size, place in zip(stages, found, strict=True))
        assert not late or set(found) <= {"twice", "pinned"}
        if room == 0:
            before = moved
        assert moved <= before
    assert set(found) <= {"pinned", "disk", "twice", "memory"}
    assert moved == 0


def test_what_is_kept_comes_back(tmp_path):
    names = {"m": "memory", "d": "disk", "t": "twice", "p": "pinned", "e": "disk"}
    store, values = (
        Store(names, tmp_path),
        {name: torch.arange(15.0).view(3, 5) * at for at, name in enumerate(names, 1)},
    )
    for number in range(2):
        for name, value in values.items():
            store.put(name, value + number)
            value += 1  # what is kept is a copy
    assert [name in store for name in names] == [True, True, False, False, True]
    for name in "mde":
        out = torch.empty(3, 5)
        store.fill(name, out)
        assert torch.equal(out, values[name])
    assert (store.bytes_written, store.bytes_read) == (2 * 2 * 60, 2 * 60)
    store.pin("p", {0: values["p"], 2: values["m"]})
    store.pin("t", {0: values["p"]})
    found = store.pinned("p", torch.device("cpu"))
    values["p"] += 1
    assert list(found) == [0, 2]
    assert torch.equal(found[0], values["p"] - 1)
    assert store.pinned("t", torch.device("cpu")) is None
    assert len(list(tmp_path.iterdir())) == 1
    store.close()
    assert not list(tmp_path.iterdir())
    assert not any(name in store for name in names)


def test_nothing_is_made_on_the_disk_without_need(tmp_path):
    store = Store(dict.fromkeys("ab", "memory"), tmp_path)
    for name, _ in itertools.product("ab", range(2)):
        store.put(name, torch.zeros(2))
    assert not list(tmp_path.iterdir())
    store.close()
