"""GradFix from a recipe to files: what plain autograd over whole models says, whatever interrupts it."""

import json
import re

import build
import pytest

pytest.importorskip("transformers")

import torch
from network import Encoder, own_loss
from transport import (
    ALPHAS,
    MOST,
    RAM,
    added,
    differing,
    llama,
    loss_of,
    made,
    mask,
    merge,
    recipe,
    samples,
    tensors,
    vectors,
    voted,
)

import streammerge as sm
from streammerge.errors import OutputExists, RecipeError
from streammerge.store.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("vote", ["majority", "mean"])
def test_the_result_is_that_of_whole_model_autograd(world, tmp_path, vote):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(world.folder, parameters={"alpha": 0.5, "vote": vote})))
    report = sm.merge(path, tmp_path / "out", ram=RAM, device="cpu")
    signs, gradient = voted(world.target, world.train, vote == "mean")
    (tau,) = vectors(world.source, world.tuned)
    delta = mask(tau, signs)
    wanted = added(world.target, delta, 0.5)
    found = tensors(tmp_path / "out")
    wrong, count = differing(found, wanted)
    assert wrong <= MOST * count
    assert verify(tmp_path / "out")["bad"] == []
    total = report["gradfix"]["total"]
    assert total["elements"] == count
    assert total["kept"] == pytest.approx(sum(int((each != 0).sum()) for each in delta.values()), rel=MOST)
    ties = sum(int(((signs[name] == 0) & (tau[name] != 0)).sum()) for name in tau)
    assert total["ties"] == pytest.approx(ties, rel=MOST, abs=1)
    slope = sum(float((gradient[name].double() * delta[name].double()).sum()) for name in delta)
    assert total["descent"] == pytest.approx(-0.5 * slope, rel=1e-4)
    assert (total["descent"] > 0) or vote == "majority"
    moved = sum(float((wanted[name] - world.target.get_parameter(name)).double().square().sum()) for name in wanted)
    assert total["displacement"] == pytest.approx(moved**0.5, rel=1e-4)
    assert report["gradfix"]["alpha"] == 0.5
    losses = [float(loss_of(world.target, row)) for row in world.train]
    assert report["gradfix"]["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-6)
    assert report["read_bytes"] == report["predicted"]["read_bytes"]
    assert set(report["gradfix"]["tensors"]) == set(found)


def test_the_merged_model_loads_and_went_downhill(untied, tmp_path):
    import transformers

    merge(untied, tmp_path / "out", parameters={"alpha": 0.05, "vote": "mean"})
    merged = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out").eval()
    before, after = (sum(float(loss_of(each, row)) for row in untied.train) for each in (untied.target, merged))
    assert after < before


def test_bfloat16_is_rounded_once(tmp_path):
    world = made(tmp_path / "world", torch.bfloat16, tie_word_embeddings=True)
    report = merge(world, tmp_path / "out", parameters={"alpha": 0.01})
    signs, _ = voted(world.target.float(), world.train)
    world.target.bfloat16()
    (tau,) = vectors(world.source, world.tuned)
    delta = mask(tau, signs)
    found, wanted = tensors(tmp_path / "out"), added(world.target, delta, 0.01)
    wrong, count = differing(found, wanted)
    assert wrong <= MOST * count
    assert all(value.dtype == torch.bfloat16 for value in found.values())
    same = sum(int(((found[n] == p) & (delta[n] != 0)).sum()) for n, p in world.target.named_parameters())
    assert report["gradfix"]["total"]["unchanged"] == pytest.approx(same, abs=MOST * count)
    assert same > 0


def test_bfloat16_arithmetic_agrees_mostly(untied, tmp_path):
    """The share of flipped signs is that of rounded gradients, not of a mistake."""
    merge(untied, tmp_path / "a")
    merge(untied, tmp_path / "b", compute="bfloat16")
    wrong, count = differing(tensors(tmp_path / "a"), tensors(tmp_path / "b"))
    assert 0 < wrong < 0.05 * count


@pytest.mark.parametrize("order", ["merge_then_mask", "mask_then_merge"])
@pytest.mark.parametrize("tasks", [1, 2])
def test_several_models(untied, tmp_path, order, tasks):
    """By the mean: one vote of all samples, or one of each model's own."""
    files = [str(untied.folder / name) for name in ("train.jsonl", "second.jsonl")][:tasks]
    models = [{"model": str(untied.folder / name)} for name in ("tuned", "other")]
    merge(untied, tmp_path / "out", models=models, data={"train": files}, order=order, parameters={"alpha": 0.8})
    signs = [voted(untied.target, rows)[0] for rows in (untied.train, untied.second)[:tasks]]
    taus = vectors(untied.source, untied.tuned, untied.other)
    if order == "mask_then_merge":
        masked = [mask(tau, signs[number % tasks]) for number, tau in enumerate(taus)]
        delta = {name: (masked[0][name] + masked[1][name]) / 2 for name in taus[0]}
    else:
        vote = {name: sum(each[name] for each in signs).sign() for name in taus[0]}
        delta = mask({name: (taus[0][name] + taus[1][name]) / 2 for name in taus[0]}, vote)
    found, wanted = tensors(tmp_path / "out"), added(untied.target, delta, 0.8)
    far = sum(int(((found[n] - wanted[n]).abs() > 1e-6).sum()) for n in wanted)
    assert far <= MOST * sum(value.numel() for value in wanted.values())


@pytest.mark.parametrize("tasks", [1, 2])
@pytest.mark.parametrize("order", ["merge_then_mask", "mask_then_merge"])
@pytest.mark.parametrize("merge_by", ["mean", "ties", "tsvm"])
def test_votes_that_were_saved_give_the_same_bytes(untied, tmp_path, merge_by, order, tasks):
    """Layer by layer with samples, or tile by tile from the file of votes: the same arithmetic."""
    files = [str(untied.folder / name) for name in ("train.jsonl", "second.jsonl")][:tasks]
    models = [{"model": str(untied.folder / name)} for name in ("tuned", "other")]
    common = {"models": models, "merge": merge_by, "order": order}
    votes = str(tmp_path / "votes.safetensors")
    swept = merge(untied, tmp_path / "swept", data={"train": files}, save_votes=votes, **common)
    tiled = merge(untied, tmp_path / "tiled", data=None, votes=votes, **common)
    assert (tmp_path / "swept/model.safetensors").read_bytes() == (tmp_path / "tiled/model.safetensors").read_bytes()
    assert "sweeps" not in tiled
    one, other = (report["gradfix"]["total"] for report in (swept, tiled))
    assert other == pytest.approx({key: one[key] for key in other})
    assert sorted(path.name for path in (tmp_path / "swept").iterdir()) == sorted(
        path.name for path in (tmp_path / "tiled").iterdir()
    )


def test_votes_serve_another_task_vector(untied, tmp_path):
    world = untied
    votes, other = str(tmp_path / "votes.safetensors"), [{"model": str(world.folder / "other")}]
    merge(world, tmp_path / "a", save_votes=votes)
    merge(world, tmp_path / "b", models=other)
    merge(world, tmp_path / "c", models=other, data=None, votes=votes)
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()
    size = (tmp_path / "votes.safetensors").stat().st_size
    weights = sum(value.numel() for value in tensors(tmp_path / "a").values())
    assert size < weights / 4 + 8192
    with pytest.raises(OutputExists, match=r"votes.safetensors: exists; --overwrite replaces it"):
        merge(world, tmp_path / "d", save_votes=votes)
    merge(
        world, tmp_path / "d", {"overwrite": True}, save_votes=votes, data={"train": str(world.folder / "second.jsonl")}
    )


def test_alphas_are_tried_on_validation_samples_alone(world, tmp_path, alphas):
    report = merge(world, tmp_path / "out", **alphas)
    signs, _ = voted(world.target, world.train)
    delta = mask(vectors(world.source, world.tuned)[0], signs)
    wanted = []
    for alpha in ALPHAS:
        merged = llama(tmp_path / "x", 0, tie_word_embeddings=world.target.config.tie_word_embeddings)
        merged.load_state_dict(added(world.target, delta, alpha), strict=False)
        wanted.append(sum(float(loss_of(merged, row)) for row in world.validation) / len(world.validation))
    curve = report["gradfix"]["curve"]
    assert [alpha for alpha, _ in curve] == ALPHAS
    assert [loss for _, loss in curve] == pytest.approx(wanted, rel=1e-4)
    best = ALPHAS[wanted.index(min(wanted))]
    assert report["gradfix"]["alpha"] == best
    assert report["read_bytes"] == report["predicted"]["read_bytes"]
    single = merge(world, tmp_path / "single", parameters={"alpha": best})
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "single/model.safetensors").read_bytes()
    assert report["gradfix"]["total"] == pytest.approx(single["gradfix"]["total"])
    assert report["passes"] == 4


