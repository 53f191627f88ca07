"""The layer sweep against the ordinary backward pass of the whole model: the same bits, for many architectures."""

import pytest
import torch
from engine.sweeps import GIB, Collect, same, sweep
from models import tiny
from torch import nn

from streammerge.engine.layers import Sweep
from streammerge.engine.layers_loss import CrossEntropy
from streammerge.engine.layers_plan import Limits, plan_sweep
from streammerge.models.stack import Stack
from streammerge.store.checkpoint import Checkpoint

pytestmark = pytest.mark.usefixtures("one_thread")


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


def test_without_gradients_only_losses(llama):
    folder, batches, _, _ = llama
    model, hooks = tiny.whole(folder, "llama-tied"), Collect("none")
    losses, plan = sweep(folder, batches, hooks)
    with torch.no_grad():
        assert losses == [tiny.loss(model(**tiny.inputs(batch)), batch).item() for batch in batches]
    assert hooks.found == {}
    assert plan.passes == 1


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
