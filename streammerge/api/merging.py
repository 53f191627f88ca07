"""`merge`: plan, run, report; the output folder is complete or absent."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from streammerge.api.planning import RecipeLike, plan
from streammerge.budget import Budget
from streammerge.engine.anchor_files import KEPT, check_folder
from streammerge.engine.anchor_plan import AnchorPlan
from streammerge.engine.anchor_run import AnchorRun
from streammerge.engine.composing_plan import ComposePlan
from streammerge.engine.composing_run import Learning
from streammerge.engine.findings import Findings, Progress
from streammerge.engine.layer_run import LayerRun, check_votes_path
from streammerge.engine.report import Watcher, make_report
from streammerge.engine.run import Run, open_run
from streammerge.engine.sinks import FileSink
from streammerge.engine.sweeping import VOTES, LayerPlan
from streammerge.errors import CheckpointError, Interrupted, OutputExists, RecipeError
from streammerge.planner import coefficients
from streammerge.planner.plan import Plan, describe_inputs
from streammerge.store import journal
from streammerge.store.publish import into_place, machine
from streammerge.store.reader import Mode
from streammerge.store.ring import Closed, Ring
from streammerge.store.scatter import ScatterWriter
from streammerge.store.writer import MANIFEST, Writer

W = TypeVar("W", bound=Writer)


class Token(Protocol):
    """Whatever can say that the work should stop: a threading.Event, for one."""

    def is_set(self) -> bool: ...


def merge(
    recipe: RecipeLike | Plan,
    out: str | Path,
    *,
    resume: bool = True,
    overwrite: bool = False,
    strict: bool = False,
    reader: Mode = "auto",
    progress: Callable[[Progress], None] | None = None,
    cancel: Token | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Merge into the folder `out`, which is complete or absent when this returns or fails.

    Args:
        recipe: as for `plan`, or a plan made before.
        out: the folder to make. Unfinished work lies in OUT.partial and is taken up again by the same call.
        resume: take up unfinished work; False discards it.
        overwrite: replace `out` if it exists.
        strict: refuse inputs that hold a NaN or an infinity.
        reader: how files are read; the result does not depend on it.
        progress: called with `Progress` as bytes move.
        cancel: stops the work when it is set; what was done is kept.
        options: those of `plan`; none beside a plan, which has them already.

    Returns:
        The report: measured figures, and the plan's under "predicted".

    Raises:
        what `plan` raises; OutputExists; MachineError (disk full, I/O error); Interrupted.
    """
    if isinstance(recipe, Plan) and options:
        raise TypeError(f"a plan has its {', '.join(options)} already; give the options to plan()")
    target = check_out(out, overwrite)
    with Watcher() as watcher:
        made = recipe if isinstance(recipe, Plan) else plan(recipe, **options)
        _check_apart(target, made)
        partial = target.with_name(target.name + ".partial")
        if resume and _is_complete(partial, made):
            with machine(partial):
                into_place(partial, target, overwrite)  # killed between the last sync and the rename
            return dict(json.loads((target / MANIFEST).read_bytes())["report"])
        _check_partial(partial, made, resume)
        settings = {"reader": reader, "strict": strict, "progress": progress, "cancelled": asks(cancel)}
        extra: dict[str, bytes] = {}
        if isinstance(made, LayerPlan):
            findings, writer = _sweep(made, target, overwrite, cancel, settings)
        elif isinstance(made, AnchorPlan):
            findings, writer = _anchor(made, target, overwrite, cancel, settings)
        elif isinstance(made, ComposePlan):
            findings, writer, extra = _learn(made, target, cancel, settings)
        else:
            findings, writer = _merge(made, target, cancel, settings)
    report = make_report(made, findings, watcher, writer.bytes_written)
    files, copies = _side_files(made)
    files |= extra
    manifest = {
        "recipe": made.recipe.canonical(),
        "digest": made.digest,
        "work": made.unfinished,
        "inputs": describe_inputs(made),
        "shards": {shard.name: writer.hashes[shard.name] for shard in made.layout.shards},
        "report": report,
    }
    writer.publish(files, copies, json.dumps(manifest, indent=1).encode(), overwrite)
    return report