def test_alphas_can_be_tried_on_votes_at_hand(untied, tmp_path):
    votes = str(tmp_path / "votes.safetensors")
    data = {"validation": str(untied.folder / "validation.jsonl")}
    merge(untied, tmp_path / "a", save_votes=votes)
    report = merge(untied, tmp_path / "b", data=data, votes=votes, parameters={"alpha": ALPHAS})
    data["train"] = str(untied.folder / "train.jsonl")
    whole = merge(untied, tmp_path / "c", data=data, parameters={"alpha": ALPHAS})
    assert report["gradfix"]["curve"] == whole["gradfix"]["curve"]
    assert (tmp_path / "b/model.safetensors").read_bytes() == (tmp_path / "c/model.safetensors").read_bytes()


def test_an_alpha_of_its_own_for_some_tensors(untied, tmp_path):
    alphas = [{"filter": "embed_tokens", "value": 0}, {"filter": "mlp", "value": ALPHAS}, {"value": 0.3}]
    data = {"train": str(untied.folder / "train.jsonl"), "validation": str(untied.folder / "validation.jsonl")}
    report = merge(untied, tmp_path / "out", data=data, parameters={"alpha": alphas})
    signs, _ = voted(untied.target, untied.train)
    delta = mask(vectors(untied.source, untied.tuned)[0], signs)
    best = report["gradfix"]["alpha"]
    assert best in ALPHAS
    found = tensors(tmp_path / "out")
    for name, part in delta.items():
        alpha = 0.0 if "embed_tokens" in name else best if "mlp" in name else 0.3
        wanted = added(untied.target, delta, alpha)[name] if alpha else untied.target.get_parameter(name)
        assert int((found[name] != wanted).sum()) <= MOST * part.numel(), name


