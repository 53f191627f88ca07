"""Rows of samples: what each form becomes, and the line that a bad one is refused with."""

import json
import sys

import pytest

from streammerge import samples
from streammerge.errors import RecipeError
from streammerge.samples import IGNORED, Sample, Tokenizer, alike, batches, digest, read_samples

ROWS = [
    {"input_ids": [5, 6, 7], "labels": [IGNORED, 6, 7]},
    {"input_ids": [1, 2]},
    {"prompt": "ab", "completion": "c"},
    {"text": "abc"},
]


class Letters(Tokenizer):
    """One token for each letter; 90 before a text, 91 behind a completion."""

    end = (91,)

    def __init__(self):
        super().__init__("nowhere")

    def __call__(self, text, special):
        return [90] * special + [ord(letter) - 96 for letter in text]


def write(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows))
    return path


def read(path, **options):
    return read_samples(path, Letters(), **options)


def test_every_form(tmp_path):
    found = read(write(tmp_path / "a.jsonl", *ROWS, "", "  "))
    assert found == [
        Sample((5, 6, 7), (IGNORED, 6, 7)),
        Sample((1, 2), (1, 2)),
        Sample((90, 1, 2, 3, 91), (IGNORED, IGNORED, IGNORED, 3, 91)),
        Sample((90, 1, 2, 3), (90, 1, 2, 3)),
    ]
    assert [sample.supervised for sample in found] == [2, 1, 2, 3]


def test_long_rows_are_cut_at_their_end(tmp_path):
    (found,) = read(write(tmp_path / "a.jsonl", {"text": "abcdef"}), max_length=3)
    assert found.input_ids == (90, 1, 2)
    with pytest.raises(RecipeError, match=r"a.jsonl, line 1: no supervised token; max_length cuts all of them off"):
        read(write(tmp_path / "a.jsonl", ROWS[2]), max_length=3)


BAD = [
    ("{", "not JSON; give one object per line"),
    ("[1]", "not an object; give"),
    ({"labels": [1]}, "has neither input_ids nor prompt nor text"),
    ({"text": "a", "label": 1}, "unknown key 'label' beside 'text'"),
    ({"input_ids": [1, 2.5]}, "input_ids: must be a list of whole numbers from 0 on"),
    ({"input_ids": [1, -2]}, "input_ids: must be a list of whole numbers from 0 on"),
    ({"input_ids": [1, 2], "labels": [1, -3]}, "labels: must be a list of whole numbers from 0 on or -100"),
    ({"input_ids": [1, 2], "labels": [1]}, "2 input_ids and 1 labels; give one label per token"),
    ({"input_ids": [1, 2], "labels": [1, IGNORED]}, "no supervised token; labels of -100 and the first token"),
    ({"input_ids": []}, "no supervised token"),
    ({"prompt": "a"}, "'completion' is missing or no text"),
    ({"input_ids": [1, 60]}, "token 60 lies outside the target's vocabulary of 60"),
]


@pytest.mark.parametrize(("row", "line"), BAD)
def test_a_bad_row_is_named_by_its_line(tmp_path, row, line):
    path = write(tmp_path / "a.jsonl", ROWS[1], "", row)
    with pytest.raises(RecipeError) as caught:
        read(path, vocabulary=60)
    assert str(caught.value).startswith(f"{path}, line 3: {line}")
    assert "\n" not in str(caught.value)


def test_a_bad_file(tmp_path):
    with pytest.raises(RecipeError, match=r"none.jsonl: the samples cannot be read: No such file"):
        read(tmp_path / "none.jsonl")
    with pytest.raises(RecipeError, match=r"a.jsonl: holds no samples"):
        read(write(tmp_path / "a.jsonl", "", ""))
    (tmp_path / "b.jsonl").write_bytes(b'{"text": "\xff"}')
    with pytest.raises(RecipeError, match=r"b.jsonl: not UTF-8 at byte 10"):
        read(tmp_path / "b.jsonl")


def test_text_without_a_tokenizer_is_one_line(tmp_path, monkeypatch):
    path = write(tmp_path / "a.jsonl", {"text": "a"})
    with pytest.raises(RecipeError, match=f"{tmp_path}: no tokenizer that transformers can load") as caught:
        read_samples(path, Tokenizer(tmp_path))
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(RecipeError, match="text needs transformers; pip install"):
        read_samples(path, Tokenizer(tmp_path))
    assert read_samples(write(path, ROWS[1]), Tokenizer(tmp_path)) == [Sample((1, 2), (1, 2))]


def test_a_real_tokenizer(tmp_path):
    """A word-level one, written here: what comes out is what it says."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<s>": 0, "</s>": 1, "two": 2, "four": 3}, "<s>"))
    words.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    words.post_processor = tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=words, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(tmp_path)
    path = write(tmp_path / "a.jsonl", {"prompt": "two two", "completion": "four"}, {"text": "four"})
    assert read_samples(path, Tokenizer(tmp_path)) == [
        Sample((0, 2, 2, 3, 1), (IGNORED, IGNORED, IGNORED, 3, 1)),
        Sample((0, 3), (0, 3)),
    ]


def test_batches_are_single_samples():
    import torch

    found = batches([Sample((5, 6), (IGNORED, 6)), Sample((1, 2, 3), (1, 2, 3))])
    assert [batch["input_ids"].tolist() for batch in found] == [[[5, 6]], [[1, 2, 3]]]
    assert found[0]["labels"].tolist() == [[IGNORED, 6]]
    assert found[0]["input_ids"].dtype == torch.int64


def test_the_digest_names_tokens_and_labels():
    one = [Sample((1, 2), (1, 2)), Sample((3, 4), (3, 4))]
    assert digest(one) == digest(list(one))
    others = [one[:1], one[::-1], [Sample((1, 2), (IGNORED, 2)), one[1]], [Sample((1, 2, 3, 4), (1, 2, 3, 4))]]
    assert len({digest(other) for other in [one, *others]}) == 5


def test_forms_are_told_in_one_line():
    assert samples._forms() == '{"input_ids", "labels"} or {"prompt", "completion"} or {"text"}'


def test_samples_of_one_length_share_batches():
    torch = pytest.importorskip("torch")
    found = alike([Sample((at,) * length, (at,) * length) for at, length in enumerate((3, 9, 3, 2, 3))], 8)
    assert [batch["input_ids"].tolist() for batch in found] == [
        [[3, 3]],
        [[0, 0, 0], [2, 2, 2]],
        [[4, 4, 4]],
        [[1] * 9],
    ]
    assert all(torch.equal(batch["attention_mask"], torch.ones_like(batch["input_ids"])) for batch in found)
