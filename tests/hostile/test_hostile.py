"""Broken inputs, one folder each, and the one line that each must give.

A folder holds the files and `expected.txt`, where `{dir}` stands for the folder's path and `{n}` for a number.
A folder with a `recipe.yml` is a merge: `streammerge merge recipe.yml OUT`, with the words of its file `options`
if there is one, run in a copy of it must end with the code in its file `exit`, print the line and nothing else,
and leave the folder as it was. Any other folder is opened as a checkpoint.
"""

import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import regenerate

from streammerge import cli
from streammerge.errors import CheckpointError
from streammerge.store.checkpoint import Checkpoint

HERE = Path(__file__).parent
CASES = sorted(folder.name for folder in HERE.iterdir() if (folder / "expected.txt").exists())
RECIPES = [case for case in CASES if (HERE / case / "recipe.yml").exists()]


def contents(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def matches(line, expected):
    """Whether the line is the expected one, any number standing for {n}."""
    return re.fullmatch(re.escape(expected).replace(re.escape("{n}"), "[0-9]+"), line) is not None


def copied(case, target):
    """A copy of a case to work in, and the line that it must give."""
    folder = Path(shutil.copytree(HERE / case, target / case))
    expected = (folder / "expected.txt").read_text(encoding="utf-8").replace("{dir}", str(folder))
    assert expected.count("\n") == 1
    assert expected.endswith("\n")
    return folder, expected


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(case, tmp_path, monkeypatch, capsys):
    folder, expected = copied(case, tmp_path)
    before = contents(tmp_path)
    options = (folder / "options").read_text() if (folder / "options").exists() else ""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["streammerge", "merge", "recipe.yml", "OUT", "--quiet", *shlex.split(options)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert matches(err, f"streammerge: {expected}"), f"{err}\n{expected}"
    assert stop.value.code == int((folder / "exit").read_text())
    assert out == ""
    assert contents(tmp_path) == before


@pytest.mark.parametrize("case", [case for case in CASES if case not in RECIPES])
def test_checkpoints(case, tmp_path):
    folder, expected = copied(case, tmp_path)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert f"{caught.value}\n" == expected


@pytest.mark.parametrize("case", regenerate.CASES)
def test_the_files_are_as_they_were_made(case):
    """A checkout that changes line ends or drops a file would test something else."""
    found = contents(HERE / case).items()
    files = {str(path.relative_to(HERE / case)): raw for path, raw in found if path.name not in regenerate.BY_HAND}
    assert files == regenerate.CASES[case]


def test_the_files_are_small():
    files = [path for case in CASES for path in (HERE / case).rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 2048