def check_out(out: str | Path, overwrite: bool = False) -> Path:
    """The absolute path of an output folder, if a merge may make it.

    Raises:
        OutputExists: it is there already, or holds what no merge wrote.
        RecipeError: no folder can be made there.
    """
    target = Path(os.path.abspath(out))
    try:
        if not os.fspath(out) or os.path.dirname(target) == str(target):
            raise RecipeError(f"OUT is {str(out)!r}; name the folder to make")
        above = next(folder for folder in target.parents if folder.exists())
        if not above.is_dir():
            raise RecipeError(f"{out}: {above} is a file; choose another folder")
        if target.exists() and not overwrite:
            raise OutputExists(f"{out}: exists; --overwrite replaces it")
        if target.exists() and not ((target / MANIFEST).exists() or (target.is_dir() and not any(target.iterdir()))):
            raise OutputExists(
                f"{out}: --overwrite replaces what streammerge wrote and nothing else; remove it yourself"
            )
    except OSError as error:
        raise RecipeError(f"{out}: {error.strerror}; choose another folder") from error
    return target


def _check_apart(target: Path, made: Plan) -> None:
    """Refuse to write where an input lies: it would be gone."""
    for folder in (target, target.with_name(target.name + ".partial")):
        for checkpoint in made.inputs:
            if folder.resolve() in (checkpoint.path.resolve(), *checkpoint.path.resolve().parents):
                raise RecipeError(f"{target}: the input {checkpoint.path} lies there; choose another folder")


def _merge(made: Plan, target: Path, cancel: Token | None, options: dict[str, Any]) -> tuple[Findings, Writer]:
    """Tiles in the order of the output."""
    budget = Budget(made.ram_budget_bytes, made.held_bytes)
    run = open_run(made, budget, **options)
    make = functools.partial(Writer, target, made.layout.shards, made.unfinished)
    with _writing(make, made, budget, run) as writer, _kept(writer, options["strict"], cancel):
        _write_tiles(run, writer)
    return run.findings, writer


def _sweep(
    made: LayerPlan, target: Path, overwrite: bool, cancel: Token | None, options: dict[str, Any]
) -> tuple[Findings, Writer]:
    """Layers from last to first, each written when it is done."""
    check_votes_path(made, target, target.with_name(target.name + ".partial"), overwrite)
    budget = Budget(made.ram_budget_bytes, made.held_bytes)
    make = functools.partial(ScatterWriter, target, made.shards, made.unfinished, members=made.members)
    with _writing(make, made, budget) as writer:
        run = LayerRun(made, writer, budget, **options)
        with _kept(writer, options["strict"], cancel):
            run.work()
    (writer.partial / VOTES).unlink(missing_ok=True)
    return run.findings, writer


def _learn(
    made: ComposePlan, target: Path, cancel: Token | None, options: dict[str, Any]
) -> tuple[Findings, Writer, dict[str, bytes]]:
    """Sweeps that learn coefficients, then tiles in the order of the output; and the coefficients as a file."""
    budget = Budget(made.ram_budget_bytes, made.held_bytes)
    make = functools.partial(Writer, target, made.layout.shards, made.unfinished)
    told = {name: options[name] for name in ("reader", "progress", "cancelled")}
    with _writing(make, made, budget) as writer, _kept(writer, options["strict"], cancel):
        learning = Learning(made, writer.partial, **told)
        found, figures = learning.work()
        with closing(open_run(found.of_plan(made), budget, **options)) as run:
            _write_tiles(run, writer)
    learning.clean()
    run.findings.read_bytes += learning.findings.read_bytes
    run.findings.vram_peak_bytes = learning.findings.vram_peak_bytes
    run.findings.learned |= figures | found.figures()
    return run.findings, writer, {coefficients.NAME: found.write()}


