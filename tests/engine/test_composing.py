"""Gradients of coefficients in a sweep, against autograd through whole composed models in fp64."""

import zlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from models import tiny

from streammerge.engine.composing import Composing, Mix, Selecting
from streammerge.engine.composing_store import Store
from streammerge.engine.layers import Sweep
from streammerge.engine.layers_plan import Limits, plan_sweep
from streammerge.engine.learner import Block, Course, Learner
from streammerge.engine.places import HostPlace
from streammerge.kernels import reference
from streammerge.kernels.numerics import Partition
from streammerge.methods._composed import Composed
from streammerge.store.checkpoint import Checkpoint

EXPERTS = 3
SMOOTH = pytest.mark.parametrize("models", ["bert-mlm"], indirect=True)  # Llama's norms are computed in fp32
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=["llama", "llama-tied", "bert-mlm"])
def models(request, tmp_path_factory):
    """A base and experts near it; their folders, and their tensors in fp64."""
    folder = tmp_path_factory.mktemp(request.param)
    paths = [tiny.save(folder / "0", request.param)]
    for number in range(1, EXPERTS + 1):
        model = tiny.whole(paths[0], request.param)
        torch.manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.05 * torch.randn_like(parameter)
        model.save_pretrained(folder / str(number))
        paths.append(folder / str(number))
    return request.param, paths


def micro(name, count):
    """Five samples of one length as `count` batches, and the number that their loss is divided by."""
    (whole,) = tiny.batches(name, sizes=(5,))
    labels = (whole["labels"][:, 1:] != -100).sum()
    cuts = {1: [5], 2: [3, 2], 5: [1] * 5}[count]
    return [
        dict(zip(whole, part, strict=True)) for part in zip(*(v.split(cuts) for v in whole.values()), strict=True)
    ], int(labels)


def loss_by(tokens):
    """Cross-entropy in the logits' own precision, divided by the tokens of all batches."""

    def loss(output, batch):
        labels = torch.nn.functional.pad(batch["labels"], (0, 1), value=-100)[..., 1:]
        logits = output.logits.view(-1, output.logits.shape[-1])
        return torch.nn.functional.cross_entropy(logits, labels.reshape(-1), reduction="sum") / tokens

    return loss


class Noting(Learner):
    """Keeps the gradients that it is given."""

    def take(self, name, gradient):
        self.found = {**getattr(self, "found", {}), name: gradient}
        return super().take(name, gradient)


def mixed(stack, names, table, place, groups):
    """Everything that a sweep composes; `table` has the first coefficients of every tensor, [experts, groups]."""
    shapes = {name: tuple(spec.shape) for name, spec in names.items()}
    owned = [name for stage in stack.stages for name in stage.tensors]
    blocks = {name: Block(name, tuple(map(tuple, table[name].tolist())), 0.1, 0.1, True) for name in owned}
    methods = {name: Composed(blocks[name].init, zlib.crc32(name.encode()), 0) for name in owned}
    return Mix(methods, shapes, blocks, dict.fromkeys(owned, place), EXPERTS)


