"""What looks and does not merge: `inspect`, `diff`, `verify`, the methods' descriptions, the demo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from streammerge import method as methods
from streammerge.engine.compare import compare
from streammerge.store.checkpoint import Checkpoint
from streammerge.store.hub import locate
from streammerge.store.verify import verify as verify_folder


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
    """Every method and post-processing, or one: what it does, its source, what it must see, its parameters."""
    rows = []
    posts = methods.posts()
    for each in [name] if name else sorted([*methods.names(), *posts]):
        cls = methods.find_post(each) if each in posts else methods.find(each)
        rows.append(
            {
                "name": each,
                "post": each in posts,
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
