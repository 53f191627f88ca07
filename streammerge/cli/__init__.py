"""The command line: parse, call the library, print. Exit codes and messages are those of streammerge.errors."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from streammerge import __version__
from streammerge.errors import BudgetTooSmall, StreamMergeError

COMMANDS = {
    "merge": "merging",
    "plan": "merging",
    "inspect": "looking",
    "diff": "looking",
    "verify": "looking",
    "methods": "looking",
    "demo": "looking",
}


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


@click.group(cls=Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="streammerge")
def cli() -> None:
    """Merge fine-tuned checkpoints inside a memory budget that you name."""


def main() -> None:
    """Run the command line; every failure is one line on stderr and an exit code, a traceback only with --debug."""
    arguments = sys.argv[1:]
    try:
        code = cli.main(arguments, standalone_mode=False)
    except click.exceptions.Exit as stop:
        code = stop.exit_code
    except click.ClickException as error:
        fail(arguments, error.format_message(), 2, type(error).__name__)
        code = 2
    except (KeyboardInterrupt, click.Abort):
        fail(arguments, "stopped", 130, "Interrupted")
        code = 130
    except StreamMergeError as error:
        if "--debug" in arguments:
            raise
        least = error.least if isinstance(error, BudgetTooSmall) else None
        fail(arguments, str(error), error.exit_code, type(error).__name__, least)
        code = error.exit_code
    except BrokenPipeError:
        code = 0  # whoever read our output has seen enough
    except Exception as error:
        if "--debug" in arguments:
            raise
        fail(
            arguments,
            f"internal error: {type(error).__name__}: {error}; --debug shows where",
            1,
            "InternalError",
        )
        code = 1
    sys.exit(code if isinstance(code, int) else 0)


def fail(arguments: list[str], message: str, code: int, kind: str, least: int | None = None) -> None:
    """One line on stderr, in red on a terminal; with --json an object on stdout."""
    line = " ".join(message.split())
    if "--json" in arguments:
        body: dict[str, Any] = {"error": {"kind": kind, "message": line, "exit_code": code}}
        if least is not None:
            body["error"]["least_bytes"] = least
        click.echo(json.dumps(body))
    click.secho(f"streammerge: {line}", err=True, fg="red" if sys.stderr.isatty() else None)