def _anchor(
    made: AnchorPlan, target: Path, overwrite: bool, cancel: Token | None, options: dict[str, Any]
) -> tuple[Findings, Writer]:
    """The start's merge, then unit by unit, each written when it is done."""
    partial = target.with_name(target.name + ".partial")
    if made.save is not None:
        check_folder(made.save, target, partial, overwrite, own=partial.exists())
    budget = Budget(made.ram_budget_bytes, made.held_bytes)
    make = functools.partial(ScatterWriter, target, made.shards, made.unfinished, members=made.members)
    with _writing(make, made, budget) as writer:
        run = AnchorRun(made, writer, budget, **options)
        with _kept(writer, options["strict"], cancel):
            run.work()
    (writer.partial / KEPT).unlink(missing_ok=True)
    return run.findings, writer


def _write_tiles(run: Run, writer: Writer) -> None:
    """Merge everything that a plan has, each tensor to its place."""
    sink = FileSink(run.plan, writer)
    for _ in run.results(sink):
        pass
    sink.finish()


@contextmanager
def _writing(make: Callable[[Ring], W], made: Plan, budget: Budget, run: Run | None = None) -> Iterator[W]:
    """A writer on a ring of results. Both are closed in the end, and a run that was begun before them."""
    ring = Ring(budget, made.out_bytes, "the ring of results")
    writer: W | None = None
    try:
        writer = make(ring)
        yield writer
    finally:
        ring.stop()  # what waits for a place in it goes on, and ends
        if run is not None:
            run.close()
        if writer is not None:
            writer.close()
        ring.close()


@contextmanager
def _kept(writer: Writer, strict: bool, cancel: Token | None) -> Iterator[None]:
    """On any way out of the block, what is durable is in the journal."""
    try:
        yield
    except Closed:
        writer.check()
        raise
    except (Interrupted, KeyboardInterrupt):
        writer.park()
        code = getattr(cancel, "exit_code", 130)
        raise Interrupted(
            f"stopped; what is done is kept in {writer.partial}: run the same command again to go on", code
        ) from None
    except RecipeError:  # found on the way: a loss that is no number
        writer.discard()
        raise
    except CheckpointError:
        if strict:
            writer.discard()
        raise


def _is_complete(partial: Path, made: Plan) -> bool:
    """Whether a folder holds all of this plan's work, manifest included, and only the rename is missing."""
    if not (partial / MANIFEST).exists():
        return False
    try:
        return bool(json.loads((partial / MANIFEST).read_bytes())["work"] == made.unfinished)
    except (ValueError, KeyError):
        return False


def _check_partial(partial: Path, made: Plan, resume: bool) -> None:
    """Refuse to mix this work with another recipe's; discard it if asked to."""
    if not partial.exists():
        return
    if not resume:
        if any(partial.iterdir()) and not any((partial / name).exists() for name in (journal.NAME, MANIFEST)):
            raise OutputExists(f"{partial}: is not unfinished work of streammerge; remove it yourself")
        journal.discard(partial)
    elif not journal.is_blank(partial) and journal.read(partial).digest != made.unfinished:
        raise OutputExists(
            f"{partial}: holds unfinished work of another recipe or version, or an input changed since; "
            "--no-resume discards it"
        )


def _side_files(made: Plan) -> tuple[dict[str, bytes], list[Path]]:
    """Small files to write, and files to copy from the donor."""
    files: dict[str, bytes] = {}
    if made.layout.index is not None:
        files[made.layout.index_name] = made.layout.index
    if made.config is not None:
        files["config.json"] = json.dumps(made.config, indent=2).encode() + b"\n"
    return files, [path for path in made.donor.side_files if path.name not in files]


def asks(cancel: Token | None) -> Callable[[], bool]:
    return cancel.is_set if cancel is not None else lambda: False
