"""The layer sweep against the ordinary backward pass of the whole model: the same bits, for many architectures."""

import threading
from dataclasses import replace

import pytest
import torch
from models import tiny
from torch import nn

from streammerge.engine.layers import Sweep
from streammerge.engine.layers_hooks import Hooks
from streammerge.engine.layers_loss import CrossEntropy
from streammerge.engine.layers_plan import Limits, plan_layers, plan_sweep
from streammerge.errors import BudgetTooSmall, Interrupted
from streammerge.models.stack import Stack
from streammerge.store.checkpoint import Checkpoint

GIB = 1 << 30


@pytest.fixture(autouse=True)
def one_thread():
    """Matrices this small are not worth handing to a second thread, nor is the wait for it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


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


@pytest.fixture
def llama(tmp_path):
    """A tied Llama of three layers, three batches, and what autograd says."""
    folder = tiny.save(tmp_path / "model", "llama-tied")
    batches = tiny.batches("llama-tied")
    return folder, batches, *tiny.expected(tiny.whole(folder, "llama-tied"), batches)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of transformers 4, for DeBERTa
@pytest.mark.parametrize("name", tiny.MODELS)
def test_gradients_are_those_of_the_whole_model(tmp_path, name):
    attention = tiny.attention(name)
    folder = tiny.save(tmp_path, name)
    batches = tiny.batches(name)
    losses, gradients = tiny.expected(tiny.whole(folder, name, attention=attention), batches)
    hooks = Collect()
    got, _ = sweep(folder, batches, hooks, attention=attention)
    assert got == losses
    same(hooks.found, gradients)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt2", "bert", "vit"])
def test_eager_attention(tmp_path, name):
    folder, batches, hooks = tiny.save(tmp_path, name), tiny.batches(name), Collect()
    losses, gradients = tiny.expected(tiny.whole(folder, name), batches)
    assert sweep(folder, batches, hooks)[0] == losses
    same(hooks.found, gradients)


@pytest.mark.parametrize(("group", "prefetch"), [(1, 0), (2, 1), (3, 1), (5, 0)])
def test_layers_that_are_resident_together(llama, group, prefetch):
    folder, batches, losses, gradients = llama
    hooks = Collect()
    got, plan = sweep(folder, batches, hooks, group=group, prefetch=prefetch)
    assert got == losses
    assert plan.group == group
    assert plan.prefetch == prefetch
    same(hooks.found, gradients)
    assert hooks.losses == [losses]
    layers = [f"model.layers.{number}" for number in (2, 1, 0)]
    assert hooks.emitted == ["head", *layers, "embedding"]


@pytest.mark.parametrize("sizes", [(1,) * 6, (6,), (4, 2)])
def test_micro_batches(llama, sizes):
    folder, *_ = llama
    batches = tiny.batches("llama-tied", sizes)
    losses, gradients = tiny.expected(tiny.whole(folder, "llama-tied"), batches)
    hooks = Collect()
    assert sweep(folder, batches, hooks)[0] == losses
    same(hooks.found, gradients)


def test_a_padded_sample_is_as_if_it_were_alone(llama):
    """Positions that only fill up a batch change nothing but the order of sums."""
    folder, *_ = llama
    (batch,) = tiny.batches("llama-tied", (3,))
    alone = []
    for row in range(3):
        kept = batch["attention_mask"][row].bool()
        batch["labels"][row, kept.nonzero()[0]] = -100  # alone, nothing comes before it that could predict it
        alone.append({name: value[row, kept][None] for name, value in batch.items()})
    tokens = int((batch["labels"][:, 1:] != -100).sum())
    found = []
    for batches in ([batch], alone):
        hooks = Collect()
        losses, _ = sweep(folder, batches, hooks, loss=CrossEntropy(tokens=tokens))
        found.append((sum(losses), hooks.found))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    for name, value in found[0][1].items():
        torch.testing.assert_close(value, found[1][1][name], rtol=1e-4, atol=1e-6)


def test_gradients_of_each_batch(llama):
    folder, batches, _, _ = llama
    model = tiny.whole(folder, "llama-tied")
    hooks = Collect("each")
    sweep(folder, batches, hooks)
    wanted = {}
    for number, batch in enumerate(batches):
        wanted |= {(name, number): value for name, value in tiny.expected(model, [batch])[1].items()}
    same(hooks.found, wanted)


@pytest.mark.parametrize("name", ["llama-tied", "mixtral", "bert-mlm"])
def test_bfloat16(tmp_path, name):
    attention = tiny.attention(name)
    folder, batches = tiny.save(tmp_path, name, torch.bfloat16), tiny.batches(name)
    model = tiny.whole(folder, name, torch.bfloat16, attention)
    each, summed = Collect("each"), Collect()
    sweep(folder, batches, each, dtype=torch.bfloat16, attention=attention)
    sweep(folder, batches, summed, dtype=torch.bfloat16, attention=attention)
    for number, batch in enumerate(batches):
        for tensor, value in tiny.expected(model, [batch])[1].items():
            assert value.dtype == torch.bfloat16
            assert torch.equal(each.found[tensor, number], value), tensor
    for tensor, value in summed.found.items():
        terms = [each.found[tensor, number].float() for number in range(3) if (tensor, number) in each.found]
        assert torch.equal(value, sum(terms[1:], terms[0])), tensor


def test_a_bfloat16_checkpoint_computed_in_float32(tmp_path):
    folder, batches, hooks = tiny.save(tmp_path, "llama", torch.bfloat16), tiny.batches("llama"), Collect()
    losses, gradients = tiny.expected(tiny.whole(folder, "llama"), batches)
    assert sweep(folder, batches, hooks)[0] == losses
    same(hooks.found, gradients)


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


def test_without_gradients_only_losses(llama):
    folder, batches, _, _ = llama
    model, hooks = tiny.whole(folder, "llama-tied"), Collect("none")
    losses, plan = sweep(folder, batches, hooks)
    with torch.no_grad():
        assert losses == [tiny.loss(model(**tiny.inputs(batch)), batch).item() for batch in batches]
    assert hooks.found == {}
    assert plan.passes == 1


def test_several_sweeps_of_one_plan(llama):
    folder, batches, losses, gradients = llama
    hooks = Collect()
    plan = plan_for(folder, batches, hooks)
    with Sweep(plan, poison=True) as running:
        for part in (batches, batches[1:], batches):
            hooks.found = {}
            assert running.run(part) == losses[len(batches) - len(part) :]
        same(hooks.found, gradients)


@pytest.mark.parametrize(
    ("name", "chunk"),
    [("llama", 1), ("llama", 60), ("llama-tied", 20), ("gemma2", 20), ("granite", 7), ("bert-mlm", 20)],
)
def test_the_vocabulary_in_parts(tmp_path, name, chunk):
    folder, batches = tiny.save(tmp_path, name), tiny.batches(name)
    whole, parts = Collect(), Collect()
    shift = name != "bert-mlm"
    losses, _ = sweep(folder, batches, whole, loss=CrossEntropy(tokens=50, shift=shift))
    got, _ = sweep(folder, batches, parts, loss=CrossEntropy(tokens=50, shift=shift, chunk=chunk))
    assert got == pytest.approx(losses, rel=1e-6)
    for tensor, value in whole.found.items():
        torch.testing.assert_close(parts.found[tensor], value, rtol=2e-4, atol=2e-7)


def test_the_vocabulary_whole_is_the_ordinary_loss(llama):
    folder, batches, losses, gradients = llama
    for chunk in (None, 61, 1000):
        hooks = Collect()
        assert sweep(folder, batches, hooks, loss=CrossEntropy(chunk=chunk))[0] == losses
        same(hooks.found, gradients)


class Net(nn.Module):
    """Any module whose layers are a chain: here with several tensors handed on, one of them by the embedding."""

    stages = "body.blocks"

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Conv1d(3, 8, 2), nn.Linear(8, 2, bias=False)
        self.gate = nn.Parameter(torch.ones(8))
        self.body = nn.Module()
        self.body.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x):
        hidden, extra = self.first(x).mean(-1), None
        gate = torch.sigmoid(self.gate)
        for block in self.body.blocks:
            hidden, extra = block(hidden, gate, extra=extra)
        return {"scores": self.last(hidden)}


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down, self.extra = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)

    def forward(self, hidden, gate, extra=None):
        if extra is None:
            extra = self.extra(hidden)
        return hidden + gate * self.down(torch.relu(self.up(hidden))) + extra, extra


@pytest.mark.parametrize("group", [1, 3])
def test_any_module_that_names_its_layers(tmp_path, group):
    from safetensors.torch import save_file

    torch.manual_seed(0)
    net = Net()
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    batches = [{"x": torch.randn(size, 3, 6), "labels": torch.randn(size, 2)} for size in (2, 5)]

    def loss(output, batch):
        return (output["scores"] - batch["labels"]).square().mean()

    losses, gradients = tiny.expected(net, batches, loss)
    checkpoint = Checkpoint.open(tmp_path)
    stack = Stack.of(Net, {name: spec.shape for name, spec in checkpoint.tensors.items()}, batches[0])
    assert set(stack.stages[0].tensors) == {"first.weight", "first.bias", "gate"}
    hooks = Collect()
    plan = plan_sweep(stack, [checkpoint], batches, loss, hooks, Limits(ram=8 * GIB, group=group))
    with Sweep(plan, poison=True) as running:
        assert running.run(batches) == losses
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
