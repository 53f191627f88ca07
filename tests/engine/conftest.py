"""The GPU that tests run on, and a model to sweep over."""

import pytest
from engine import simulated
from models import tiny


@pytest.fixture
def gpu(monkeypatch):
    """A function that makes `--device cuda` a simulated GPU, unless there is a real one."""
    return lambda seed=0, **more: None if simulated.REAL else simulated.install(monkeypatch, seed, **more)


@pytest.fixture
def llama(tmp_path):
    """A tied Llama of three layers, three batches, and what autograd says."""
    folder = tiny.save(tmp_path / "model", "llama-tied")
    batches = tiny.batches("llama-tied")
    return folder, batches, *tiny.expected(tiny.whole(folder, "llama-tied"), batches)
