"""streammerge: merge fine-tuned checkpoints inside a memory budget that you name.

    import streammerge as sm
    plan = sm.plan("recipe.yml", ram="4GiB")
    report = sm.merge("recipe.yml", "out", ram="4GiB", progress=callback, cancel=token)
    for name, tensor in sm.stream("recipe.yml", ram="4GiB"): ...
    merged = sm.merge_state_dicts([sd_a, sd_b], base=sd_0, method="ties", parameters={"density": 0.5})
    report = sm.gradfix(sm.Stack.of(build, shapes, batches[0]), batches, loss, target="b", ...)
    report = sm.atlas(sm.Stack.of(build, shapes, batches[0]), batches, loss, base_model="b", ...)

Nothing here is global, patched or seeded; torch is imported only where tensors are handed out.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from streammerge.api import atlas, diff, gradfix, inspect, merge, merge_state_dicts, plan, report, stream, verify
    from streammerge.errors import (
        BudgetTooSmall,
        CheckpointError,
        Interrupted,
        MachineError,
        OutputExists,
        RecipeError,
        StreamMergeError,
    )
    from streammerge.models.stack import Stack

_HOMES = {
    "Stack": "streammerge.models.stack",
    **dict.fromkeys(
        ("atlas", "diff", "gradfix", "inspect", "merge", "merge_state_dicts", "plan", "report", "stream", "verify"),
        "streammerge.api",
    ),
    **dict.fromkeys(
        (
            "BudgetTooSmall",
            "CheckpointError",
            "Interrupted",
            "MachineError",
            "OutputExists",
            "RecipeError",
            "StreamMergeError",
        ),
        "streammerge.errors",
    ),
}

__all__ = [
    "BudgetTooSmall",
    "CheckpointError",
    "Interrupted",
    "MachineError",
    "OutputExists",
    "RecipeError",
    "Stack",
    "StreamMergeError",
    "__version__",
    "atlas",
    "diff",
    "gradfix",
    "inspect",
    "merge",
    "merge_state_dicts",
    "plan",
    "report",
    "stream",
    "verify",
]


def __getattr__(name: str) -> Any:
    """Public names are imported when first used: `import streammerge` costs nothing."""
    if name not in _HOMES:
        raise AttributeError(f"module 'streammerge' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
