"""What a method is: arithmetic over aligned tiles of the inputs, beside the engine that feeds it.

A method is one frozen dataclass in `streammerge/methods/<name>.py`; the file's name is the method's name in a
recipe. Its fields are its parameters. The engine gets an instance and cannot tell one method from another:

    tile method     sees the same contiguous slice of one tensor in every input; no tile size changes a bit
    tensor method   must see a whole matrix
    layer method    runs on a network, one layer resident at a time
    post            works on another method's merge: a file in streammerge/methods/post, `post` in a recipe

What a whole tensor must say before a tile can be merged (a trim threshold, a norm, an angle) is a `Survey`: the
engine shows it every tile, settles it, and hands it to `merge`. If the tensor's inputs fit the budget all of this
happens in one read; else each round of a survey is one more read.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.metadata import entry_points
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from streammerge.errors import RecipeError
from streammerge.formats.dtypes import SIGNS as SIGNS
from streammerge.formats.dtypes import bits_of
from streammerge.kernels.numerics import Span

Flags: TypeAlias = npt.NDArray[np.uint8]  # one per input, base first: 0 finite, 1 holds an infinity, 2 holds a NaN
PerExpert: TypeAlias = float | tuple[float, ...]  # a parameter with one value for each expert, or one for all
BLOCK = 4096  # elements of a logical block: reductions are taken per block, so that no cut changes a bit

SAMPLE = 1 << 20  # elements that a survey is shown first, in slices spread over the tensor
SLICES = 128  # of a sample: rows of an embedding differ, so a few long runs would mislead

REQUIRED: Any = MISSING
_VOCABULARY = re.compile(r"embed_tokens|\bwte\b|word_embeddings|tok_embeddings|embed_in|embed_out|lm_head|\bshared\b")


@dataclass(frozen=True, slots=True)
class Cost:
    """Bytes a method holds beyond inputs and output, on the host and on the device."""

    host: int = 0
    device: int = 0


@dataclass(frozen=True, slots=True)
class Param:
    """One parameter of a method as a recipe names it."""

    name: str
    default: Any  # REQUIRED if the recipe must give it
    meaning: str
    per_expert: bool
    kind: type
    several: bool = False  # a list in a recipe is a list of values, and no gradient over depth


def param(
    default: Any = REQUIRED,
    meaning: str = "",
    *,
    per_expert: bool = False,
    kind: type | None = None,
    several: bool = False,
) -> Any:
    """A dataclass field that is a recipe parameter. Per-expert parameters are tuples, one value per expert."""
    if default is MISSING:
        required = {"meaning": meaning, "per_expert": per_expert, "kind": kind or float, "several": several}
        return field(metadata=required, kw_only=True)
    data = {"meaning": meaning, "per_expert": per_expert, "kind": kind or type(default), "several": several}
    return field(default=default, metadata=data, kw_only=True)


@dataclass(slots=True)
class Tile:
    """The same contiguous slice of one tensor in every input, and where its result goes.

    `start` and `numel` count elements of the tensor; `shape` is the whole tensor's. `ranks` holds, for surveys that
    rank elements, the ranks where the tile begins; merging moves them to its end.
    """

    name: str
    tensor_id: int
    shape: tuple[int, ...]
    start: int
    numel: int
    base: Span | None
    experts: tuple[Span, ...]
    out: Span | None = None
    seed: int = 0
    ranks: npt.NDArray[np.int64] | None = None

    @property
    def anchor(self) -> Span:
        """The base, or the first expert where a method has none."""
        return self.base if self.base is not None else self.experts[0]

    def only(self, reads: tuple[int, ...] | None) -> Tile:
        """This tile with these inputs and no others: what a round that reads them sees."""
        if reads is None:
            return self
        every = (*(() if self.base is None else (self.base,)), *self.experts)
        chosen = [every[i] for i in reads]
        base = chosen.pop(0) if self.base is not None and 0 in reads else None
        return replace(self, base=base, experts=tuple(chosen))

    def part(self, first: int, last: int) -> Tile:
        """Elements [first, last) of this tile as a tile of its own."""
        return replace(
            self,
            start=self.start + first,
            numel=last - first,
            base=None if self.base is None else _cut(self.base, first, last),
            experts=tuple(_cut(e, first, last) for e in self.experts),
            out=None if self.out is None else _cut(self.out, first, last),
            ranks=None,
        )


def _cut(span: Span, first: int, last: int) -> Span:
    return Span(span.address + first * bits_of(span.dtype) // 8, span.dtype, last - first, span.queue)


class Survey(ABC):
    """What a whole tensor must say before its tiles can be merged.

    The engine calls `sample` once if `wants_sample`, then rounds of `look` over every tile (any order, many threads)
    and `settle` over the partial answers in tile order until `settle` is content, and hands the survey to `merge`.
    """

    wants_sample: bool = False
    in_order: bool = False  # tiles must be looked at one after the other
    figures: Mapping[str, float] = MappingProxyType({})  # how it went, once settled: for the report
    section: str = "matrices"  # of the report, where the figures go

    def sample(self, tiles: Sequence[Tile], resident: bool) -> None:
        """Some tiles spread evenly over the tensor: may save rounds, never changes the answer.

        `resident` says that another round costs no read.
        """
        raise NotImplementedError

    @abstractmethod
    def look(self, tile: Tile) -> Any:
        """The partial answer of one tile. Tiles start at multiples of the method's grain.

        Arrays that kernels write may be filled in later, before `settle`: nothing may be read from them here.
        """

    @abstractmethod
    def settle(self, partials: Sequence[Any]) -> bool:
        """Take in one round's partial answers, in tile order. False asks for another round."""

    def release(self) -> None:  # noqa: B027  # most hold little
        """Let go of what `merge` needed; the figures stay."""

    def first_ranks(self) -> npt.NDArray[np.int64] | None:
        """Ranks at the tensor's start, if `merge` needs `tile.ranks`; it must then move them to the tile's end."""
        return None

    def ranks(self, tile: Tile, before: npt.NDArray[np.int64] | None) -> npt.NDArray[np.int64]:
        """How far a tile moves the ranks; asked only where there are `first_ranks`.

        The ranks in front of the tile are at least `before`: what is beyond interest there need not be counted.
        """
        raise NotImplementedError


