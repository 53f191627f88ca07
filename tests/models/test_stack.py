"""Models as chains: which tensor belongs to which stage, what is refused, and that nothing of it takes memory."""

import sys
import threading
from types import SimpleNamespace

import pytest
import torch
import transformers
from models import tiny
from torch import nn

from streammerge.budget import resident
from streammerge.errors import CheckpointError, RecipeError
from streammerge.models.build import parameters_on_meta
from streammerge.models.stack import Stack
from streammerge.store.checkpoint import Checkpoint

V5 = transformers.__version__ >= "5"


def shapes_of(folder):
    return {name: spec.shape for name, spec in Checkpoint.open(folder).tensors.items()}


def from_shapes(folder, shapes, name="llama-tied", **options):
    return Stack.from_transformers(folder, shapes, tiny.batches(name)[0], attention="eager", **options)


def refusal(error, match, call):
    """The call is refused with one line."""
    with pytest.raises(error, match=match) as caught:
        call()
    assert "\n" not in str(caught.value)


@pytest.fixture
def tied(tmp_path):
    return tiny.save(tmp_path / "tied", "llama-tied")


@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_stages_of_a_decoder(tmp_path, name):
    stack = tiny.stack(tiny.save(tmp_path, name), tiny.batches(name)[0])
    assert [stage.kind for stage in stack.stages] == ["embedding", "layer", "layer", "layer", "head"]
    assert [stage.index for stage in stack.stages] == [0, 1, 2, 3, 4]
    assert stack.stages[0].tensors == ("model.embed_tokens.weight",)
    assert stack.stages[2].name == "model.layers.1"
    assert len(stack.stages[2].tensors) == 9
    assert all(tensor.startswith("model.layers.1.") for tensor in stack.stages[2].tensors)
    own = ("model.norm.weight",) if name == "llama-tied" else ("lm_head.weight", "model.norm.weight")
    assert set(stack.stages[-1].tensors) == set(own)
    assert stack.stages[-1].borrowed == (("model.embed_tokens.weight",) if name == "llama-tied" else ())
    assert stack.unused == ()


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # of transformers 4, for DeBERTa
@pytest.mark.parametrize("name", tiny.MODELS)
def test_every_tensor_has_one_stage(tmp_path, name):
    folder = tiny.save(tmp_path, name)
    stack = tiny.stack(folder, tiny.batches(name)[0])
    owned = [tensor for stage in stack.stages for tensor in stage.tensors]
    assert len(owned) == len(set(owned))
    assert set(owned) | set(stack.unused) | set(stack.copies) == set(shapes_of(folder))
    assert all(parameter.is_meta for parameter in stack.module.parameters())
    assert not any(buffer.is_meta for buffer in stack.module.buffers())


def test_buffers_are_those_of_the_whole_model(tied):
    stack, whole = tiny.stack(tied, None), tiny.whole(tied, "llama-tied")
    buffers = dict(whole.named_buffers())
    assert "model.rotary_emb.inv_freq" in buffers
    for name, buffer in stack.module.named_buffers():
        assert torch.equal(buffer, buffers[name])


def test_experts_are_parts_of_what_is_run(tmp_path):
    stack = tiny.stack(tiny.save(tmp_path, "qwen3-moe"), tiny.batches("qwen3-moe")[0])
    layer = stack.stages[1]
    experts = [name for name in layer.tensors if ".experts." in name]
    assert len(experts) == 12
    values = {name: torch.arange(p.numel(), dtype=torch.float32).view(p.shape) for name, p in layer.parameters.items()}
    views = layer.views(values)
    assert {name: tuple(views[name].shape) for name in experts} == {
        name: (32, 16) if "down" in name else (16, 32) for name in experts
    }
    seen = torch.cat([views[name].flatten() for name in experts])
    if V5:
        fused = [p for name, p in values.items() if ".experts." in name]
        assert len(fused) == 2
        assert torch.equal(seen.sort().values, torch.cat([p.flatten() for p in fused]).sort().values)
        assert all(any(v.data_ptr() - p.data_ptr() in range(p.nbytes) for p in fused) for v in map(views.get, experts))


