"""What the user asks, in mergekit's dialect: checked when it is read, frozen afterwards.

    merge_method  base_model  dtype  out_dtype  tokenizer_source  parameters  post
    models:  [{model, parameters}]                            whole models, or
    slices:  [{sources: [{model, layer_range: [a, b), parameters}], base_model, parameters}]
    post:    svc, or {svc: {floor: 0.5}}                      what is done to the merge of each tensor

Every parameter's name and kind is checked against the method, so that a slip of the pen is found before a
file is opened. What mergekit knows and streammerge does not (yet) is refused by name. A method may own
further top-level keys (`Method.keys`); they land in `Recipe.extra`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from streammerge import method as methods
from streammerge.errors import RecipeError
from streammerge.formats.dtypes import from_recipe
from streammerge.planner import plain_yaml
from streammerge.planner.checks import check_keys, items, layer_range, mapping, nearest, reference, text
from streammerge.planner.settings import Setting, Settings, canonical, read_setting, scalar

Find: TypeAlias = Callable[[str], type[methods.Method]]

KEYS = (
    "merge_method",
    "base_model",
    "models",
    "slices",
    "parameters",
    "post",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
)
REFUSED = {
    "modules": "parts of a multimodal model are not told apart; 'models' merges every tensor by its name",
    "chat_template": "not supported; the template comes with the tokenizer's files (tokenizer_source)",
}
NO_EFFECT = ("int8_mask",)  # in many recipes; changes how mergekit stores a mask and no result


@dataclass(frozen=True, slots=True)
class Source:
    """One input: a model as the recipe names it ("path" or "path@revision"), its layers, its parameters."""

    model: str
    parameters: Settings = field(default_factory=dict)
    layers: tuple[int, int] | None = None


@dataclass(frozen=True, slots=True)
class Slice:
    """Output layers made from equally many layers of each source."""

    sources: tuple[Source, ...]
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Post:
    """A post-processing by its name, with its parameters."""

    name: str
    parameters: Settings = field(default_factory=dict)


@dataclass(frozen=True)
class Recipe:
    """A checked request. One of `models` and `slices` is empty; dtypes are the header's strings.

    `extra` is what the method's own keys say, `beside` the models among that.
    """

    merge_method: str
    models: tuple[Source, ...] = ()
    slices: tuple[Slice, ...] = ()
    base_model: str | None = None
    parameters: Settings = field(default_factory=dict)
    dtype: str | None = None
    out_dtype: str | None = None
    tokenizer_source: str | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    where: str = field(default="recipe", compare=False)
    post: Post | None = None
    beside: tuple[str, ...] = ()

    @property
    def sources(self) -> tuple[Source, ...]:
        """Every source in the recipe's order."""
        return self.models or tuple(source for part in self.slices for source in part.sources)

    @property
    def references(self) -> tuple[str, ...]:
        """Every model that must be opened, each once: the base first, then in the recipe's order."""
        named = [self.base_model, *(source.model for source in self.sources), *self.beside]
        return tuple(dict.fromkeys(model for model in named if model is not None))

    def canonical(self) -> dict[str, Any]:
        """The request as JSON values, without what was left out: equal requests give equal values."""
        found = {
            "merge_method": self.merge_method,
            "base_model": self.base_model,
            "models": [_plain_source(source) for source in self.models],
            "slices": [_plain_slice(part) for part in self.slices],
            "parameters": canonical(self.parameters),
            "dtype": self.dtype,
            "out_dtype": self.out_dtype,
            "tokenizer_source": self.tokenizer_source,
            "post": None if self.post is None else {self.post.name: canonical(self.post.parameters)},
            **self.extra,
        }
        return _filled(found)


def _filled(found: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in found.items() if value is not None and value not in ([], {})}


def _plain_source(source: Source) -> dict[str, Any]:
    layers = None if source.layers is None else list(source.layers)
    return _filled({"model": source.model, "layer_range": layers, "parameters": canonical(source.parameters)})


def _plain_slice(part: Slice) -> dict[str, Any]:
    found = {"base_model": part.base_model, "parameters": canonical(part.parameters)}
    return _filled({"sources": [_plain_source(source) for source in part.sources], **found})