class Method(ABC):
    """Base of all methods. Class attributes say what the recipe must give."""

    summary: ClassVar[str]  # one line for the table of methods
    source: ClassVar[str]  # paper, equation, or where the formula is defined
    sees: ClassVar[str]  # "tile", "tensor" or "layer"
    needs_base: ClassVar[bool] = True
    base_is_expert: ClassVar[bool] = False  # a base listed among the models counts as one of the inputs
    min_experts: ClassVar[int] = 1
    max_experts: ClassVar[int | None] = None
    kernels: ClassVar[tuple[str, ...]] = ()  # what it computes with at most
    keys: ClassVar[tuple[str, ...]] = ()  # further top-level recipe keys that belong to this method
    beside: ClassVar[tuple[str, ...]] = ()  # those of them that name a model, an input of every tensor

    @classmethod
    def read_keys(cls, given: Mapping[str, Any], models: int, where: str) -> dict[str, Any]:
        """What the recipe says under `keys`, checked; `models` are those listed, `where` starts a message.

        Raises:
            RecipeError: a key is missing or has a wrong value.
        """
        return dict(given)

    @classmethod
    def fill(cls, given: Mapping[str, Any], keys: Mapping[str, Any], where: str) -> dict[str, Any]:
        """The recipe's parameters, with those that one of them stands for; `keys` are what `read_keys` gave."""
        return dict(given)

    @classmethod
    def takes_base(cls) -> bool:
        """Whether a base model stands beside the experts, where there is one."""
        return cls.needs_base or not cls.base_is_expert


class TileMethod(Method):
    """A method for which each result element depends on the same element of the inputs, and on a survey at most."""

    sees = "tile"

    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> TileMethod:
        """The method that merges this tensor: another one where this one does not apply."""
        return self

    def uses(self) -> tuple[str, ...]:
        """The kernels that this instance computes with."""
        return self.kernels

    def refusal(self, device: str) -> str:
        """Why this instance does not run on a device, and the way out, behind the method's name; empty if it does."""
        return ""

    def cost(self, numel: int, experts: int, device: str) -> Cost:
        """Bytes beyond inputs and output while one tile of `numel` elements is surveyed or merged."""
        return Cost()

    def survey_bytes(self, shape: tuple[int, ...], experts: int, threads: int) -> int:
        """Bytes that the survey of one whole tensor holds until the tensor is merged, with so many threads looking."""
        return 0

    def grain(self, shape: tuple[int, ...]) -> int:
        """Tiles are cut at multiples of this many elements."""
        return BLOCK

    def survey(self, shape: tuple[int, ...], experts: int) -> Survey | None:
        """A fresh survey of one tensor, or None if tiles can be merged as they come."""
        return None

    def tally(self, shape: tuple[int, ...]) -> Survey | None:
        """What a tensor's merge counts into, given as its survey where it has none; figures once it is merged."""
        return None

    def rounds(self, experts: int) -> int:
        """Rounds that a survey takes if its sample did not mislead it: reads of a tensor that does not fit."""
        return 1

    def reads(self, number: int, experts: int) -> tuple[int, ...] | None:
        """The inputs that round `number` looks at (0 the base, where there is one, then the experts), and, for the
        number behind the last round, the merge; None: all. A tile has no others then.
        """
        return None

    def keeps_equal(self) -> bool:
        """Whether inputs that are the same bytes give exactly those bytes, so that they can be copied."""
        return True

    @abstractmethod
    def merge(self, tile: Tile, survey: Any) -> Flags:
        """Write the merged tile to `tile.out`; say per input (base first) whether it held non-finite values.

        On a GPU both are filled in later: the flags are handed on as they come from the kernel.
        """


