"""aTLAS: a coefficient for every task vector and every tensor, learned from a few samples.

    merged_b = base_b + sum_k c_kb (expert_k,b - base_b)                Zhang et al. 2024, arXiv:2407.02880
    dL/dc_kb = < dL/dmerged_b , expert_k,b - base_b >                   all that a step of AdamW needs

A block b is a named tensor, norms and biases included. With `partitions: K` every block has K coefficients for each
expert, its elements dealt out to them by a hash of seed, tensor and element. Coefficients start at `init`, 0: the base.

    supervised     cross-entropy, the mean over the supervised tokens of a step
    negation       minus that on data.train plus that on data.control, `batch` samples of each
    entropy        the mean entropy of the predictions at the same tokens: labels say where, not what
    pseudo_label   cross-entropy with what the model itself predicts there, of samples where it is sure, and of the
                   others as far as they pass a threshold: engine/objectives.py

Several files under data.train are several tasks: each gives `batch` samples to a step, and their losses are added.
With data.validation the coefficients of the epoch with the least loss there are kept, the first ones included.

Where it differs from the authors' code: no clipping of the gradient's norm over all coefficients unless `clip` asks for
it, since every tensor is updated while it is in memory (with `clip` the experts are read twice a step); blocks that get
no gradient keep their coefficients instead of being decayed. `budget: b` keeps, for each block, the b experts whose
coefficients have the largest gradients at c = 0; the others stay at 0 and are not read again.

`coefficients: FILE` takes coefficients that were learned before instead of `data`. compute: bfloat16 composes the
weights in 16 bits, where steps smaller than half a unit in the last place are lost: the plan warns of it. An output in
16 bits rounds once: the report says what is left (_rounding.py).
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from streammerge.errors import RecipeError
from streammerge.method import LayerMethod, PerExpert, param, spread
from streammerge.methods._composed import Composed

OBJECTIVES = ("supervised", "entropy", "pseudo_label", "negation")
COMPUTE = ("float32", "bfloat16")
ATTENTION = ("sdpa", "eager")
DATA = ("train", "control", "validation", "max_length")


@dataclass(frozen=True)
class Atlas(LayerMethod):
    """Learned coefficients."""

    summary = "task vectors with a learned coefficient for every tensor"
    source = "Zhang et al. 2024, arXiv:2407.02880"
    kernels = ("multi_dot", "add_deltas", "norms_and_dots")
    keys = ("data", "coefficients", "compute", "attention")
    common = ("objective", "steps", "epochs", "batch", "schedule", "clip", "budget")  # the same for all tensors

    objective: str = param("supervised", "supervised, entropy, pseudo_label or negation")
    steps: int = param(0, "steps of AdamW; 0: as many as epochs make")
    epochs: int = param(10, "times that every sample is seen, where steps is 0")
    batch: int | str = param(128, "samples of a step, of each file of them; or all", kind=object)
    lr: float = param(0.1, "learning rate of AdamW")
    weight_decay: float = param(0.1, "of AdamW: a step takes lr * weight_decay of every coefficient away")
    schedule: str = param("cosine", "of the learning rate: cosine to 0, or constant")
    clip: float = param(0.0, "most norm of the gradient over all coefficients; 0: no limit, and half the reads")
    partitions: int = param(1, "coefficients of an expert in every tensor, elements dealt out to them by a hash")
    blocks: str | tuple[str, ...] = param(
        "all", "tensors that learn: all, weights (two axes or more), or patterns of names as *mlp*", several=True
    )
    budget: int = param(0, "experts that every tensor keeps, those of the largest first gradients; 0: all")
    init: PerExpert = param(0.0, "what coefficients start from", per_expert=True)

    coefficients: tuple[tuple[float, ...], ...] = ()  # learned ones, [experts][groups]
    origin: int = -1  # the tensor's number in the hash, where it is another's
    seed: int = 0  # of the hash

    def __post_init__(self) -> None:
        known = (("objective", self.objective, OBJECTIVES), ("schedule", self.schedule, ("cosine", "constant")))
        for name, value, words in known:
            if value not in words:
                raise RecipeError(f"atlas: {name} is {value!r}; one of {', '.join(words)}")
        for name, least in (("steps", 0), ("epochs", 1), ("partitions", 1), ("budget", 0)):
            if getattr(self, name) < least:
                raise RecipeError(f"atlas: {name} is {getattr(self, name)}; give {least} or more")
        for name in ("lr", "weight_decay", "clip"):
            if not getattr(self, name) >= 0:
                raise RecipeError(f"atlas: {name} is {getattr(self, name)}; it must not be negative")
        if self.batch != "all" and (isinstance(self.batch, str) or self.batch < 1):
            raise RecipeError(f"atlas: batch is {self.batch!r}; give a number of samples, or all")

    @classmethod
    def read_keys(cls, given: Mapping[str, Any], models: int, where: str) -> dict[str, Any]:
        """The keys with their defaults; `data.train` and `data.control` as lists."""
        found = {"compute": COMPUTE[0], "attention": ATTENTION[0], **given}
        for key, known in (("compute", COMPUTE), ("attention", ATTENTION)):
            if found[key] not in known:
                raise RecipeError(f"{where}: {key} is {found[key]!r}; one of {', '.join(known)}")
        if ("data" in given) == ("coefficients" in given):
            both = "both data and coefficients" if "data" in given else "neither data nor coefficients"
            raise RecipeError(f"{where}: {both}; give samples to learn from, or a file of what was learned")
        if "coefficients" in given:
            _file(given["coefficients"], f"{where}: coefficients")
        else:
            found["data"] = _data(given["data"], f"{where}: data")
        return found

    def learns(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor's coefficients are learned; else they stay at `init`."""
        if self.blocks in ("all", "weights"):
            return self.blocks == "all" or len(shape) > 1
        patterns = (self.blocks,) if isinstance(self.blocks, str) else self.blocks
        return any(fnmatchcase(name, pattern) for pattern in patterns)

    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> Composed:
        started = tuple((value,) * self.partitions for value in spread(self.init, experts).tolist())
        origin = zlib.crc32(name.encode()) if self.origin < 0 else self.origin
        return Composed(self.coefficients or started, origin, self.seed)


def _data(raw: Any, at: str) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise RecipeError(f"{at}: must be a mapping of {', '.join(DATA)}")
    for key in raw:
        if key not in DATA:
            raise RecipeError(f"{at}: unknown key {key!r}; known: {', '.join(DATA)}")
    found: dict[str, Any] = {}
    for key in ("train", "control"):
        given = raw.get(key, [])
        found[key] = [given] if isinstance(given, str) else given
        if not isinstance(found[key], list):
            raise RecipeError(f"{at}.{key}: must be a file, or a list of files")
        for file in found[key]:
            _file(file, f"{at}.{key}")
    if not found["train"]:
        raise RecipeError(f"{at}: no train; give a file of samples")
    if raw.get("validation") is not None:
        _file(raw["validation"], f"{at}.validation")
    length = raw.get("max_length")
    if length is not None and (not isinstance(length, int) or isinstance(length, bool) or length < 2):
        raise RecipeError(f"{at}.max_length: {length!r}; give a whole number of tokens, 2 or more")
    return {**found, "validation": raw.get("validation"), "max_length": length}


def _file(given: Any, at: str) -> None:
    if not (isinstance(given, str) and given.strip()):
        raise RecipeError(f"{at}: must be the path of a file")
