"""Where a model's name leads: paths first, then the Hub, which is replaced by a stand-in here."""

import errno
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.errors import LocalEntryNotFoundError

from streammerge.errors import MachineError, RecipeError
from streammerge.store.hub import locate


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Calls of snapshot_download; what it raises or returns is set by `answer`."""

    class Hub:
        def __init__(self):
            self.answer = str(tmp_path / "cache")
            self.calls = []

        def __call__(self, repository, **options):
            self.calls.append((repository, options))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer

    stand_in = Hub()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", stand_in)
    monkeypatch.chdir(tmp_path)
    return stand_in


def refusal(name, near=(), kind=RecipeError):
    with pytest.raises(kind) as caught:
        locate(name, near)
    assert str(caught.value).isprintable()
    return str(caught.value)


def test_paths_from_here_then_from_each_folder(hub, tmp_path):
    for folder in ("here/m", "one/only", "one/m", "two/m", "two/org/name"):
        (tmp_path / folder).mkdir(parents=True)
    near = [tmp_path / "one", tmp_path / "two"]
    assert locate("here/m", near) == Path("here/m")
    assert locate("only", near) == tmp_path / "one/only"
    assert locate("m", near) == tmp_path / "one/m"
    assert locate("org/name", near) == tmp_path / "two/org/name"
    assert locate(str(tmp_path / "two"), near) == tmp_path / "two"
    assert hub.calls == []


def test_home(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    assert locate("~/m") == tmp_path / "m"
    assert refusal("~nobody.of.this.name/m").endswith(": nobody has this home; give a path, or org/name")


@pytest.mark.parametrize(
    ("name", "repository", "revision"),
    [
        ("org/name", "org/name", None),
        ("Org-1/Na.me_7B", "Org-1/Na.me_7B", None),
        ("org/name@main", "org/name", "main"),
        ("org/name@refs/pr/3", "org/name", "refs/pr/3"),
    ],
)
def test_the_hub_is_asked_for_what_is_no_path(hub, tmp_path, name, repository, revision):
    assert locate(name) == tmp_path / "cache"
    ((asked, options),) = hub.calls
    assert (asked, options["revision"], options["local_files_only"]) == (repository, revision, False)
    wanted = options["allow_patterns"]
    assert {"*.safetensors", "*.json", "tokenizer*", "*.txt", "*.model", "*.py", "*.jinja"} <= set(wanted)
    assert not any("bin" in pattern or "pt" in pattern for pattern in wanted)


def test_what_would_be_downloaded(hub):
    """The library's own filter, given our patterns, keeps a model's files and leaves the rest."""
    locate("org/name")
    options = hub.calls[0][1]
    keep = [
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
        "tokenizer.model",
    ]
    keep += ["merges.txt", "modeling_x.py", "chat_template.jinja", "LICENSE", "LICENCE.txt", "NOTICE"]
    leave = [
        "pytorch_model.bin",
        "m.gguf",
        "original/params.json",
        "onnx/model.onnx",
        "README.md",
        "a/m.safetensors",
    ]
    kept = huggingface_hub.utils.filter_repo_objects(
        keep + leave,
        allow_patterns=options["allow_patterns"],
        ignore_patterns=options["ignore_patterns"],
    )
    assert list(kept) == keep


def test_local_only(hub):
    locate("org/name", local_only=True)
    assert hub.calls[0][1]["local_files_only"] is True


@pytest.mark.parametrize(
    "name",
    ["gpt2x", "./org/name", "/org/name", "a/b/c", "org/", "org/..", "org/na me", "org/name@"],
)
def test_what_does_not_look_like_the_hub_is_not_asked_there(hub, tmp_path, name):
    line = refusal(name, [tmp_path / "near"])
    assert hub.calls == []
    assert line.startswith(f"no model {name!r}: looked at ")
    assert str(tmp_path / "near") in line or name.startswith("/")


@pytest.mark.parametrize("name", ["", "org/n\n", "\x1b[2J", "a\0b"])
def test_names_that_cannot_be(hub, name):
    assert refusal(name) == f"no model can be called {name!r}; give a path, or org/name on the Hub"
    assert hub.calls == []


def test_paths_that_cannot_be_asked_for(hub):
    name = "n" * 300
    assert refusal(name) == f"{name}: File name too long; check the path and its permissions"


def test_the_refusal_lists_where_it_looked(hub, tmp_path):
    assert refusal("nothing", [tmp_path / "r"]) == (
        f"no model 'nothing': looked at {tmp_path / 'nothing'}, {tmp_path / 'r' / 'nothing'}; "
        "give a path, or org/name on the Hub"
    )


def test_what_the_hub_says_is_one_line(hub, tmp_path):
    def answers(error, revision=""):
        hub.answer = error
        line = refusal(f"org/name{revision}")
        prefix = f"no model 'org/name': looked at {tmp_path / ('org/name' + revision)}, and on the Hub"
        assert line.startswith(prefix)
        return line.removeprefix(prefix)

    local = "it is not in the local cache, and the Hub cannot be reached or must not be"
    assert answers(LocalEntryNotFoundError("many\nlines")) == f": {local}"
    for kind, reason in (
        ("RepositoryNotFoundError", "there is no such model, or it is private"),
        ("GatedRepoError", "its terms must be accepted on the Hub, and a token of that account set"),
    ):
        assert answers(type(kind, (Exception,), {})("x")) == f": {reason}"
    assert answers(type("RevisionNotFoundError", (Exception,), {})("x"), "@v9") == (
        " at revision v9: there is no such revision"
    )
    assert answers(ConnectionError("no\nroute")) == ": ConnectionError: no route"
    assert len(answers(ValueError("x" * 5000))) < 250


def test_a_full_disk_is_the_machine_s_fault(hub):
    hub.answer = OSError(errno.ENOSPC, "No space left on device")
    line = refusal("org/name", kind=MachineError)
    assert line == "downloading org/name: No space left on device; make room and run again"
