"""FDA: a unit's weights learn from synthetic inputs, which each expert's task vector alone has made.

    anchors of expert i    inputs x whose induced gradient at the base has the direction of tau_i    (_anchors.py)
    adaptation             the unit's weights learn all experts' results on their anchors            (_adapt.py)

Functional dual anchors, arXiv:2510.21223. A unit is the MLP of a layer (decoders), a whole layer (encoders, vision),
every linear map of a layer, or the modules that a pattern names. Units know nothing of each other: what is in memory is
one of them, the base's and one expert's, and its anchors. No data is read, unless samples decide when to stop.

What is no unit's is the `start`'s, to the bit: another method's merge, or the base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streammerge.errors import RecipeError
from streammerge.method import LayerMethod, TileMethod, param
from streammerge.methods._adapt import Adaptation, Course, Trial, closed_form
from streammerge.methods._anchors import INITS, Construction, gaussian, linear_optimum, micro_batch, random_of, rows_of
from streammerge.methods._induced import DISTANCES, Network, Tensors
from streammerge.methods._rounded import PRECISIONS
from streammerge.methods._swiglu import GatedMlp
from streammerge.methods._whole_unit import Run, WholeUnit, without_gradient

if TYPE_CHECKING:
    from torch import Tensor

ADAPTS = ("auto", "coefficients", "weights", "closed_form")
ALPHAS = ("merged", "experts")
COMMON = {"construct_lr": 1e-2, "distance": "cosine", "init": "gaussian", "sigma": 0.01}
BLOCKS = {"unit": "block", "anchors": 64, "construct_steps": 1200, "adapt_epochs": 100, "batch": 128}
PRESETS: dict[str, dict[str, Any]] = {
    "paper-llama": {
        **COMMON,
        **{"unit": "mlp", "anchors": 8192, "construct_steps": 200, "adapt_epochs": 50, "batch": 8192},
    },
    "paper-vit": {**COMMON, **BLOCKS, "alphas": "experts"},
    "paper-roberta": {**COMMON, **BLOCKS, "alphas": "experts", "tokens": 5},
}
RATES = {"paper-vit": 1e-5}  # of Adam on weights; else WEIGHTS
COEFFICIENTS, WEIGHTS = 1e-2, 5e-5


@dataclass(frozen=True)
class Fda(LayerMethod):
    """Weights that agree with every expert on the expert's anchors."""

    summary = "layer by layer, weights that return what each expert does on inputs made from its task vector"
    source = "Shi et al. 2025, arXiv:2510.21223"
    keys = ("start", "units", "save_anchors", "anchors_from")

    unit: str = param("auto", "mlp, block, linear, or a pattern of module names in a layer; auto: mlp of decoders")
    anchors: int = param(64, "inputs for each unit and expert")
    tokens: int = param(5, "tokens of an anchor where a unit is a whole layer of a text model")
    construct_steps: int = param(200, "steps of AdamW on the anchors")
    construct_lr: float = param(1e-2, "its rate")
    init: str = param("gaussian", "anchors start as gaussian noise, or as rows of the expert's weights")
    sigma: float = param(0.01, "scale of the noise")
    distance: str = param("cosine", "between results of a unit: cosine, l2 or l1")
    adapt: str = param("auto", "coefficients, weights or closed_form; auto: coefficients where a merge is the start")
    alphas: str = param("merged", "coefficients of the merged task vector; experts: of each, if the start is a sum")
    adapt_epochs: int = param(0, "passes over all anchors; 0: 25 for coefficients, 100 for weights")
    adapt_steps: int = param(0, "steps, instead of epochs")
    adapt_lr: float = param(0.0, "rate of Adam; 0: 1e-2 for coefficients, 5e-5 for weights")
    batch: int = param(128, "anchors of a step")
    ridge: float = param(0.01, "of closed_form, in mean eigenvalues")
    early_stop: float | str | tuple[str, ...] = param(
        0.0,
        "what ends adaptation when it fares worse: a share of the anchors, or a file of samples, or one for each model",
        kind=Path,
        several=True,
    )
    precision: str = param("fp32", "of the products of construction: fp32, bf16, or tf32 on a GPU")
    rows: int = param(1024, "tokens of a micro-batch")
    preset: str = param("none", "published values of all of these: paper-llama, paper-vit or paper-roberta")

    def __post_init__(self) -> None:
        for name, known in (
            ("init", INITS),
            ("distance", DISTANCES),
            ("adapt", ADAPTS),
            ("alphas", ALPHAS),
            ("precision", PRECISIONS),
            ("preset", ("none", *PRESETS)),
        ):
            if getattr(self, name) not in known:
                raise RecipeError(f"fda: {name} is {getattr(self, name)!r}; one of {', '.join(known)}")
        for name in ("anchors", "tokens", "batch", "rows"):
            if getattr(self, name) < 1:
                raise RecipeError(f"fda: {name} is {getattr(self, name)}; give 1 or more")
        for name in ("construct_steps", "adapt_epochs", "adapt_steps", "construct_lr", "sigma", "adapt_lr", "ridge"):
            if getattr(self, name) < 0:
                raise RecipeError(f"fda: {name} is {getattr(self, name)}; it cannot be negative")
        if isinstance(self.early_stop, tuple) and not all(isinstance(each, str) for each in self.early_stop):
            raise RecipeError(f"fda: early_stop is {list(self.early_stop)}; give one share, or files of samples")
        if not 0 <= self.held_out < 1:
            raise RecipeError(f"fda: early_stop is {self.early_stop}; it is a share of the anchors, from 0 to below 1")
        if self.early_stop and self.adapt == "closed_form":
            raise RecipeError("fda: early_stop ends the steps of adaptation; closed_form has none, leave it out")
        if math.ceil(self.held_out * self.anchors) == self.anchors:
            raise RecipeError(
                f"fda: early_stop is {self.early_stop}; none of {self.anchors} anchors is left to learn from"
            )

    @property
    def held_out(self) -> float:
        """The share of anchors that only decides when to stop."""
        return 0.0 if isinstance(self.early_stop, (str, tuple)) else self.early_stop

    @property
    def files(self) -> tuple[str, ...]:
        """Samples that decide instead: one file for all experts, or one for each."""
        if isinstance(self.early_stop, tuple):
            return self.early_stop
        return (self.early_stop,) if isinstance(self.early_stop, str) else ()

    @classmethod
    def read_keys(cls, given: Mapping[str, Any], models: int, where: str) -> dict[str, Any]:
        """The keys with their defaults: `start` "base" or a mapping, `units` [first, last] or nothing."""
        start = given.get("start", "base")
        if start != "base" and not (isinstance(start, dict) and "merge_method" in start):
            raise RecipeError(f"{where}: start must be base, or a mapping with a merge_method and its parameters")
        found = {"start": start}
        if "units" in given:
            found["units"] = _units(given["units"], f"{where}: units")
        if "save_anchors" in given:
            found["save_anchors"] = _folder(given["save_anchors"], f"{where}: save_anchors")
        if "anchors_from" in given:
            several = given["anchors_from"] if isinstance(given["anchors_from"], list) else [given["anchors_from"]]
            found["anchors_from"] = [_folder(each, f"{where}: anchors_from") for each in several]
        return found

    @classmethod
    def fill(cls, given: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> dict[str, Any]:
        """A preset's values, where none are given."""
        name = given.get("preset", "none")
        if name == "none" or name not in PRESETS:
            return dict(given)
        found = PRESETS[name] | {"adapt": "weights" if keys["start"] == "base" else "coefficients"} | dict(given)
        rate = COEFFICIENTS if found["adapt"] == "coefficients" else RATES.get(name, WEIGHTS)
        return {"adapt_lr": rate, **found}

    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> TileMethod:
        raise RecipeError("fda merges no single tensor; its start does")

    def settled(self, start: str) -> Fda:
        """With nothing left to choose; `start` is "base" or the merge method that makes the start.

        Raises:
            RecipeError: the values do not go together.
        """
        adapt = self.adapt if self.adapt != "auto" else "weights" if start == "base" else "coefficients"
        if adapt == "coefficients" and start == "base":
            raise RecipeError(
                "fda: adapt: coefficients refines a merged start; give start: {merge_method: ...}, or adapt: weights"
            )
        coefficients = adapt == "coefficients"
        alphas = self.alphas if coefficients and start == "task_arithmetic" else "merged"
        if self.alphas == "experts" and alphas != "experts" and self.preset == "none":
            raise RecipeError(
                "fda: alphas: experts goes with start: task_arithmetic and adapt: coefficients; "
                f"the start is {start}, adapt {adapt}"
            )
        return replace(
            self,
            adapt=adapt,
            alphas=alphas,
            adapt_epochs=self.adapt_epochs or (25 if coefficients else 100),
            adapt_lr=self.adapt_lr or (COEFFICIENTS if coefficients else WEIGHTS),
        )

    # --- what the engine asks for, unit by unit ---

    def network(self, run: Run, base: Tensors, tau: Tensors, gated: tuple[str, str, str] | None) -> Network:
        """A unit at base and expert; `gated` names gate, up and down of an MLP with SiLU and no biases."""
        if gated is not None:
            return GatedMlp(base, tau, gated, self.distance, self.precision)
        return WholeUnit(run, base, tau, self.distance, self.precision)

    def first(self, seed: int, unit: str, expert: int, shape: Sequence[int], matrices: Sequence[Tensor]) -> Tensor:
        """Anchors to begin with, of that shape; `matrices` are the expert's."""
        random = random_of(seed, unit, expert)
        if self.init == "weights":
            return rows_of(random, matrices, shape)
        return gaussian(random, shape, self.sigma)

    def noise(self, unit: str, shape: Sequence[int]) -> Tensor:
        """Inputs of length one per element, whatever the seed."""
        return gaussian(random_of(0, unit, 0), shape, 1.0)

    def micro_batch(self, shape: Sequence[int]) -> int:
        """Anchors of [anchors, (tokens,) d] that run at once."""
        return micro_batch(shape, self.rows)

    def construction(self, network: Network, tau: Tensors, first: Tensor, masks: Tensors) -> Construction:
        return Construction(network, tau, first, self.construct_lr, self.construct_steps, self.rows, masks)

    def optimum(self, tau: Tensor) -> tuple[Tensor, float]:
        """Anchors of a linear map under l2, and their loss."""
        return linear_optimum(tau, self.anchors)

    def masks(self, run: Run, base: Tensors, x: Tensor) -> dict[str, Tensor]:
        """Entries of vectors that no input reaches."""
        return without_gradient(run, base, x)

    def adaptation(
        self,
        run: Run,
        theta: dict[str, Tensor],
        moves: Sequence[Tensors],
        anchors: Sequence[Tensor],
        targets: Sequence[Tensor],
        trial: Trial | None = None,
    ) -> Adaptation:
        course = Course(
            self.adapt_lr,
            self.adapt_epochs,
            self.adapt_steps,
            self.batch,
            self.held_out,
            self.rows,
            self.distance,
        )
        return Adaptation(run, theta, moves, anchors, targets, course, trial)

    def order(self, seed: int, unit: str, epoch: int) -> Any:
        """The generator of one epoch's order."""
        return random_of(seed, unit, 0, 1 + epoch)

    def solve(self, inputs: Sequence[Tensor], moved: Sequence[Tensor]) -> Tensor:
        """What is added to a matrix by closed_form."""
        return closed_form(inputs, moved, self.ridge)


def _units(raw: Any, at: str) -> list[int]:
    """First and last unit of `3` or `0-9`."""
    parts = str(raw).split("-")
    if isinstance(raw, bool) or len(parts) > 2 or not all(part.isdigit() for part in parts):
        raise RecipeError(f"{at}: {raw!r}; write a number or a range: 0-9")
    first, last = int(parts[0]), int(parts[-1])
    if last < first:
        raise RecipeError(f"{at}: {raw!r} ends before it begins")
    return [first, last]


def _folder(raw: Any, at: str) -> str:
    if not isinstance(raw, str) or not raw.strip():
        raise RecipeError(f"{at}: must be the path of a folder")
    return raw
