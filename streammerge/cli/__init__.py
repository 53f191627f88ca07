"""The command line: parse, call the library, print. Exit codes and messages are those of streammerge.errors."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import traceback
from typing import Any

import click

from streammerge import __version__
from streammerge.errors import BudgetTooSmall, Interrupted, StreamMergeError

COMMANDS = {
    "merge": "merging",
    "plan": "merging",
    "inspect": "looking",
    "diff": "looking",
    "verify": "looking",
    "report": "looking",
    "methods": "looking",
    "demo": "looking",
}
SPINS = "20000"  # some 1 ms
CLOSED = 141  # what a shell says of a program whose reader has seen enough (| head)


def spare_cores() -> None:
    """Have torch's idle threads wait in a loop for 1 ms and not for 16: they take a core from compiled loops meanwhile.

    libgomp reads it when torch is loaded. What the user has set stays.
    """
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)


class Lazy(click.Group):
    """Loads a command's module when it is used, so that `streammerge --help` answers at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        from importlib import import_module

        if name not in COMMANDS:
            return None
        command: click.Command = getattr(import_module(f"streammerge.cli.{COMMANDS[name]}"), name)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command; click would print an empty line of its own when it is interrupted."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("stopped") from None


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streammerge")
def cli() -> None:
    """Merge fine-tuned checkpoints inside a memory budget that you name."""


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code, a traceback too with --debug."""
    arguments = sys.argv[1:] or ["--help"]
    spare_cores()
    try:
        code = cli.main(arguments, "streammerge", standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        code = fail(arguments, _usage(error), 2, "UsageError")
    except (KeyboardInterrupt, click.Abort):
        code = fail(arguments, "stopped", 130, "Interrupted")
    except StreamMergeError as error:
        least = error.least if isinstance(error, BudgetTooSmall) else None
        code = fail(arguments, str(error), error.exit_code, type(error).__name__, least)
    except SystemExit:  # click's answer to a closed pipe, and rich's
        code = CLOSED
        _drop_output()
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or str(error)
        code = fail(arguments, f"{what}; mend it and run the same command again", 4, "MachineError")
    except Exception as error:
        line = f"internal error: {type(error).__name__}: {error}; --debug shows where"
        code = fail(arguments, line, 1, "InternalError")
    sys.exit(code if isinstance(code, int) else 0)


def _usage(error: click.ClickException) -> str:
    """What click has to say about the words of a command, and where the right ones are listed."""
    context = getattr(error, "ctx", None)
    if isinstance(error, click.NoSuchOption) and error.possibilities:
        return f"no option {error.option_name}; did you mean {sorted(error.possibilities)[0]}?"
    command = "streammerge" if context is None or context.parent is None else f"streammerge {context.info_name}"
    return f"{error.format_message().rstrip('.')}; {command} --help lists what there is"


def fail(arguments: list[str], message: str, code: int, kind: str, least: int | None = None) -> int:
    """One line on stderr, in red on a terminal; with --json an object on stdout; with --debug where it happened."""
    if "--debug" in arguments:
        traceback.print_exc()
    line = " ".join(message.splitlines())
    if "--json" in arguments:
        body: dict[str, Any] = {"error": {"kind": kind, "message": line, "exit_code": code}}
        if least is not None:
            body["error"]["least_bytes"] = least
        try:
            click.echo(json.dumps(body))
        except OSError:
            _drop_output()
    with contextlib.suppress(OSError):
        click.secho(f"streammerge: {line}", err=True, fg="red" if sys.stderr.isatty() else None)
    return code


def _drop_output() -> None:
    """Nothing more can be written to standard output; what waits in its buffer goes nowhere, without a complaint."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
