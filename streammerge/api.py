"""merge = plan, run, report; the same without files as `stream`, and in memory as `merge_state_dicts`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from streammerge import method as methods
from streammerge.budget import Budget, cores, default_ram, parse_size
from streammerge.engine.compare import compare
from streammerge.engine.memory import merge_tensors
from streammerge.engine.report import Watcher, make_report
from streammerge.engine.run import Progress, Run
from streammerge.engine.sinks import FileSink, MemorySink
from streammerge.engine.tiles import Crew
from streammerge.errors import CheckpointError, Interrupted, OutputExists, RecipeError
from streammerge.formats.dtypes import DTYPES, from_recipe
from streammerge.planner import recipe as recipes
from streammerge.planner.dialect import resolve
from streammerge.planner.plan import Limits, Plan, describe_inputs, make_plan
from streammerge.store import journal
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.hub import locate
from streammerge.store.reader import Mode
from streammerge.store.ring import Closed, Ring
from streammerge.store.verify import verify as verify_folder
from streammerge.store.writer import MANIFEST, Writer, into_place, machine

if TYPE_CHECKING:
    import torch

RecipeLike = str | Path | Mapping[str, Any] | recipes.Recipe
DEVICES = ("auto", "cpu")


class Token(Protocol):
    """Whatever can say that the work should stop: a threading.Event, for one."""

    def is_set(self) -> bool: ...


def plan(
    recipe: RecipeLike,
    *,
    ram: str | int | None = None,
    vram: str | int | None = None,
    device: str = "auto",
    threads: int = 0,
    shard_size: str | int | None = None,
    seed: int = 0,
    in_memory: bool = False,
) -> Plan:
    """What a merge would read, hold and write, from headers alone.

    Args:
        recipe: a YAML file, a mapping of the same form, or a Recipe.
        ram: bytes of host memory the process may hold ("4GiB"); 80 % of what is free if left out.
        vram: bytes of device memory.
        device: "auto" or "cpu".
        threads: for the arithmetic; all processors if 0. The result does not depend on it.
        shard_size: bytes of tensors in an output shard; the base model's own shards if left out.
        seed: of the methods that draw random numbers.
        in_memory: count two of the largest results, as `stream` holds them.

    Raises:
        RecipeError, CheckpointError: the request or an input is wrong.
        BudgetTooSmall: the merge does not fit; `least` would do.
    """
    _check_device(device)
    _check_numbers(threads, seed)
    limits = Limits(
        ram=default_ram() if ram is None else _size("--ram", ram),
        threads=threads or cores(),
        device="cpu",
        shard_size=None if shard_size is None else _size("--shard-size", shard_size),
        seed=seed,
        in_memory=in_memory,
    )
    if vram is not None:
        _size("--vram", vram)
    parsed, near = _load(recipe)
    checkpoints = {name: Checkpoint.open(locate(name, near)) for name in parsed.references}
    resolution = resolve(parsed, checkpoints, methods.find)
    return make_plan(parsed, resolution, checkpoints, limits)


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
        budget = Budget(made.ram_budget_bytes, made.held_bytes)
        run = Run(made, budget, reader=reader, strict=strict, progress=progress, cancelled=_asks(cancel))
        ring = Ring(budget, made.out_bytes, "the ring of results")
        writer: Writer | None = None
        try:
            writer = Writer(target, made.layout.shards, made.unfinished, ring)
            _work(run, writer, strict, cancel)
        finally:
            ring.stop()
            run.close()
            if writer is not None:
                writer.close()
            ring.close()
    report = make_report(made, run.findings, watcher, writer.bytes_written)
    files, copies = _side_files(made)
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


def _work(run: Run, writer: Writer, strict: bool, cancel: Token | None) -> None:
    """Drive the run; on any way out, what is durable is in the journal."""
    sink = FileSink(run.plan, writer)
    try:
        for _ in run.results(sink):
            pass
        sink.finish()
    except Closed:
        writer.check()
        raise
    except (Interrupted, KeyboardInterrupt):
        writer.park()
        code = getattr(cancel, "exit_code", 130)
        raise Interrupted(
            f"stopped; what is done is kept in {writer.partial}: run the same command again to go on", code
        ) from None
    except CheckpointError:
        if strict:
            writer.discard()
        raise


def stream(
    recipe: RecipeLike | Plan,
    *,
    cancel: Token | None = None,
    progress: Callable[[Progress], None] | None = None,
    reader: Mode = "auto",
    **options: Any,
) -> Iterator[tuple[str, torch.Tensor]]:
    """The merged tensors one after the other, in the order of the base model's files; nothing is written.

    The tensor that is handed out and the one being made come on top of the rings: plan with `in_memory`, and the budget
    counts the largest of them twice.

    A dtype that torch lacks (F6_E2M3 and its like) comes as flat bytes.

    Args:
        recipe: as for `plan`, or a plan made with `in_memory`.
        options: those of `plan`.

    Raises:
        what `merge` raises, while it is iterated.
    """
    import torch

    made = recipe if isinstance(recipe, Plan) else plan(recipe, in_memory=True, **options)
    budget = Budget(made.ram_budget_bytes, made.held_bytes)
    run = Run(made, budget, reader=reader, progress=progress, cancelled=_asks(cancel))
    try:
        with budget.lease(made.out_bytes, "the results of a step"):
            sink = MemorySink(made)
            for index in run.results(sink):
                job = made.tensors[index].job
                yield job.name, _shaped(torch.from_numpy(sink.take(index)), job.dtype, job.shape)
    finally:
        run.close()


def _shaped(raw: torch.Tensor, dtype: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor's bytes in its dtype and shape; flat bytes where torch has no such dtype, pairs of F4 as torch does."""
    import torch

    known = getattr(torch, DTYPES[dtype].torch or "", None)
    if known is None:
        return raw
    if DTYPES[dtype].bits < 8:
        shape = (*shape[:-1], shape[-1] * DTYPES[dtype].bits // 8)
    return raw.view(known).reshape(shape) if raw.numel() else torch.empty(shape, dtype=known)


def merge_state_dicts(
    models: Sequence[Mapping[str, torch.Tensor]],
    *,
    method: str,
    base: Mapping[str, torch.Tensor] | None = None,
    parameters: Mapping[str, Any] | None = None,
    dtype: str | None = None,
    threads: int = 0,
    seed: int = 0,
) -> dict[str, torch.Tensor]:
    """Merge state dicts that are in memory; the result is what `merge` would have written, to the bit.

    Args:
        models: the experts, each a mapping of names to tensors.
        method: a method's name.
        base: the base model, for methods that merge relative to one.
        parameters: by their recipe names; per-model ones as one value or a list with one for each model.
        dtype: of the result ("bfloat16"); that of the base, or of the first model, if left out.

    Raises:
        RecipeError: unknown method or parameter, too few or too many models, a base is missing or not wanted.
        CheckpointError: a tensor is missing in a model, or shapes differ.
    """
    _check_numbers(threads, seed)
    cls = methods.find(method)
    values = recipes.check_parameters(cls, method, parameters or {}, len(models))
    if cls.needs_base and base is None:
        raise RecipeError(f"{method} needs a base")
    if cls.base_is_expert and base is not None:
        raise RecipeError(f"{method} takes no base; give it as one of the models")
    made = methods.build(cls, values)
    if not isinstance(made, methods.TileMethod):
        raise RecipeError(f"{method} is a {made.sees} method; merge_state_dicts runs tile methods")
    crew = Crew(threads or cores())
    try:
        stored = None if dtype is None else from_recipe(dtype)
        return merge_tensors(made, models, base, stored, crew, seed)
    finally:
        crew.close()


def inspect(model: str | Path) -> dict[str, Any]:
    """What a checkpoint holds, from its headers: totals, and per tensor name, dtype, shape, bytes and shard."""
    checkpoint = Checkpoint.open(locate(str(model), []))
    specs = list(checkpoint.tensors.values())
    counts: dict[str, int] = {}
    for spec in specs:
        counts[spec.dtype] = counts.get(spec.dtype, 0) + spec.numel
    return {
        "path": str(checkpoint.path),
        "tensors": len(specs),
        "parameters": sum(spec.numel for spec in specs),
        "bytes": sum(spec.nbytes for spec in specs),
        "dtypes": counts,
        "shards": len(checkpoint.shards),
        "architectures": (checkpoint.config or {}).get("architectures"),
        "entries": [
            {
                "name": spec.name,
                "dtype": spec.dtype,
                "shape": list(spec.shape),
                "bytes": spec.nbytes,
                "shard": Path(spec.file).name,
            }
            for spec in specs
        ],
    }


def diff(one: str | Path, other: str | Path) -> Iterator[dict[str, Any]]:
    """How two checkpoints differ: a row per tensor, those that only one has or that do not match in form first."""
    a, b = (Checkpoint.open(locate(str(model), [])) for model in (one, other))
    for name in [*a.tensors, *(n for n in b.tensors if n not in a.tensors)]:
        left, right = a.tensors.get(name), b.tensors.get(name)
        if left is None or right is None:
            yield {"name": name, "state": "only in the first" if right is None else "only in the second"}
        elif (left.dtype, left.shape) != (right.dtype, right.shape):
            forms = [f"{spec.dtype} {list(spec.shape)}" for spec in (left, right)]
            yield {"name": name, "state": f"{forms[0]} against {forms[1]}"}
    for change in compare(a, b):
        yield {
            "state": "changed" if change.changed else "same",
            **asdict(change),
            "shape": list(change.shape),
        }


def verify(out: str | Path, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """Re-hash a merged folder against its manifest; "bad" lists the shards that are missing or differ."""
    return verify_folder(Path(out), progress)


def demo(folder: str | Path, *, ram: str = "512MiB", fresh: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Train a tiny base model and three experts in `folder`, merge them by every method, compare; the results.

    Raises:
        StreamMergeError: transformers is not installed, or a merge failed.
    """
    from rich.console import Console

    from streammerge.demo import run

    return run(Path(folder), ram=ram, fresh=fresh, console=Console(quiet=True) if quiet else None)


def describe_methods(name: str | None = None) -> list[dict[str, Any]]:
    """Every method, or one: what it does, its source, what it must see, its parameters."""
    rows = []
    for each in [name] if name else methods.names():
        cls = methods.find(each)
        rows.append(
            {
                "name": each,
                "summary": cls.summary,
                "source": cls.source,
                "sees": cls.sees,
                "base_model": "needed" if cls.needs_base else "optional",
                "models": [cls.min_experts, cls.max_experts],
                "kernels": list(cls.kernels),
                "parameters": [
                    {
                        "name": p.name,
                        "default": None if p.default is methods.REQUIRED else p.default,
                        "required": p.default is methods.REQUIRED,
                        "per_expert": p.per_expert,
                        "meaning": p.meaning,
                    }
                    for p in methods.parameters(cls).values()
                ],
            }
        )
    return rows


def _load(recipe: RecipeLike) -> tuple[recipes.Recipe, list[Path]]:
    """The recipe, and the folders beside the current one in which its models may lie."""
    if isinstance(recipe, recipes.Recipe):
        return recipe, []
    if isinstance(recipe, Mapping):
        return recipes.from_dict(recipe), []
    return recipes.load(recipe), [Path(recipe).resolve().parent]


def _check_device(device: str) -> None:
    if device not in DEVICES:
        raise RecipeError(f"--device {device}: only the CPU pipeline is built; use one of {', '.join(DEVICES)}")


def _check_numbers(threads: int, seed: int) -> None:
    if threads < 0:
        raise RecipeError(f"--threads {threads}: give the number of threads, 0 for all processors")
    if not 0 <= seed < 1 << 64:
        raise RecipeError(f"--seed {seed}: give a number from 0 to 2^64 - 1")


def _size(option: str, given: str | int) -> int:
    """The bytes that an option asks for."""
    try:
        found = parse_size(given)
    except RecipeError as error:
        raise RecipeError(f"{option}: {error}") from None
    if found < 1:
        raise RecipeError(f"{option} {given}: must be more than nothing; write it as 4GiB, 4GB or 500M")
    return found


def _asks(cancel: Token | None) -> Callable[[], bool]:
    return cancel.is_set if cancel is not None else lambda: False


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
