"""A parameter's value by tensor name and depth, as mergekit's dialect writes it.

    0.5                                          the same everywhere
    [0.0, 0.5, 1.0]                              a gradient: points over depth t, joined by straight lines
    [{filter: mlp, value: [0, 1]}, {value: 1}]   the first rule whose filter is part of the tensor's name

A filter is plain text to be found anywhere in the name; `*` or none matches all. If no rule matches, the
setting has no say and the next scope is asked. A gradient of n points is read at t in [0, 1]: with
s = t (n - 1) and i = floor(s), value = (1 - (s - i)) p[i] + (s - i) p[min(i + 1, n - 1)]; truth values and
text pick p[i].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from streammerge.errors import RecipeError
from streammerge.planner.plain_yaml import kind as kind_of

Scalar: TypeAlias = float | int | bool | str


@dataclass(frozen=True, slots=True)
class Rule:
    """A value, or a gradient's points, for the tensors whose name holds `filter`."""

    value: Scalar | tuple[Scalar, ...]
    filter: str | None = None

    def matches(self, name: str) -> bool:
        return self.filter is None or self.filter in name


Setting: TypeAlias = tuple[Rule, ...]
Settings: TypeAlias = Mapping[str, Setting]

_TRUTH: dict[Any, bool] = {0: False, 1: True, "false": False, "true": True, "no": False, "yes": True}


def read_setting(raw: Any, kind: type, where: str) -> Setting:
    """A setting from a recipe's value, every number already of the parameter's kind."""
    if isinstance(raw, dict):
        return (_rule(raw, kind, where),)
    if isinstance(raw, list) and any(isinstance(item, dict) for item in raw):
        return tuple(_rule(item, kind, f"{where}[{i}]") for i, item in enumerate(raw))
    return (Rule(_value(raw, kind, where)),)


def _rule(raw: Any, kind: type, where: str) -> Rule:
    if not isinstance(raw, dict):
        raise RecipeError(f"{where}: {kind_of(raw)} beside rules; write {{value: ...}}")
    for key in raw:
        if key not in ("filter", "value"):
            raise RecipeError(f"{where}: unknown key {key!r}; a rule has 'filter' and 'value'")
    if "value" not in raw:
        raise RecipeError(f"{where}: a rule needs a 'value'")
    text = raw.get("filter")
    if text is not None and not isinstance(text, str):
        raise RecipeError(f"{where}: filter is {kind_of(text)}; it must be part of a tensor's name")
    return Rule(_value(raw["value"], kind, f"{where}.value"), None if text == "*" else text)


def _value(raw: Any, kind: type, where: str) -> Scalar | tuple[Scalar, ...]:
    if not isinstance(raw, list):
        return scalar(raw, kind, where)
    if not raw:
        raise RecipeError(f"{where}: an empty list; give a number or a gradient's points")
    return tuple(scalar(item, kind, f"{where}[{i}]") for i, item in enumerate(raw))


def scalar(raw: Any, kind: type, where: str) -> Scalar:
    """One value of the given kind; text that reads as a number is one (YAML takes 1e-5 for text).

    The kind `object` is a word or a whole number, `Path` a number or else a path.
    """
    if kind is Path and isinstance(raw, str) and raw.strip():
        try:
            float(raw)
        except ValueError:
            return raw
    if kind is object:
        return raw if isinstance(raw, str) and raw.isidentifier() else _number(raw, int, where)
    if kind is bool:
        found = raw if isinstance(raw, bool) else _TRUTH.get(raw) if isinstance(raw, (int, str)) else None
        if found is None:
            raise RecipeError(f"{where}: {_shown(raw)} is not true or false")
        return bool(found)
    if kind is str:
        if not isinstance(raw, str):
            raise RecipeError(f"{where}: {_shown(raw)} is not text")
        return raw
    return _number(raw, kind, where)


def _number(raw: Any, kind: type, where: str) -> float | int:
    value = math.nan
    if isinstance(raw, (int, float, str)) and not isinstance(raw, bool):
        try:
            value = float(raw)
        except (ValueError, OverflowError):
            value = math.nan
    if not math.isfinite(value):
        raise RecipeError(f"{where}: {_shown(raw)} is not a finite number")
    if kind is not int:
        return value
    if not value.is_integer():
        raise RecipeError(f"{where}: {_shown(raw)} is not a whole number")
    return int(value)


def _shown(raw: Any) -> str:
    text = kind_of(raw) if isinstance(raw, (list, dict)) or raw is None else repr(raw)
    return text if len(text) <= 60 else text[:57] + "..."


def evaluate(setting: Setting, name: str, t: float, kind: type) -> Scalar | None:
    """The value for one tensor at depth t; None if no rule matches its name."""
    for rule in setting:
        if rule.matches(name):
            return _at(rule.value, t, kind, name) if isinstance(rule.value, tuple) else rule.value
    return None


def choose(setting: Setting, name: str) -> Scalar | tuple[Scalar, ...] | None:
    """What a rule says of one tensor, a list as it is; None if no rule matches its name."""
    return next((rule.value for rule in setting if rule.matches(name)), None)


def _at(points: tuple[Scalar, ...], t: float, kind: type, name: str) -> Scalar:
    at = t * (len(points) - 1)
    left = int(at)
    if kind is bool or kind is str:
        return points[left]
    share = at - left
    value = (1 - share) * float(points[left]) + share * float(points[min(left + 1, len(points) - 1)])
    if kind is not int:
        return value
    if not value.is_integer():
        raise RecipeError(f"a gradient gives {value:g} for tensor {name!r}; it must be a whole number")
    return int(value)


def canonical(settings: Settings) -> dict[str, Any]:
    """The settings as JSON values, names sorted; equal settings give equal values."""
    return {name: _plain(settings[name]) for name in sorted(settings)}


def _plain(setting: Setting) -> Any:
    values = [list(r.value) if isinstance(r.value, tuple) else r.value for r in setting]
    if len(setting) == 1 and setting[0].filter is None:
        return values[0]
    return [{"filter": r.filter, "value": v} for r, v in zip(setting, values, strict=True)]


def filters(settings: Settings) -> Iterator[str]:
    """Every filter text in the settings."""
    for setting in settings.values():
        yield from (rule.filter for rule in setting if rule.filter is not None)
