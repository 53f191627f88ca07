"""AdamW on coefficients: torch's own steps, in any order of tensors, after any interruption."""

import math

import numpy as np
import pytest
import torch

from streammerge.engine.learner import Block, Course, Learner
from streammerge.errors import MachineError

STEPS = 7
BLOCKS = {
    "a": Block("a", ((0.0, 0.5), (0.1, 0.0)), 0.1, 0.1, True),
    "b": Block("b", ((1.0,), (-2.0,)), 0.02, 0.0, True),
    "c": Block("c", ((0.7,), (0.0,)), 0.1, 0.1, False),
}


def gradients(step):
    random = np.random.default_rng(step)
    return {"a": random.normal(0, 1, (2, 2)), "b": random.normal(0, 1e-6, (2, 1))}


def learned(course, learner=None, until=STEPS):
    learner = learner or Learner(BLOCKS, course)
    while learner.step < until:
        for name, gradient in gradients(learner.step).items():
            learner.take(name, gradient)
        learner.finish(float(learner.step))
    return learner


@pytest.mark.parametrize("cosine", [True, False])
@pytest.mark.parametrize("clip", [0.0, 0.3])
def test_steps_are_those_of_torch(cosine, clip):
    found = learned(Course(STEPS, cosine, clip))
    leaves = {name: torch.tensor(BLOCKS[name].init, dtype=torch.float64, requires_grad=True) for name in "ab"}
    groups = [{"params": [leaf], "lr": BLOCKS[n].rate, "weight_decay": BLOCKS[n].decay} for n, leaf in leaves.items()]
    adam = torch.optim.AdamW(groups)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        adam, lambda step: (1 + math.cos(math.pi * step / STEPS)) / 2 if cosine else 1.0
    )
    for step in range(STEPS):
        for name, gradient in gradients(step).items():
            leaves[name].grad = torch.tensor(gradient)
        if clip:
            norm = torch.nn.utils.clip_grad_norm_(leaves.values(), clip)
            assert norm > clip
        adam.step()
        schedule.step()
    if clip:
        assert found.norm == pytest.approx(float(norm), rel=1e-12)
    for name, leaf in leaves.items():
        np.testing.assert_allclose(found.coefficients[name], leaf.detach().numpy(), rtol=1e-12)
    assert found.coefficients["c"].tolist() == [[0.7], [0.0]]
    assert found.losses == list(range(STEPS))


def test_what_waits_is_updated_with_the_step():
    now, later = (learned(Course(STEPS, True, late=late)) for late in (frozenset(), frozenset({"b"})))
    learner = Learner(BLOCKS, Course(STEPS, True, late=frozenset({"b"})))
    assert learner.take("a", gradients(0)["a"])
    assert not learner.take("b", gradients(0)["b"])
    assert learner.coefficients["b"].tolist() == [[1.0], [-2.0]]
    for name, table in now.coefficients.items():
        assert (later.coefficients[name] == table).all()


@pytest.mark.parametrize("stop", [0, 3, STEPS])
def test_a_run_that_goes_on_ends_the_same(tmp_path, stop):
    course, path = Course(STEPS, True), tmp_path / "state.npz"
    whole, part = learned(course), learned(course, until=stop)
    part.keep(1.5)
    part.save(path)
    other = Learner(BLOCKS, course)
    other.load(path)
    assert (other.step, other.losses, other.tried, other.best) == (stop, part.losses, [(stop, 1.5)], stop)
    assert all((other.kept[name] == table).all() for name, table in part.coefficients.items())
    learned(course, other)
    assert all((other.coefficients[name] == table).all() for name, table in whole.coefficients.items())
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.npz"]


def test_no_file_is_the_start_and_a_broken_one_is_refused(tmp_path):
    learner = Learner(BLOCKS, Course(STEPS, True))
    learner.load(tmp_path / "none.npz")
    assert learner.step == 0
    (tmp_path / "broken.npz").write_bytes(b"PK\x03\x04 nothing")
    with pytest.raises(MachineError, match=r"broken\.npz: damaged .*--no-resume starts over"):
        learner.load(tmp_path / "broken.npz")


def test_the_best_of_the_validation_losses_is_kept():
    learner = Learner(BLOCKS, Course(STEPS, True))
    kept = []
    for loss in (2.0, 1.0, math.nan, 1.0, 0.5, 0.75):
        learner.keep(loss)
        kept.append(learner.best)
        learned(learner.course, learner, learner.step + 1)
    assert kept == [0, 1, 1, 1, 4, 4]
    assert (learner.chosen()["a"] != learner.coefficients["a"]).any()
    assert (learner.chosen()["a"] == learned(Course(STEPS, True), until=4).coefficients["a"]).all()
