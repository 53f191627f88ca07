"""Tiny random models of many architectures, saved by transformers, and what plain autograd says of them."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import transformers

from streammerge.models.stack import Stack
from streammerge.store.checkpoint import Checkpoint

os.environ.setdefault("TQDM_DISABLE", "1")
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LLAMA = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
BERT = {name: value for name, value in LLAMA.items() if name != "num_key_value_heads"}
VIT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
MODELS = {  # name: config class, its values, model class
    "llama": ("LlamaConfig", LLAMA, "LlamaForCausalLM"),
    "llama-tied": ("LlamaConfig", {**LLAMA, "tie_word_embeddings": True}, "LlamaForCausalLM"),
    "mistral": ("MistralConfig", {**LLAMA, "sliding_window": 5}, "MistralForCausalLM"),
    "qwen2": ("Qwen2Config", LLAMA, "Qwen2ForCausalLM"),
    "qwen3": ("Qwen3Config", {**LLAMA, "head_dim": 8, "tie_word_embeddings": True}, "Qwen3ForCausalLM"),
    "gemma2": ("Gemma2Config", {**LLAMA, "head_dim": 8, "sliding_window": 4}, "Gemma2ForCausalLM"),
    "gemma3": (
        "Gemma3TextConfig",
        {**LLAMA, "head_dim": 8, "sliding_window": 4, "layer_types": SLIDING},
        "Gemma3ForCausalLM",
    ),
    "phi3": ("Phi3Config", {**LLAMA, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}, "Phi3ForCausalLM"),
    "gpt2": (
        "GPT2Config",
        {"vocab_size": 61, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 64},
        "GPT2LMHeadModel",
    ),
    "gpt_neox": ("GPTNeoXConfig", BERT, "GPTNeoXForCausalLM"),
    "opt": (
        "OPTConfig",
        {**BERT, "ffn_dim": 48, "word_embed_proj_dim": 16, "pad_token_id": 0},
        "OPTForCausalLM",
    ),
    "falcon": ("FalconConfig", {**BERT, "alibi": False}, "FalconForCausalLM"),
    "bloom": ("BloomConfig", {"vocab_size": 61, "hidden_size": 32, "n_layer": 3, "n_head": 4}, "BloomForCausalLM"),
    "granite": ("GraniteConfig", {**LLAMA, "logits_scaling": 3.0}, "GraniteForCausalLM"),
    "bert": ("BertConfig", BERT, "BertModel"),
    "bert-mlm": ("BertConfig", BERT, "BertForMaskedLM"),
    "roberta": ("RobertaConfig", {**BERT, "max_position_embeddings": 66}, "RobertaModel"),
    "deberta": (
        "DebertaV2Config",
        {
            **BERT,
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_buckets": 8,
        },
        "DebertaV2Model",
    ),
    "vit": ("ViTConfig", VIT, "ViTForImageClassification"),
    "clip-vision": ("CLIPVisionConfig", VIT, "CLIPVisionModel"),
    "t5-encoder": (
        "T5Config",
        {"vocab_size": 61, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 3, "num_heads": 4},
        "T5EncoderModel",
    ),
    "mixtral": ("MixtralConfig", {**LLAMA, "num_local_experts": 4}, "MixtralForCausalLM"),
    "qwen3-moe": (
        "Qwen3MoeConfig",
        {**LLAMA, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "Qwen3MoeForCausalLM",
    ),
}
NO_SDPA = {
    "gemma2",
    "deberta",
    "bloom",
    *(() if transformers.__version__ >= "5" else ("t5-encoder",)),
}  # in some version of transformers


def attention(name: str) -> str:
    """The attention that both versions of transformers have for a model."""
    return "eager" if name in NO_SDPA else "sdpa"


def save(folder: Path, name: str, dtype: torch.dtype = torch.float32, seed: int = 7, **changes) -> Path:
    """A checkpoint of the model with random weights, norms and biases included."""
    config_class, values, model_class = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**values, **changes})
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    model.to(dtype).save_pretrained(folder)
    return folder


def whole(folder: Path, name: str, dtype: torch.dtype = torch.float32, attention: str = "eager"):
    """The model as transformers loads it."""
    cls = getattr(transformers, MODELS[name][2])
    return cls.from_pretrained(folder, dtype=dtype, attn_implementation=attention).eval()


def stack(folder: Path, example, dtype: torch.dtype = torch.float32, attention: str = "eager") -> Stack:
    shapes = {name: spec.shape for name, spec in Checkpoint.open(folder).tensors.items()}
    return Stack.from_transformers(folder, shapes, example, dtype=dtype, attention=attention)


def batches(name: str, sizes=(2, 1, 3), length: int = 9) -> list[dict[str, torch.Tensor]]:
    """Left-padded token batches with some unsupervised labels, or images with classes."""
    random = torch.Generator().manual_seed(3)
    found = []
    for number, size in enumerate(sizes):
        if "vit" in name or "vision" in name:
            images = torch.randn(size, 3, 16, 16, generator=random)
            found.append({"pixel_values": images, "labels": torch.randint(0, 2, (size,), generator=random)})
            continue
        tokens = length + number
        ids = torch.randint(3, 61, (size, tokens), generator=random)
        mask = torch.ones_like(ids)
        mask[0, : 2 + number] = 0
        labels = ids.masked_fill(mask == 0, -100)
        labels[-1, -1] = -100
        found.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return found


def loss(output, batch):
    """A loss for whatever the model returns."""
    labels = batch["labels"]
    if not hasattr(output, "logits"):
        final = output.last_hidden_state
        return (final.float() * torch.linspace(-1, 1, final.numel()).view(final.shape)).sum()
    logits = output.logits.float()
    if logits.dim() == 2:
        return torch.nn.functional.cross_entropy(logits, labels)
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[..., 1:]
    total = torch.nn.functional.cross_entropy(logits.view(-1, logits.shape[-1]), shifted.reshape(-1), reduction="sum")
    return total / (shifted != -100).sum()


def inputs(batch):
    return {name: value for name, value in batch.items() if name != "labels"}


def stored(model, values) -> dict[str, torch.Tensor]:
    """Parameter-shaped tensors under the names that the model is saved with: through transformers' own saving."""
    if transformers.__version__ < "5" or not isinstance(model, transformers.PreTrainedModel):
        return values
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, values)


def expected(model, batches, loss=loss) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and summed gradients of ordinary backward passes, batch by batch, under the checkpoint's names."""
    losses = []
    for batch in batches:
        value = loss(model(**inputs(batch)), batch)
        value.backward()
        losses.append(value.item())
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return losses, {name: value.clone() for name, value in stored(model, gradients).items()}
