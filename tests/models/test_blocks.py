"""Blocks as they are counted for published architectures at their full size: one for every tensor. On meta."""

import math

import pytest
import torch
import transformers

from streammerge.methods.atlas import Atlas
from streammerge.models.stack import Stack

VISION = {"model": "CLIPVisionModelWithProjection", "config": "CLIPVisionConfig", "image_size": 224}
BASE = {**VISION, "hidden_size": 768, "intermediate_size": 3072, "projection_dim": 512}
LARGE = {**VISION, "hidden_size": 1024, "intermediate_size": 4096, "projection_dim": 768}
LARGE |= {"num_hidden_layers": 24, "num_attention_heads": 16, "patch_size": 14}
LLAMA = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}
WANTED = {  # tensors, those of one axis, weights. CLIP's published code has q, k and v as one: 152 and 296 tensors
    "llama-13b": ({"model": "LlamaForCausalLM", "config": "LlamaConfig", **LLAMA}, 363, 81, 13_015_864_320),
    "clip-b32": ({**BASE, "patch_size": 32}, 152 + 12 * 4, 101 + 12 * 2, 87_849_216),
    "clip-b16": ({**BASE, "patch_size": 16}, 152 + 12 * 4, 101 + 12 * 2, 86_192_640),
    "clip-l14": (LARGE, 296 + 24 * 4, 197 + 24 * 2, 303_966_208),
    "bert-base": ({"model": "BertModel", "config": "BertConfig"}, 199, 123, 109_482_240),
    "gpt2": ({"model": "GPT2LMHeadModel", "config": "GPT2Config"}, 148, 98, 124_439_808),  # the head is the embedding
}


@pytest.mark.parametrize("name", WANTED)
def test_blocks_of_published_architectures(name):
    values, tensors, vectors, weights = WANTED[name]
    config = getattr(transformers, values["config"])(
        **{k: v for k, v in values.items() if k not in ("model", "config")}
    )
    with torch.device("meta"):
        whole = getattr(transformers, values["model"])(config)
    shapes = {key: tuple(value.shape) for key, value in whole.state_dict().items()}
    example = {"input_ids": torch.zeros(1, 3, dtype=torch.int64)}
    if "image_size" in values:
        example = {"pixel_values": torch.zeros(1, 3, 224, 224)}
    stack = Stack.from_transformers(config, shapes, example, model=values["model"])
    blocks = [block for stage in stack.stages for block in stage.tensors]
    assert len(blocks) == len(set(blocks)) == tensors
    assert sum(math.prod(shapes[block]) for block in blocks) == weights
    learned = [sum(Atlas(blocks=which).learns(each, shapes[each]) for each in blocks) for which in ("all", "weights")]
    assert learned == [tensors, tensors - vectors]
