"""Promises of a plan: figures that follow from its steps, a least budget that works, a digest that names the work."""

import random

import build
import pytest

import streammerge as sm
from streammerge.errors import BudgetTooSmall
from streammerge.store.ring import PAGE

pytestmark = pytest.mark.usefixtures("fresh_process")
MIB = 1 << 20
ROOM = "1GiB"


@pytest.fixture
def models(tmp_path):
    """Three models without a byte on the disk: a large tensor, small ones, an odd and an empty one."""
    tensors = {
        "embed": ("F32", (4000, 1001)),
        "norm": ("F32", (7,)),
        "none": ("F32", (0, 3)),
        **{f"layer.{i}": ("BF16", (300, 333 + i)) for i in range(20)},
    }
    return [build.sparse(tmp_path / name / "model.safetensors", tensors, lead=3).parent for name in "abc"]


def linear(folder, models, **parameters):
    weights = {"weight": [1.0, 2.0, 0.5][: len(models)], **parameters}
    return build.recipe(folder / "linear.json", "linear", models, **weights)


def slerp(folder, models):
    return build.recipe(folder / "slerp.json", "slerp", models[:2], models[0], t=0.3)


def test_the_figures_follow_from_the_steps(tmp_path, models):
    plan = sm.plan(linear(tmp_path, models), ram=ROOM)
    steps = list(plan.work())
    assert plan.steps == len(steps)
    assert plan.read_bytes == sum(step.read_bytes for step in steps)
    needed = 3 * sum(t.numel * t.inputs[0].nbytes // max(t.numel, 1) for t in plan.tensors)
    assert plan.read_bytes == needed, "neighbours without gaps: every byte once and nothing else"
    assert plan.write_bytes == sum(shard.size for shard in plan.layout.shards)
    assert plan.passes == 1
    assert plan.ram_peak_bytes <= plan.ram_budget_bytes == 1 << 30
    assert max(step.size for step in steps) <= plan.ring_bytes
    assert plan.as_dict()["read_bytes"] == plan.read_bytes


def test_a_survey_that_does_not_fit_is_a_second_pass(tmp_path, models):
    recipe = slerp(tmp_path, models)
    roomy = sm.plan(recipe, ram=ROOM)
    tight = sm.plan(recipe, ram=_least(recipe))
    assert (roomy.passes, tight.passes) == (1, 2)
    large = 2 * 4000 * 1001 * 4
    assert roomy.read_bytes + large <= tight.read_bytes <= roomy.read_bytes + 2 * large
    assert {step.kind for step in tight.work()} == {"sample", "survey", "merge"}


def _least(recipe, **options):
    with pytest.raises(BudgetTooSmall) as caught:
        sm.plan(recipe, ram="1MiB", **options)
    least = caught.value.least
    assert least % MIB == 0
    assert f"--ram {least // MIB}MiB" in str(caught.value)
    return least


@pytest.mark.parametrize("make", [linear, slerp])
@pytest.mark.parametrize("threads", [1, 7])
def test_the_least_budget_that_is_named_works(tmp_path, models, make, threads):
    recipe = make(tmp_path, models)
    least = _least(recipe, threads=threads)
    plan = sm.plan(recipe, ram=least, threads=threads)
    assert plan.ram_peak_bytes <= least
    with pytest.raises(BudgetTooSmall):
        sm.plan(recipe, ram=least - 8 * MIB, threads=threads)


@pytest.mark.parametrize("make", [linear, slerp])
def test_the_digest_names_the_work(tmp_path, models, make):
    recipe = make(tmp_path, models)
    plan = sm.plan(recipe, ram=ROOM)
    for same in ({"ram": "700MiB"}, {"ram": _least(recipe)}, {"ram": ROOM, "threads": 1}):
        assert sm.plan(recipe, **same).digest == plan.digest
    others = [
        sm.plan(recipe, ram=ROOM, seed=1),
        sm.plan(recipe, ram=ROOM, shard_size="1MB"),
        sm.plan(linear(tmp_path, models, normalize=False), ram=ROOM),
    ]
    build.sparse(models[1] / "model.safetensors", {"embed": ("F32", (4000, 1001))})
    build.sparse(models[0] / "model.safetensors", {"embed": ("F32", (4000, 1001))})
    build.sparse(models[2] / "model.safetensors", {"embed": ("F32", (4000, 1001))})
    others.append(sm.plan(recipe, ram=ROOM))
    digests = [plan.digest, *(other.digest for other in others)]
    assert len(set(digests)) == len(digests)


def test_a_smaller_budget_makes_smaller_steps_and_the_same_output(tmp_path, models):
    recipe = linear(tmp_path, models)
    roomy, tight = sm.plan(recipe, ram=ROOM), sm.plan(recipe, ram=_least(recipe))
    assert tight.cut.step < roomy.cut.step
    assert tight.steps > roomy.steps
    assert tight.layout == roomy.layout
    assert tight.read_bytes <= roomy.read_bytes + 3 * PAGE * tight.steps


class _Ring:
    """What streammerge.store.ring promises, without memory or waiting."""

    def __init__(self, size):
        self.size, self.head, self.used, self.slots = -(-size // PAGE) * PAGE, 0, 0, []

    def take(self, size):
        size = -(-max(size, 1) // PAGE) * PAGE
        if not self.slots:
            self.head = self.used = 0
        skip = self.size - self.head if self.head + size > self.size else 0
        if self.used + skip + size > self.size:
            return False
        self.slots.append(skip + size)
        self.used += skip + size
        self.head = (self.head + skip) % self.size + size
        return True

    def give(self):
        self.used -= self.slots.pop(0)


def _runs_through(plan, choose):
    """Whether reading ahead and merging come to an end, whichever of them is quicker."""
    steps = list(plan.work())
    ring = _Ring(plan.ring_bytes)
    groups, size = [], 0
    for step in steps:
        size += 1
        if step.last:
            groups.append(size)
            size = 0
    taken = ready = done = 0
    while done < len(groups):
        can_take = taken < len(steps)
        can_merge = ready >= groups[done]
        if can_take and (not can_merge or choose()) and ring.take(steps[taken].size):
            taken += 1
            ready += 1
        elif can_merge:
            for _ in range(groups[done]):
                ring.give()
            ready -= groups[done]
            done += 1
        elif not (can_take and ring.take(steps[taken].size)):
            return False
        else:
            taken, ready = taken + 1, ready + 1
    return True


@pytest.mark.parametrize("method", ["linear", "slerp"])
@pytest.mark.parametrize("seed", range(4))
def test_the_ring_never_locks_up(tmp_path, method, seed):
    """Tiles that wait for each other must fit the ring wherever it stands, with what the wrap-around wastes."""
    dice = random.Random(f"{method} {seed}")
    shapes = [dice.choice([1, 5000, 300_000, 1_500_000, 4_000_001]) for _ in range(dice.randint(1, 7))]
    tensors = {f"t{i}": ("F32", (n + dice.randint(0, 3),)) for i, n in enumerate(shapes)}
    models = [
        build.sparse(tmp_path / name / "model.safetensors", tensors, lead).parent for lead, name in enumerate("ab")
    ]
    recipe = linear(tmp_path, models) if method == "linear" else slerp(tmp_path, models)
    least = _least(recipe)
    for ram in (least, least + 3 * MIB, least + 17 * MIB, least + 60 * MIB, 1 << 30):
        plan = sm.plan(recipe, ram=ram)
        for choose in (lambda: True, lambda: False, lambda: dice.random() < 0.5):
            assert _runs_through(plan, choose), f"locks up at {ram} bytes: {shapes}"