def test_shards_and_another_dtype(untied, tmp_path):
    one = merge(untied, tmp_path / "one", out_dtype="bfloat16")
    many = merge(untied, tmp_path / "many", {"shard_size": 12_000}, out_dtype="bfloat16")
    assert (one["shards"], many["shards"] > 2) == (1, True)
    found, wanted = tensors(tmp_path / "many"), tensors(tmp_path / "one")
    assert differing(found, wanted)[0] == 0
    merge(untied, tmp_path / "exact")
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in tensors(tmp_path / "exact").items())
    assert verify(tmp_path / "many")["bad"] == []


@pytest.mark.slow
@pytest.mark.parametrize("panels", [False, True])
def test_launches_give_the_same(untied, tmp_path, monkeypatch, panels):
    """What a GPU does, in Triton's interpreter: votes of panels, packing, masks, composed alphas."""
    from streammerge.engine import layer_run
    from streammerge.engine.places import GpuPlace

    changes = {
        "parameters": {"alpha": [0.3, 0.6]},
        "data": {"train": str(untied.folder / "train.jsonl"), "validation": str(untied.folder / "validation.jsonl")},
        "save_votes": str(tmp_path / "votes.safetensors"),
    }
    wanted = merge(untied, tmp_path / "wanted", **changes)
    (tmp_path / "votes.safetensors").rename(tmp_path / "kept.safetensors")
    monkeypatch.setattr(layer_run, "HostPlace", lambda threads: GpuPlace(torch.device("cpu"), layer_run.PIECE))
    plan = sm.plan(recipe(untied.folder, **changes), ram=RAM, device="cpu")
    plan.train.hooks.panels = panels
    report = sm.merge(plan, tmp_path / "out")
    votes = [(tmp_path / name).read_bytes() for name in ("kept.safetensors", "votes.safetensors")]
    if panels:
        assert sum(a != b for a, b in zip(*votes, strict=True)) <= MOST * len(votes[0])
    else:
        assert votes[0] == votes[1]
    assert [loss for _, loss in report["gradfix"]["curve"]] == pytest.approx(
        [loss for _, loss in wanted["gradfix"]["curve"]], rel=1e-5
    )
    assert report["gradfix"]["total"] == pytest.approx(wanted["gradfix"]["total"], rel=1e-3)
    single = sm.plan(recipe(untied.folder), ram=RAM, device="cpu")
    single.train.hooks.panels = panels
    sm.merge(single, tmp_path / "single")
    merge(untied, tmp_path / "host")
    wrong, count = differing(tensors(tmp_path / "single"), tensors(tmp_path / "host"))
    assert wrong <= (MOST * count if panels else 0)