def test_a_prefix_more_or_less(tied):
    bare = {name.removeprefix("model."): shape for name, shape in shapes_of(tied).items()}
    stack = from_shapes(tied, bare)
    assert stack.stages[0].tensors == ("embed_tokens.weight",)
    assert "layers.0.mlp.up_proj.weight" in stack.stages[1].tensors
    encoder = from_shapes(tied, shapes_of(tied) | {"lm_head.weight": (61, 32)}, model="AutoModel")
    assert encoder.stages[1].name == "layers.0"
    assert "model.layers.0.mlp.up_proj.weight" in encoder.stages[1].tensors
    assert encoder.stages[-1].tensors == ("model.norm.weight",)
    assert encoder.unused == ("lm_head.weight",)


def test_old_names_of_norms(tmp_path):
    folder = tiny.save(tmp_path, "bert")
    shapes = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): shape
        for name, shape in shapes_of(folder).items()
    }
    stack = from_shapes(folder, shapes, "bert")
    assert "bert.encoder.layer.0.output.LayerNorm.gamma" in stack.stages[1].tensors
    assert stack.unused == ()


def test_a_tied_head_that_is_stored_too_is_a_copy(tied):
    stack = from_shapes(tied, shapes_of(tied) | {"lm_head.weight": (61, 32)})
    first, second = "model.embed_tokens.weight", "lm_head.weight"
    assert stack.copies in ({second: first}, {first: second})
    assert len(stack.stages[0].tensors) == 1


def test_what_no_stage_runs_with(tied):
    stack = from_shapes(tied, shapes_of(tied) | {"model.layers.0.self_attn.rotary_emb.inv_freq": (4,), "extra": (2,)})
    assert set(stack.unused) == {"model.layers.0.self_attn.rotary_emb.inv_freq", "extra"}


def test_the_same_tensor_in_another_checkpoint(tied):
    stack = tiny.stack(tied, tiny.batches("llama-tied")[0])
    bare = {name.removeprefix("model."): shape for name, shape in shapes_of(tied).items() if "norm" not in name}
    names = stack.names_in(bare)
    assert names["model.layers.1.mlp.up_proj.weight"] == "layers.1.mlp.up_proj.weight"
    assert set(names) == {name for name in shapes_of(tied) if "norm" not in name}
    refusal(CheckpointError, "has shape", lambda: stack.names_in({**bare, "embed_tokens.weight": (60, 32)}))


def test_a_tensor_that_is_not_there(tied):
    shapes = shapes_of(tied)
    del shapes["model.layers.1.mlp.up_proj.weight"]
    refusal(CheckpointError, r"no tensor for the model's model.layers.1.mlp.up_proj", lambda: from_shapes(tied, shapes))


def test_a_shape_that_differs(tied):
    shapes = shapes_of(tied) | {"model.norm.weight": (33,)}
    refusal(CheckpointError, r"model.norm.weight' has shape \[33\]", lambda: from_shapes(tied, shapes))


@pytest.mark.skipif(not V5, reason="version 4 runs experts as they are stored")
def test_a_layout_that_cannot_be_read_in_place_is_refused_by_name(tmp_path, monkeypatch):
    folder = tiny.save(tmp_path, "mixtral")
    monkeypatch.setattr("streammerge.models.names._parts", lambda *_: {})
    refusal(CheckpointError, r"experts.0.w1.weight' is stored in another layout", lambda: tiny.stack(folder, None))


def test_an_encoder_and_a_decoder(tmp_path):
    config = transformers.T5Config(**tiny.MODELS["t5-encoder"][1])
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    batch = tiny.batches("t5-encoder")[0]
    refusal(RecipeError, "run its encoder alone", lambda: tiny.stack(tmp_path, batch))
    stack = Stack.from_transformers(tmp_path, shapes_of(tmp_path), batch, attention="eager", model="T5EncoderModel")
    assert [stage.name for stage in stack.stages[1:-1]] == ["encoder.block.0", "encoder.block.1", "encoder.block.2"]
    assert all(name.startswith(("decoder.", "lm_head.")) for name in stack.unused)


def test_layers_that_share_their_weights(tmp_path):
    values = {**tiny.BERT, "embedding_size": 16, "num_hidden_groups": 1, "inner_group_num": 1}
    transformers.AlbertModel(transformers.AlbertConfig(**values)).save_pretrained(tmp_path)
    refusal(RecipeError, "shared, skipped or run in another order", lambda: tiny.stack(tmp_path, tiny.batches("b")[0]))


def test_several_lists_of_layers(tmp_path):
    config = transformers.CLIPConfig(
        text_config={**tiny.BERT, "eos_token_id": 1}, vision_config=tiny.VIT, projection_dim=8
    )
    transformers.CLIPModel(config).save_pretrained(tmp_path)
    refusal(RecipeError, "CLIPModel is no chain of layers: lists of layers found: ", lambda: tiny.stack(tmp_path, None))


