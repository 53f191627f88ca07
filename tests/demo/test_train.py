"""Training, saving and scoring of byte-level Llamas, against transformers and against direct computation."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from streammerge.demo import evaluate, optimizer, train

pytest.importorskip("transformers")
TEXT = b"the cat sat on the mat. " * 40


@pytest.fixture(scope="module")
def saved(tmp_path_factory, architecture, schedule) -> Path:
    """A model trained for three steps."""
    folder = tmp_path_factory.mktemp("model")
    model = train.new_model(architecture, seed=0)
    train.train(model, [TEXT], schedule, lambda step, loss: None)
    train.save_model(model, folder)
    return folder


def test_transformers_loads_what_was_saved(saved):
    from transformers import AutoConfig, AutoModelForCausalLM

    with train.quiet():
        model = AutoModelForCausalLM.from_pretrained(saved)
    assert type(model).__name__ == "LlamaForCausalLM"
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    assert AutoConfig.from_pretrained(saved).vocab_size == 256
    assert not list(saved.glob("*.bin"))


def test_the_same_seed_trains_the_same_weights(saved, architecture, schedule):
    again = train.new_model(architecture, seed=0)
    train.train(again, [TEXT], schedule, lambda step, loss: None)
    for (name, ours), theirs in zip(
        again.state_dict().items(), train.load_model(saved).state_dict().values(), strict=True
    ):
        assert torch.equal(ours.bfloat16().float(), theirs), name


def test_training_lowers_the_loss(architecture):
    model, losses = train.new_model(architecture, seed=0), []
    schedule = train.Schedule(steps=40, matrix_rate=0.02, other_rate=1e-2, batch=2, window=32, warmup=2)
    train.train(model, [TEXT], schedule, lambda step, loss: losses.append((step, loss)))
    assert [step for step, _ in losses] == list(range(1, 41))
    assert losses[0][1] == pytest.approx(8, abs=0.3)  # 256 equally likely bytes are 8 bits
    assert losses[-1][1] < 4


def test_texts_take_turns():
    streams = [train.as_tensor(bytes([value]) * 100) for value in (1, 2, 3)]
    schedule = train.Schedule(steps=3, matrix_rate=1, other_rate=1, batch=2, window=8)
    generator = torch.Generator().manual_seed(0)
    drawn = [train.draw(streams, schedule, step, generator) for step in range(3)]
    assert [rows[:, 0].tolist() for rows in drawn] == [[1, 2], [3, 1], [2, 3]]
    assert drawn[0].shape == (2, 9)


def test_rate_rises_then_falls():
    schedule = train.Schedule(steps=100, matrix_rate=1, other_rate=1, warmup=10)
    factors = [schedule.factor(step) for step in range(100)]
    assert factors[0] == 0.1
    assert factors[99] == 0.01
    assert max(factors) == factors[9] == 0.91


@pytest.mark.parametrize("shape", [(2, 6, 6), (1, 4, 9), (3, 9, 4)])
def test_orthogonal_brings_singular_values_near_one(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = torch.linalg.svdvals(optimizer.orthogonal(matrices).double())
    assert found.min() > 0.3
    assert found.max() < 1.3
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    aligned = (optimizer.orthogonal(matrices).double() * (u @ vh)).sum(dim=(1, 2))
    assert (aligned > 0.7 * min(shape[1:])).all()  # singular vectors are kept


def test_bits_per_byte_is_the_sum_of_log_probabilities(saved):
    model, text = train.load_model(saved), bytes(range(32, 122)) * 3
    measured = evaluate.bits_per_byte(model, text, count=5, length=20)
    stride, total = len(text) // 5, 0.0
    for window in range(5):
        piece = list(text[window * stride : window * stride + 20])
        with torch.no_grad():
            chances = model(torch.tensor([piece])).logits[0].double().log_softmax(-1)
        total -= sum(float(chances[at, piece[at + 1]]) for at in range(19))
    assert measured == pytest.approx(total / math.log(2) / (5 * 19), rel=1e-6)


def test_too_little_text_is_refused():
    with pytest.raises(Exception, match="10 bytes of text are too few for 2 windows of 20"):
        evaluate.windows(b"0123456789", 2, 20)


def test_generate_continues_a_prompt(saved):
    model = train.load_model(saved)
    state = torch.get_rng_state()
    once, twice = (evaluate.continue_prompt(model, b"the cat", length=12) for _ in range(2))
    assert once == twice
    assert 1 <= len(once) <= 12
    assert torch.equal(state, torch.get_rng_state())


def test_the_tokenizer_is_bytes(saved):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(saved)
    text = "def f(x):\n\treturn 'é' * 3  # ½ 漢"
    assert tokenizer(text)["input_ids"] == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text
    letters = train._byte_letters()
    assert len(set(letters)) == 256
    assert tokenizer.convert_ids_to_tokens(list(range(256))) == letters
