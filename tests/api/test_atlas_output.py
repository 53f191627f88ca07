"""What aTLAS writes: rounding that is told, the same after an interruption; and a stream instead of files."""

import json

import pytest
from build import After

pytest.importorskip("transformers")

import torch
from composed import Plain, bytes_of, command_line, made, merge, recipe, tensors
from transport import RAM

import streammerge as sm
from streammerge.errors import Interrupted, RecipeError

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Models in bfloat16."""
    return made(tmp_path_factory.mktemp("halves"), torch.bfloat16)


def test_what_rounding_leaves_is_in_the_report(halves, tmp_path):
    """The slope of what was written on what was meant; with steps too small for bfloat16 a line that warns."""
    world, path = halves, tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(world.folder, parameters={"steps": 1, "batch": "all", "lr": 1e-3})))
    run = command_line("merge", path, tmp_path / "out")
    assert run.exit_code == 0, run.output
    report = json.loads((tmp_path / "out/streammerge.json").read_text())["report"]
    rounding = report["atlas"]["rounding"]
    saved = json.loads((tmp_path / "out/coefficients.json").read_text())["tensors"]
    found, plain, along, meant = tensors(tmp_path / "out"), Plain(world), 0.0, 0.0
    assert set(rounding["tensors"]) == set(saved)
    for name, rows in saved.items():
        step = sum(row[0] * delta for row, delta in zip(rows, plain.deltas[name], strict=True))
        stored = found[name].double() - plain.base[name]
        along, meant = along + float((stored * step).sum()), meant + float(step.square().sum())
        assert rounding["tensors"][name]["slope"] == pytest.approx(
            float((stored * step).sum() / (step * step).sum()), rel=1e-4
        )
    assert rounding["slope"] == pytest.approx(along / meant, rel=1e-4)
    assert rounding["slope"] < 0.9
    (warning,) = report["warnings"]
    assert f"note   {warning}" in run.output
    assert f"rounded: slope {rounding['slope']:.3f}" in run.output
    large = merge(world, tmp_path / "large")
    assert abs(large["atlas"]["rounding"]["slope"] - 1) < 0.01
    assert not large["warnings"]
    assert "rounding" not in merge(world, tmp_path / "wide", dtype="float32")["atlas"]


def test_what_rounding_leaves_is_told_of_work_that_was_done_before(halves, tmp_path):
    """Interrupted after each shard: what the runs before said is in the last one's report."""
    merge(halves, tmp_path / "first", parameters={"steps": 2, "batch": "all", "lr": 1e-3})
    body = recipe(halves.folder, data=None, parameters=None, coefficients=str(tmp_path / "first/coefficients.json"))
    options = {"ram": RAM, "device": "cpu", "shard_size": 20_000}
    whole = sm.merge(body, tmp_path / "whole", **options)
    for _ in range(2):
        with pytest.raises(Interrupted):
            sm.merge(body, tmp_path / "out", cancel=After(2), **options)
    report = sm.merge(body, tmp_path / "out", **options)
    assert report["write_bytes"] < whole["write_bytes"], "nothing was left to be told by the runs before"
    assert report["atlas"]["rounding"] == whole["atlas"]["rounding"]
    assert len(whole["atlas"]["rounding"]["tensors"]) == len(list(halves.base.parameters()))
    assert report["warnings"] == whole["warnings"] != []
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")


def test_a_stream_takes_coefficients_from_a_file(tmp_path):
    untied = made(tmp_path / "world")
    merge(untied, tmp_path / "out", parameters={"steps": 2, "partitions": 2})
    given = recipe(untied.folder, data=None, parameters=None, coefficients=str(tmp_path / "out/coefficients.json"))
    wanted = tensors(tmp_path / "out")
    streamed = dict(sm.stream(given, ram=RAM, device="cpu"))
    assert set(streamed) == set(wanted)
    assert all(torch.equal(streamed[name], value) for name, value in wanted.items())
    with pytest.raises(RecipeError, match="atlas learns before it merges: stream takes its coefficients from a file"):
        next(sm.stream(recipe(untied.folder), ram=RAM, device="cpu"))
    with pytest.raises(RecipeError, match="atlas is a layer method; merge_state_dicts has no layers to run, use merge"):
        sm.merge_state_dicts([{}], base={}, method="atlas")


@pytest.mark.parametrize("budget", [0, 1])
def test_an_expert_that_holds_no_number_is_named(tmp_path, budget):
    """The base is composed first, and its loss is one: only the gradient tells."""
    world = made(tmp_path / "world")
    with torch.no_grad():
        world.experts[1].model.layers[1].mlp.up_proj.weight[3, 5] = torch.nan
    world.experts[1].save_pretrained(tmp_path / "world/b")
    said = r"step 1: the gradient of 'model\.layers\.1\.mlp\.up_proj\.weight' gives no number; .* look for NaN"
    with pytest.raises(RecipeError, match=said):
        merge(world, tmp_path / "out", parameters={"steps": 1, "budget": budget})
    assert not (tmp_path / "out").exists()
