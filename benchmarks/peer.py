"""mergekit, the incumbent, run as its users run it: its own environment, its own command line, the same recipe.

It writes through the page cache and does not wait until its output is durable; that time is not charged to it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import measure

VERSION = "0.1.5"
FLAGS = ("--no-copy-tokenizer", "--no-write-model-card", "--quiet")
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


def find(given: str | None, work: Path, make: bool, torch: str) -> Path | None:
    """mergekit-yaml: the one that was named, or the work folder's own, made now if that is asked for."""
    if given:
        path = Path(given)
        if not os.access(path, os.X_OK):
            raise SystemExit(f"--mergekit {given}: not an executable; give the path of mergekit-yaml")
        return path
    path = work / f"mergekit-{VERSION}" / "bin" / "mergekit-yaml"
    if not path.exists() and make:
        folder = path.parent.parent
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for wanted in (f"torch=={torch.partition('+')[0]}", f"mergekit=={VERSION}"):
            subprocess.run([str(folder / "bin" / "pip"), "install", "--quiet", wanted], check=True)
    return path if path.exists() else None


def versions(binary: Path) -> dict[str, str]:
    """What stands beside the binary."""
    names = ("mergekit", "torch", "transformers", "safetensors")
    code = f"import importlib.metadata as m; print(*(m.version(n) for n in {names}))"
    done = subprocess.run([str(binary.parent / "python"), "-c", code], capture_output=True, text=True, check=True)
    return dict(zip(names, done.stdout.split(), strict=True))


def merge(binary: Path, recipe: Path, out: Path, seed: int = 0) -> measure.Usage:
    """Merge into a folder, which is replaced."""
    shutil.rmtree(out, ignore_errors=True)
    argv = [str(binary), str(recipe), str(out), *FLAGS, "--random-seed", str(seed)]
    return measure.run(argv, OFFLINE)
