"""GradFix from a recipe to files: what plain autograd over whole models says, whatever interrupts it."""

import json
import re
import shutil
from types import SimpleNamespace

import build
import pytest

pytest.importorskip("transformers")

import torch
from transport import (
    WORDS,
    added,
    differing,
    llama,
    loss_of,
    mask,
    recipe,
    samples,
    tensors,
    vectors,
    voted,
)

import streammerge as sm
from streammerge.errors import CheckpointError, Interrupted, OutputExists, RecipeError
from streammerge.store import journal
from streammerge.store.verify import verify

RAM = "2GiB"
MOST = 2e-3  # share of weights that may differ from plain autograd
pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of is not ours


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("world"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return made(tmp_path_factory.mktemp("untied"))


def made(folder, dtype=torch.float32, **changes):
    """Target, source and two fine-tuned models in a folder, with samples of two tasks and some to choose by."""
    target = llama(folder / "target", 0, dtype=dtype, **changes)
    source = llama(folder / "source", 1, dtype=dtype, **changes)
    tuned = llama(folder / "tuned", 2, source, dtype=dtype, **changes)
    other = llama(folder / "other", 3, source, dtype=dtype, **changes)
    train = samples(folder / "train.jsonl", (7, 12, 9, 5, 8), 1)
    second = samples(folder / "second.jsonl", (6, 11, 10), 2)
    validation = samples(folder / "validation.jsonl", (9, 14), 3)
    return SimpleNamespace(
        folder=folder, target=target, source=source, tuned=tuned, other=other,
        train=train, second=second, validation=validation,
    )  # fmt: skip


def merge(world, out, options=None, **changes):
    body = recipe(world.folder, **changes)
    return sm.merge(body, out, ram=RAM, device="cpu", **(options or {}))


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


def test_votes_serve_another_task_vector(world, tmp_path):
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


ALPHAS = [0.1, 0.4, 1.0]


@pytest.fixture
def sweep(world):
    return {
        "parameters": {"alpha": ALPHAS},
        "data": {"train": str(world.folder / "train.jsonl"), "validation": str(world.folder / "validation.jsonl")},
    }


def test_alphas_are_tried_on_validation_samples_alone(world, tmp_path, sweep):
    report = merge(world, tmp_path / "out", **sweep)
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


class After:
    """Asks to stop at question number `count`."""

    def __init__(self, count):
        self.left = count

    def is_set(self):
        self.left -= 1
        return self.left < 0


@pytest.mark.parametrize("several", [False, True], ids=["one alpha", "alphas"])
def test_an_interrupted_run_ends_in_the_same_bytes(world, tmp_path, sweep, several):
    changes = sweep if several else {}
    whole = merge(world, tmp_path / "whole", **changes)
    wanted = (tmp_path / "whole/model.safetensors").read_bytes()
    stops, sealed = 0, set()
    for count in (3, 5, 7, 9, 13, 40):
        try:
            report = merge(world, tmp_path / "out", {"cancel": After(count)}, **changes)
            break
        except Interrupted:
            stops += 1
        assert not (tmp_path / "out").exists()
        sealed.add(sum(map(len, journal.read(tmp_path / "out.partial").tensors.values())))
    assert stops >= 3
    assert len(sealed) >= 3, "no run left layers behind"
    assert (tmp_path / "out/model.safetensors").read_bytes() == wanted
    one, other = report["gradfix"], whole["gradfix"]
    assert one.pop("total") == pytest.approx(other.pop("total"))
    assert one == other
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    assert verify(tmp_path / "out")["bad"] == []


DIE = """
import os
from streammerge.store import scatter
real = scatter.ScatterWriter._seal
count = [0]
def seal(*arguments):
    real(*arguments)
    count[0] += 1
    if count[0] == AFTER:
        os.kill(os.getpid(), 9)
scatter.ScatterWriter._seal = seal
"""


def test_killed_while_a_layer_is_written(untied, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(untied.folder)))
    before = DIE.replace("AFTER", "2")
    child = build.command("merge", path, tmp_path / "out", "--ram", RAM, "--device", "cpu", "--quiet", before=before)
    assert child.returncode == -9, child.stderr
    assert not (tmp_path / "out").exists()
    kept = journal.read(tmp_path / "out.partial").tensors["model.safetensors"]
    assert len(kept) == 2 + 9  # head and last layer
    (tmp_path / "out.partial" / "streammerge-left").mkdir()
    merge(untied, tmp_path / "out")
    merge(untied, tmp_path / "whole")
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == sorted(
        p.name for p in (tmp_path / "whole").iterdir()
    )


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_killed_at_every_seal(world, tmp_path, sweep, several):
    path = tmp_path / "recipe.json"
    path.write_text(
        json.dumps(recipe(world.folder, save_votes=str(tmp_path / "votes.safetensors"), **(sweep if several else {})))
    )
    ends = set()
    for number in range(1, 9):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "votes.safetensors").unlink(missing_ok=True)
        words = ("merge", path, tmp_path / "out", "--ram", RAM, "--device", "cpu", "--quiet")
        build.command(*words, before=DIE.replace("AFTER", str(number)))
        if not (tmp_path / "out").exists():
            child = build.command(*words)
            assert child.returncode == 0, child.stderr
        ends.add((tmp_path / "out/model.safetensors").read_bytes() + (tmp_path / "votes.safetensors").read_bytes())
    assert len(ends) == 1


