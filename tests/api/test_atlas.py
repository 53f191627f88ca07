"""aTLAS from a recipe to files: the steps of plain autograd, exported, and merged again from the coefficients alone."""

import json
import re

import pytest

pytest.importorskip("transformers")

import torch
from composed import EXPERTS, Plain, bytes_of, command_line, made, merge, recipe, tensors
from transport import RAM

import streammerge as sm
from streammerge.engine import composing_plan
from streammerge.errors import RecipeError
from streammerge.store.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
    pytest.mark.usefixtures("one_thread"),
]
CLOSE = 5e-3  # of the delta, after four steps; fp32 leaves it below 1e-5


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("world"), tie_word_embeddings=request.param)


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    return made(tmp_path_factory.mktemp("untied"))


def test_four_steps_are_those_of_plain_autograd(world, tmp_path):
    """Through the command line; then once more from the coefficients alone."""
    path, out = tmp_path / "recipe.json", tmp_path / "out"
    path.write_text(json.dumps(recipe(world.folder)))
    run = command_line("merge", path, out, "--json")
    assert run.exit_code == 0, run.output
    report = json.loads(run.output)
    plain = Plain(world)
    losses = plain.learn(4, lambda step: plain.loss(world.train))
    assert report["atlas"]["loss"] == pytest.approx(losses, rel=1e-5)
    assert losses[-1] < losses[0] - 0.1
    assert plain.distance(tensors(out)) < 1e-4 < CLOSE
    assert report["read_bytes"] == report["predicted"]["read_bytes"]
    assert verify(out)["bad"] == []
    assert {entry.name for entry in out.iterdir()} >= {"coefficients.json", "config.json", "streammerge.json"}
    saved = json.loads((out / "coefficients.json").read_text())
    for name, leaf in plain.leaves.items():
        assert [row[0] for row in saved["tensors"][name]] == pytest.approx(leaf.tolist(), abs=1e-4)
        figures = report["atlas"]["tensors"][name]
        assert [figures[f"c_{number}"] for number in (1, 2, 3)] == [row[0] for row in saved["tensors"][name]]
    again = recipe(world.folder, data=None, parameters=None, coefficients=str(out / "coefficients.json"))
    path.write_text(json.dumps(again))
    run = command_line("merge", path, tmp_path / "again", "--json")
    assert run.exit_code == 0, run.output
    assert bytes_of(tmp_path / "again") == bytes_of(out)
    assert (tmp_path / "again/coefficients.json").read_bytes() == (out / "coefficients.json").read_bytes()
    assert json.loads(run.output)["passes"] == 1


