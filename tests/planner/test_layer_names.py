"""Stacks, depth and what surrounds them, from tensor names of known architectures."""

import pytest
from stand_ins import llama

from streammerge.errors import CheckpointError
from streammerge.method import is_vocabulary
from streammerge.planner.layers import Layers, Place, comes_before

BERT = [f"bert.encoder.layer.{i}.output.dense.weight" for i in range(12)]
T5 = [f"encoder.block.{i}.layer.{j}.layer_norm.weight" for i in range(3) for j in range(2)]
T5 += [f"decoder.block.{i}.layer.{j}.layer_norm.weight" for i in range(2) for j in range(3)]
MOE = [f"model.layers.{i}.mlp.experts.{e}.up_proj.weight" for i in range(2) for e in range(8)]


@pytest.mark.parametrize(
    ("names", "stacks"),
    [
        (list(llama(3)), {"model.layers": 3}),
        ([f"h.{i}.attn.bias" for i in range(12)] + ["wte.weight"], {"h": 12}),
        ([f"transformer.h.{i}.ln_1.weight" for i in (1, 0)], {"transformer.h": 2}),
        ([*BERT, "cls.predictions.bias"], {"bert.encoder.layer": 12}),
        ([name.removeprefix("bert.") for name in BERT], {"encoder.layer": 12}),
        (["0.auto_model." + name for name in BERT], {"0.auto_model.bert.encoder.layer": 12}),
        ([*T5, "shared.weight"], {"encoder.block": 3, "decoder.block": 2}),
        (MOE, {"model.layers": 2}),
        (["model.layers.0.mlp.experts.0.w", "model.layers.0.mlp.experts.1.w"], {"model.layers": 1}),
        (
            [f"model.layers.{i}.experts.{e}.w" for i in (0, 2) for e in (0, 1)],
            {},
        ),  # a hole: layer 1 is missing
        ([f"head.{i}.weight" for i in (0, 2)], {}),  # a Sequential with an activation between
        ([f"scale.{i}" for i in range(4)], {}),  # numbered tensors, not layers
        ([f"model.layers.0{i}.w" for i in range(3)], {}),
    ],
)
def test_stacks(names: list[str], stacks: dict[str, int]) -> None:
    assert Layers(names).stacks == stacks


def test_outermost_number_is_the_layer() -> None:
    layers = Layers(MOE)
    assert layers.place("model.layers.1.mlp.experts.5.up_proj.weight") == Place(
        "model.layers", 1, "mlp.experts.5.up_proj.weight"
    )


def test_depth_counts_in_its_own_stack_and_is_zero_outside() -> None:
    layers = Layers([*T5, "shared.weight", "lm_head.weight"])
    assert [layers.depth(f"encoder.block.{i}.layer.0.layer_norm.weight") for i in range(3)] == [0.0, 0.5, 1.0]
    assert [layers.depth(f"decoder.block.{i}.layer.2.layer_norm.weight") for i in range(2)] == [0.0, 1.0]
    assert layers.depth("shared.weight") == layers.depth("lm_head.weight") == 0.0
    assert Layers(["h.0.w"]).depth("h.0.w") == 1.0  # one layer only: mergekit puts it at the end


def test_main_prefers_what_is_named_a_stack() -> None:
    names = [*llama(2), "score.0.weight", "score.1.weight"]
    assert Layers(names).stacks == {"model.layers": 2, "score": 2}
    assert Layers(names).main("A") == "model.layers"


def test_no_or_two_stacks_cannot_be_sliced() -> None:
    with pytest.raises(CheckpointError) as none:
        Layers(["weight"]).main("A")
    assert str(none.value) == "A: no layer stack in its tensor names; slices need one, use 'models'"
    with pytest.raises(CheckpointError) as two:
        Layers(T5).main("B")
    assert str(two.value) == (
        "B: 2 layer stacks, slices need one: encoder.block (3 layers), decoder.block (2 layers); use 'models'"
    )


BEFORE = """model.embed_tokens.weight transformer.wte.weight wpe.weight bert.embeddings.LayerNorm.bias
    vit.embeddings.cls_token vit.embeddings.patch_embeddings.projection.weight gpt_neox.embed_in.weight
    model.decoder.embed_positions.weight tok_embeddings.weight shared.weight visual.class_embedding
    vision_model.pre_layrnorm.weight transformer.word_embeddings_layernorm.weight pos_embed
    model.decoder.project_in.weight"""
AFTER = """model.norm.weight lm_head.weight transformer.ln_f.bias embed_out.weight score.weight
    bert.pooler.dense.weight cls.predictions.decoder.weight classifier.bias output.weight
    encoder.final_layer_norm.weight vit.layernorm.weight model.decoder.project_out.weight"""


@pytest.mark.parametrize("name", BEFORE.split())
def test_before(name: str) -> None:
    assert comes_before(name)


@pytest.mark.parametrize("name", AFTER.split())
def test_after(name: str) -> None:
    assert not comes_before(name)


def test_vocabulary() -> None:
    assert is_vocabulary("model.embed_tokens.weight")
    assert is_vocabulary("lm_head.weight")
    assert not is_vocabulary("model.norm.weight")
    assert not is_vocabulary("embeddings.position_embeddings.weight")
