"""Parts of benchmarks/transport.py and transport_cost.py whose mistakes would look like results."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

FOLDER = Path(__file__).parents[2] / "benchmarks"
CONFIG = {
    "vocab_size": 31,
    "hidden_size": 12,
    "num_attention_heads": 3,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "max_position_embeddings": 16,
    "type_vocab_size": 2,
}


@pytest.fixture(autouse=True)
def _benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))


def bert(seed: int):
    """Random weights everywhere, biases and norms too."""
    torch.manual_seed(seed)
    model = transformers.BertModel(transformers.BertConfig(**CONFIG)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def states(model):
    ids = torch.arange(1, 19).view(2, 9)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask, token_type_ids=ids % 2)


def permuted(model, order):
    found = bert(7)
    found.load_state_dict(order.apply(model.state_dict()))
    return found


def test_a_permuted_encoder_computes_the_same_function():
    from transport_encoder import Order

    model = bert(0)
    order = Order.draw(model.config, seed=1)
    one, other = states(model), states(permuted(model, order))
    torch.testing.assert_close(other.last_hidden_state, one.last_hidden_state[..., order.hidden], rtol=0, atol=1e-12)
    torch.testing.assert_close(other.pooler_output, one.pooler_output, rtol=0, atol=1e-12)


def test_every_weight_that_can_move_does():
    from transport_encoder import Order

    model = bert(0)
    order = Order.draw(model.config, seed=1)
    before, after = model.state_dict(), order.apply(model.state_dict())
    still = [name for name, value in before.items() if value.is_floating_point() and torch.equal(value, after[name])]
    assert still == ["pooler.dense.bias"]
    everything = [order.hidden, *order.inner, *order.queries, *order.values]
    assert all(torch.equal(each.sort().values, torch.arange(len(each))) for each in everything)
    query, value = order.queries[0], order.values[0]
    assert not torch.equal(query, value)
    assert torch.equal(query.view(3, 4) // 4, value.view(3, 4) // 4), "heads stay whole, and in one order"


def test_the_permuted_task_vector_is_the_one_that_the_target_needs():
    from transport_encoder import Order
    from transport_rows import added, vector

    source, tuned = bert(0), bert(1)
    order = Order.draw(source.config, seed=1)
    tau = vector(source.state_dict(), tuned.state_dict())
    target = order.apply(source.state_dict())
    found = bert(7)
    found.load_state_dict(added(target, order.apply(tau), 1.0))
    wanted = states(tuned).last_hidden_state[..., order.hidden]
    torch.testing.assert_close(states(found).last_hidden_state, wanted, rtol=0, atol=1e-9)


def test_controls_are_what_they_are_called():
    import transport_rows as ways

    random = torch.Generator().manual_seed(0)
    tau = {name: torch.randn(40, 50, generator=random) for name in ("a", "b")}
    other = ways.shuffled(tau)
    for name, value in tau.items():
        assert torch.equal(other[name].flatten().sort().values, value.flatten().sort().values)
        assert float((other[name] == value).float().mean()) < 0.01
    kept = ways.half(tau)
    shares = [float((kept[name] != 0).float().mean()) for name in tau]
    assert shares == pytest.approx([0.5, 0.5], abs=0.05)
    assert all(bool(((kept[name] == 0) | (kept[name] == tau[name])).all()) for name in tau)
    assert ways.norm(ways.sized(ways.signs(other), tau)) == pytest.approx(ways.norm(tau))
    both = ways.agreeing({"w": torch.tensor([1.0, -2.0, 3.0, 0.0])}, {"w": torch.tensor([5.0, 1.0, 0.0, 1.0])})
    assert both["w"].tolist() == [1, 0, 0, 0]


def test_alpha_is_chosen_by_validation_alone():
    """Of a loss with its least at 0.6 and a figure that would rather have another alpha."""
    from transport_rows import stepped

    class Subject:
        def put(self, weights):
            self.at = float(weights["w"])

        def validate(self):
            return abs(self.at - 0.6) if self.at < 2.5 else float("nan")

        def test(self):
            return -self.at

    row = stepped(Subject(), {"w": torch.zeros(())}, {"w": torch.ones(())}, "x")
    assert (row.alpha, row.figure) == (0.6, pytest.approx(-0.6))


def test_queries_come_in_turns():
    from transport_encoder import _per_intent

    queries = [(f"{intent}{number}", intent) for intent in (2, 0, 1) for number in range(4)]
    assert _per_intent(queries, 2) == [("00", 0), ("10", 1), ("20", 2), ("01", 0), ("11", 1), ("21", 2)]


def test_what_is_said_follows_from_the_figures():
    from transport_report import Found, says
    from transport_rows import Row

    def lines(better="accuracy", **figures):
        names = {"tau": "B + tau", "one_gradient": "one step, gradient", "one_signs": "one step, signs"}
        return list(says(Found("c", "t", better, [Row(names.get(k, k), v, 0.0) for k, v in figures.items()], 1.0)))

    common = {"tau": 0.52, "one_gradient": 0.55, "one_signs": 0.58}
    first, plain, step = lines(B=0.5, vote=0.6, shuffled=0.59, oracle=0.7, **common)
    assert (
        "gains 0.1000, 50% of the oracle's gain; a shuffled task vector has 90% of that: the gradients' signs" in first
    )
    assert "B + tau, without a mask, gains +0.0200, less than GradFix" in plain
    assert "one step, signs, without a task vector, gains +0.0800, less than GradFix" in step
    assert "20% of that: the task vector's own values matter" in lines(B=0.5, vote=0.6, shuffled=0.52, **common)[0]
    assert "gains nothing" in lines(B=0.5, vote=0.5, shuffled=0.52, **common)[0]
    lower = lines("bits per byte", B=3.0, vote=2.5, shuffled=2.9, tau=3.1, one_gradient=2.2, one_signs=2.6)
    assert "gains 0.5000; a shuffled task vector has 20%" in lower[0]
    assert "B + tau, without a mask, gains -0.1000, less than GradFix" in lower[1]
    assert "one step, gradient, without a task vector, gains +0.8000, more than GradFix" in lower[2]
    rows = [Row(label, figure, 0.0, samples=n) for n, figure in ((1, 0.6), (4, 0.7)) for label in ("vote", "shuffled")]
    several = list(says(Found("c", "t", "accuracy", [Row("B", 0.5, 0.0), *rows], 1.0)))
    assert several[0] == "c t: gains of vote by samples: +0.100 (1), +0.200 (4)."


def test_repeated_layers_make_checkpoints_and_fewer_layers_are_links(tmp_path):
    import transport_shapes as shapes
    from checkpoints import Shape
    from safetensors import safe_open

    from streammerge.store.checkpoint import Checkpoint

    shape = Shape("x", 3, 8, 24, 16, 2)
    for name in shapes.NAMES:
        shapes.repeated(tmp_path / shape.name / name, shape, name)
    values = {}
    for name in shapes.NAMES:
        folder = tmp_path / shape.name / name
        assert {key: spec.shape for key, spec in Checkpoint.open(folder).tensors.items()} == dict(shape.tensors())
        for file in folder.glob("*.safetensors"):
            with safe_open(file, "pt") as found:
                values |= {(name, key): found.get_tensor(key) for key in found.keys()}  # noqa: SIM118
    up = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(values["target", up.format(0)], values["target", up.format(2)])
    assert not torch.equal(values["target", up.format(0)], values["source_base", up.format(0)])
    moved = (values["tuned", up.format(0)] - values["source_base", up.format(0)]).float().std()
    assert 1e-4 < moved < 2e-3, "a task vector is small beside weights of 0.02"
    folder, small = shapes.fewer(tmp_path, shape, 2)
    found = Checkpoint.open(folder / "target").tensors
    assert {key: spec.shape for key, spec in found.items()} == dict(small.tensors())
    one, other = (tmp_path / at / "target/model.layers.1.safetensors" for at in (shape.name, small.name))
    assert one.stat().st_ino == other.stat().st_ino


def test_the_cost_of_a_tiny_shape_is_measured_and_no_gpu_is_no_figure(tmp_path):
    def run(*options: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, str(FOLDER / "transport_cost.py"), "--dir", str(tmp_path), *options]
        return subprocess.run(argv, capture_output=True, text=True, check=False)

    done = run("--quick", "--ram", "1GiB")
    document = json.loads(done.stdout.splitlines()[-1])
    (found,) = document["rows"]
    assert found["row"]["read_bytes"] == found["fewest_bytes"]
    assert found["row"]["demand_bytes"] <= found["row"]["predicted_bytes"] <= found["row"]["budget_bytes"]
    assert 0.2 < found["kept"] < 0.8
    if not torch.cuda.is_available():
        done = run("--device", "cuda")
        assert (done.returncode, done.stdout) == (2, "")
