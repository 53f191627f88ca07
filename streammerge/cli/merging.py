"""`merge` and `plan`."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Callable
from typing import Any

import click

from streammerge import api
from streammerge.cli import show


def _planning(command: Callable[..., None]) -> Callable[..., None]:
    """The options that decide a plan."""
    for option in reversed(
        (
            click.argument("recipe", type=click.Path(exists=True, dir_okay=False)),
            click.option("--ram", help="Host memory the run may hold, as 4GiB; 80 % of what is free if left out."),
            click.option(
                "--vram",
                help="GPU memory the run may hold, the driver's own included; 80 % of what is free if left out.",
            ),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda or cuda:N."),
            click.option("--threads", default=0, help="Threads for the arithmetic; all processors if left out."),
            click.option(
                "--shard-size",
                help="Bytes of tensors in an output shard, as 5GB; the base's shards if left out.",
            ),
            click.option("--seed", default=0, show_default=True, help="Seed of the methods that draw random numbers."),
            click.option("--json", "as_json", is_flag=True, help="Print one JSON object."),
            click.option("--debug", is_flag=True, help="Show tracebacks."),
        )
    ):
        command = option(command)
    return command


@click.command()
@_planning
def plan(recipe: str, as_json: bool, debug: bool, **options: Any) -> None:
    """Show what a merge would read, hold and write, without reading a weight."""
    made = api.plan(recipe, **options)
    if as_json:
        click.echo(json.dumps(made.as_dict()))
    else:
        show.plan(made)


@click.command()
@_planning
@click.argument("out", type=click.Path(file_okay=False))
@click.option("--no-resume", is_flag=True, help="Discard unfinished work instead of going on with it.")
@click.option("--overwrite", is_flag=True, help="Replace OUT if it exists.")
@click.option("--strict", is_flag=True, help="Refuse inputs that hold a NaN or an infinity.")
@click.option(
    "--reader",
    type=click.Choice(["auto", "direct", "buffered", "mmap"]),
    default="auto",
    show_default=True,
    help="How files are read; the result does not depend on it.",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors.")
def merge(
    recipe: str,
    out: str,
    no_resume: bool,
    overwrite: bool,
    strict: bool,
    reader: Any,
    quiet: bool,
    as_json: bool,
    debug: bool,
    **options: Any,
) -> None:
    """Merge the models of RECIPE into the folder OUT.

    OUT appears when it is complete. Until then the work lies in OUT.partial; the same command takes it up again.
    """
    token = _Signals()
    api.check_out(out, overwrite)
    made = api.plan(recipe, **options)
    if not quiet and not as_json:
        show.plan(made)
    with token, show.progress(made, quiet or as_json) as progress:
        report = api.merge(
            made,
            out,
            resume=not no_resume,
            overwrite=overwrite,
            strict=strict,
            reader=reader,
            progress=progress,
            cancel=token,
        )
    if as_json:
        click.echo(json.dumps(report))
    elif not quiet:
        show.report(report, out)


class _Signals:
    """Ctrl-C and SIGTERM ask the run to stop at the next tile; a second one stops it at once."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self.exit_code = 130
        self._before: dict[int, Any] = {}

    def is_set(self) -> bool:
        return self._event.is_set()

    def _note(self, number: int, frame: Any) -> None:
        if self._event.is_set():
            raise KeyboardInterrupt
        self.exit_code = 128 + number
        self._event.set()

    def __enter__(self) -> _Signals:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