# --- the command line ---


def command(*words):
    from click.testing import CliRunner

    from streammerge.cli import cli

    return CliRunner().invoke(cli, [str(word) for word in (*words, "--ram", RAM, "--device", "cpu")])


def test_plan_and_merge_print_what_is_swept(untied, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(untied.folder)))
    planned = command("plan", path)
    assert planned.exit_code == 0, planned.output
    assert "two passes over the layers, 5 samples" in planned.output
    body = json.loads(command("plan", path, "--json").output)
    assert body["warnings"] == []
    assert 4 * 61 * 32 <= body["step_bytes"] <= body["read_bytes"]
    assert body["sweeps"]["train"]["passes"] == body["passes"] == 2
    assert body["samples"] == 5
    merged = command("merge", path, tmp_path / "out")
    assert merged.exit_code == 0, merged.output
    assert "kept" in merged.output
    kept = r"^kept +\d+\.\d% +alpha 0\.5, \d\.\d% tied, 0 lost to rounding, loss to fall by [\d.]+ to first order$"
    assert re.search(kept, merged.output, re.MULTILINE)
    samples(tmp_path / "even.jsonl", (5, 6))
    path.write_text(json.dumps(recipe(untied.folder, data={"train": str(tmp_path / "even.jsonl")})))
    assert "2 samples: an odd number leaves fewer ties" in command("plan", path).output


# --- any network, any loss ---


@pytest.mark.parametrize("parameters", [{}, {"alpha": [0.2, 0.6]}])
def test_any_network_with_any_loss(tmp_path, parameters):
    models = {}
    for seed, name in enumerate(("target", "source", "tuned")):
        torch.manual_seed(seed)
        models[name] = Encoder()
        arrays = {key: value.numpy() for key, value in models[name].state_dict().items()}
        build.checkpoint(tmp_path / name, {"model.safetensors": arrays})
    random = torch.Generator().manual_seed(0)
    batches = [
        {"values": torch.randn(1, 6, generator=random), "label": torch.tensor([number % 3])} for number in range(7)
    ]
    shapes = {each["name"]: each["shape"] for each in sm.inspect(tmp_path / "target")["entries"]}
    stack = sm.Stack.of(Encoder, shapes, batches[0])
    report = sm.gradfix(
        stack, batches[:5], own_loss, target=tmp_path / "target", source_base=tmp_path / "source",
        models=[tmp_path / "tuned"], out=tmp_path / "out", validation=batches[5:], parameters=parameters,
        ram=RAM, device="cpu",
    )  # fmt: skip
    votes = {}
    for batch in batches[:5]:
        models["target"].zero_grad()
        own_loss(models["target"](batch["values"]), batch).backward()
        for name, parameter in models["target"].named_parameters():
            votes[name] = votes.get(name, 0) - parameter.grad.sign()
    delta = mask(vectors(models["source"], models["tuned"])[0], {name: vote.sign() for name, vote in votes.items()})
    wanted = added(models["target"], delta, report["gradfix"]["alpha"])
    assert differing(tensors(tmp_path / "out"), wanted)[0] == 0
    assert report["gradfix"]["samples"] == 5


def test_tasks_of_a_call_are_checked(untied):
    with pytest.raises(RecipeError, match="tasks: give the number of every batch's task"):
        sm.gradfix(None, [{}, {}], own_loss, target="", source_base="", models=[], out="", tasks=[1, 0])
