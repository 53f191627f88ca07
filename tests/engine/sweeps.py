"""Sweeps over tiny models in debug mode, and a method that keeps the gradients that it is shown."""

import torch
from models import tiny

from streammerge.engine.layers import Sweep
from streammerge.engine.layers_hooks import Hooks
from streammerge.engine.layers_plan import Limits, plan_sweep
from streammerge.store.checkpoint import Checkpoint

GIB = 1 << 30


class Collect(Hooks):
    """Keeps what it is shown."""

    def __init__(self, gradients="sum"):
        self.gradients = gradients
        self.found = {}
        self.emitted = []
        self.losses = []

    def learn(self, stage, name, gradient, batch):
        key = name if batch is None else (name, batch)
        assert key not in self.found
        self.found[key] = gradient.clone()

    def emit(self, loaded):
        self.emitted.append(loaded.stage.name)

    def step(self, losses):
        self.losses.append(list(losses))


def plan_for(folder, batches, hooks, *, loss=tiny.loss, attention="eager", dtype=torch.float32, others=(), **limits):
    stack = tiny.stack(folder, batches[0], dtype, attention)
    checkpoints = [Checkpoint.open(path) for path in (folder, *others)]
    return plan_sweep(stack, checkpoints, batches, loss, hooks, Limits(**{"ram": 8 * GIB, **limits}))


def sweep(folder, batches, hooks, *, done=(), **settings):
    """One sweep in debug mode; losses and plan."""
    plan = plan_for(folder, batches, hooks, **settings)
    with Sweep(plan, poison=True) as running:
        losses = running.run(batches, done)
        assert len(running.scratch) == 0
        assert running.bytes_read == plan.read_bytes
    return losses, plan


def same(found, wanted):
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
