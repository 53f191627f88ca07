"""config.json after layers were stacked or the dtype changed."""

import copy

from streammerge.planner.config import updated_config

BASE = {
    "architectures": ["LlamaForCausalLM"],
    "num_hidden_layers": 3,
    "num_attention_heads": 3,  # the same number, another meaning
    "max_window_layers": 3,
    "eos_token_id": [1, 2, 3],
    "layer_types": ["full", "window", "full"],
    "mlp_only_layers": [2],
    "torch_dtype": "float32",
}


def test_layers_are_counted_listed_and_renumbered_anew() -> None:
    before = copy.deepcopy(BASE)
    other = {"layer_types": ["a", "b", "c"], "mlp_only_layers": [0, 1]}
    stack = [(BASE, 0), (BASE, 1), (other, 1), (BASE, 2), (None, 2)]
    assert updated_config(BASE, 3, stack, "BF16") == {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 5,
        "num_attention_heads": 3,
        "max_window_layers": 5,
        "eos_token_id": [1, 2, 3],
        "layer_types": ["full", "window", "b", "full", "full"],
        "mlp_only_layers": [2, 3, 4],
        "torch_dtype": "bfloat16",
    }
    assert before == BASE


def test_other_spellings_and_nested_configs() -> None:
    assert updated_config({"n_layer": 12, "n_head": 12}, 12, [(None, 0)] * 7) == {"n_layer": 7, "n_head": 12}
    nested = {"text_config": {"num_hidden_layers": 4, "dtype": "float32"}, "vision_config": {"depth": 4}}
    assert updated_config(nested, 4, [(nested, i) for i in (0, 1, 3)], "F16") == {
        "text_config": {"num_hidden_layers": 3, "dtype": "float16"},
        "vision_config": {"depth": 4},
        "torch_dtype": "float16",
    }


def test_dtype_keeps_its_spelling() -> None:
    assert updated_config({"dtype": "float32"}, 0, None, "BF16") == {"dtype": "bfloat16"}
    assert updated_config({}, 0, None, "F32") == {"torch_dtype": "float32"}
    assert updated_config(BASE, 3) == BASE