class World:
    """A stack with its checkpoints, ready for sweeps."""

    def __init__(self, models, tmp_path, *, count=1, groups=1, place="twice", dtype=torch.float64, seed=0):
        name, self.paths = models
        self.batches, tokens = micro(name, count)
        self.loss = loss_by(tokens)
        self.stack = tiny.stack(self.paths[0], self.batches[0], dtype, tiny.attention(name))
        self.checkpoints = [Checkpoint.open(path) for path in self.paths]
        random = np.random.default_rng(seed)
        owned = [name for stage in self.stack.stages for name in stage.tensors]
        self.table = {name: random.normal(0, 0.5, (EXPERTS, groups)) for name in owned}
        self.groups, self.name, self.tmp_path, self.place = groups, name, tmp_path, place

    def sweeps(self, steps=1, kind=Composing, course=None, **limits):
        """The learner after so many steps, losses, and the bytes that each step read."""
        mix = mixed(self.stack, self.checkpoints[0].tensors, self.table, self.place, self.groups)
        late = frozenset(self.stack.stages[-1].tensors) if self.stack.stages[-1].borrowed else frozenset()
        learner, store = Noting(mix.blocks, course or Course(8, True, late=late)), Store(mix.places, self.tmp_path)
        if late and self.place in ("memory", "disk"):
            mix = replace(mix, places={**mix.places, **dict.fromkeys(late, "twice")})
            store = Store(mix.places, self.tmp_path)
        losses, reads, planned = [], [], []
        for step in range(steps):
            hooks = Selecting(mix) if kind is Selecting else Composing(mix, learns=True, opening=step == 0, bare=False)
            place = HostPlace(1)
            hooks.begin(store, learner, place)
            plan = plan_sweep(
                self.stack, self.checkpoints, self.batches, self.loss, hooks, Limits(ram="8GiB", **limits)
            )
            with Sweep(plan, poison=True) as sweep:
                losses.append(sum(sweep.run(self.batches)))
                reads.append(sweep.bytes_read)
                planned.append(plan.read_bytes)
            place.close()
        assert reads == planned
        store.close()
        self.hooks = hooks
        return learner, losses, reads


def composed(world, leaves, watched=None):
    """The loss on all batches of the whole model with coefficients [experts, groups] by tensor, fp64, as a graph.

    `watched` are forward hooks of modules.
    """
    model = tiny.whole(world.paths[0], world.name, attention=tiny.attention(world.name)).double()
    files = [loaded(path) for path in world.paths]
    values = {}
    for name, leaf in leaves.items():
        base = files[0][name].double()
        groups = torch.zeros(base.shape, dtype=torch.int64)
        if world.groups > 1:
            split = Partition(0, zlib.crc32(name.encode()))
            groups = reference.partition(0, base.numel(), world.groups, split, "cpu").view(base.shape).long()
        values[name] = base + sum(leaf[k][groups] * (files[k + 1][name].double() - base) for k in range(EXPERTS))
    model.requires_grad_(False)
    for module, hook in (watched or {}).items():
        model.get_submodule(module).register_forward_hook(hook)
    outputs = [torch.func.functional_call(model, values, (), tiny.inputs(batch)) for batch in world.batches]
    return sum(world.loss(output, batch) for output, batch in zip(outputs, world.batches, strict=True))


def whole(world, table):
    """The loss and dL/dc of plain autograd through the whole composed model, fp64."""
    leaves = {name: torch.tensor(rows, requires_grad=True) for name, rows in table.items()}
    total = composed(world, leaves)
    total.backward()
    return float(total.detach()), {name: leaf.grad.numpy() for name, leaf in leaves.items()}


def loaded(path):
    from safetensors.torch import load_file

    return load_file(path / "model.safetensors")


def worst(found, wanted):
    """The largest difference beside the largest gradient of all: that of a key's bias is nothing but rounding."""
    assert set(found) == set(wanted)
    scale = max(float(np.abs(each).max()) for each in wanted.values())
    return max(float(np.abs(found[name] - wanted[name]).max()) for name in wanted) / scale


@pytest.mark.parametrize(("groups", "count"), [(1, 1), (1, 2), (1, 5), (4, 2), (7, 1)])
def test_gradients_are_those_of_the_whole_model(models, tmp_path, groups, count):
    world = World(models, tmp_path, groups=groups, count=count)
    learner, losses, _ = world.sweeps()
    loss, wanted = whole(world, world.table)
    assert losses[0] == pytest.approx(loss, rel=1e-14)
    assert worst(learner.found, wanted) < 1e-14


@SMOOTH
def test_gradients_are_finite_differences(models, tmp_path):
    world = World(models, tmp_path)
    learner, _, _ = world.sweeps()
    name = next(name for name in world.table if "layer" in name and "weight" in name)
    for expert in range(EXPERTS):
        around = []
        for step in (1e-5, -1e-5):
            table = {**world.table, name: world.table[name].copy()}
            table[name][expert] += step
            around.append(whole(world, table)[0])
        assert learner.found[name][expert, 0] == pytest.approx((around[0] - around[1]) / 2e-5, abs=1e-9)