def test_the_budget_changes_no_bit(untied, tmp_path):
    body = recipe(untied.folder)
    with pytest.raises(sm.BudgetTooSmall, match=r"a sweep over the layers needs at least .*; give --ram") as caught:
        sm.plan(body, ram="1MiB", device="cpu")
    assert caught.value.least > 64 << 20
    merge(untied, tmp_path / "a")
    sm.merge(body, tmp_path / "b", ram=caught.value.least + (8 << 20), device="cpu", threads=1)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_shards_and_another_dtype(untied, tmp_path):
    one = merge(untied, tmp_path / "one", out_dtype="bfloat16")
    many = merge(untied, tmp_path / "many", {"shard_size": 12_000}, out_dtype="bfloat16")
    assert (one["shards"], many["shards"] > 2) == (1, True)
    found, wanted = tensors(tmp_path / "many"), tensors(tmp_path / "one")
    assert differing(found, wanted)[0] == 0
    merge(untied, tmp_path / "exact")
    assert all(torch.equal(found[name], value.bfloat16()) for name, value in tensors(tmp_path / "exact").items())
    assert verify(tmp_path / "many")["bad"] == []


# --- what is not matched ---


def grown(world, folder, more, to=("target", "source", "tuned")):
    """Copies of the models with further tensors."""
    from safetensors.torch import load_file, save_file

    for name in ("target", "source", "tuned"):
        shutil.copytree(world.folder / name, folder / name)
        if name in to:
            path = folder / name / "model.safetensors"
            save_file({**load_file(path), **more(name)}, path, {"format": "pt"})
    shutil.copy(world.folder / "train.jsonl", folder)
    return SimpleNamespace(folder=folder)


@pytest.mark.parametrize("unmatched", ["drop", "pass"])
def test_a_tensor_that_no_layer_runs_with(untied, tmp_path, unmatched):
    values = {"target": 10.0, "source": 1.0, "tuned": 3.0}
    world = grown(
        untied, tmp_path, lambda name: {"zz.extra": torch.full((5,), values[name]), "count": torch.tensor([7])}
    )
    report = merge(world, tmp_path / "out", parameters={"unmatched": unmatched, "alpha": 0.25})
    found = tensors(tmp_path / "out")
    assert found["zz.extra"].tolist() == [10.0 if unmatched == "drop" else 10.5] * 5
    assert found["count"].tolist() == [7]
    assert any("1 tensors that no layer runs with (zz.extra)" in each for each in report["warnings"])
    merge(untied, tmp_path / "plain", parameters={"alpha": 0.25})
    plain = tensors(tmp_path / "plain")
    assert all(torch.equal(found[name], value) for name, value in plain.items())


