"""aTLAS interrupted, killed and held to its budget: the same bytes, and no more memory than promised."""

import json

import build
import pytest

pytest.importorskip("transformers")

import numpy as np
import torch
from composed import bytes_of, made, merge, recipe
from transport import RAM, samples

import streammerge as sm
from streammerge.errors import Interrupted, OutputExists
from streammerge.store.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
    pytest.mark.usefixtures("one_thread"),
]
MIB = 1 << 20


@pytest.fixture(scope="module", params=[False, True], ids=["untied", "tied"])
def world(request, tmp_path_factory):
    return made(tmp_path_factory.mktemp("world"), tie_word_embeddings=request.param)


@pytest.mark.parametrize("kind", ["plain", "chosen", "tried"])
def test_an_interrupted_run_ends_in_the_same_bytes(world, tmp_path, kind):
    data = {name: str(world.folder / f"{name}.jsonl") for name in ("train", "validation")}
    changes = {
        "plain": {},
        "chosen": {"parameters": {"steps": 4, "batch": 2, "budget": 2}},
        "tried": {"data": data, "parameters": {"epochs": 2, "batch": 3, "partitions": 2}},
    }[kind]
    whole = merge(world, tmp_path / "whole", **changes)
    stops, seen = 0, set()
    for count in (4, 11, 12, 14, 25, 60):
        try:
            report = merge(world, tmp_path / "out", {"cancel": build.After(count)}, **changes)
            break
        except Interrupted:
            stops += 1
        assert not (tmp_path / "out").exists()
        state = tmp_path / "out.partial/learning.npz"
        seen.add(state.read_bytes() if state.exists() else b"")
    assert stops >= 3
    assert len(seen) >= 3, "no run left steps behind"
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    for key in ("loss", "tensors", "chosen", "validation", "kept"):
        assert report["atlas"].get(key) == whole["atlas"].get(key)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    assert verify(tmp_path / "out")["bad"] == []


DIE = """
import os
from streammerge.engine import learner
real, count = learner.Learner.save, [0]
def save(*arguments):
    real(*arguments)
    count[0] += 1
    if count[0] == 4:
        os.kill(os.getpid(), 9)
learner.Learner.save = save
"""


def test_killed_between_two_steps(world, tmp_path):
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(world.folder)))
    child = build.command("merge", path, tmp_path / "out", "--ram", RAM, "--device", "cpu", "--quiet", before=DIE)
    assert child.returncode == -9, child.stderr
    with np.load(tmp_path / "out.partial/learning.npz") as state:
        assert state["step"] == 3
    (tmp_path / "out.partial" / "streammerge-left").mkdir()
    merge(world, tmp_path / "out")
    merge(world, tmp_path / "whole")
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "whole")
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert names[0] == names[1]


def test_other_samples_do_not_go_on_with_the_work(world, tmp_path):
    with pytest.raises(Interrupted):
        merge(world, tmp_path / "out", {"cancel": build.After(12)})
    with pytest.raises(OutputExists, match="unfinished work of another recipe"):
        merge(world, tmp_path / "out", data={"train": str(world.folder / "second.jsonl")})
    with pytest.raises(OutputExists, match="unfinished work of another recipe"):
        merge(world, tmp_path / "out", {"seed": 1})


def test_the_budget_changes_no_bit(world, tmp_path):
    body = recipe(world.folder, parameters={"steps": 3, "batch": 2})
    with pytest.raises(sm.BudgetTooSmall, match=r"a sweep over the layers needs at least .*; give --ram") as caught:
        sm.plan(body, ram="1MiB", device="cpu")
    sm.merge(body, tmp_path / "a", ram=RAM, device="cpu")
    report = sm.merge(body, tmp_path / "b", ram=caught.value.least + 8 * MIB, device="cpu", threads=1)
    assert set(report["predicted"]["learn"]["stages"]) <= {"disk", "twice"}
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """Four models of 29 MiB in bf16, one layer of which is 4 MiB; composed in fp32 it is 57 MiB."""
    shape = {"vocab_size": 12_000, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 8}
    world = made(
        tmp_path_factory.mktemp("larger"), torch.bfloat16, **shape, num_hidden_layers=4, max_position_embeddings=256
    )  # fmt: skip
    samples(world.folder / "train.jsonl", (100, 120, 90))
    return world


@pytest.mark.slow
@pytest.mark.parametrize(("more", "clip"), [(0, 0), (0, 1), (40, 0), (120, 0), (400, 0), (400, 1)])
def test_the_budget_holds_in_a_process_of_its_own(larger, tmp_path, more, clip):
    """Measured peak <= predicted peak <= budget, looked at from outside, wherever the weights stay."""
    path = tmp_path / "recipe.json"
    parameters = {"steps": 3, "batch": 2, "partitions": 2 if more else 1, "clip": clip}
    path.write_text(json.dumps(recipe(larger.folder, parameters=parameters)))
    tight = build.command("plan", path, "--ram", "1MiB", "--device", "cpu", "--json")
    allowed = json.loads(tight.stdout)["error"]["least_bytes"] + more * MIB
    child = build.start("merge", path, tmp_path / "out", "--ram", allowed, "--device", "cpu", "--json")
    out, err, peak = build.watched(child)
    assert child.returncode == 0, err
    report = json.loads(out)
    predicted, stages = report["predicted"]["ram_peak_bytes"], report["predicted"]["learn"]["stages"]
    print(f"measured {peak / MIB:.0f}, predicted {predicted / MIB:.0f} MiB, {stages}")
    assert max(peak, report["ram_peak_bytes"]) <= predicted <= allowed
    assert predicted <= 1.4 * peak, "the promise is too careful to be of use"
    assert report["read_bytes"] == report["predicted"]["read_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("place", ["twice", "memory", "pinned"])
def test_launches_give_the_same(world, tmp_path, monkeypatch, place):
    """What a GPU does, in Triton's interpreter: weights composed and products taken by launches."""
    from streammerge.engine import composing_plan, composing_run
    from streammerge.engine.places import GpuPlace

    def choose(sizes, room, late):
        return ["twice" if late[at] and place == "memory" else place for at in range(len(sizes))]

    monkeypatch.setattr(composing_plan, "choose_places", choose)
    changes = {"parameters": {"steps": 3, "batch": "all", "partitions": 2}}
    merge(world, tmp_path / "wanted", **changes)
    monkeypatch.setattr(
        composing_run, "HostPlace", lambda threads: GpuPlace(torch.device("cpu"), composing_run.PIECE)
    )  # fmt: skip
    merge(world, tmp_path / "out", **changes)
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "wanted")
