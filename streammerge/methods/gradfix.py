"""GradFix: a task vector from another pre-training, masked by the signs of a few gradients at the target.

    tau  = fine-tuned - source_base                                     arXiv:2510.09658, ICLR 2026
    v_i  = sum_n sign(-d loss_n / d target_i)        one vote per sample n; a gradient of 0 (or NaN) abstains
    m_i  = 1 if sign(tau_i) == sign(v_i) != 0, else 0                   ties are dropped
    out  = target + alpha (m * tau)

`vote: mean` takes the sign of -sum_n d loss_n / d target_i instead. All gradients are taken at the target as it is:
each layer's are voted on, applied and written during one backward pass, and no two layers' exist at once.

Each kept step goes downhill to first order, since g_i m_i tau_i <= 0, for any task vector and for the samples' mean
gradient g; a vote has that property as far as it has the sign of g. The report has sum_i g_i m_i tau_i.

Several fine-tuned models: of several tasks, each with samples of its own (data.train is a list: one vote of every task
on the merged vector), or of one task by several roads (one file). `merge` and `order` are those of _masked.py and
_masked_whole.py; a single model is not merged.

Tensors that no layer runs with, or that the other models lack, stay the target's; `unmatched: pass` adds the whole task
vector of the former, unmasked. `mode: force` takes |tau_i| sign(v_i); `random` draws the signs, as a control. With
`alpha` a list, one more forward pass over the weights tries all of them on data.validation, and the one of least loss
is written. `save_votes` keeps the signs, two bits each, for other task vectors: `votes` takes them instead of data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from streammerge.errors import RecipeError
from streammerge.method import LayerMethod, param
from streammerge.methods._ballots import Ballot
from streammerge.methods._masked import Masked
from streammerge.methods._masked_whole import MaskedWhole, is_matrix

MERGES = ("mean", "ties", "tsvm")
ORDERS = ("merge_then_mask", "mask_then_merge")
COMPUTE = ("float32", "bfloat16")
ATTENTION = ("sdpa", "eager")
DATA = ("train", "validation", "max_length")


@dataclass(frozen=True)
class GradFix(LayerMethod):
    """Masked transport of task vectors."""

    summary = "task vectors of another pre-training, masked by the signs of a few gradients"
    source = "Rinaldi et al. 2025, arXiv:2510.09658"
    kernels = ("sign_mask", "add_deltas", "norms_and_dots", "vote_gemm")
    keys = ("source_base", "data", "merge", "order", "votes", "save_votes", "compute", "attention")
    beside = ("source_base",)

    alpha: float | tuple[float, ...] = param(
        0.5, "factor on the masked task vector; of a list the best on data.validation", several=True
    )
    vote: str = param("majority", "majority: one vote per sample; mean: the sign of the summed gradient")
    mode: str = param("agreement", "agreement: the task vector where its sign is the vote's; force; random")
    unmatched: str = param("drop", "tensors without a gradient: drop or pass their task vectors")

    merge: str = "mean"
    order: str = "merge_then_mask"
    sources: int = 1
    voters: int = 1
    whole: bool = False  # of a tensor without signs: its task vectors pass

    def __post_init__(self) -> None:
        for name, value, known in (
            ("vote", self.vote, ("majority", "mean")),
            ("mode", self.mode, ("agreement", "force", "random")),
            ("unmatched", self.unmatched, ("drop", "pass")),
        ):
            if value not in known:
                raise RecipeError(f"gradfix: {name} is {value!r}; one of {', '.join(known)}")

    @classmethod
    def read_keys(cls, given: Mapping[str, Any], models: int, where: str) -> dict[str, Any]:
        """The keys with their defaults; `data.train` as a list."""
        found = {"merge": MERGES[0], "order": ORDERS[0], "compute": COMPUTE[0], "attention": ATTENTION[0], **given}
        if "source_base" not in given:
            raise RecipeError(
                f"{where}: gradfix needs source_base; name the model that the others were fine-tuned from"
            )
        for key, known in (("merge", MERGES), ("order", ORDERS), ("compute", COMPUTE), ("attention", ATTENTION)):
            if found[key] not in known:
                raise RecipeError(f"{where}: {key} is {found[key]!r}; one of {', '.join(known)}")
        for key in ("votes", "save_votes"):
            if key in given and not (isinstance(given[key], str) and given[key].strip()):
                raise RecipeError(f"{where}: {key} must be the path of a file")
        if not str(given.get("save_votes", ".safetensors")).endswith(".safetensors"):
            raise RecipeError(f"{where}: save_votes is {given['save_votes']!r}; its name must end in .safetensors")
        if "votes" in given and "save_votes" in given:
            raise RecipeError(f"{where}: both votes and save_votes; the former is a file of votes already")
        if "data" in given:
            found["data"] = _data(given["data"], models, "votes" in given, f"{where}: data")
        return found

    @property
    def alphas(self) -> tuple[float, ...]:
        """Those to try; one if there is no choice."""
        return self.alpha if isinstance(self.alpha, tuple) else (self.alpha,)

    @property
    def counts(self) -> bool:
        """Whether samples are counted, so that they can tie."""
        return self.vote == "majority"

    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> Masked:
        if self.whole:
            return Masked(self.alphas[0], "pass", self.order, self.sources, 0)
        voters = 0 if self.mode == "random" else self.voters
        own = (self.alphas[0], self.mode, self.order, self.sources, voters)
        if (
            self.sources == 1
            or self.merge == "mean"
            or (self.merge == "tsvm" and not is_matrix(name, shape, self.sources))
        ):
            return Masked(*own)
        return MaskedWhole(*own, self.merge)

    @property
    def apart(self) -> bool:
        """Whether each task's signs are kept for its own model."""
        return self.sources > 1 and self.order == "mask_then_merge"

    def ballot(self, numel: int, tasks: Sequence[int], device: Any) -> Ballot:
        """What collects the gradients of one tensor; `tasks` has the task of each sample."""
        return Ballot(numel, tasks, self.vote == "mean", self.apart, device)

    def ballot_bytes(self, numel: int, tasks: Sequence[int], on_gpu: bool) -> int:
        """What it holds at most."""
        return Ballot.bytes_held(numel, tasks, self.vote == "mean", self.apart, on_gpu)

    def panel_bytes(self, shape: tuple[int, ...], tasks: Sequence[int], tokens: int, width: int) -> tuple[int, int]:
        """The same where it is given panels, until they are counted, and what counting takes for a while."""
        rows, columns = shape
        counting = Ballot.counting_bytes(rows, columns, tokens, width, tasks, self.apart)
        return Ballot.panel_bytes(rows, columns, tokens, width), counting


def _data(raw: Any, models: int, voted: bool, at: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RecipeError(f"{at}: must be a mapping of {', '.join(DATA)}")
    for key in raw:
        if key not in DATA:
            raise RecipeError(f"{at}: unknown key {key!r}; known: {', '.join(DATA)}")
    train = raw.get("train", [])
    files = [train] if isinstance(train, str) else train
    if not isinstance(files, list) or not all(isinstance(each, str) and each.strip() for each in files):
        raise RecipeError(f"{at}.train: must be a file, or a list of one file for each model")
    if voted and files:
        raise RecipeError(f"{at}.train: there are votes already; leave one of them out")
    if files and len(files) not in (1, models):
        raise RecipeError(f"{at}.train: {len(files)} files for {models} models; give one, or one for each model")
    validation = raw.get("validation")
    if validation is not None and not (isinstance(validation, str) and validation.strip()):
        raise RecipeError(f"{at}.validation: must be a file")
    length = raw.get("max_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 2):
        raise RecipeError(f"{at}.max_length: {length!r}; give a whole number of tokens, 2 or more")
    return {"train": files, "validation": validation, "max_length": length}
