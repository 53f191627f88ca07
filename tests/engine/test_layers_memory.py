"""The budget of a sweep from outside: what a child process holds, against what was promised."""

import json
import subprocess
import sys
from pathlib import Path

import build
import pytest
import torch
import transformers
from models import tiny

MIB = 1 << 20
pytestmark = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")

CHILD = """
import json, sys
import torch
from streammerge.engine.layers import Sweep
from streammerge.engine.layers_hooks import Hooks
from streammerge.engine.layers_loss import CrossEntropy
from streammerge.engine.layers_plan import Limits, plan_sweep
from streammerge.models.stack import Stack
from streammerge.store.checkpoint import Checkpoint

folder, ram, mode, dtype, group = sys.argv[1:]

class Count(Hooks):
    gradients = mode
    shown = 0

    def learn(self, stage, name, gradient, batch):
        Count.shown += gradient.numel()

torch.set_num_threads(1)
ids = [torch.randint(0, 4000, (2, 128)) for _ in range(3)]
batches = [{"input_ids": found, "attention_mask": torch.ones_like(found), "labels": found} for found in ids]
checkpoint = Checkpoint.open(folder)
shapes = {name: spec.shape for name, spec in checkpoint.tensors.items()}
stack = Stack.from_transformers(folder, shapes, batches[0], dtype=getattr(torch, dtype))
limits = Limits(ram=ram, group=int(group))
plan = plan_sweep(stack, [checkpoint], batches, CrossEntropy(chunk=1000), Count(), limits)
with Sweep(plan) as sweep:
    sweep.run(batches)
    peak = sweep.scratch.peak
print(json.dumps(plan.as_dict() | {"process": plan.process_bytes, "shown": Count.shown, "peak": peak}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 87 MiB in bf16, one layer of which is 7 MiB."""
    path = tmp_path_factory.mktemp("model")
    values = {**tiny.LLAMA, "vocab_size": 4000, "hidden_size": 512, "intermediate_size": 1536}
    values |= {"num_hidden_layers": 12, "num_attention_heads": 8, "num_key_value_heads": 8}
    values |= {"max_position_embeddings": 256, "dtype": "bfloat16"}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(torch.bfloat16).save_pretrained(path)
    return path


def watched(*arguments):
    """Run the child; what it printed and the most it held, looked at from outside."""
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    out, err, peak = build.watched(child)
    assert child.returncode == 0, err
    return json.loads(out.splitlines()[-1]), peak


SETTINGS = [("sum", "float32", 1), ("each", "bfloat16", 1), ("each", "float32", 2), ("sum", "bfloat16", 3)]


@pytest.mark.parametrize(
    ("mode", "dtype", "group"), [SETTINGS[0], *(pytest.param(*s, marks=pytest.mark.slow) for s in SETTINGS[1:])]
)
def test_measured_is_at_most_predicted(folder, mode, dtype, group):
    said, peak = watched(folder, "4GiB", mode, dtype, group)
    predicted = said["ram_peak_bytes"]
    print(f"measured {peak / MIB:.0f}, predicted {predicted / MIB:.0f}, process {said['process'] / MIB:.0f} MiB")
    assert peak <= predicted <= 1.3 * peak
    numel = 4000 * 512 * 2 + 512 + 12 * (4 * 512 * 512 + 3 * 512 * 1536 + 2 * 512)
    assert said["shown"] == numel * (1 if mode == "sum" else 3)
    weights_and_gradients = 2 * numel * (4 if dtype == "float32" else 2)
    assert predicted - said["process"] < weights_and_gradients, "the whole model would have fitted"


@pytest.mark.slow
def test_a_smaller_budget_spills_and_holds(folder):
    said, _ = watched(folder, "4GiB", "each", "bfloat16", 1)
    room = said["ram_peak_bytes"] - said["scratch_host_bytes"] // 2
    tight, peak = watched(folder, room, "each", "bfloat16", 1)
    assert peak <= tight["ram_peak_bytes"] <= room
    assert tight["peak"]["disk"] > 0