def test_the_gradient_of_a_shared_coefficient_is_the_sum(models, tmp_path):
    """One coefficient for each expert in all tensors: its gradient is what theirs add up to."""
    world = World(models, tmp_path)
    one = next(iter(world.table.values()))
    world.table = dict.fromkeys(world.table, one)
    learner, _, _ = world.sweeps()
    shared = torch.tensor(one, requires_grad=True)
    loss = composed(world, dict.fromkeys(world.table, shared))
    (wanted,) = torch.autograd.grad(loss, shared)
    np.testing.assert_allclose(sum(learner.found.values()), wanted.numpy(), rtol=1e-12)


def test_groups_with_equal_coefficients_change_nothing(models, tmp_path):
    """The same loss, and what a coefficient's gradient was is what those of its groups add up to."""
    one, four = World(models, tmp_path), World(models, tmp_path, groups=4)
    four.table = {name: np.repeat(rows, 4, axis=1) for name, rows in one.table.items()}
    (whole, losses, _), (parts, again, _) = one.sweeps(), four.sweeps()
    assert again == losses
    assert all(rows.shape == (EXPERTS, 4) for rows in parts.found.values())
    assert worst({name: rows.sum(1, keepdims=True) for name, rows in parts.found.items()}, whole.found) < 1e-15


def test_micro_batches_change_nothing(models, tmp_path):
    """Losses are divided by the tokens of all batches, so where a step is cut is rounding alone."""
    found = [World(models, tmp_path, count=count).sweeps() for count in (1, 2, 5)]
    for learner, losses, _ in found[1:]:
        assert losses == pytest.approx(found[0][1], rel=1e-14)
        assert worst(learner.found, found[0][0].found) < 1e-14


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_kept_between_sweeps_changes_no_bit(models, tmp_path, dtype):
    found = {}
    for place in ("twice", "memory", "disk", "pinned"):
        learner, losses, _ = World(models, tmp_path, place=place, dtype=dtype, count=2).sweeps(4)
        found[place] = losses, {name: rows.tolist() for name, rows in learner.coefficients.items()}
    assert all(each == found["twice"] for each in found.values())


@pytest.mark.parametrize("models", ["llama", "llama-tied", "bert-mlm"], indirect=True)
def test_layers_that_stay_need_not_run_again(models, tmp_path):
    """All in one group, graphs kept from the way there to the way back: the same bits, and nothing is left behind."""
    found = []
    for limits in ({}, {"group": 3}, {"group": 3, "graphs": True}):
        world = World(models, tmp_path, place="pinned", dtype=torch.float32, count=2)
        learner, losses, _ = world.sweeps(3, **limits)
        found.append((losses, {name: rows.tolist() for name, rows in learner.coefficients.items()}))
    assert found[0] == found[1] == found[2]


