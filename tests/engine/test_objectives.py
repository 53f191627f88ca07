"""Objectives without labels, by hand."""

import math
from types import SimpleNamespace

import pytest
import torch

from streammerge.engine.objectives import Look, entropy, flatten, pseudo_label, trusted


def batch(labels, **more):
    return {"labels": torch.tensor(labels), **more}


def output(*probabilities):
    """Logits whose softmax is what is given, position by position; one sample."""
    return SimpleNamespace(logits=torch.tensor([probabilities]).log().requires_grad_())


def test_the_power_of_one_half_flattens():
    torch.testing.assert_close(flatten(torch.tensor([0.9, 0.1])), torch.tensor([0.75, 0.25]))


@pytest.mark.parametrize("most", [100, 3])
def test_trusted_samples_are_a_classs_share_of_all(most):
    """N = 12 in C = 2 classes: six of each, or as many as there are, or `most`."""
    classes = ["a"] * 8 + ["b"] * 4
    confidence = [0.1 * at for at in range(8)] + [0.9, 0.1, 0.5, 0.5]
    found = trusted(classes, confidence, most)
    share = min(6, most)
    assert [at for at in found if at < 8] == list(range(8 - share, 8))
    assert [at for at in found if at >= 8] == ([8, 9, 10, 11] if most == 100 else [8, 10, 11])


def test_as_many_classes_as_samples_are_all_trusted():
    assert trusted(list(range(5)), [0.0] * 5) == [0, 1, 2, 3, 4]
    assert trusted(["a"] * 300, [float(at) for at in range(300)]) == list(range(200, 300))


def test_entropy_is_that_of_the_positions_before_labels():
    found = entropy(output([0.5, 0.5], [0.9, 0.1], [0.2, 0.8]), batch([[0, 1, -100]], divisor=2))
    assert float(found.detach()) == pytest.approx(math.log(2) / 2, rel=1e-6)


@pytest.mark.parametrize(("bar", "passes"), [(0.7, True), (0.8, False)])
def test_only_what_is_above_the_threshold_counts(bar, passes):
    """q of (0.9, 0.1) is (0.75, 0.25), and has no gradient of its own; where nothing passes the loss is 0, not NaN."""
    model = output([0.9, 0.1], [0.5, 0.5])
    found = pseudo_label(model, batch([[-100, 1]], threshold=bar, divisor=4))
    wanted = -(0.75 * math.log(0.9) + 0.25 * math.log(0.1)) / 4 if passes else 0.0
    assert float(found.detach()) == pytest.approx(wanted, rel=1e-5)
    found.backward()
    gradient = [(0.9 - 0.75) / 4, (0.1 - 0.25) / 4] if passes else [0.0, 0.0]
    assert model.logits.grad[0, 0].tolist() == pytest.approx(gradient, rel=1e-4)


def test_trusted_batches_are_cross_entropy():
    found = pseudo_label(output([0.9, 0.1], [0.5, 0.5]), batch([[-100, 1]], divisor=2))
    assert float(found.detach()) == pytest.approx(-math.log(0.1) / 2, rel=1e-5)


def test_a_look_has_what_is_predicted_at_the_labels():
    look = Look()
    logits = torch.tensor([[[0.9, 0.1], [0.2, 0.8], [0.5, 0.5]], [[0.4, 0.6], [0.7, 0.3], [0.5, 0.5]]]).log()
    look(SimpleNamespace(logits=logits), batch([[0, 1, 1], [0, -100, 1]]))
    assert look.tokens == [[0, 1], [0]]
    assert look.confidence == pytest.approx([(math.log(0.9) + math.log(0.8)) / 2, math.log(0.7)])
