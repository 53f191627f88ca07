"""How the files of the checkpoint cases were made; expected.txt is by hand. Run with PYTHONPATH=tests."""

from __future__ import annotations

from pathlib import Path

import build

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
    "git_lfs_pointer": {
        "model.safetensors": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 160\n"
    },
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

if __name__ == "__main__":
    for case, files in CASES.items():
        (HERE / case).mkdir(exist_ok=True)
        for name, content in files.items():
            (HERE / case / name).write_bytes(content)