@SMOOTH
def test_task_vectors_of_low_rank_by_other_roads(models, tmp_path):
    """Y = X (W + c U V^T)^T: dL/dc is <dL/dW, U V^T>, the sum over tokens of <dY U, X V>, or, sample by sample, that of
    <dY, X V U^T>. Task vectors are whole multiples of 2^-8, the base's weights of 2^-16: no file rounds them.
    """
    random, rank, factors, name = torch.Generator().manual_seed(5), 2, [], models[0]
    folder = tiny.save(tmp_path / "0", name)
    model = tiny.whole(folder, name)
    linear = [each for each, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "layer" in each]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_((parameter * 2**16).round() / 2**16)
    model.save_pretrained(folder)
    for number in range(1, EXPERTS + 1):
        expert, own = tiny.whole(folder, name), {}
        with torch.no_grad():
            for each in linear:
                weight = expert.get_submodule(each).weight
                u, v = (torch.randint(-2, 3, (size, rank), generator=random) for size in weight.shape)
                weight += u.float() @ v.float().T / 2**8
                own[each] = u.double(), v.double() / 2**8
        expert.save_pretrained(tmp_path / str(number))
        factors.append(own)
    world = World((name, [tmp_path / str(number) for number in range(EXPERTS + 1)]), tmp_path, count=2)
    learner, _, _ = world.sweeps()
    leaves = {each: torch.tensor(rows) for each, rows in world.table.items()}
    seen, kept = {each: [] for each in linear}, []

    def watch(module, inputs, output, each):
        output.requires_grad_().retain_grad()
        kept.append((each, inputs[0].detach(), output))

    loss = composed(world, leaves, {each: lambda *given, each=each: watch(*given, each) for each in linear})
    loss.backward()
    for each, x, y in kept:
        seen[each].append((x, y.grad))
    for each in linear:
        found = learner.found[f"{each}.weight"][:, 0]
        for expert, own in enumerate(factors):
            u, v = own[each]
            by_tokens = sum(float(((dy @ u) * (x @ v)).sum()) for x, dy in seen[each])
            by_samples = torch.cat([(dy * (x @ v @ u.T)).sum((1, 2)) for x, dy in seen[each]])
            assert len(by_samples) == 5
            close = 1e-12 * float(np.abs(found).max())
            assert by_tokens == pytest.approx(found[expert], abs=close), each
            assert float(by_samples.sum()) == pytest.approx(found[expert], abs=close), each


def test_four_steps_are_those_of_torch(models, tmp_path):
    world = World(models, tmp_path, place="memory")
    learner, losses, _ = world.sweeps(4, course=None)
    table = {name: rows.copy() for name, rows in world.table.items()}
    leaves = {name: torch.tensor(rows, requires_grad=True) for name, rows in table.items()}
    adam = torch.optim.AdamW(leaves.values(), lr=0.1, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: Course(8, True).factor(step))
    for step in range(4):
        loss, gradients = whole(world, {name: leaf.detach().numpy() for name, leaf in leaves.items()})
        assert losses[step] == pytest.approx(loss, rel=1e-9)
        for name, leaf in leaves.items():
            leaf.grad = torch.tensor(gradients[name])
        adam.step()
        schedule.step()
    for name, leaf in leaves.items():
        np.testing.assert_allclose(learner.coefficients[name], leaf.detach().numpy(), rtol=1e-7, atol=1e-7)


def test_bytes_are_those_that_the_schedule_promises(models, tmp_path):
    """Kept weights: base and experts once a step. Else twice, but for what the turn finds in memory."""
    world = World(models, tmp_path, place="memory")
    stages = world.stack.stages
    every = {n: sum(c.tensors[n].nbytes for c in world.checkpoints) for s in stages for n in s.tensors}
    once, last = sum(every.values()), sum(every[name] for name in stages[-1].tensors)
    again = last if stages[-1].borrowed else 0  # a tied head runs once more at the embedding, with what it alone has
    _, _, reads = world.sweeps(3)
    assert reads[1:] == [once + again] * 2
    world.place = "twice"
    _, _, reads = world.sweeps(3)
    borrowed = sum(every[name] for name in stages[-1].borrowed)  # a tied head reads the embedding for itself
    turned = sum(every[name] for name in stages[-2].tensors)
    assert reads == [2 * once - last + borrowed - turned + again] * 3
    world.place = "pinned"
    assert world.sweeps(3)[2][1:] == [0, 0]


def test_gradients_at_the_base_choose_experts(models, tmp_path):
    world = World(models, tmp_path, dtype=torch.float32)
    world.table = {name: np.zeros((EXPERTS, 1)) for name in world.table}
    world.sweeps(kind=Selecting)
    _, wanted = whole(world, world.table)
    for name, sizes in world.hooks.sizes.items():
        np.testing.assert_allclose(sizes, np.abs(wanted[name][:, 0]), rtol=1e-3, atol=1e-8)
