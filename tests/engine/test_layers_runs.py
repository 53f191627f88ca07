"""A sweep reads what its plan says, keeps what fits, goes on where it was, can fail, stop, and be run again."""

import threading
from dataclasses import replace

import pytest
import torch
from engine.sweeps import Collect, plan_for, same, sweep
from models import tiny

from streammerge.engine.layers import Sweep
from streammerge.errors import BudgetTooSmall, Interrupted
from streammerge.store.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


def test_two_reads_of_a_weight_whatever_the_number_of_batches(tmp_path):
    folder = tiny.save(tmp_path, "llama")
    specs = Checkpoint.open(folder).tensors
    head = sum(spec.nbytes for name, spec in specs.items() if name in ("lm_head.weight", "model.norm.weight"))
    last = sum(spec.nbytes for name, spec in specs.items() if name.startswith("model.layers.2."))
    for sizes in ((1,), (1,) * 7):
        _, plan = sweep(folder, tiny.batches("llama", sizes), Collect())
        assert plan.passes == 2
        assert plan.read_bytes == 2 * sum(spec.nbytes for spec in specs.values()) - head - last  # both are turned in


def test_what_is_kept_goes_to_files_where_memory_ends(llama, tmp_path):
    folder, batches, losses, gradients = llama
    spill = tmp_path / "spill"
    spill.mkdir()
    hooks = Collect()
    plan = replace(plan_for(folder, batches, hooks), scratch_host_bytes=6000)
    with Sweep(plan, folder=spill, poison=True) as running:
        assert running.run(batches) == losses
        assert 0 < running.scratch.peak["host"] <= 6000
        assert running.scratch.peak["host"] + running.scratch.peak["disk"] <= plan.scratch_bytes
        assert running.scratch.peak["disk"] > 0
    same(hooks.found, gradients)
    assert not list(spill.iterdir())


def test_hidden_states_kept_in_bfloat16(llama):
    folder, batches, _, gradients = llama
    hooks = Collect()
    _, plan = sweep(folder, batches, hooks, scratch=torch.bfloat16)
    exact = plan_for(folder, batches, Collect())
    assert 2 * plan.scratch_bytes == exact.scratch_bytes
    for name, value in gradients.items():
        assert (hooks.found[name] - value).norm() < 0.05 * value.norm(), name
    assert any(not torch.equal(hooks.found[name], value) for name, value in gradients.items())


def test_finished_stages_are_computed_through(llama):
    folder, batches, losses, gradients = llama
    done = ["head", "model.layers.2", "model.layers.1"]
    hooks = Collect()
    assert sweep(folder, batches, hooks, done=done)[0] == losses
    first = {name: value for name, value in gradients.items() if ".0." in name or "embed" in name}
    same(hooks.found, first)
    assert hooks.emitted == ["model.layers.0", "embedding"]


def test_a_finished_embedding(llama):
    folder, batches, losses, gradients = llama
    hooks = Collect()
    assert sweep(folder, batches, hooks, done=["embedding"])[0] == losses
    same(hooks.found, {name: value for name, value in gradients.items() if "embed" not in name})


def test_several_sweeps_of_one_plan(llama):
    folder, batches, losses, gradients = llama
    hooks = Collect()
    plan = plan_for(folder, batches, hooks)
    with Sweep(plan, poison=True) as running:
        for part in (batches, batches[1:], batches):
            hooks.found = {}
            assert running.run(part) == losses[len(batches) - len(part) :]
        same(hooks.found, gradients)


def test_an_error_of_the_method_leaves_nothing_behind(llama):
    folder, batches, losses, gradients = llama

    class Fails(Collect):
        def learn(self, stage, name, gradient, batch):
            if fail and stage.name == "model.layers.1":
                raise ValueError("not this one")
            super().learn(stage, name, gradient, batch)

    fail, hooks = True, Fails()
    plan = plan_for(folder, batches, hooks)
    with Sweep(plan, poison=True) as running:
        with pytest.raises(ValueError, match="not this one"):
            running.run(batches)
        assert len(running.scratch) == 0
        assert not [thread for thread in threading.enumerate() if thread.name == "weights"]
        fail, hooks.found = False, {}
        assert running.run(batches) == losses
    same(hooks.found, gradients)
    assert running.host.taken == plan.process_bytes + plan.room_bytes + plan.constants_bytes


def test_it_can_be_stopped(llama):
    folder, batches, _, _ = llama
    seen = []
    plan = plan_for(folder, batches, Collect())
    running = Sweep(plan, progress=lambda done, of: seen.append((done, of)), cancelled=lambda: len(seen) == 4)
    with running, pytest.raises(Interrupted):
        running.run(batches)
    assert seen == [(number, 9) for number in (1, 2, 3, 4)]


def test_a_sweep_that_does_not_fit_says_what_would_do(llama, monkeypatch):
    from streammerge.budget import Resident

    monkeypatch.setattr("streammerge.engine.layers_plan.resident", lambda: Resident(1 << 20, 0, 0))
    folder, batches, losses, _ = llama
    with pytest.raises(BudgetTooSmall) as caught:
        plan_for(folder, batches, Collect(), ram=1 << 20)
    least = caught.value.least
    with pytest.raises(BudgetTooSmall):
        plan_for(folder, batches, Collect(), ram=least - 1)
    got, plan = sweep(folder, batches, Collect(), ram=least)
    assert got == losses
    assert plan.prefetch == 0
    assert plan.scratch_disk_bytes == plan.scratch_bytes
    assert plan.ram_peak_bytes == least
