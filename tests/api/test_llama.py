"""Merged Llamas load with transformers, and say what a merge done in plain torch says."""

import json

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import streammerge as sm  # noqa: E402
from streammerge.errors import CheckpointError  # noqa: E402

RAM = "2GiB"
pytestmark = pytest.mark.filterwarnings("ignore")  # what transformers warns of is not ours
IDS = torch.arange(24).reshape(2, 12) % 60


def llama(folder, seed, tied=False, layers=3, dtype=torch.float32):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    model.save_pretrained(folder)
    return model


def load(folder):
    model, info = transformers.LlamaForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval()


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def by_hand(target, models, rule):
    """The merge in plain torch: a model whose every weight is what the rule makes of its namesakes."""
    with torch.no_grad():
        for name, weight in target.named_parameters():
            weight.copy_(rule(*(dict(each.named_parameters())[name] for each in models)))
    return target


@pytest.mark.parametrize("tied", [False, True])
def test_logits_are_those_of_a_merge_in_torch(tmp_path, tied):
    models = [llama(tmp_path / str(seed), seed, tied) for seed in range(3)]
    recipe = {
        "merge_method": "task_arithmetic",
        "base_model": str(tmp_path / "0"),
        "models": [{"model": str(tmp_path / str(i)), "parameters": {"weight": w}} for i, w in ((1, 0.4), (2, 0.7))],
    }
    sm.merge(recipe, tmp_path / "out", ram=RAM)
    merged = load(tmp_path / "out")
    assert (merged.lm_head.weight is merged.model.embed_tokens.weight) == tied
    found = logits(merged)
    wanted = by_hand(llama(tmp_path / "x", 9, tied), models, lambda b, x, y: b + 0.4 * (x - b) + 0.7 * (y - b))
    assert (found - logits(models[0])).abs().max() > 0.05, "the merge changed nothing"
    torch.testing.assert_close(found, logits(wanted), atol=2e-6, rtol=1e-5)


def test_bfloat16_is_one_rounding_from_the_merge_in_fp32(tmp_path):
    models = [llama(tmp_path / str(seed), seed, dtype=torch.bfloat16) for seed in range(2)]
    rows = [{"model": str(tmp_path / str(i)), "parameters": {"weight": 0.5}} for i in range(2)]
    sm.merge({"merge_method": "linear", "models": rows}, tmp_path / "out", ram=RAM)
    merged = load(tmp_path / "out")
    assert merged.dtype == torch.bfloat16
    weights = [dict(model.named_parameters()) for model in models]
    for name, weight in merged.named_parameters():
        assert torch.equal(weight, ((weights[0][name].float() + weights[1][name].float()) / 2).bfloat16())


def test_a_stack_of_layers_is_a_model(tmp_path):
    a, b = (llama(tmp_path / name, seed) for seed, name in enumerate("ab"))
    parts = [("a", 0, 2), ("b", 1, 3)]
    sources = [{"sources": [{"model": str(tmp_path / m), "layer_range": [x, y]}]} for m, x, y in parts]
    sm.merge({"merge_method": "passthrough", "slices": sources}, tmp_path / "out", ram=RAM)
    merged = load(tmp_path / "out")
    assert merged.config.num_hidden_layers == 4
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == 4
    origin = [a.model.layers[0], a.model.layers[1], b.model.layers[1], b.model.layers[2]]
    for layer, wanted in zip(merged.model.layers, origin, strict=True):
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in wanted.state_dict().items())
    assert torch.equal(merged.model.embed_tokens.weight, a.model.embed_tokens.weight)
    assert torch.equal(merged.lm_head.weight, b.lm_head.weight), "what follows the layers comes with the last slice"
    assert logits(merged).isfinite().all()


def test_a_tied_and_an_untied_model_do_not_merge_in_silence(tmp_path):
    llama(tmp_path / "tied", 0, tied=True)
    llama(tmp_path / "untied", 1, tied=False)
    rows = [{"model": str(tmp_path / name), "parameters": {"weight": 1.0}} for name in ("untied", "tied")]
    with pytest.raises(CheckpointError, match=r"tied: no tensor 'lm_head.weight', .* its head may be tied"):
        sm.plan({"merge_method": "linear", "models": rows})
    plan = sm.plan({"merge_method": "linear", "models": rows[::-1]})
    assert any("lm_head.weight" in warning for warning in plan.warnings)
