"""Where the process matters: pipes that close, full devices, signals, and what is imported."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import build
import numpy as np
import pytest

pytestmark = pytest.mark.skipif(os.name != "posix", reason="shells, signals")
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(build.ROOT)}
# Enough steps to be stopped in the middle of.
SLOW = """
import os, time
from streammerge.planner import cutting
cutting.TILE = 1 << 16
real = os.pwrite
def slow(*arguments):
    time.sleep(0.05)
    return real(*arguments)
os.pwrite = slow
"""


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cli")
    tensors = {f"layer.{i}": np.full((300, 400), i, np.float32) for i in range(30)}
    for name in "ab":
        build.checkpoint(folder / name, {"model.safetensors": {k: v + ord(name) for k, v in tensors.items()}})
    build.recipe(folder / "r.yml", "linear", [folder / "a", folder / "b"], weight=[1.0, 2.0])
    return folder


def shell(text, folder):
    """(exit code of the first command of a pipe, what the last one said, standard error)."""
    line = f'sm() {{ {sys.executable} -m streammerge "$@"; }}; set -o pipefail; {text}'
    done = subprocess.run(["bash", "-c", line], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_pipes_that_close_leave_no_trace(here):
    code, out, err = shell("sm inspect a --json | head -c 1", here)
    assert (code in (0, 141), out, err) == (True, "{", "")
    assert shell("sm inspect a --json | sleep 0", here)[::2] in ((141, ""), (0, ""))
    assert shell("{ sleep 0.1; sm inspect a; } | true", here) == (141, "", "")
    assert shell("{ sleep 0.1; sm --help; } | true", here) == (141, "", "")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_standard_output_that_is_full(here):
    for words in ("plan r.yml", "methods --json", "--help"):
        code, _, err = shell(f"sm {words} > /dev/full", here)
        assert (code, err) == (4, "streammerge: No space left on device; mend it and run the same command again\n")


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signals_stop_at_the_next_step_and_keep_the_work(here, tmp_path, sent, code):
    out = tmp_path / "out"
    child = build.start("merge", here / "r.yml", out, "--ram", "1GiB", "--quiet", before=SLOW)
    shard = tmp_path / "out.partial" / "model.safetensors"
    end = time.monotonic() + 30
    while not shard.exists() and time.monotonic() < end and child.poll() is None:
        time.sleep(0.01)
    child.send_signal(sent)
    said, err = child.communicate(timeout=30)
    kept = f"{tmp_path / 'out.partial'}: run the same command again to go on"
    assert (child.returncode, said, err) == (code, "", f"streammerge: stopped; what is done is kept in {kept}\n")
    assert not out.exists()
    done = build.command("merge", here / "r.yml", out, "--ram", "1GiB", "--quiet")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert build.command("verify", out).returncode == 0


def test_an_interrupt_while_planning_is_one_line(here):
    before = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started us may have had it ignored
from streammerge import api
def interrupted(*_, **__):
    signal.raise_signal(signal.SIGINT)  # to this thread: another one would take a moment to tell it
api.plan = interrupted
"""
    done = build.command("plan", here / "r.yml", before=before)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "streammerge: stopped\n")


@pytest.mark.skipif(os.name != "posix" or os.geteuid() == 0, reason="root may do everything")
def test_places_without_permission(here, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    done = build.command("merge", here / "r.yml", tmp_path / "locked" / "out", "--quiet")
    assert (done.returncode, done.stderr.count("\n")) == (4, 1)
    assert "Permission denied" in done.stderr
    secret = tmp_path / "r.yml"
    secret.touch(mode=0o000)
    done = build.command("plan", secret)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


def test_a_merge_imports_no_torch(here, tmp_path):
    before = "import sys; sys.modules['torch'] = None"
    done = build.command("merge", here / "r.yml", tmp_path / "out", "--quiet", before=before)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_that_are_not_utf8(here):
    code, out, err = shell("cp r.yml $'r\\xff.yml' && echo x > $'s\\xff.yml' && sm plan $'r\\xff.yml' --json", here)
    assert (code, err, out[0]) == (0, "", "{")
    code, out, err = shell("sm plan $'s\\xff.yml'", here)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "a recipe is a mapping" in err


def test_the_progress_bar_on_a_terminal(tmp_path):
    """Names of tensors are shown as they are, whatever a terminal library would make of them."""
    pty = pytest.importorskip("pty")
    for name, weight in (("a", 1), ("b", 2)):
        tensors = {f"layer.{i}[/b]": np.full((300, 400), weight, np.float32) for i in range(30)}
        build.checkpoint(tmp_path / name, {"model.safetensors": tensors})
    recipe = build.recipe(tmp_path / "r.yml", "linear", [tmp_path / "a", tmp_path / "b"], weight=[1.0, 2.0])
    reader, terminal = pty.openpty()
    code = f"{SLOW.replace('0.05', '0.003')}\nfrom streammerge.cli import main\nmain()"
    words = [sys.executable, "-c", code, "merge", str(recipe), str(tmp_path / "out"), "--ram", "1GiB"]
    child = subprocess.Popen(words, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=terminal, text=True)
    os.close(terminal)
    seen = b""
    try:
        while piece := os.read(reader, 1 << 16):
            seen += piece
    except OSError:
        pass  # how Linux says that the other end is closed
    os.close(reader)
    out, _ = child.communicate(timeout=30)
    assert child.returncode == 0, seen
    assert "\x1b" not in out
    assert b"[/b]" in seen
    assert b"GB/s" in seen


@pytest.mark.parametrize("given", [None, "7"])
def test_idle_threads_of_torch_spare_cores_unless_the_user_says_otherwise(given):
    code = """
import os, sys
from streammerge.cli import SPINS, main
sys.argv = ["streammerge", "--version"]
try:
    main()
finally:
    print(os.environ["GOMP_SPINCOUNT"], SPINS, "torch" in sys.modules)
"""
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "GOMP_SPINCOUNT"}
    environment |= {} if given is None else {"GOMP_SPINCOUNT": given}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    spins, default, loaded = done.stdout.split()[-3:]
    assert (spins, loaded) == (given or default, "False")
