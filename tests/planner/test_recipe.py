"""Recipes as people write them, and as they should not: the exact line that each gets."""

import json
from pathlib import Path

import pytest
from stand_ins import find

from streammerge.errors import RecipeError
from streammerge.planner import plain_yaml
from streammerge.planner.recipe import Recipe, Slice, Source, from_dict, load, parse
from streammerge.planner.settings import Rule

TIES = """
merge_method: ties
base_model: org/base@main
models:
  - model: {model: {path: org/one, revision: v1}}
    parameters: {weight: 1, int8_mask: true}
  - model: two
    parameters:
      weight: [{filter: mlp, value: [0, 1e-1]}, {filter: "*", value: "1e-5"}]
parameters: {normalize: 0, lambda: 2}
dtype: torch.bfloat16
out_dtype: float32
tokenizer: {source: base}
chat_template: null
"""


def refused(text: str | bytes) -> str:
    with pytest.raises(RecipeError) as error:
        parse(text, "r.yml", find)
    return str(error.value)


def test_a_recipe_of_models() -> None:
    two = {"weight": (Rule((0.0, 0.1), "mlp"), Rule(1e-5))}
    assert parse(TIES, "r.yml", find) == Recipe(
        "ties",
        models=(Source("org/one@v1", {"weight": (Rule(1.0),)}), Source("two", two)),
        base_model="org/base@main",
        parameters={"normalize": (Rule(False),), "lambda": (Rule(2.0),)},
        dtype="BF16",
        out_dtype="F32",
        tokenizer_source="base",
    )


def test_a_recipe_of_slices() -> None:
    text = """
    merge_method: linear
    slices:
      - sources: [{model: a, layer_range: [0, 2], parameters: {weight: 1}}, {model: b, layer_range: [1, 3]}]
        base_model: b
        parameters: {weight: 2}
    """
    recipe = parse(text, "r.yml", find)
    sources = (Source("a", {"weight": (Rule(1.0),)}, (0, 2)), Source("b", {}, (1, 3)))
    assert recipe.slices == (Slice(sources, "b", {"weight": (Rule(2.0),)}),)
    assert recipe.references == ("a", "b")


def test_canonical_form_forgets_spelling_and_is_read_back() -> None:
    recipe = parse(TIES, "r.yml", find)
    canonical = recipe.canonical()
    assert json.loads(json.dumps(canonical)) == {
        "merge_method": "ties",
        "base_model": "org/base@main",
        "models": [
            {"model": "org/one@v1", "parameters": {"weight": 1.0}},
            {
                "model": "two",
                "parameters": {"weight": [{"filter": "mlp", "value": [0.0, 0.1]}, {"filter": None, "value": 1e-5}]},
            },
        ],
        "parameters": {"lambda": 2.0, "normalize": False},
        "dtype": "BF16",
        "out_dtype": "F32",
        "tokenizer_source": "base",
    }
    assert from_dict(canonical, "again", find) == recipe


def test_keys_of_a_method_land_in_extra() -> None:
    text = "{merge_method: nuslerp, models: [{model: a}, {model: b}], data: {file: x}}"
    recipe = parse(text, "r.yml", find)
    assert recipe.extra == {"data": {"file": "x"}}
    assert recipe.canonical()["data"] == {"file": "x"}


def test_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yml"
    path.write_bytes(b"\xef\xbb\xbf" + TIES.encode())
    assert load(path, find).where == str(path)
    with pytest.raises(RecipeError) as error:
        load(tmp_path / "none.yml", find)
    assert str(error.value) == f"{tmp_path}/none.yml: the recipe cannot be read: No such file or directory"


