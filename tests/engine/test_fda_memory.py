"""The budget of FDA from outside: what a child process holds, against what its plan promised."""

import json
from pathlib import Path

import build
import pytest

pytest.importorskip("transformers")

import torch
import transformers

MIB = 1 << 20
pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc"),
    pytest.mark.filterwarnings("ignore"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of 110 MiB in bf16 and two near it; the MLP of a layer is 18 MiB in fp32."""
    path = tmp_path_factory.mktemp("models")
    values = {"vocab_size": 500, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 8}
    values |= {"num_attention_heads": 8, "num_key_value_heads": 8, "max_position_embeddings": 64, "dtype": "bfloat16"}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**values)).to(torch.bfloat16)
    for name in ("base", "one", "two"):
        model.save_pretrained(path / name)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 1e-3 * torch.randn_like(parameter)
    return path


def run(*arguments):
    """A merge by the command line: its report, and the most it held, looked at from outside."""
    child = build.start("merge", *arguments, "--json", "--device", "cpu")
    out, err, peak = build.watched(child)
    return child.returncode, json.loads(out.splitlines()[-1]) if child.returncode == 0 else err, peak


@pytest.mark.parametrize(
    ("parameters", "start"),
    [
        pytest.param({"unit": "mlp"}, "base", marks=pytest.mark.slow),
        ({"unit": "mlp", "alphas": "experts"}, "task_arithmetic"),
        pytest.param({"unit": "mlp", "adapt": "closed_form"}, "tsvm", marks=pytest.mark.slow),
        pytest.param({"unit": "block", "tokens": 4, "rows": 128}, "base", marks=pytest.mark.slow),
        pytest.param({"unit": "mlp", "early_stop": "real.jsonl"}, "base", marks=pytest.mark.slow),
        pytest.param(
            {"unit": "block", "adapt_steps": 1, "early_stop": "real.jsonl"}, "task_arithmetic", marks=pytest.mark.slow
        ),
    ],
)
def test_a_child_process_stays_below_its_prediction(folder, tmp_path, parameters, start):
    """The three models together are three times the budget's room for weights."""
    values = {"anchors": 64, "construct_steps": 3, "adapt_steps": 3, **parameters}
    recipe = {"merge_method": "fda", "base_model": str(folder / "base"), "parameters": values}
    recipe |= {"models": [{"model": str(folder / name)} for name in ("one", "two")]}
    recipe["start"] = start if start == "base" else {"merge_method": start}
    path = tmp_path / "fda.yml"
    path.write_text(json.dumps(recipe))
    rows = [{"input_ids": [3] * (500 + number % 4)} for number in range(6)]  # with them units run on many more tokens
    (tmp_path / "real.jsonl").write_text("\n".join(map(json.dumps, rows)))
    code, found, _ = run(path, tmp_path / "refused", "--ram", "128MiB")
    assert code == 3
    assert "give --ram" in found
    code, report, peak = run(path, tmp_path / "out", "--ram", "1GiB")
    assert code == 0, report
    predicted = report["predicted"]["ram_peak_bytes"]
    assert report["ram_peak_bytes"] <= predicted
    assert peak <= predicted
    assert predicted <= 1.6 * peak
