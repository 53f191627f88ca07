"""`sm.atlas`: any chain of layers, any loss, against plain autograd."""

import math

import build
import pytest

pytest.importorskip("transformers")

import torch
from composed import factor
from network import Encoder, own_loss
from transport import RAM, tensors

import streammerge as sm
from streammerge.errors import RecipeError

pytestmark = pytest.mark.usefixtures("one_thread")
EXPERTS = ("one", "two")


@pytest.fixture
def world(tmp_path):
    """Models by name, and batches of four."""
    models = {}
    for seed, name in enumerate(("base", *EXPERTS)):
        torch.manual_seed(seed)
        models[name] = Encoder()
        if name != "base":
            with torch.no_grad():
                for own, theirs in zip(models[name].parameters(), models["base"].parameters(), strict=True):
                    own.copy_(theirs + 0.3 * own)
        arrays = {key: value.detach().numpy() for key, value in models[name].state_dict().items()}
        build.checkpoint(tmp_path / name, {"model.safetensors": arrays})
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 3, (6, 4), generator=random)
    return models, [{"values": torch.randn(4, 6, generator=random), "label": row} for row in labels]


def call(tmp_path, batches, out="out", loss=own_loss, **more):
    shapes = {each["name"]: each["shape"] for each in sm.inspect(tmp_path / "base")["entries"]}
    stack = sm.Stack.of(Encoder, shapes, batches[0])
    given = {"base_model": tmp_path / "base", "models": [tmp_path / name for name in EXPERTS], "out": tmp_path / out}
    return sm.atlas(stack, batches, loss, **{**given, "ram": RAM, "device": "cpu", **more})


def plain(models, steps, count):
    """Weights after so many steps of AdamW, each on its batches; and the losses."""
    base = {name: p.detach().double() for name, p in models["base"].named_parameters()}
    deltas = {n: [models[e].get_parameter(n).detach().double() - p for e in EXPERTS] for n, p in base.items()}
    leaves = {name: torch.zeros(2, dtype=torch.float64, requires_grad=True) for name in base}
    adam = torch.optim.AdamW(leaves.values(), lr=0.1, weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(adam, lambda at: factor(at, count))
    model, losses = Encoder().double(), []

    def weights():
        return {n: p + leaves[n][0] * deltas[n][0] + leaves[n][1] * deltas[n][1] for n, p in base.items()}

    for batches in steps:
        adam.zero_grad()
        loss = sum(
            own_loss(torch.func.functional_call(model, weights(), (each["values"].double(),)), each) for each in batches
        )
        loss.backward()
        adam.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return {name: value.detach() for name, value in weights().items()}, losses


@pytest.mark.parametrize("each", ["all", 2, 4])
def test_any_network_with_any_loss(world, tmp_path, each):
    """A step takes so many batches, in their order and over again."""
    models, batches = world
    count = 6 if each == "all" else each
    report = call(tmp_path, batches, parameters={"steps": 5, "batch": each})
    steps = [[batches[(number * count + at) % 6] for at in range(count)] for number in range(5)]
    wanted, losses = plain(models, steps, 5)
    found = tensors(tmp_path / "out")
    assert all(torch.allclose(found[name].double(), value, atol=1e-6) for name, value in wanted.items())
    assert report["atlas"]["loss"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] or each != "all"


def test_validation_batches_choose(world, tmp_path):
    _, batches = world
    report = call(tmp_path, batches[:4], validation=batches[4:], parameters={"epochs": 3, "batch": 2, "lr": 0.5})
    tried = report["atlas"]["validation"]
    assert [step for step, _ in tried] == [0, 2, 4, 6]
    assert all(math.isfinite(loss) for _, loss in tried)
    assert report["atlas"]["kept"] == min(tried, key=lambda pair: pair[1])[0]


def test_what_was_learned_serves_a_recipe(world, tmp_path):
    call(tmp_path, world[1], parameters={"steps": 2, "partitions": 3}, dtype="bfloat16", seed=5)
    recipe = {
        "merge_method": "atlas",
        "base_model": str(tmp_path / "base"),
        "models": [{"model": str(tmp_path / name)} for name in EXPERTS],
        "coefficients": str(tmp_path / "out/coefficients.json"),
        "dtype": "bfloat16",
    }
    sm.merge(recipe, tmp_path / "again", ram=RAM, device="cpu", seed=9)
    one, two = (tmp_path / name / "model.safetensors" for name in ("out", "again"))
    assert one.read_bytes() == two.read_bytes()


def test_what_a_call_may_not_say(world, tmp_path):
    with pytest.raises(RecipeError, match="the loss is the objective of a call"):
        call(tmp_path, world[1], parameters={"objective": "entropy"})
    with pytest.raises(RecipeError, match="batches: give one at least"):
        sm.atlas(None, [], own_loss, base_model="a", models=["b"], out="c")


def test_a_loss_that_is_no_number_ends_it(world, tmp_path):
    def broken(output, batch):
        return own_loss(output, batch) / (batch["label"] is not world[1][1]["label"])

    with pytest.raises(
        RecipeError, match="step 1: the loss of batch 2 is inf; give a smaller lr, or check the samples"
    ):
        call(tmp_path, world[1], loss=broken, parameters={"steps": 2})
    assert not (tmp_path / "out").exists()
