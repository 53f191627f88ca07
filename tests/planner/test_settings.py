"""Parameter values: what they may be, gradients, filters."""

from pathlib import Path

import pytest

from streammerge.errors import RecipeError
from streammerge.planner.settings import evaluate, read_setting


@pytest.mark.parametrize(
    ("value", "kind", "line"),
    [
        ("many", float, "at: 'many' is not a finite number"),
        (True, float, "at: True is not a finite number"),
        (float("nan"), float, "at: nan is not a finite number"),
        ("1e999", float, "at: '1e999' is not a finite number"),
        (None, float, "at: nothing is not a finite number"),
        ([1, "x"], float, "at[1]: 'x' is not a finite number"),
        ([], float, "at: an empty list; give a number or a gradient's points"),
        (1.5, int, "at: 1.5 is not a whole number"),
        (" ", Path, "at: ' ' is not a finite number"),
        ("maybe", bool, "at: 'maybe' is not true or false"),
        (2, bool, "at: 2 is not true or false"),
        (1, str, "at: 1 is not text"),
        ([{"value": 1}, 2], float, "at[1]: a number beside rules; write {value: ...}"),
        ({"filter": "x"}, float, "at: a rule needs a 'value'"),
        ({"filter": 3, "value": 1}, float, "at: filter is a number; it must be part of a tensor's name"),
        ({"value": 1, "filtr": "x"}, float, "at: unknown key 'filtr'; a rule has 'filter' and 'value'"),
        ({"value": [{"value": 1}]}, float, "at.value[0]: a mapping is not a finite number"),
    ],
)
def test_values_that_are_refused(value: object, kind: type, line: str) -> None:
    with pytest.raises(RecipeError) as error:
        read_setting(value, kind, "at")
    assert str(error.value) == line


def test_a_path_is_what_reads_as_no_number() -> None:
    found = [read_setting(value, Path, "at")[0].value for value in (0.1, "1e-1", "10%", "a.jsonl", ["a", "b"])]
    assert found == [0.1, 0.1, "10%", "a.jsonl", ("a", "b")]


def test_gradients() -> None:
    points = read_setting([0, 1, 0.5], float, "at")
    assert [evaluate(points, "x", t / 8, float) for t in range(9)] == [
        0.0, 0.25, 0.5, 0.75, 1.0, 0.875, 0.75, 0.625, 0.5,
    ]  # fmt: skip
    assert evaluate(read_setting([3], float, "at"), "x", 1.0, float) == 3.0
    truth = read_setting([False, True, True], bool, "at")
    assert [evaluate(truth, "x", t, bool) for t in (0.0, 0.49, 0.5, 1.0)] == [False, False, True, True]
    whole = read_setting([10, 20], int, "at")
    assert evaluate(whole, "x", 0.5, int) == 15
    with pytest.raises(RecipeError) as error:
        evaluate(whole, "x", 0.25, int)
    assert str(error.value) == "a gradient gives 12.5 for tensor 'x'; it must be a whole number"


def test_the_first_rule_that_matches_counts_and_none_may() -> None:
    rules = read_setting([{"filter": "mlp", "value": 1}, {"filter": "up", "value": 2}], float, "at")
    assert [evaluate(rules, name, 0.0, float) for name in ("mlp.up", "up", "q")] == [1.0, 2.0, None]
    assert evaluate(read_setting({"value": 4}, float, "at"), "anything", 0.0, float) == 4.0