def load(path: str | Path, find: Find = methods.find) -> Recipe:
    """The recipe in a file.

    Raises:
        RecipeError: the file cannot be read, or something in it is wrong; one line that says where.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise RecipeError(f"{path}: the recipe cannot be read: {error.strerror or error}") from None
    return parse(raw, str(path), find)


def parse(text: str | bytes, where: str = "recipe", find: Find = methods.find) -> Recipe:
    """The recipe in a text; `where` names it in errors."""
    return from_dict(plain_yaml.read(text, where), where, find)


def from_dict(data: Mapping[str, Any], where: str = "recipe", find: Find = methods.find) -> Recipe:
    """The recipe in plain values, as YAML would hold them."""
    if "merge_method" not in data:
        check_keys(data, KEYS, where)
        raise RecipeError(f"{where}: no merge_method; name one of 'streammerge methods'")
    name = text(data["merge_method"], f"{where}: merge_method")
    try:
        found = find(name)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    return _Reader(where, name, found).recipe(data)


def check_parameters(method: type[methods.Method], name: str, given: Mapping[str, Any], experts: int) -> dict[str, Any]:
    """Parameters of a call without a recipe: plain values, or for per-expert ones one value or a list of them.

    Raises:
        RecipeError: unknown or missing parameter, or the wrong number of experts or values.
    """
    most = method.max_experts
    if experts < method.min_experts or (most is not None and experts > most):
        raise RecipeError(
            f"{name} takes {method.min_experts} to {most or 'any number of'} models, {experts} were given"
        )
    known = methods.parameters(method)
    for key in given:
        if key not in known:
            raise RecipeError(f"{name} has no parameter {key!r}; {nearest(key, known)}")
    values: dict[str, Any] = {}
    for key, param in known.items():
        if key not in given and param.default is methods.REQUIRED:
            raise RecipeError(f"{name} needs the parameter {key!r}")
        value = given.get(key, param.default)
        if param.per_expert:
            each = list(value) if isinstance(value, list | tuple) else [value] * experts
            if len(each) != experts:
                raise RecipeError(f"{name}: {key} has {len(each)} values for {experts} models")
            values[key] = tuple(scalar(item, param.kind, key) for item in each)
        else:
            values[key] = scalar(value, param.kind, key)
    return values


def find_post(raw: Any, at: str) -> tuple[type[methods.Method], str, dict[str, Any]]:
    """What `post` names: its class, its name, and the parameters that are given, unchecked.

    Raises:
        RecipeError: it names none, or several.
    """
    table = {raw: None} if isinstance(raw, str) else mapping(raw, at)
    if len(table) != 1:
        raise RecipeError(f"{at}: {len(table)} names; give one, as svc or {{svc: {{floor: 0.5}}}}")
    ((name, given),) = table.items()
    text(name, at)
    try:
        found = methods.find_post(name)
    except RecipeError as error:
        raise RecipeError(f"{at}: {error}") from None
    return found, name, {} if given is None else mapping(given, f"{at}.{name}")


@dataclass(frozen=True)
class _Reader:
    """Reads the parts of one recipe; `where` starts every message."""

    where: str
    name: str
    method: type[methods.Method]

    def recipe(self, data: Mapping[str, Any]) -> Recipe:
        for key, why in REFUSED.items():
            if data.get(key) is not None:
                raise RecipeError(f"{self.where}: {key}: {why}")
        check_keys({k: v for k, v in data.items() if k not in REFUSED}, (*KEYS, *self.method.keys), self.where)
        if bool(data.get("models")) == bool(data.get("slices")):
            wrong = "both models and slices" if data.get("models") else "neither models nor slices"
            raise RecipeError(f"{self.where}: {wrong}; give exactly one of them, not empty")
        models = items(data.get("models"), f"{self.where}: models")
        slices = items(data.get("slices"), f"{self.where}: slices")
        extra = self.method.read_keys({k: data[k] for k in self.method.keys if k in data}, len(models), self.where)
        parameters = data.get("parameters")
        if isinstance(parameters, dict):
            parameters = self.method.fill(parameters, extra, self.where)
        recipe = Recipe(
            self.name,
            tuple(self.source(raw, f"{self.where}: models[{i}]", False) for i, raw in enumerate(models)),
            tuple(self.slice(raw, f"{self.where}: slices[{i}]") for i, raw in enumerate(slices)),
            self.base(data, f"{self.where}: "),
            self.settings(parameters, f"{self.where}: parameters"),
            self.dtype(data, "dtype"),
            self.dtype(data, "out_dtype"),
            self.tokenizer(data),
            extra,
            self.where,
            self.post(data.get("post")),
            tuple(reference(data[key], f"{self.where}: {key}") for key in self.method.beside if key in data),
        )
        self.check_tokenizer(recipe)
        return recipe

    def slice(self, raw: Any, at: str) -> Slice:
        check_keys(mapping(raw, at), ("sources", "base_model", "parameters"), at)
        given = items(raw.get("sources"), f"{at}.sources")
        if not given:
            raise RecipeError(f"{at}: a slice needs sources")
        sources = [self.source(item, f"{at}.sources[{i}]", True) for i, item in enumerate(given)]
        return Slice(tuple(sources), self.base(raw, f"{at}."), self.settings(raw.get("parameters"), f"{at}.parameters"))

    def source(self, raw: Any, at: str, ranged: bool) -> Source:
        keys = ("model", "layer_range", "parameters") if ranged else ("model", "parameters")
        check_keys(mapping(raw, at), keys, at)
        if "model" not in raw:
            raise RecipeError(f"{at}: no model; give its folder or Hub id")
        if ranged and "layer_range" not in raw:
            raise RecipeError(f"{at}: no layer_range; give [first, end] of the layers that it lends")
        layers = layer_range(raw["layer_range"], f"{at}.layer_range") if ranged else None
        model = reference(raw["model"], f"{at}.model")
        return Source(model, self.settings(raw.get("parameters"), f"{at}.parameters"), layers)

    def post(self, raw: Any) -> Post | None:
        if raw is None:
            return None
        at = f"{self.where}: post"
        found, name, given = find_post(raw, at)
        if self.method.sees == "layer":
            raise RecipeError(f"{at}: {name} works on one tensor at a time, {self.name} on whole layers; leave it out")
        return Post(name, _Reader(self.where, name, found).settings(given, f"{at}.{name}"))

    def base(self, raw: Mapping[str, Any], prefix: str) -> str | None:
        given = raw.get("base_model")
        return None if given is None else reference(given, f"{prefix}base_model")

    def settings(self, raw: Any, at: str) -> Settings:
        known = methods.parameters(self.method)
        found: dict[str, Setting] = {}
        for name, value in ({} if raw is None else mapping(raw, at)).items():
            if name in known:
                found[name] = read_setting(value, known[name].kind, f"{at}.{name}")
            elif name not in NO_EFFECT:
                raise RecipeError(f"{at}: {self.name} has no parameter {name!r}; {nearest(name, known)}")
        return found

    def dtype(self, data: Mapping[str, Any], key: str) -> str | None:
        if data.get(key) is None:
            return None
        name = text(data[key], f"{self.where}: {key}")
        try:
            return from_recipe(name)
        except RecipeError as error:
            raise RecipeError(f"{self.where}: {key}: {error}") from None

    def tokenizer(self, data: Mapping[str, Any]) -> str | None:
        at, given = f"{self.where}: tokenizer_source", data.get("tokenizer_source")
        if data.get("tokenizer") is not None:
            if given is not None:
                raise RecipeError(f"{self.where}: both tokenizer_source and tokenizer; give one of them")
            at = f"{self.where}: tokenizer"
            table = mapping(data["tokenizer"], at)
            if set(table) != {"source"}:
                raise RecipeError(f"{at}: only 'source' is supported; vocabularies are not merged")
            at, given = f"{at}.source", table["source"]
        if given == "union":
            raise RecipeError(f"{at}: 'union' is not supported; use 'base' or one of the models")
        return None if given is None else reference(given, at)

    def check_tokenizer(self, recipe: Recipe) -> None:
        source = recipe.tokenizer_source
        if source == "base" and recipe.base_model is None:
            raise RecipeError(f"{self.where}: tokenizer_source is 'base' and there is no base_model")
        if source not in (None, "base", *recipe.references):
            near = nearest(str(source), ("base", *recipe.references))
            raise RecipeError(f"{self.where}: tokenizer_source {source!r} is not one of the models; {near}")
