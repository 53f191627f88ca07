"""GradFix on tensors that do not match, in its other modes, and on requests that are wrong: one line each."""

import shutil
from types import SimpleNamespace

import pytest

pytest.importorskip("transformers")

import torch
from transport import (
    RAM,
    WORDS,
    llama,
    made,
    merge,
    recipe,
    tensors,
    vectors,
    voted,
)

import streammerge as sm
from streammerge.errors import CheckpointError, RecipeError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
    pytest.mark.usefixtures("one_thread"),
]


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
    assert any("1 tensor that no layer runs with (zz.extra)" in each for each in report["warnings"])
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


def test_drawn_signs_need_no_training_samples_to_choose_an_alpha(untied, tmp_path):
    data = {"validation": str(untied.folder / "validation.jsonl")}
    report = merge(untied, tmp_path / "a", data=data, parameters={"mode": "random", "alpha": [0.1, 0.6]})
    best = report["gradfix"]["alpha"]
    assert [alpha for alpha, _ in report["gradfix"]["curve"]] == [0.1, 0.6]
    merge(untied, tmp_path / "b", data=None, parameters={"mode": "random", "alpha": best})
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


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
        ({"data": {}}, "gradfix needs data.train: a file of samples, or votes"),
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


def test_a_nan_in_a_task_vector_is_named_or_refused(untied, tmp_path):
    from safetensors.torch import load_file, save_file

    shutil.copytree(untied.folder / "tuned", tmp_path / "tuned")
    path = tmp_path / "tuned/model.safetensors"
    values = load_file(path)
    values["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(values, path, {"format": "pt"})
    models = [{"model": str(tmp_path / "tuned")}]
    report = merge(untied, tmp_path / "out", models=models)
    assert report["nonfinite"] == [{"tensor": "model.layers.1.mlp.up_proj.weight", "file": str(path), "holds": "NaN"}]
    assert tensors(tmp_path / "out")["model.layers.1.mlp.up_proj.weight"].isfinite().all()
    with pytest.raises(CheckpointError, match=r"up_proj.weight' holds NaN; mend it, or merge without --strict"):
        merge(untied, tmp_path / "strict", {"strict": True}, models=models)
    assert not list(tmp_path.glob("strict*"))


def test_votes_of_another_kind_are_refused(untied, tmp_path):
    models = [{"model": str(untied.folder / name)} for name in ("tuned", "other")]
    files = [str(untied.folder / name) for name in ("train.jsonl", "second.jsonl")]
    votes = str(tmp_path / "votes.safetensors")
    merge(untied, tmp_path / "a", models=models, data={"train": files}, order="mask_then_merge", save_votes=votes)
    with pytest.raises(RecipeError, match="holds the votes of 2 tasks for 1 models"):
        merge(untied, tmp_path / "b", data=None, votes=votes)
    votes = str(tmp_path / "one.safetensors")
    merge(untied, tmp_path / "c", save_votes=votes)
    report = merge(untied, tmp_path / "d", data=None, votes=votes)
    assert report["warnings"] == []
    llama(tmp_path / "half", 0, dtype=torch.bfloat16)
    report = merge(untied, tmp_path / "e", data=None, votes=votes, base_model=str(tmp_path / "half"))
    assert report["warnings"] == [f"{votes}: voted on at another model than {tmp_path / 'half'}"]
    wide = {key: str(tmp_path / key) for key in ("base_model", "source_base", "tuned")}
    for seed, folder in enumerate(wide.values()):
        llama(folder, seed, vocab_size=64)
    models = [{"model": wide.pop("tuned")}]
    with pytest.raises(CheckpointError, match=r"votes of tensor 'lm_head.weight' are not of 2048 elements"):
        merge(untied, tmp_path / "f", data=None, votes=votes, models=models, **wide)


def test_streams_and_state_dicts_are_refused(untied):
    with pytest.raises(RecipeError, match="gradfix runs on layers"):
        next(iter(sm.stream(recipe(untied.folder), ram=RAM, device="cpu")))
    with pytest.raises(RecipeError, match="gradfix is a layer method"):
        sm.merge_state_dicts([{}], base={}, method="gradfix")
