"""What a recipe may say to GradFix, and what it tells of nothing."""

import pytest

from streammerge import method as methods
from streammerge.errors import RecipeError
from streammerge.methods._tally import Tally
from streammerge.methods.gradfix import GradFix


def test_parameters_and_keys():
    assert list(methods.parameters(GradFix)) == ["alpha", "vote", "mode", "unmatched"]
    assert (GradFix(alpha=(0.1, 0.2)).alphas, GradFix(alpha=0.3).alphas) == ((0.1, 0.2), (0.3,))
    given = GradFix.read_keys({"source_base": "a", "data": {"train": "t"}}, 2, "recipe")
    assert given["data"] == {"train": ["t"], "validation": None, "max_length": None}
    assert (given["merge"], given["order"]) == ("mean", "merge_then_mask")


BASE = {"source_base": "a", "data": {"train": "t"}}


@pytest.mark.parametrize(
    ("given", "line"),
    [
        ({"data": {"train": "t"}}, "gradfix needs source_base"),
        ({**BASE, "merge": "slerp"}, "merge is 'slerp'; one of mean, ties, tsvm"),
        ({**BASE, "order": "both"}, "order is 'both'; one of"),
        ({**BASE, "votes": "v", "save_votes": "w.safetensors"}, "both votes and save_votes"),
        ({**BASE, "save_votes": "w"}, "save_votes is 'w'; its name must end in .safetensors"),
        ({**BASE, "votes": 3}, "votes must be the path of a file"),
        ({**BASE, "votes": "v"}, "data.train: there are votes already"),
        ({**BASE, "data": "t"}, "data: must be a mapping of train, validation, max_length"),
        ({**BASE, "data": {"train": "t", "test": "u"}}, "data: unknown key 'test'"),
        ({**BASE, "data": {"train": ["t", "u", "v"]}}, "data.train: 3 files for 2 models"),
        ({**BASE, "data": {"train": [1]}}, "data.train: must be a file, or a list"),
        ({**BASE, "data": {"train": "t", "validation": 1}}, "data.validation: must be a file"),
        ({**BASE, "data": {"train": "t", "max_length": 1}}, "data.max_length: 1; give a whole number"),
        ({**BASE, "compute": "int8"}, "compute is 'int8'"),
    ],
)
def test_wrong_keys_are_one_line(given, line):
    with pytest.raises(RecipeError, match=line) as caught:
        GradFix.read_keys(given, 2, "r.yml")
    assert str(caught.value).startswith("r.yml: ")


@pytest.mark.parametrize(("name", "value"), [("vote", "max"), ("mode", "soft"), ("unmatched", "keep")])
def test_wrong_parameters_are_one_line(name, value):
    with pytest.raises(RecipeError, match=f"gradfix: {name} is {value!r}; one of"):
        GradFix(**{name: value})


def test_what_an_empty_tensor_tells():
    figures = Tally(0).figures
    assert figures == {
        "alpha": 1.0,
        "elements": 0,
        "kept": 0,
        "ties": 0.0,
        "unchanged": 0,
        "nan": 0,
        "displacement": 0.0,
    }


def test_places_of_counts_are_the_kernels():
    from streammerge.kernels.host import sign_mask
    from streammerge.methods import _tally

    for name in ("KEPT", "TIES", "LOST", "NANS"):
        assert getattr(_tally, name) == getattr(sign_mask, name)
