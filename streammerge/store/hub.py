"""Finds what a recipe calls a model: a path, or `org/name[@revision]` on the Hugging Face Hub.

A path that exists always wins, so that a run never depends on the network where the files are at hand. From
the Hub come safetensors and the small files beside them, top level only; pickles are not even downloaded.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from pathlib import Path

from streammerge.errors import MachineError, RecipeError

REPOSITORY = re.compile(r"(\w[\w.-]*/\w[\w.-]*)(?:@([\w.][\w./-]*))?", re.ASCII)
WEIGHTS_AND_CONFIG = ["*.safetensors", "*.json", "*.txt", "*.model", "*.py", "*.jinja", "tokenizer*"]
WANTED = [*WEIGHTS_AND_CONFIG, "LICEN[SC]E*", "NOTICE*"]
REASONS = {
    "GatedRepoError": "its terms must be accepted on the Hub, and a token of that account set",
    "RepositoryNotFoundError": "there is no such model, or it is private",
    "RevisionNotFoundError": "there is no such revision",
    "LocalEntryNotFoundError": "it is not in the local cache, and the Hub cannot be reached or must not be",
}
DISK = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS)


def locate(name: str, near: Sequence[Path] = (), *, local_only: bool = False) -> Path:
    """The folder or file that `name` means: from here, from each folder in `near`, then from the Hub.

    With `local_only` the Hub is not asked, and only what its cache already holds is found.
    """
    if not name or not name.isprintable():
        raise RecipeError(f"no model can be called {name!r}; give a path, or org/name on the Hub")
    try:
        path = Path(name).expanduser()
    except RuntimeError as error:  # ~somebody who is not there
        raise RecipeError(f"no model {name!r}: nobody has this home; give a path, or org/name") from error
    places = [path, *(folder / path for folder in near)]
    for place in places:
        try:
            if place.exists():
                return place
        except OSError as error:
            raise RecipeError(f"{place}: {error.strerror}; check the path and its permissions") from error
    looked = ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    match = REPOSITORY.fullmatch(name)
    if match is None:
        raise RecipeError(f"no model {name!r}: looked at {looked}; give a path, or org/name on the Hub")
    return _download(match[1], match[2], looked, local_only)


def _download(repository: str, revision: str | None, looked: str, local_only: bool) -> Path:
    try:
        from huggingface_hub import snapshot_download

        folder = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=WANTED,
            ignore_patterns=["*/*"],
            local_files_only=local_only,
        )
    except Exception as error:  # what it raises depends on its version and on that of its network layer
        if isinstance(error, OSError) and error.errno in DISK:
            fault = f"downloading {repository}: {error.strerror}; make room and run again"
            raise MachineError(fault) from error
        kind = type(error).__name__
        reason = REASONS.get(kind) or " ".join(f"{kind}: {error}".split())[:200]
        at = f" at revision {revision}" if revision else ""
        fault = f"no model {repository!r}: looked at {looked}, and on the Hub{at}: {reason}"
        raise RecipeError(fault) from error
    return Path(folder)
