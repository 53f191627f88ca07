"""GradFix interrupted, killed and held to its budget: the same bytes, and no more memory than promised."""

import json
import shutil

import build
import pytest

pytest.importorskip("transformers")

import torch
from transport import (
    ALPHAS,
    RAM,
    made,
    merge,
    recipe,
    samples,
)

import streammerge as sm
from streammerge.errors import Interrupted
from streammerge.store import journal
from streammerge.store.verify import verify

pytestmark = [
    pytest.mark.filterwarnings("ignore"),  # what transformers warns of is not ours
    pytest.mark.usefixtures("one_thread"),
]


@pytest.mark.parametrize("several", [False, True], ids=["one alpha", "alphas"])
def test_an_interrupted_run_ends_in_the_same_bytes(world, tmp_path, alphas, several):
    changes = alphas if several else {}
    whole = merge(world, tmp_path / "whole", **changes)
    wanted = (tmp_path / "whole/model.safetensors").read_bytes()
    stops, sealed = 0, set()
    for count in (3, 5, 7, 9, 13, 40):
        try:
            report = merge(world, tmp_path / "out", {"cancel": build.After(count)}, **changes)
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
def test_killed_at_any_seal(untied, tmp_path, several):
    data = {name: str(untied.folder / f"{name}.jsonl") for name in ("train", "validation")}
    changes = {"data": data, "parameters": {"alpha": ALPHAS}} if several else {}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(untied.folder, save_votes=str(tmp_path / "votes.safetensors"), **changes)))
    ends = set()
    for number in (1, 3, 5, 6, 7):  # head and layers, the embedding, what is noted after them
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


@pytest.mark.slow
@pytest.mark.parametrize("several", [False, True])
def test_the_budget_holds_in_a_process_of_its_own(tmp_path, several):
    """Measured peak <= predicted peak <= the least budget that is said to do, looked at from outside."""
    shape = {"vocab_size": 12_000, "hidden_size": 384, "intermediate_size": 1024, "num_attention_heads": 8}
    world = made(tmp_path / "world", torch.bfloat16, **shape, num_hidden_layers=4, max_position_embeddings=256)
    samples(world.folder / "train.jsonl", (100, 120, 90))
    data = {"train": str(world.folder / "train.jsonl"), "validation": str(world.folder / "validation.jsonl")}
    changes = {"data": data, "parameters": {"alpha": [0.2, 0.7]}} if several else {}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(recipe(world.folder, **changes)))
    tight = build.command("plan", path, "--ram", "1MiB", "--device", "cpu", "--json")
    least = json.loads(tight.stdout)["error"]["least_bytes"]
    child = build.start("merge", path, tmp_path / "out", "--ram", least, "--device", "cpu", "--json")
    out, err, peak = build.watched(child)
    assert child.returncode == 0, err
    report = json.loads(out)
    predicted = report["predicted"]["ram_peak_bytes"]
    assert max(peak, report["ram_peak_bytes"]) <= predicted <= least
    assert predicted <= 1.4 * peak, "the promise is too careful to be of use"