def bomb() -> str:
    levels = [f"l{i}: &l{i} [{', '.join([f'*l{i - 1}'] * 10)}]" for i in range(1, 10)]
    return "\n".join(["l0: &l0 [1, 1]", *levels])


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("", "r.yml: the recipe is empty; it needs a merge_method and models"),
        ("# nothing", "r.yml: the recipe is empty; it needs a merge_method and models"),
        ("- a", "r.yml: a list at the top; a recipe is a mapping (merge_method: ...)"),
        ("~", "r.yml: nothing at the top; a recipe is a mapping (merge_method: ...)"),
        ("a: 1\n---\nb: 2", "r.yml, line 2: several documents; a recipe is one document"),
        (b"a: \xff", "r.yml: not UTF-8 text (byte 3)"),
        ("a: 1\na: 2", "r.yml, line 2: the key 'a' is given twice; keep one of them"),
        ("[1]: 2", "r.yml, line 1: a key must be plain text"),
        ("a: [1", "r.yml, line 1: not YAML: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\0", "r.yml: not YAML: unacceptable character #x0000: special characters are not allowed"),
        ("a: *b", "r.yml, line 1: not YAML: found undefined alias 'b'"),
        (
            "a: 1\nb: !!python/object/apply:os.system [ls]",
            "r.yml, line 2: the tag !!python/object/apply:os.system is refused; a recipe holds plain values only",
        ),
        ("a: !mine 1", "r.yml, line 1: the tag !mine is refused; a recipe holds plain values only"),
        ("a: &a [*a]", "r.yml, line 1: an alias stands for a value that holds it"),
        (bomb(), "r.yml, line 6: aliases unfold to more than 100,000 values; write plain values"),
        ("[" * 50, "r.yml, line 1: nested more than 40 deep"),
        ("a: 2001-99-99", "r.yml: a value cannot be read: month must be in 1..12"),
        (
            "a: " + "9" * 5000,
            "r.yml: a value cannot be read: Exceeds the limit (4300",
        ),
        (b"#" * 1_000_001, "r.yml: 1,000,001 bytes; a recipe has at most 1,000,000"),
    ],
)
def test_text_that_is_no_recipe(text: str | bytes, line: str) -> None:
    assert refused(text).startswith(line)
    assert "\n" not in refused(text)


def test_aliases_and_merge_keys_that_stay_small_work() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: *a"
    assert plain_yaml.read(text, "r") == {"a": {"x": 1, "y": 2}, "b": {"x": 1, "y": 3}, "c": {"x": 1, "y": 2}}