def test_a_tensor_that_only_the_target_has(untied, tmp_path):
    world = grown(untied, tmp_path, lambda name: {"zz.extra": torch.ones(5)}, to=("target",))
    report = merge(world, tmp_path / "out", parameters={"unmatched": "pass"})
    assert tensors(tmp_path / "out")["zz.extra"].tolist() == [1.0] * 5
    assert any("1 tensor without a source or votes (zz.extra)" in each for each in report["warnings"])


def test_a_tied_head_that_is_stored_twice(tmp_path):
    """Both copies come out the same."""
    world = made(tmp_path / "world", tie_word_embeddings=True)
    from safetensors.torch import load_file

    shared = {
        name: load_file(world.folder / name / "model.safetensors")["model.embed_tokens.weight"]
        for name in ("target", "source", "tuned")
    }
    (tmp_path / "grown").mkdir()
    twice = grown(world, tmp_path / "grown", lambda name: {"lm_head.weight": shared[name].clone()})
    votes = str(tmp_path / "votes.safetensors")
    merge(twice, tmp_path / "out", save_votes=votes)
    merge(twice, tmp_path / "again", data=None, votes=votes)
    merge(world, tmp_path / "once")
    found = tensors(tmp_path / "out")
    assert torch.equal(found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert torch.equal(found["lm_head.weight"], tensors(tmp_path / "once")["model.embed_tokens.weight"])
    assert (tmp_path / "out/model.safetensors").read_bytes() == (tmp_path / "again/model.safetensors").read_bytes()


@pytest.mark.parametrize("mode", ["force", "random"])
def test_other_modes(untied, tmp_path, mode):
    merge(
        untied,
        tmp_path / "out",
        data=None if mode == "random" else recipe(untied.folder)["data"],
        parameters={"mode": mode},
    )
    found = tensors(tmp_path / "out")
    (tau,) = vectors(untied.source, untied.tuned)
    signs, _ = voted(untied.target, untied.train)
    for name, parameter in untied.target.named_parameters():
        step = found[name] - parameter
        torch.testing.assert_close(
            step.abs(), torch.where((signs[name] == 0) & (mode == "force"), 0, 0.5 * tau[name].abs()), atol=1e-6, rtol=0
        )
        if mode == "force":
            assert bool((step * signs[name] >= 0).all())
    if mode == "random":
        step = torch.cat([(found[n] - p).sign().flatten() for n, p in untied.target.named_parameters()])
        assert abs(float(step.mean())) < 0.05


# --- what may be wrong ---


def rows(path, *lines):
    path.write_text("\n".join(lines))
    return {"train": str(path)}


def test_bad_requests_are_one_line(untied, tmp_path):
    good = '{"input_ids": [1, 2, 3]}'
    cases = [
        ({"data": {"train": str(tmp_path / "none")}}, "none: the samples cannot be read: No such file or directory"),
        ({"data": rows(tmp_path / "a", good, "{")}, "a, line 2: not JSON"),
        (
            {"data": rows(tmp_path / "b", '{"input_ids": [1, 2], "labels": [1, -100]}')},
            "b, line 1: no supervised token",
        ),
        (
            {"data": rows(tmp_path / "c", good, f'{{"input_ids": [1, {WORDS}]}}')},
            f"c, line 2: token {WORDS} lies outside",
        ),
        ({"data": rows(tmp_path / "d", '{"text": "x"}')}, "no tokenizer that transformers can load"),
        ({"data": None}, "gradfix needs data.train: a file of samples, or votes"),
        ({"parameters": {"alpha": [0.1, 0.2]}}, "alpha is a list; give data.validation"),
        ({"parameters": {"alpha": []}}, "alpha: an empty list"),
        ({"parameters": {"alpha": "x"}}, "alpha: 'x' is not a finite number"),
        ({"parameters": {"vote": "max"}}, "vote is 'max'; one of majority, mean"),
        ({"source_base": None}, "gradfix needs source_base"),
        ({"base_model": None}, "gradfix needs a base_model"),
        ({"source_bas": "x"}, "unknown key 'source_bas'; did you mean 'source_base'?"),
        ({"data": None, "votes": str(untied.folder / "target")}, "holds no votes; give a file that save_votes wrote"),
        ({"post": "svc"}, "svc works on one tensor at a time"),
        ({"save_votes": str(tmp_path / "out" / "votes.safetensors")}, "lies in the output folder"),
    ]
    for changes, line in cases:
        with pytest.raises((RecipeError, CheckpointError)) as caught:
            merge(untied, tmp_path / "out", **changes)
        assert line in str(caught.value), str(caught.value)
        assert "\n" not in str(caught.value)
        assert not list(tmp_path.glob("out*"))


def test_models_that_do_not_fit(untied, tmp_path):
    llama(tmp_path / "wide", 4, intermediate_size=64)
    with pytest.raises(CheckpointError, match=r"wide: tensor .*mlp.* is \[32, 64\], in .*target it is \[32, 48\]"):
        merge(untied, tmp_path / "out", models=[{"model": str(tmp_path / "wide")}])
    llama(tmp_path / "one", 4, hidden_size=1, num_attention_heads=1, num_key_value_heads=1, head_dim=8)
    with pytest.raises(CheckpointError, match=r"only models of one architecture and size merge|vocabularies differ"):
        merge(untied, tmp_path / "out", source_base=str(tmp_path / "one"))
    llama(tmp_path / "tied", 4, tie_word_embeddings=True)
    with pytest.raises(CheckpointError, match=r"tied: no tensor 'lm_head.weight', which .*source has; the fine-tuned"):
        merge(untied, tmp_path / "out", models=[{"model": str(tmp_path / "tied")}])


def test_a_loss_that_is_no_number_writes_nothing(untied, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(untied.folder / "target", tmp_path / "target")
    path = tmp_path / "target/model.safetensors"
    values = load_file(path)
    values["model.norm.weight"][3] = float("nan")
    save_file(values, path, {"format": "pt"})
    with pytest.raises(RecipeError, match="the target's loss of training sample 1 is nan; check sample and target"):
        merge(untied, tmp_path / "out", base_model=str(tmp_path / "target"))
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_votes_of_another_kind_are_refused(untied, tmp_path):
    models = [{"model": str(untied.folder / name)} for name in ("tuned", "other")]
    files = [str(untied.folder / name) for name in ("train.jsonl", "second.jsonl")]
    votes = str(tmp_path / "votes.safetensors")
    merge(untied, tmp_path / "a", models=models, data={"train": files}, order="mask_then_merge", save_votes=votes)
    with pytest.raises(RecipeError, match="holds the votes of 2 tasks for 1 models"):
        merge(untied, tmp_path / "b", data=None, votes=votes)


def test_streams_and_state_dicts_are_refused(untied):
    with pytest.raises(RecipeError, match="gradfix runs on layers"):
        next(iter(sm.stream(recipe(untied.folder), ram=RAM, device="cpu")))
    with pytest.raises(RecipeError, match="gradfix is a layer method"):
        sm.merge_state_dicts([{}], base={}, method="gradfix")


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
    assert body["sweeps"]["train"]["passes"] == body["passes"] == 2
    assert body["samples"] == 5
    merged = command("merge", path, tmp_path / "out")
    assert merged.exit_code == 0, merged.output
    assert "kept" in merged.output
    kept = r"^kept +\d+\.\d% +alpha 0\.5, \d\.\d% tied, 0 lost to rounding, loss to fall by [\d.]+ to first order$"
    assert re.search(kept, merged.output, re.MULTILINE)
    assert "two passes over the layers" not in command("plan", path, "--help").output


# --- any network, any loss ---


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, hidden):
        return hidden + torch.tanh(self.inner(hidden))


class Encoder(torch.nn.Module):
    """Names its layers; a classifier on top."""

    stages = "blocks"

    def __init__(self):
        super().__init__()
        self.enter = torch.nn.Linear(6, 8)
        self.blocks = torch.nn.ModuleList([Block(), Block()])
        self.leave = torch.nn.Linear(8, 3)

    def forward(self, values):
        hidden = self.enter(values)
        for block in self.blocks:
            hidden = block(hidden)
        return self.leave(hidden)


def own_loss(output, batch):
    return torch.nn.functional.cross_entropy(output, batch["label"])


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
