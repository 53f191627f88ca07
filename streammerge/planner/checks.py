"""The small checks that a recipe is read with; each failure is one line that starts with where it was."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from streammerge.errors import RecipeError
from streammerge.planner.plain_yaml import kind

ADAPTER = "adapters are not supported yet; merge the adapter into its model first"


def reference(raw: Any, at: str) -> str:
    """A model as "path" or "path@revision", from that text or from mergekit's mappings.

    Raises:
        RecipeError: it has no such form, or it names an adapter.
    """
    if isinstance(raw, dict) and "model" in raw:
        if raw.get("lora") is not None:
            raise RecipeError(f"{at}: {ADAPTER}")
        check_keys(raw, ("model", "lora"), at)
        return reference(raw["model"], at)
    if isinstance(raw, dict):
        check_keys(raw, ("path", "revision"), at)
        path, revision = text(raw.get("path"), f"{at}.path"), raw.get("revision")
        return reference(path if revision is None else f"{path}@{text(revision, f'{at}.revision')}", at)
    name = text(raw, at)
    if "+" in name:
        raise RecipeError(f"{at}: {name!r} names an adapter after '+'; {ADAPTER}")
    if name.count("@") > 1 or name.startswith("@") or name.endswith("@"):
        raise RecipeError(f"{at}: {name!r} is not a model; write path or path@revision")
    return name


def layer_range(raw: Any, at: str) -> tuple[int, int]:
    """The layers [first, end)."""
    whole = isinstance(raw, list) and all(isinstance(i, int) and not isinstance(i, bool) for i in raw)
    if not whole or len(raw) != 2:
        raise RecipeError(f"{at}: write [first, end], two whole numbers; the end is left out")
    first, end = raw
    if not 0 <= first < end:
        raise RecipeError(f"{at}: [{first}, {end}] holds no layer; layers count from 0 and the end is left out")
    return first, end


def check_keys(raw: Mapping[str, Any], known: Sequence[str], at: str) -> None:
    """Refuse a key that is not known, with the nearest that is."""
    for key in raw:
        if key not in known:
            raise RecipeError(f"{at}: unknown key {key!r}; {nearest(str(key), known)}")


def nearest(word: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown word."""
    words = list(known)
    near = get_close_matches(word, words, 1)
    if near:
        return f"did you mean {near[0]!r}?"
    return f"known: {', '.join(words)}" if words else "it has none"


def text(raw: Any, at: str) -> str:
    """The value as text that is not empty."""
    if not isinstance(raw, str) or not raw.strip():
        raise RecipeError(f"{at}: {'empty text' if isinstance(raw, str) else kind(raw)}; it must be text")
    return raw


def items(raw: Any, at: str) -> list[Any]:
    """The value as a list; nothing is an empty one."""
    if raw is None:
        return []
    if not isinstance(raw, list):
        raise RecipeError(f"{at}: {kind(raw)}; it must be a list")
    return raw


def mapping(raw: Any, at: str) -> dict[str, Any]:
    """The value as a mapping."""
    if not isinstance(raw, dict):
        raise RecipeError(f"{at}: {kind(raw)}; it must be a mapping")
    return raw