TWO = "models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]"
SLICES = "merge_method: passthrough\nslices: [{sources: [%s]}]"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("merge_metod: ties", "r.yml: unknown key 'merge_metod'; did you mean 'merge_method'?"),
        ("dtype: float32", "r.yml: no merge_method; name one of 'streammerge methods'"),
        ("merge_method: 3", "r.yml: merge_method: a number; it must be text"),
        ("merge_method: ''", "r.yml: merge_method: empty text; it must be text"),
        ("merge_method: tiles", "r.yml: unknown merge_method 'tiles'"),
        ("merge_method: ties\nmodles: []", "r.yml: unknown key 'modles'; did you mean 'models'?"),
        ("merge_method: ties", "r.yml: neither models nor slices; give exactly one of them, not empty"),
        (
            "merge_method: ties\nmodels: []",
            "r.yml: neither models nor slices; give exactly one of them, not empty",
        ),
        (
            "merge_method: ties\nmodels: [1]\nslices: [1]",
            "r.yml: both models and slices; give exactly one of them, not empty",
        ),
        ("merge_method: ties\nmodels: a", "r.yml: models: text; it must be a list"),
        ("merge_method: ties\nmodels: [a]", "r.yml: models[0]: text; it must be a mapping"),
        ("merge_method: ties\nmodels: [{}]", "r.yml: models[0]: no model; give its folder or Hub id"),
        (
            "merge_method: ties\nmodels: [{model: a, paramters: {}}]",
            "r.yml: models[0]: unknown key 'paramters'; did you mean 'parameters'?",
        ),
        (
            "merge_method: ties\nmodels: [{model: a, layer_range: [0, 1]}]",
            "r.yml: models[0]: unknown key 'layer_range'; known: model, parameters",
        ),
        (
            "merge_method: ties\nmodels: [{model: a, parameters: {densty: 1}}]",
            "r.yml: models[0].parameters: ties has no parameter 'densty'; did you mean 'density'?",
        ),
        (
            f"merge_method: ties\n{TWO}\nparameters: {{t: 1}}",
            "r.yml: parameters: ties has no parameter 't'; known: weight, density, normalize, lambda",
        ),
        (
            "merge_method: ties\nmodels: [{model: a+b}]",
            "r.yml: models[0].model: 'a+b' names an adapter after '+'; adapters are not supported "
            "yet; merge the "
            "adapter into its model first",
        ),
        (
            "merge_method: ties\nmodels: [{model: {model: a, lora: b}}]",
            "r.yml: models[0].model: adapters are not supported yet; merge the adapter into its model first",
        ),
        (
            "merge_method: ties\nmodels: [{model: {model: a, override_architecture: X}}]",
            "r.yml: models[0].model: unknown key 'override_architecture'; known: model, lora",
        ),
        (
            "merge_method: ties\nmodels: [{model: a@b@c}]",
            "r.yml: models[0].model: 'a@b@c' is not a model; write path or path@revision",
        ),
        ("merge_method: ties\nmodels: [{model: 7}]", "r.yml: models[0].model: a number; it must be text"),
        (f"merge_method: ties\nbase_model: []\n{TWO}", "r.yml: base_model: a list; it must be text"),
        (
            f"merge_method: ties\n{TWO}\ntokenizer_source: union",
            "r.yml: tokenizer_source: 'union' is not supported; use 'base' or one of the models",
        ),
        (
            f"merge_method: ties\n{TWO}\ntokenizer: {{source: a, tokens: {{}}}}",
            "r.yml: tokenizer: only 'source' is supported; vocabularies are not merged",
        ),
        (
            f"merge_method: ties\n{TWO}\ntokenizer_source: base",
            "r.yml: tokenizer_source is 'base' and there is no base_model",
        ),
        (
            f"merge_method: ties\n{TWO}\ntokenizer_source: c",
            "r.yml: tokenizer_source 'c' is not one of the models; known: base, a, b",
        ),
        (
            f"merge_method: ties\n{TWO}\nmodules: {{}}",
            "r.yml: modules: parts of a multimodal model are not told apart; 'models' merges every tensor by its name",
        ),
        (
            f"merge_method: ties\n{TWO}\nchat_template: auto",
            "r.yml: chat_template: not supported; the template comes with the tokenizer's files (tokenizer_source)",
        ),
        (
            f"merge_method: ties\n{TWO}\ndtype: int64",
            "r.yml: dtype: unknown dtype 'int64'; use one of ",
        ),
        (f"merge_method: ties\n{TWO}\nout_dtype: 16", "r.yml: out_dtype: a number; it must be text"),
        (SLICES % "", "r.yml: slices[0]: a slice needs sources"),
        (
            SLICES % "{model: a}",
            "r.yml: slices[0].sources[0]: no layer_range; give [first, end] of the layers that it lends",
        ),
        (
            SLICES % "{model: a, layer_range: [0]}",
            "r.yml: slices[0].sources[0].layer_range: write [first, end], two whole numbers; the end is left out",
        ),
        (
            SLICES % "{model: a, layer_range: [0, 1.5]}",
            "r.yml: slices[0].sources[0].layer_range: write [first, end], two whole numbers; the end is left out",
        ),
        (
            SLICES % "{model: a, layer_range: [3, 3]}",
            "r.yml: slices[0].sources[0].layer_range: [3, 3] holds no layer; layers count from 0 and "
            "the end is left "
            "out",
        ),
    ],
)
def test_requests_that_are_refused(text: str, line: str) -> None:
    assert refused(text).startswith(line)
    assert "\n" not in refused(text)