class TensorMethod(TileMethod):
    """A method that must see whole matrices: its survey does the work, and merging hands out rows of the answer.

    What is no matrix, or should not be taken as one, it leaves to another method (`for_tensor`).
    """

    sees = "tensor"
    shared_bytes: ClassVar[int] = 0  # of `survey_bytes`, what matrices have in common that are solved side by side

    def solver_name(self, shape: tuple[int, ...], experts: int) -> str:
        """How a matrix of this shape is solved, for people to read in a plan."""
        return "whole matrix"

    def fills_cores(self, shape: tuple[int, ...]) -> bool:
        """Whether a matrix of this shape keeps all cores busy; if not, several are solved at once."""
        return False

    def solver_bytes(self, shape: tuple[int, ...], experts: int) -> int:
        """Bytes that torch takes of a GPU for one matrix, until it is merged: there they are not `survey_bytes`."""
        return self.survey_bytes(shape, experts, 1)


@dataclass(frozen=True)
class Post(TensorMethod):
    """What is done to another method's merge; the base model is needed, and is none of the experts.

    `of` is that method with its own parameters; the fields beside it are the parameters under `post` in a recipe.
    """

    of: TileMethod


class LayerMethod(Method):
    """A method that runs on the network itself, layer by layer, before its tensors are merged.

    Its parameters are the recipe's `parameters` and what `read_keys` gives.
    """

    sees = "layer"

    @abstractmethod
    def for_tensor(self, name: str, shape: tuple[int, ...], experts: int) -> TileMethod:
        """What merges a tensor once the layers were seen."""


def is_vocabulary(name: str) -> bool:
    """Whether the tensor has one row per token, by its name."""
    return _VOCABULARY.search(name) is not None


def spread(value: PerExpert, experts: int) -> npt.NDArray[np.float64]:
    """A per-expert parameter as one number per expert; a single number serves all."""
    values = np.asarray(value, dtype=np.float64).reshape(-1)
    if values.size == 1:
        return np.repeat(values, experts)
    if values.size != experts:
        raise RecipeError(f"{values.size} values for {experts} experts; give one per expert")
    return values


def parameters(cls: type[Method]) -> dict[str, Param]:
    """The recipe parameters of a method by their names in a recipe (`lambda_` is `lambda`)."""
    found = {}
    for item in fields(cls):  # type: ignore[arg-type]  # every method is a dataclass
        if not item.metadata:  # what a recipe does not name
            continue
        name = item.name.rstrip("_")
        meta = item.metadata
        found[name] = Param(name, item.default, meta["meaning"], meta["per_expert"], meta["kind"], meta["several"])
    return found


def build(cls: type[Method], values: Mapping[str, Any]) -> Method:
    """An instance from recipe names and values; names have been checked by the recipe."""
    spelled = {item.name.rstrip("_"): item.name for item in fields(cls)}  # type: ignore[arg-type]
    return cls(**{spelled[name]: value for name, value in values.items()})


def beside_base(cls: type[Method]) -> type[Method]:
    """A method as a post-processing needs it: with a base model, which is none of the experts."""
    return type(cls.__name__, (cls,), {"needs_base": True, "base_is_expert": False})


def names() -> list[str]:
    """Every method that a recipe can name: files in streammerge/methods, then entry points of other packages."""
    return _files("methods") + sorted(point.name for point in entry_points(group="streammerge.methods"))


def posts() -> list[str]:
    """Every post-processing that a recipe can name: files in streammerge/methods/post."""
    return _files("methods.post")


def _files(package: str) -> list[str]:
    found = pkgutil.iter_modules(importlib.import_module(f"streammerge.{package}").__path__)
    return sorted(module.name for module in found if not module.name.startswith("_") and not module.ispkg)


def find(name: str) -> type[Method]:
    """The one method class that streammerge/methods/<name>.py, or the entry point `name`, defines.

    Raises:
        RecipeError: there is no such method; the message names the nearest.
    """
    if name in posts():
        raise RecipeError(f"{name} is done to another method's merge; write 'post: {name}' beside its merge_method")
    known = names()
    if name not in known:
        raise RecipeError(f"unknown merge_method {name!r}; {_hint(name, known)}")
    for point in entry_points(group="streammerge.methods"):
        if point.name == name:
            loaded: type[Method] = point.load()
            return loaded
    return _defined(f"streammerge.methods.{name}")


def find_post(name: str) -> type[Method]:
    """The one class that streammerge/methods/post/<name>.py defines.

    Raises:
        RecipeError: there is no such post-processing; the message names the nearest.
    """
    if name not in posts():
        raise RecipeError(f"unknown post-processing {name!r}; {_hint(name, posts())}")
    return _defined(f"streammerge.methods.post.{name}")


def _hint(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known)}"


def _defined(module: str) -> type[Method]:
    (found,) = (
        item
        for item in vars(importlib.import_module(module)).values()
        if isinstance(item, type) and issubclass(item, Method) and item.__module__ == module
    )
    return found
