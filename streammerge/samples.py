"""Samples for methods that look at gradients: JSON lines, each one sample, each one vote.

    {"input_ids": [1, 15, 7], "labels": [-100, 15, 7]}     -100: not supervised; without labels all tokens are
    {"prompt": "2 + 2 =", "completion": " 4"}              the completion is supervised, with the end-of-text token
    {"text": "..."}                                        all of it is

Text goes through the target's tokenizer, which transformers loads; rows of numbers need neither. Labels stand beside
their own tokens: the model predicts label i from the tokens before it, so the first label never counts. What is longer
than `max_length` is cut at its end.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from streammerge.errors import RecipeError

IGNORED = -100  # label of a token that is not supervised, as torch's cross-entropy has it
FORMS = ("input_ids", "prompt", "text")
KEYS = {"input_ids": ("input_ids", "labels"), "prompt": ("prompt", "completion"), "text": ("text",)}

Encode: TypeAlias = Callable[[str, bool], list[int]]  # text, and whether special tokens are put around it


@dataclass(frozen=True)
class Sample:
    """Token numbers and their labels, equally many."""

    input_ids: tuple[int, ...]
    labels: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def supervised(self) -> int:
        """Tokens that the loss counts."""
        return sum(label != IGNORED for label in self.labels[1:])


class Tokenizer:
    """The tokenizer in a folder, loaded when a row first needs it.

    Raises:
        RecipeError: transformers is not installed, or the folder holds no tokenizer.
    """

    def __init__(self, folder: str | Path) -> None:
        self._folder = Path(folder)
        self._loaded: Any = None

    def __call__(self, text: str, special: bool) -> list[int]:
        found: list[int] = self._load()(text, add_special_tokens=special, verbose=False)["input_ids"]
        return found

    @property
    def end(self) -> list[int]:
        """What ends a text: one token, or none."""
        number = self._load().eos_token_id
        return [] if number is None else [int(number)]

    def _load(self) -> Any:
        if self._loaded is None:
            try:
                from transformers import AutoTokenizer
            except ImportError:
                raise RecipeError(
                    "text needs transformers; pip install streammerge[models], or give input_ids"
                ) from None
            try:
                self._loaded = AutoTokenizer.from_pretrained(str(self._folder), local_files_only=True)
            except (OSError, ValueError, KeyError, ImportError) as error:
                why = " ".join(str(error).split())[:200]
                raise RecipeError(
                    f"{self._folder}: no tokenizer that transformers can load ({why}); give input_ids instead of text"
                ) from None
        return self._loaded


def read_samples(
    path: Path, tokenizer: Tokenizer, *, max_length: int | None = None, vocabulary: int | None = None
) -> list[Sample]:
    """Every row of a file.

    Args:
        path: JSON lines, UTF-8; empty lines do not count.
        tokenizer: for rows of text.
        max_length: tokens of a sample, at most.
        vocabulary: token numbers must lie below it.

    Raises:
        RecipeError: the file or a row is wrong; the message names both.
    """
    samples = []
    for number, row in _rows(path):
        at = f"{path}, line {number}"
        ids, labels = _tokens(row, tokenizer, at)
        sample = Sample(tuple(ids[:max_length]), tuple(labels[:max_length]))
        _check(sample, vocabulary, len(ids) > len(sample), at)
        samples.append(sample)
    if not samples:
        raise RecipeError(f"{path}: holds no samples; give one JSON object per line")
    return samples


def _rows(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise RecipeError(f"{path}: the samples cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 at byte {error.start:,}; give JSON lines") from None
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise RecipeError(f"{path}, line {number}: not JSON; give one object per line") from None
        if not isinstance(row, dict):
            raise RecipeError(f"{path}, line {number}: not an object; give {_forms()}")
        yield number, row


def _tokens(row: Mapping[str, Any], tokenizer: Tokenizer, at: str) -> tuple[list[int], list[int]]:
    """Token numbers and labels of one row."""
    form = next((key for key in FORMS if key in row), None)
    if form is None:
        raise RecipeError(f"{at}: has neither input_ids nor prompt nor text; give {_forms()}")
    unknown = next((key for key in row if key not in KEYS[form]), None)
    if unknown is not None:
        raise RecipeError(f"{at}: unknown key {unknown!r} beside {form!r}; give {_forms()}")
    if form == "input_ids":
        ids = _numbers(row["input_ids"], 0, f"{at}: input_ids")
        labels = _numbers(row["labels"], IGNORED, f"{at}: labels") if "labels" in row else list(ids)
        if len(labels) != len(ids):
            raise RecipeError(f"{at}: {len(ids)} input_ids and {len(labels)} labels; give one label per token")
        return ids, labels
    if form == "text":
        ids = tokenizer(_text(row, "text", at), True)
        return ids, list(ids)
    prompt = tokenizer(_text(row, "prompt", at), True)
    completion = [*tokenizer(_text(row, "completion", at), False), *tokenizer.end]
    return [*prompt, *completion], [IGNORED] * len(prompt) + completion


def _numbers(raw: Any, least: int, at: str) -> list[int]:
    whole = isinstance(raw, list) and all(isinstance(item, int) and not isinstance(item, bool) for item in raw)
    wrong = not whole or any(item < 0 and item != least for item in raw)
    if wrong:
        also = " or -100" if least else ""
        raise RecipeError(f"{at}: must be a list of whole numbers from 0 on{also}")
    return list(raw)


def _text(row: Mapping[str, Any], key: str, at: str) -> str:
    if not isinstance(row.get(key), str):
        raise RecipeError(f"{at}: {key!r} is missing or no text; give {_forms()}")
    return str(row[key])


def _check(sample: Sample, vocabulary: int | None, cut: bool, at: str) -> None:
    if not sample.supervised:
        hint = "max_length cuts all of them off" if cut else "labels of -100 and the first token do not count"
        raise RecipeError(f"{at}: no supervised token; {hint}")
    largest = max(*sample.input_ids, *sample.labels)
    if vocabulary is not None and largest >= vocabulary:
        raise RecipeError(f"{at}: token {largest} lies outside the target's vocabulary of {vocabulary}")


def _forms() -> str:
    return " or ".join("{" + ", ".join(f'"{key}"' for key in KEYS[form]) + "}" for form in FORMS)


def digest(samples: Sequence[Sample]) -> str:
    """Names the samples, whatever file they came from."""
    found = hashlib.sha256()
    for sample in samples:
        found.update(np.array([len(sample), *sample.input_ids, *sample.labels], np.int64).tobytes())
    return found.hexdigest()


def batches(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """One batch of one sample each: int64 tensors [1, tokens], no padding."""
    import torch

    return [
        {"input_ids": torch.tensor([sample.input_ids]), "labels": torch.tensor([sample.labels])} for sample in samples
    ]


def padded(samples: Sequence[Sample], count: int, divisor: int | None = None) -> list[dict[str, Any]]:
    """The samples from the longest to the shortest, `count` to a batch, filled up behind their ends.

    int64 tensors [samples, tokens] with an attention mask. `divisor` is what the loss of a batch is divided by.
    """
    import torch

    found: list[dict[str, Any]] = []
    ranked = sorted(samples, key=len, reverse=True)
    for first in range(0, len(ranked), count):
        some = ranked[first : first + count]
        ids = torch.zeros(len(some), len(some[0]), dtype=torch.int64)
        labels, mask = torch.full_like(ids, IGNORED), torch.zeros_like(ids)
        for row, sample in enumerate(some):
            ids[row, : len(sample)] = torch.tensor(sample.input_ids)
            labels[row, : len(sample)] = torch.tensor(sample.labels)
            mask[row, : len(sample)] = 1
        batch = {"input_ids": ids, "labels": labels, "attention_mask": mask}
        found.append(batch if divisor is None else batch | {"divisor": divisor})
    return found


def alike(samples: Sequence[Sample], tokens: int) -> list[dict[str, Any]]:
    """Samples of one length to a batch, of so many tokens at most or of one sample: nothing to fill up, no labels."""
    import torch

    found: list[dict[str, Any]] = []
    for length, some in groupby(sorted(samples, key=len), len):
        several, count = list(some), max(1, tokens // length)
        for first in range(0, len(several), count):
            ids = torch.tensor([sample.input_ids for sample in several[first : first + count]])
            found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    return found


def step_order(samples: int, batch: int, steps: int, seed: int) -> list[list[int]]:
    """Which samples each step takes: every epoch all of them, in an order of its own, the last step what is left."""
    random = np.random.Generator(np.random.PCG64(seed))
    found: list[list[int]] = []
    while len(found) < steps:
        order = random.permutation(samples).tolist()
        found += [order[at : at + batch] for at in range(0, samples, batch)]
    return found[:steps]
