"""Triton kernels run on the GPU if there is one, else in the interpreter: chosen before anything imports triton."""

from __future__ import annotations

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


@pytest.fixture
def one_thread():
    """Matrices this small are not worth handing to a second thread, nor is the wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def fresh_process(monkeypatch):
    """Plans count what their process holds: here a new one's share, not what the tests before this one left behind."""
    from streammerge.budget import MIB, Resident

    monkeypatch.setattr("streammerge.planner.plan.resident", lambda: Resident(96 * MIB, 0, 64 * MIB))
