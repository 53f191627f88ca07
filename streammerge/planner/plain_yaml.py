"""Recipe text to plain values: the part of YAML that a recipe needs, one line for whatever else it holds.

A recipe comes from strangers. So: UTF-8, one document, a mapping at the top, at most 1 MB; no tags (they
build Python objects), no key given twice (the later one would win in silence), and aliases only as long as
what they stand for stays small: ten lists of ten aliases each, nested ten deep, are ten billion values.
"""

from __future__ import annotations

from typing import Any

import yaml

from streammerge.errors import RecipeError

MAX_BYTES = 1_000_000
MAX_VALUES = 100_000  # after every alias is replaced by what it stands for
MAX_DEPTH = 40
_STANDARD = "tag:yaml.org,2002:"


class _Refused(Exception):
    """What is wrong and the line it is on (0: no one line)."""

    def __init__(self, text: str, line: int = 0) -> None:
        super().__init__(text)
        self.line = line


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses tags, repeated keys and deep nesting."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()  # type: ignore[no-untyped-call]
        line = event.start_mark.line + 1
        tag = getattr(event, "tag", None)
        if tag is not None:
            shown = tag.replace(_STANDARD, "!!")
            raise _Refused(f"the tag {shown} is refused; a recipe holds plain values only", line)
        if self._depth >= MAX_DEPTH:
            raise _Refused(f"nested more than {MAX_DEPTH} deep", line)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key, _ in node.value:  # here, before `<<` is unfolded: a merged key may be given again
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise _Refused("a key must be plain text", line)
            if key.value in seen:
                raise _Refused(f"the key {key.value!r} is given twice; keep one of them", line)
            seen.add(key.value)
        return node


def _values(node: yaml.Node, known: dict[int, int]) -> int:
    """How many values a node stands for, aliases replaced; a node inside itself is refused."""
    count = known.get(id(node))
    line = node.start_mark.line + 1
    if count == -1:
        raise _Refused("an alias stands for a value that holds it", line)
    if count is not None:
        return count
    known[id(node)] = -1
    total = 1
    children: list[Any] = node.value if isinstance(node, yaml.CollectionNode) else []
    for child in children:
        parts = child if isinstance(child, tuple) else (child,)
        total += sum(_values(part, known) for part in parts)
    if total > MAX_VALUES:
        raise _Refused(f"aliases unfold to more than {MAX_VALUES:,} values; write plain values", line)
    known[id(node)] = total
    return total


def _document(text: str) -> Any:
    loader = _Loader(text)
    try:
        if not loader.check_node():
            raise _Refused("the recipe is empty; it needs a merge_method and models")
        node = loader.get_node()
        if loader.check_node():
            raise _Refused("several documents; a recipe is one document", loader.get_mark().line + 1)
        assert node is not None
        _values(node, {})
        return loader.construct_document(node)
    finally:
        loader.dispose()


def read(raw: str | bytes, where: str) -> dict[str, Any]:
    """The mapping that a recipe's text holds.

    Raises:
        RecipeError: one line with `where` and, where there is one, the line of the text.
    """
    size = len(raw)
    if size > MAX_BYTES:
        raise RecipeError(f"{where}: {size:,} bytes; a recipe has at most {MAX_BYTES:,}")
    try:
        text = raw.decode("utf-8-sig") if isinstance(raw, bytes) else raw
    except UnicodeDecodeError as error:
        raise RecipeError(f"{where}: not UTF-8 text (byte {error.start})") from None
    try:
        found = _document(text)
    except _Refused as error:
        at = f"{where}, line {error.line}" if error.line else where
        raise RecipeError(f"{at}: {error}") from None
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = f"{where}, line {mark.line + 1}" if mark else where
        raise RecipeError(f"{at}: not YAML: {error.problem or error.context}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{where}: not YAML: {str(error).splitlines()[0]}") from None
    except (ValueError, OverflowError) as error:  # a date or an integer that Python refuses
        raise RecipeError(f"{where}: a value cannot be read: {str(error).splitlines()[0]}") from None
    if not isinstance(found, dict):
        raise RecipeError(f"{where}: {kind(found)} at the top; a recipe is a mapping (merge_method: ...)")
    return found


def kind(value: Any) -> str:
    """What a value is, in a user's words."""
    if value is None:
        return "nothing"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    return names.get(type(value), f"a {type(value).__name__}")