@pytest.mark.parametrize(
    ("parameters", "steps"),
    [
        ({"partitions": 3}, 4),
        ({"budget": 2}, 4),
        ({"blocks": "weights"}, 3),
        ({"clip": 0.01}, 3),
        ({"init": 0.2, "batch": 2}, 5),
        ({"objective": "entropy"}, 3),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_where_weights_stay_changes_no_bit_and_reads_what_was_planned(world, tmp_path, monkeypatch, parameters, steps):
    found = {}
    for place in ("twice", "memory", "disk", "pinned"):
        if "clip" in parameters and place in ("memory", "disk"):
            continue

        def choose(sizes, room, late, place=place):
            return ["twice" if late[at] and place in ("memory", "disk") else place for at in range(len(sizes))]

        monkeypatch.setattr(composing_plan, "choose_places", choose)
        out = tmp_path / place
        report = merge(world, out, parameters={"steps": steps, "batch": "all", **parameters})
        assert report["read_bytes"] == report["predicted"]["read_bytes"], place
        found[place] = bytes_of(out), (out / "coefficients.json").read_bytes(), report["atlas"]["loss"]
    assert all(each == found["twice"] for each in found.values())


def test_passes_and_bytes_by_the_counter(untied, tmp_path, monkeypatch):
    """Kept weights: the base once to start from, then base and experts once a step, and once for the merge."""
    monkeypatch.setattr(composing_plan, "choose_places", lambda sizes, room, late: ["memory"] * len(sizes))
    report = merge(untied, tmp_path / "out", parameters={"steps": 6, "batch": "all"})
    one = sum(value.nbytes for value in tensors(tmp_path / "out").values())
    models = 1 + len(EXPERTS)
    assert report["predicted"]["learn"]["step_read_bytes"] == models * one
    opening = one - untied.base.lm_head.weight.nbytes - untied.base.model.norm.weight.nbytes  # the head is met once
    last = sum(p.nbytes for p in untied.base.model.layers[-1].parameters())  # and the last layer's base is still there
    assert report["read_bytes"] == opening - last + 6 * models * one + models * one
    assert report["passes"] == 2 + 5 + 1


def test_clipping_is_that_of_the_whole_gradient(untied, tmp_path):
    """The norm over all coefficients is known after the sweep only."""
    merge(untied, tmp_path / "out", parameters={"steps": 4, "batch": 2, "clip": 0.01})
    merge(untied, tmp_path / "free", parameters={"steps": 4, "batch": 2})
    from streammerge.samples import step_order

    order = step_order(5, 2, 4, 0)
    plain = Plain(untied)
    plain.learn(4, lambda step: plain.loss([untied.train[at] for at in order[step]]), clip=0.01)
    assert plain.distance(tensors(tmp_path / "out")) < 1e-4
    assert plain.distance(tensors(tmp_path / "free")) > 1e-3


def test_several_files_are_added_and_a_control_set_is_kept(untied, tmp_path):
    files = [str(untied.folder / name) for name in ("train.jsonl", "second.jsonl")]
    merge(untied, tmp_path / "sum", data={"train": files})
    plain = Plain(untied)
    plain.learn(4, lambda step: plain.loss(untied.train) + plain.loss(untied.second))
    assert plain.distance(tensors(tmp_path / "sum")) < 1e-4
    negation = {"steps": 4, "batch": "all", "objective": "negation"}
    report = merge(untied, tmp_path / "out", data={"train": files[0], "control": files[1]}, parameters=negation)
    plain = Plain(untied)
    before = float(plain.loss(untied.train)), float(plain.loss(untied.second))
    losses = plain.learn(4, lambda step: plain.loss(untied.second) - plain.loss(untied.train))
    assert plain.distance(tensors(tmp_path / "out")) < 1e-4
    assert report["atlas"]["loss"] == pytest.approx(losses, abs=1e-5)
    assert float(plain.loss(untied.train)) > before[0]
    assert float(plain.loss(untied.second)) < before[1]


def test_entropy_needs_no_labels(untied, tmp_path):
    """Labels say where, not what."""
    rows = [{**row, "labels": [-100 if label == -100 else 1 for label in row["labels"]]} for row in untied.train]
    (tmp_path / "blind.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parameters = {"steps": 3, "batch": "all", "objective": "entropy"}
    one = merge(untied, tmp_path / "one", parameters=parameters)
    other = merge(untied, tmp_path / "other", parameters=parameters, data={"train": str(tmp_path / "blind.jsonl")})
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "other")
    assert one["atlas"]["loss"] == other["atlas"]["loss"]
    plain, total, count = Plain(untied), 0.0, 0
    for row in untied.train:
        ids = torch.tensor([row["input_ids"]])
        output = torch.func.functional_call(plain.model, plain.base, (), {"input_ids": ids})
        wanted = torch.tensor(row["labels"][1:]) != -100
        scores = torch.log_softmax(output.logits[0, :-1][wanted], -1)
        total -= float((scores.exp() * scores).sum().detach())
        count += int(wanted.sum())
    assert one["atlas"]["loss"][0] == pytest.approx(total / count, rel=1e-5)
    assert one["atlas"]["loss"][2] < one["atlas"]["loss"][0]


def test_pseudo_labels_are_the_models_own(untied, tmp_path):
    """Two epochs, labels looked up before each: trusted samples by cross-entropy, the others above a threshold."""
    from streammerge.engine.objectives import flatten, trusted
    from streammerge.samples import step_order

    rows = [
        {**row, "labels": [-100] * 4 + row["labels"][4:6] + [-100] * (len(row["input_ids"]) - 6)}
        for row in untied.train[:3]
    ]
    rows += [{"input_ids": rows[0]["input_ids"][::-1], "labels": rows[0]["labels"]}]
    rows = [row for row in rows if len(row["input_ids"]) == len(row["labels"])]
    (tmp_path / "few.jsonl").write_text("\n".join(map(json.dumps, rows)))
    parameters = {"epochs": 2, "batch": 2, "objective": "pseudo_label", "lr": 0.3}
    report = merge(untied, tmp_path / "out", data={"train": str(tmp_path / "few.jsonl")}, parameters=parameters)
    assert report["read_bytes"] == report["predicted"]["read_bytes"]
    plain, order, own = Plain(untied), step_order(len(rows), 2, 4, 0), {}

    def logs(row):
        ids = torch.tensor([row["input_ids"]])
        output = torch.func.functional_call(plain.model, plain.weights(), (), {"input_ids": ids})
        return torch.log_softmax(output.logits[0, :-1][torch.tensor(row["labels"][1:]) != -100], -1)

    def loss(step):
        if step % 2 == 0:
            with torch.no_grad():
                found = [logs(row).max(-1) for row in rows]
            chosen = trusted([tuple(each.indices.tolist()) for each in found], [float(f.values.mean()) for f in found])
            own.clear()
            own.update({at: found[at].indices for at in chosen})
        sure, others = sorted(own), [at for at in order[step] if at not in own][:1]
        first = sure[step % len(sure)]
        total = -logs(rows[first])[range(2), own[first]].sum()
        for at in others:
            found = logs(rows[at])
            q = flatten(found.detach().exp())
            total = total - ((q * found).sum(-1) * (q.amax(-1) > 0.9 + 0.05 * (step // 2))).sum()
        return total / (2 + 2 * len(others))

    losses = plain.learn(4, loss, lr=0.3)
    assert report["atlas"]["loss"] == pytest.approx(losses, rel=1e-4)
    assert plain.distance(tensors(tmp_path / "out")) < 1e-3
    with pytest.raises(RecipeError, match=r"pseudo_label takes one file under data\.train"):
        merge(untied, tmp_path / "no", data={"train": [str(tmp_path / "few.jsonl")] * 2}, parameters=parameters)


def test_validation_samples_choose_the_epoch(untied, tmp_path):
    data = {name: str(untied.folder / f"{name}.jsonl") for name in ("train", "validation")}
    parameters = {"epochs": 4, "batch": 3, "lr": 0.6}
    report = merge(untied, tmp_path / "out", data=data, parameters=parameters)
    tried = report["atlas"]["validation"]
    assert [step for step, _ in tried] == [0, 2, 4, 6, 8]
    assert report["atlas"]["kept"] == min(tried, key=lambda each: each[1])[0]
    assert report["read_bytes"] == report["predicted"]["read_bytes"]
    plain = Plain(untied)
    assert tried[0][1] == pytest.approx(float(plain.loss(untied.validation)), rel=1e-5)
    saved = json.loads((tmp_path / "out/coefficients.json").read_text())["tensors"]
    with torch.no_grad():
        for name, leaf in plain.leaves.items():
            leaf.copy_(torch.tensor(saved[name])[:, 0])
    best = min(loss for _, loss in tried)
    assert float(plain.loss(untied.validation)) == pytest.approx(best, rel=1e-5)


def test_a_budget_of_experts_keeps_those_of_the_largest_gradients(untied, tmp_path):
    report = merge(untied, tmp_path / "out", parameters={"steps": 4, "batch": "all", "budget": 1})
    plain = Plain(untied)
    plain.loss(untied.train).backward()
    chosen = report["atlas"]["chosen"]
    assert {name: [int(leaf.grad.abs().argmax())] for name, leaf in plain.leaves.items()} == chosen
    mask = {name: torch.tensor([float(k in chosen[name]) for k in range(3)]) for name in chosen}
    for name, leaf in plain.leaves.items():
        leaf.grad = None
        leaf.register_hook(lambda gradient, name=name: gradient * mask[name])
    plain.learn(4, lambda step: plain.loss(untied.train))
    assert plain.distance(tensors(tmp_path / "out")) < 1e-4
    saved = json.loads((tmp_path / "out/coefficients.json").read_text())["tensors"]
    assert all(saved[name][k] == [0.0] for name, kept in chosen.items() for k in range(3) if k not in kept)


def test_settings_by_tensor_and_by_model(untied, tmp_path):
    models = [{"model": str(untied.folder / name), "parameters": {"init": at / 10}} for at, name in enumerate(EXPERTS)]
    parameters = {
        "steps": 2,
        "batch": "all",
        "blocks": "*mlp*",
        "lr": [{"filter": "up_proj", "value": 0}, {"value": 0.1}],
        "weight_decay": 0,
    }
    merge(untied, tmp_path / "out", models=models, parameters=parameters)
    saved = json.loads((tmp_path / "out/coefficients.json").read_text())["tensors"]
    for name, rows in saved.items():
        same = [row[0] for row in rows] == [0, 0.1, 0.2]
        assert same == ("mlp" not in name or "up_proj" in name), name


def test_sixteen_bits_are_rounded_once_and_warned_of(tmp_path):
    world = made(tmp_path / "world", torch.bfloat16, tie_word_embeddings=True)
    merge(world, tmp_path / "out")
    plain = Plain(world)
    plain.learn(4, lambda step: plain.loss(world.train))
    found, wanted = tensors(tmp_path / "out"), plain.merged()
    wrong = sum(int((found[name] != wanted[name].bfloat16()).sum()) for name in wanted)
    assert wrong <= 2e-3 * sum(value.numel() for value in wanted.values())
    plan = sm.plan(recipe(world.folder, compute="bfloat16"), ram=RAM, device="cpu")
    assert any("about 16 % survives" in warning for warning in plan.warnings)
    assert not sm.plan(recipe(world.folder), ram=RAM, device="cpu").warnings


def test_plan_and_merge_print_what_is_learned(untied, tmp_path):
    path = tmp_path / "recipe.json"
    data = {name: str(untied.folder / f"{name}.jsonl") for name in ("train", "validation")}
    path.write_text(json.dumps(recipe(untied.folder, data=data)))
    planned = command_line("plan", path)
    assert planned.exit_code == 0, planned.output
    assert re.search(
        r"^learn +90 +coefficients, 4 steps, 0 bytes read in each; 5 pinned of 5 stages$", planned.output, re.M
    )
    assert "passes over the layers, 5 samples" in planned.output
    merged = command_line("merge", path, tmp_path / "out")
    assert merged.exit_code == 0, merged.output
    assert re.search(r"^loss +4\.\d+ to 4\.\d+ +4 steps, validation .* kept those of step \d", merged.output, re.M)


def test_the_report_page_has_a_heat_map(untied, tmp_path):
    pytest.importorskip("matplotlib")
    merge(untied, tmp_path / "out", parameters={"steps": 2, "batch": "all"})
    page = sm.report(tmp_path / "out").read_text()
    assert "<h2>Coefficients</h2>" in page
    assert all(f">{name}<" in page or f"<!-- {name} -->" in page for name in EXPERTS)
    assert page.count("<svg") >= 4


# --- what is refused ---


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"data": {"train": "nowhere.jsonl"}}, "nowhere.jsonl: the samples cannot be read"),
        ({"parameters": {"objective": "negation"}}, "objective negation needs data.control"),
        ({"parameters": {"lr": "fast"}}, "lr: 'fast' is not a finite number"),
        ({"parameters": {"batch": 1.5}}, "batch: 1.5 is not a whole number"),
        ({"parameters": {"steps": [{"filter": "mlp", "value": 3}, {"value": 4}]}}, "steps is for the whole run"),
        ({"parameters": {"budget": 2, "init": 0.1}}, "budget chooses experts at the base; leave init at 0"),
        ({"parameters": {"blocks": ["weight", "*mpl*"]}}, "blocks names no tensor; give all, weights, or patterns"),
        ({"parameters": {"lr": 1e30, "steps": 3}}, "step 2: the gradient of .* gives no number; give a smaller lr"),
    ],
)
def test_what_cannot_be_learned_is_refused(untied, tmp_path, changes, said):
    with pytest.raises(RecipeError, match=said):
        merge(untied, tmp_path / "out", **changes)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda body: body.update(streammerge="votes"), "holds no coefficients"),
        (lambda body: body.update(version=2), "version 2 of coefficients, 1 is known"),
        (lambda body: body["models"].pop(), "is damaged"),
        (lambda body: body["tensors"].pop("lm_head.weight"), "'lm_head.weight' has no coefficients"),
        (lambda body: body["tensors"].update({"lm_head.weight": [[1.0], [2.0], [None]]}), "is damaged"),
        (lambda body: body.update(seed=-1), "is damaged"),
    ],
)
def test_a_file_of_other_coefficients_is_refused(untied, tmp_path, change, said):
    merge(untied, tmp_path / "out", parameters={"steps": 1})
    body = json.loads((tmp_path / "out/coefficients.json").read_text())
    change(body)
    (tmp_path / "c.json").write_text(json.dumps(body))
    with pytest.raises(RecipeError, match=rf"c\.json: .*{said}"):
        merge(untied, tmp_path / "again", data=None, coefficients=str(tmp_path / "c.json"), parameters=None)


def test_other_models_are_refused(untied, tmp_path):
    merge(untied, tmp_path / "out", parameters={"steps": 1})
    own = {"data": None, "coefficients": str(tmp_path / "out/coefficients.json"), "parameters": None}
    with pytest.raises(RecipeError, match="the coefficients are those of 3 models, the recipe has 2"):
        merge(untied, tmp_path / "again", models=[{"model": str(untied.folder / name)} for name in "ab"], **own)
