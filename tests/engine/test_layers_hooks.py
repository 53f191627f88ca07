"""What a method may do during a sweep: weights of its own, other checkpoints, panels, layers without arithmetic."""

import pytest
import torch
from engine.sweeps import Collect, same, sweep
from models import tiny

from streammerge.engine.layers import Sweep
from streammerge.engine.layers_hooks import Hooks
from streammerge.engine.layers_plan import plan_layers
from streammerge.store.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


class Apart(Collect):
    """Runs the model at weights that are composed of two other checkpoints."""

    def reads(self, stage, backward):
        return (2, 1)

    def composes(self, stage):
        return True

    def weights(self, loaded, backward):
        assert set(loaded.raw[1]) == set(loaded.raw[2]) == set(loaded.fresh)
        for name in loaded.fresh:
            loaded.weights[name].copy_(loaded.raw[1][name] - 0.5 * loaded.raw[2][name].float())


@pytest.mark.parametrize("name", ["llama-tied", "llama", "mixtral"])
def test_composed_weights(tmp_path, name):
    folder = tiny.save(tmp_path / "model", name)
    one = tiny.save(tmp_path / "one", name, seed=1)
    two = tiny.save(tmp_path / "two", name, torch.bfloat16, seed=2)
    batches, hooks = tiny.batches(name), Apart()
    model, other = tiny.whole(one, name), tiny.whole(two, name)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine -= 0.5 * theirs
    losses, gradients = tiny.expected(model, batches)
    got, plan = sweep(folder, batches, hooks, others=(one, two))
    assert got == losses
    same(hooks.found, gradients)
    assert not any(read.spec.file.startswith(f"{folder}/") for v in plan.visits for u in v.units for read in u.reads)


class Beside(Collect):
    """Looks at another checkpoint's tensors during the backward pass."""

    def __init__(self):
        super().__init__("each")
        self.raw = {}

    def reads(self, stage, backward):
        return (1,) if backward else ()

    def emit(self, loaded):
        assert set(loaded.raw[1]) == set(loaded.stage.tensors)
        self.raw |= {name: tensor.clone() for name, tensor in loaded.raw[1].items()}


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
def test_other_checkpoints_are_shown_as_they_are_stored(tmp_path, name):
    from safetensors.torch import load_file

    folder = tiny.save(tmp_path / "model", name)
    other = tiny.save(tmp_path / "other", name, torch.bfloat16, seed=1)
    hooks = Beside()
    _, plan = sweep(folder, tiny.batches(name), hooks, others=(other,))
    same(hooks.raw, load_file(other / "model.safetensors"))
    read = [r.spec for v in plan.visits for u in v.units if u.source == 1 for r in u.reads]
    assert len(read) == len(hooks.raw)


class Panels(Collect):
    """Puts gradients of linear layers together from what went in and what came back."""

    panels = True

    def __init__(self):
        super().__init__("each")
        self.addresses = {}

    def panel(self, stage, name, inputs, outputs, batch):
        assert inputs.dim() == outputs.dim() == 2
        self.found[name, batch] = outputs.T @ inputs
        self.addresses.setdefault((stage.index, batch), {})[name.split(".")[-2]] = inputs.data_ptr()


def test_panels_make_the_gradients_of_linear_layers(llama):
    folder, batches, _, _ = llama
    plain, panels = Collect("each"), Panels()
    sweep(folder, batches, plain)
    sweep(folder, batches, panels)
    assert set(panels.found) == set(plain.found)
    for name, value in plain.found.items():
        torch.testing.assert_close(panels.found[name], value, rtol=1e-4, atol=1e-6)
    for seen in panels.addresses.values():
        assert seen["q_proj"] == seen["k_proj"] == seen["v_proj"] != seen["o_proj"]
        assert seen["gate_proj"] == seen["up_proj"] != seen["down_proj"]


class Look(Hooks):
    """Copies every layer that comes by."""

    def __init__(self):
        self.weights_seen = {}
        self.raw_seen = {}

    def reads(self, stage, backward):
        return (1,)

    def emit(self, loaded):
        self.weights_seen |= {name: tensor.clone() for name, tensor in loaded.weights.items()}
        self.raw_seen |= {name: tensor.clone() for name, tensor in loaded.raw[1].items()}


@pytest.mark.parametrize("name", ["llama", "mixtral"])
def test_layers_one_by_one(tmp_path, name):
    from safetensors.torch import load_file

    folder, other = tiny.save(tmp_path / "a", name), tiny.save(tmp_path / "b", name, seed=1)
    hooks = Look()
    plan = plan_layers(tiny.stack(folder, None), [Checkpoint.open(folder), Checkpoint.open(other)], hooks)
    with Sweep(plan, poison=True) as running:
        running.layers()
        assert running.bytes_read == plan.read_bytes
    for seen, path in ((hooks.weights_seen, folder), (hooks.raw_seen, other)):
        same(seen, {n: t for n, t in load_file(path / "model.safetensors").items() if ".layers." in n})
