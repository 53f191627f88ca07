"""How the checkpoints of the cases were made; recipes, options and expected lines are by hand.

Run with PYTHONPATH=tests.
"""

from __future__ import annotations

from pathlib import Path

import build
import numpy as np

HERE = Path(__file__).parent
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
START = 128  # where the data begins in files with one header of this length


def entry(name: str, shape: str, offsets: str, extra: str = "") -> str:
    return f'"{name}":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}{extra}}}'


def file(*entries: str, size: int, length: int | None = None) -> bytes:
    text = "{" + ",".join(entries) + "}"
    return build.raw_file(text.ljust(START - 8), bytes(range(size)), length)


def index(*pairs: tuple[str, str]) -> bytes:
    body = ", ".join(f'"{name}": "{shard}"' for name, shard in pairs)
    return f'{{"metadata": {{"total_size": 32}}, "weight_map": {{{body}}}}}\n'.encode()


def single(*entries: str, size: int = 32, length: int | None = None) -> dict[str, bytes]:
    return {"model.safetensors": file(*entries, size=size, length=length)}


W = entry("w", "[8]", "[0,32]")
V = entry("v", "[8]", "[0,32]")
CASES: dict[str, dict[str, bytes]] = {
    "truncated": single(W, size=20),
    "trailing_bytes": single(W, size=37),
    "size_lies": single(entry("w", "[8]", "[0,16]"), size=16),
    "length_lies": single(W, length=1000),
    "header_too_large": single(W, length=100_000_001),
    "empty_file": {"model.safetensors": b""},
    "not_json": single('"w":{"dtype":"F32",,'),
    "git_lfs_pointer": {"model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 160\n"},
    "overlap": single(entry("w", "[5]", "[0,20]"), entry("v", "[4]", "[16,32]")),
    "hole": single(entry("w", "[4]", "[0,16]"), entry("v", "[3]", "[20,32]")),
    "duplicate_key": single(W, W),
    "duplicate_field": single(entry("w", "[8]", "[0,32]", ',"shape":[8]')),
    "unknown_field": single(entry("w", "[8]", "[0,32]", ',"strides":[1]')),
    "float_offsets": single(entry("w", "[8]", "[0,32.0]")),
    "negative_shape": single(entry("w", "[-8]", "[0,32]")),
    "overflowing_shape": single(entry("w", "[4294967296,4294967296]", "[0,32]")),
    "terminal_escape": single(entry("\\u001b[2Jw", "[8]", "[0,32]")),
    "index_wrong_shard": {
        ONE: file(W, size=32),
        TWO: file(V, size=32),
        INDEX: index(("w", TWO), ("v", ONE)),
    },
    "index_names_no_tensor": {ONE: file(W, size=32), INDEX: index(("w", ONE), ("v", ONE))},
    "index_omits_tensor": {
        ONE: file(entry("w", "[4]", "[0,16]"), entry("v", "[4]", "[16,32]"), size=32),
        INDEX: index(("w", ONE)),
    },
    "index_leaves_the_folder": {
        "model.safetensors": file(W, size=32),
        INDEX: index(("w", "../m/model.safetensors")),
    },
    "index_duplicate_key": {
        ONE: file(W, size=32),
        TWO: file(V, size=32),
        INDEX: index(("w", ONE), ("w", TWO)),
    },
    "missing_shard": {ONE: file(W, size=32), INDEX: index(("w", ONE), ("v", TWO))},
    "missing_shard_without_index": {TWO: file(V, size=32)},
    "two_shards_one_tensor": {ONE: file(W, size=32), TWO: file(W, size=32)},
    "config_not_json": {**single(W), "config.json": b'{"model_type": llama}\n'},
    "pickles_only": {"pytorch_model.bin": b"PK\3\4", "config.json": b"{}\n"},
    "adapter": {"adapter_model.safetensors": file(W, size=32), "adapter_config.json": b"{}\n"},
    "gguf_only": {"model.Q4_K_M.gguf": b"GGUF\3\0\0\0"},
}

BY_HAND = ("expected.txt", "recipe.yml", "options", "exit")  # options: more words for the command line


def models(**tensors: dict[str, object]) -> dict[str, bytes]:
    """One checkpoint of one file for each model of a recipe, by its name and its tensors."""
    return {f"{name}/model.safetensors": build.shard(held) for name, held in tensors.items()}


ONES = np.ones(8, np.float32)
PAIR = models(base={"w": ONES}, expert={"w": 2 * ONES})
LAYERS = {"embed.weight": ONES, "layers.0.w": ONES, "layers.1.w": ONES, "norm": ONES}
FP8 = build.Tensor("F8_E4M3", (8,), bytes(range(8)))
BROKEN = 2 * ONES
BROKEN[5] = np.nan
CASES |= dict.fromkeys(
    (
        "recipe_budget_too_small",
        "recipe_listed_twice",
        "recipe_missing_model",
        "recipe_missing_parameter",
        "recipe_no_base",
        "recipe_weights_sum_to_zero",
    ),
    PAIR,
)
CASES |= {
    "recipe_block_scaled": models(base={"w": ONES}, expert={"w": FP8, "w_scale_inv": ONES[:1], "other": ONES}),
    "recipe_missing_shard": {
        "base/model.safetensors": file(W, size=32),
        f"expert/{ONE}": file(W, size=32),
        f"expert/{INDEX}": index(("w", ONE), ("v", TWO)),
    },
    "recipe_missing_tensor": models(base={"w": ONES, "v": ONES}, expert={"w": ONES}),
    "recipe_nan_strict": models(base={"w": ONES}, expert={"w": BROKEN}),
    "recipe_not_floating": models(base={"w": ONES}, expert={"w": np.arange(8, dtype=np.int32)}),
    "recipe_output_exists": {**PAIR, "OUT/config.json": b"{}\n"},
    "recipe_output_is_not_ours": {**PAIR, "OUT/thesis.txt": b"the only copy\n"},
    "recipe_output_is_the_input": {**models(base={"w": ONES}, OUT={"w": ONES}), "OUT/streammerge.json": b"{}\n"},
    "recipe_shapes_differ": models(base={"a": ONES, "w": ONES}, expert={"a": ONES, "w": ONES.reshape(4, 2)}),
    "recipe_slices_out_of_range": models(base=LAYERS, expert=LAYERS),
    "recipe_slices_without_layers": PAIR,
    "recipe_tied_head": models(base={"w": ONES, "lm_head.weight": ONES}, expert={"w": ONES}),
    "recipe_too_many_models": models(base={"w": ONES}, expert={"w": ONES}, other={"w": ONES}),
    "recipe_truncated_shard": {**PAIR, "expert/model.safetensors": PAIR["expert/model.safetensors"][:-12]},
    "recipe_unfinished_work_of_another": {
        **PAIR,
        "OUT.partial/journal.jsonl": b'{"digest": "0123", "version": 1}\n',
    },
    "recipe_vocabularies_differ": models(
        base={"model.embed_tokens.weight": ONES.reshape(4, 2)},
        expert={"model.embed_tokens.weight": np.ones((5, 2), np.float32)},
    ),
}

if __name__ == "__main__":
    for case, files in CASES.items():
        for name, content in files.items():
            path = HERE / case / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
