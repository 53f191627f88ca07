"""Broken inputs, one folder each, and the one line that each must give.

A folder holds the files and `expected.txt`, where `{dir}` stands for the folder's path. A folder with a
`recipe.yml` is a merge: `python -m streammerge merge recipe.yml OUT` in a copy of it must end with the code
in its file `exit`, print the line and nothing else, and leave neither OUT nor OUT.partial. Any other folder
is opened as a checkpoint.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import regenerate

from streammerge.errors import CheckpointError
from streammerge.store.checkpoint import Checkpoint

HERE = Path(__file__).parent
CASES = sorted(folder.name for folder in HERE.iterdir() if (folder / "expected.txt").exists())


def merge(folder):
    """What a merge of the folder's recipe prints on stderr, after checking all else."""
    command = [sys.executable, "-m", "streammerge", "merge", "recipe.yml", "OUT"]
    paths = [str(HERE.parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1"}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)
    assert ran.returncode == int((folder / "exit").read_text()), ran.stderr
    assert ran.stdout == ""
    assert not (folder / "OUT").exists()
    assert not (folder / "OUT.partial").exists()
    return ran.stderr


@pytest.mark.parametrize("case", CASES)
def test_hostile(case, tmp_path):
    folder = Path(shutil.copytree(HERE / case, tmp_path / case))
    expected = (folder / "expected.txt").read_text(encoding="utf-8").replace("{dir}", str(folder))
    assert expected.count("\n") == 1
    assert expected.endswith("\n")
    if (folder / "recipe.yml").exists():
        assert merge(folder) == expected
        return
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert f"{caught.value}\n" == expected


@pytest.mark.parametrize("case", regenerate.CASES)
def test_the_files_are_as_they_were_made(case):
    """A checkout that changes line ends or drops a file would test something else."""
    files = {path.name: path.read_bytes() for path in (HERE / case).iterdir() if path.name != "expected.txt"}
    assert files == regenerate.CASES[case]


def test_the_files_are_small():
    files = [path for case in CASES for path in (HERE / case).rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 2048
