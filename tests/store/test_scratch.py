"""Scratch: what is kept comes back as it was, wherever it had to go, and nothing of it stays."""

import os

import pytest
import torch

from streammerge.budget import Budget
from streammerge.errors import MachineError
from streammerge.store.scratch import Scratch

KIB = 1 << 10


def some(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "spill").mkdir()
    return tmp_path / "spill"


def test_memory_first_then_files(folder):
    budget = Budget(100 * KIB)
    scratch = Scratch(budget, 2 * KIB, folder=folder)
    values = {number: some(16, 16, seed=number) for number in range(4)}  # one KiB each
    for key, value in values.items():
        scratch.put(key, value)
    assert scratch.held == {"device": 0, "host": 2 * KIB, "disk": 2 * KIB}
    assert budget.taken == 2 * KIB
    assert len(list(folder.glob("*/*"))) == 2
    for key in (3, 0, 2, 1):
        assert torch.equal(scratch.get(key), values[key])
    for key in values:
        scratch.drop(key)
    assert scratch.held == {"device": 0, "host": 0, "disk": 0}
    assert scratch.peak == {"device": 0, "host": 2 * KIB, "disk": 2 * KIB}
    assert budget.taken == 0
    scratch.close()
    assert not list(folder.iterdir())


def test_room_that_came_free_is_used_again(folder):
    scratch = Scratch(Budget(100 * KIB), KIB, folder=folder)
    scratch.put("a", some(256))
    scratch.drop("a")
    scratch.put("b", some(256))
    assert scratch.held["disk"] == 0
    scratch.close()


def test_a_budget_that_others_have_used_up_means_files(folder):
    budget = Budget(10 * KIB, taken=10 * KIB - 512)
    scratch = Scratch(budget, 4 * KIB, folder=folder)
    scratch.put("large", some(256))
    scratch.put("small", some(64))
    assert scratch.held == {"device": 0, "host": 256, "disk": KIB}
    scratch.close()
    assert budget.taken == 10 * KIB - 512


@pytest.mark.parametrize("share", [0, 1 << 20])
@pytest.mark.parametrize(
    "value",
    [
        some(3, 5, dtype=torch.bfloat16),
        some(7, dtype=torch.float16),
        some(2, 2, dtype=torch.float64),
        torch.arange(5),
        torch.tensor([True, False]),
        torch.tensor(2.5),
        torch.empty(0, 4),
        some(6, 4).T,
        some(8, 8)[:, 2:5],
    ],
    ids=str,
)
def test_every_kind_of_tensor_comes_back(folder, share, value):
    scratch = Scratch(Budget(1 << 20), share, folder=folder)
    scratch.put("x", value)
    back = scratch.get("x")
    assert back.dtype == value.dtype
    assert back.shape == value.shape
    assert torch.equal(back, value)
    assert scratch.held["host" if share else "disk"] == value.numel() * value.element_size()
    scratch.close()


@pytest.mark.parametrize("share", [0, 1 << 20])
def test_kept_in_another_dtype(folder, share):
    scratch = Scratch(Budget(1 << 20), share, folder=folder, dtype=torch.bfloat16)
    value, whole = some(9, 9), torch.arange(9)
    scratch.put("x", value)
    scratch.put("n", whole)
    assert torch.equal(scratch.get("x"), value.bfloat16().float())
    assert torch.equal(scratch.get("n"), whole)
    assert scratch.held["host" if share else "disk"] == 81 * 2 + 9 * 8
    scratch.close()


def test_a_part_of_a_tensor_does_not_keep_the_whole():
    scratch = Scratch(Budget(KIB), KIB)
    scratch.put("row", some(1000, 16)[3])
    assert scratch.get("row").untyped_storage().nbytes() == 64
    scratch.close()


def test_memory_is_not_copied_without_need():
    value = some(8, 8)
    scratch = Scratch(Budget(KIB), KIB)
    scratch.put("x", value)
    assert scratch.get("x").data_ptr() == value.data_ptr()
    scratch.close()


def test_gradients_do_not_flow_through_what_is_kept():
    scratch = Scratch(Budget(KIB), KIB)
    scratch.put("x", some(4).requires_grad_() * 2)
    assert not scratch.get("x").requires_grad
    scratch.close()


def test_who_still_holds_what_was_dropped_finds_nan():
    scratch = Scratch(Budget(KIB), KIB, poison=True)
    scratch.put("x", some(4))
    held = scratch.get("x")
    scratch.drop("x")
    assert torch.isnan(held).all()
    scratch.close()


def test_a_change_to_what_is_kept_is_found():
    scratch = Scratch(Budget(KIB), KIB)
    value = some(4)
    scratch.put("x", value)
    value += 1
    with pytest.raises(AssertionError, match="changed while it was kept"):
        scratch.get("x")
    scratch.close()


def test_no_key_twice():
    scratch = Scratch(Budget(KIB), KIB)
    scratch.put(("a", 1), some(4))
    with pytest.raises(AssertionError, match="kept already"):
        scratch.put(("a", 1), some(4))
    scratch.close()


def test_closing_forgets_everything(folder):
    budget = Budget(KIB)
    scratch = Scratch(budget, 64, folder=folder)
    for number in range(4):
        scratch.put(number, some(16, seed=number))
    scratch.close()
    assert len(scratch) == 0
    assert budget.taken == 0
    assert not list(folder.iterdir())
    scratch.put(0, some(16))  # and can be used again
    scratch.put(1, some(16))
    assert len(list(folder.glob("*/*"))) == 1
    scratch.close()


def test_a_full_disk_is_one_line(folder, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    scratch = Scratch(Budget(KIB), 0, folder=folder)
    with pytest.raises(MachineError, match=r"cannot keep 64 bytes between layers \(the disk is full\)") as caught:
        scratch.put("x", some(16))
    assert "\n" not in str(caught.value)
    assert "x" not in scratch
    assert not list(folder.glob("*/*"))
    scratch.close()


def test_a_file_that_was_cut_short_is_found(folder):
    scratch = Scratch(Budget(KIB), 0, folder=folder)
    scratch.put("x", some(16))
    (path,) = folder.glob("*/*")
    os.truncate(path, 10)
    with pytest.raises(MachineError, match="ended at byte 10 of 64"):
        scratch.get("x")
    scratch.close()