def test_an_attention_that_the_model_lacks(tmp_path):
    name = "gemma2" if V5 else "t5-encoder"
    folder = tiny.save(tmp_path, name)
    refusal(RecipeError, "cannot build", lambda: tiny.stack(folder, None, attention="sdpa"))


def test_a_folder_without_a_config(tied, tmp_path):
    refusal(CheckpointError, "no config.json", lambda: from_shapes(tmp_path, shapes_of(tied)))


def test_a_class_that_transformers_lacks(tied):
    refusal(CheckpointError, "has no class 'LlamaForDreaming'", lambda: from_shapes(tied, {}, model="LlamaForDreaming"))


def test_transformers_is_not_installed(tied, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    refusal(RecipeError, r"pip install streammerge\[models\]", lambda: Stack.from_transformers(tied, {}))


def test_a_large_model_takes_no_memory():
    values = {**tiny.LLAMA, "hidden_size": 5120, "intermediate_size": 13824, "vocab_size": 32_000}
    values |= {"num_hidden_layers": 20, "num_attention_heads": 40, "num_key_value_heads": 40}
    config = transformers.LlamaConfig(**values, architectures=["LlamaForCausalLM"])
    with torch.device("meta"):
        shapes = {n: tuple(p.shape) for n, p in transformers.LlamaForCausalLM(config).named_parameters()}
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) > 6e9
    before = resident().demand
    stack = Stack.from_transformers(config, shapes, tiny.batches("llama")[0])
    assert resident().demand - before < 64 << 20
    assert len(stack.stages) == 22


def test_only_this_thread_builds_without_memory():
    found = []
    with parameters_on_meta():
        found.append(nn.Linear(2, 2).weight.is_meta)
        thread = threading.Thread(target=lambda: found.append(nn.Linear(2, 2).weight.is_meta))
        thread.start()
        thread.join()
    found.append(nn.Linear(2, 2).weight.is_meta)
    assert found == [True, False, False]


class Chain(nn.Module):
    """Three blocks between two linear maps; what happens between blocks is up to the test."""

    stages = "blocks"

    def __init__(self, between=lambda hidden: hidden, order=(0, 1, 2)):
        super().__init__()
        self.first, self.last = nn.Linear(4, 8), nn.Linear(8, 3)
        self.blocks = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        self.between, self.order = between, order

    def forward(self, x):
        hidden = self.first(x)
        for number in self.order:
            hidden = self.between(self.blocks[number](hidden))
        return SimpleNamespace(logits=self.last(hidden))


BATCH = {"x": torch.zeros(2, 4), "labels": torch.zeros(2)}


def of(build, example=BATCH):
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in build().named_parameters()}
    return Stack.of(build, shapes, example)


def test_a_module_that_names_its_layers():
    stack = of(Chain)
    assert [stage.tensors for stage in stack.stages] == [
        ("first.weight", "first.bias"),
        *((f"blocks.{number}.weight", f"blocks.{number}.bias") for number in range(3)),
        ("last.weight", "last.bias"),
    ]


def test_a_module_that_does_not():
    refusal(RecipeError, "Linear does not name its layers", lambda: of(lambda: nn.Linear(2, 2)))


def test_a_change_between_layers_is_no_chain():
    refusal(
        RecipeError,
        "hidden states are changed between layers 0 and 1",
        lambda: of(lambda: Chain(between=torch.tanh)),
    )


@pytest.mark.parametrize("order", [(0, 1, 1, 2), (0, 2), (1, 0, 2)])
def test_layers_in_another_order(order):
    refusal(RecipeError, "shared, skipped or run in another order", lambda: of(lambda: Chain(order=order)))


def test_layers_left_out():
    refusal(RecipeError, "runs only 2 of its layers", lambda: of(lambda: Chain(order=(0, 1))))


def test_a_weight_that_two_layers_share():
    def build():
        chain = Chain()
        chain.blocks[2].weight = chain.blocks[0].weight
        return chain

    refusal(RecipeError, "is shared between layers", lambda: of(build))


def test_states_beside_the_weights():
    def build():
        chain = Chain()
        chain.norm = nn.BatchNorm1d(8)
        return chain

    with torch.device("meta"):
        shapes = {name: tuple(value.shape) for name, value in build().state_dict().items()}
    refusal(CheckpointError, "norm.running_mean' is a state", lambda: Stack.of(build, shapes, BATCH))
