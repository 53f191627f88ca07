"""The same merge without files: `stream` tensor by tensor, `merge_state_dicts` in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from streammerge import method as methods
from streammerge.api.merging import Token, asks
from streammerge.api.planning import RecipeLike, check_numbers, plan
from streammerge.budget import Budget, cores
from streammerge.engine.anchor_plan import AnchorPlan
from streammerge.engine.composing_plan import ComposePlan
from streammerge.engine.findings import Progress
from streammerge.engine.memory import merge_tensors
from streammerge.engine.run import open_run
from streammerge.engine.sinks import MemorySink
from streammerge.engine.sweeping import LayerPlan
from streammerge.engine.tiles import Crew
from streammerge.errors import RecipeError
from streammerge.formats.dtypes import DTYPES, from_recipe
from streammerge.planner import recipe as recipes
from streammerge.planner.plan import Plan
from streammerge.store.reader import Mode

if TYPE_CHECKING:
    import torch


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
    if why := _refusal(made):
        raise RecipeError(f"{made.recipe.merge_method} {why}; use merge")
    budget = Budget(made.ram_budget_bytes, made.held_bytes)
    run = open_run(made, budget, reader=reader, progress=progress, cancelled=asks(cancel))
    try:
        with budget.lease(made.out_bytes, "the results of a step"):
            sink = MemorySink(made)
            for index in run.results(sink):
                job = made.tensors[index].job
                yield job.name, _shaped(torch.from_numpy(sink.take(index)), job.dtype, job.shape)
    finally:
        run.close()


def _refusal(made: Plan) -> str:
    """Why a plan is not to be had tensor by tensor, behind the method's name; empty if it is."""
    if isinstance(made, ComposePlan):  # learned coefficients make an ordinary merge
        return "" if made.given is not None else "learns before it merges: stream takes its coefficients from a file"
    if isinstance(made, AnchorPlan):
        return "merges unit by unit, with anchors that it makes first"
    return "runs on layers, from the last to the first" if isinstance(made, LayerPlan) else ""


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
    post: str | Mapping[str, Any] | None = None,
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
        post: what is done to the merge of each tensor, as in a recipe: "svc" or {"svc": {"floor": 0.5}}.
        dtype: of the result ("bfloat16"); that of the base, or of the first model, if left out.

    Raises:
        RecipeError: unknown method or parameter, too few or too many models, a base is missing or not wanted.
        CheckpointError: a tensor is missing in a model, or shapes differ.
    """
    check_numbers(threads, seed)
    cls = methods.find(method) if post is None else methods.beside_base(methods.find(method))
    values = recipes.check_parameters(cls, method, parameters or {}, len(models))
    if cls.needs_base and base is None:
        raise RecipeError(f"{method} needs a base")
    if cls.base_is_expert and base is not None:
        raise RecipeError(f"{method} takes no base; give it as one of the models")
    made = methods.build(methods.find(method), values)
    if not isinstance(made, methods.TileMethod):
        raise RecipeError(f"{method} is a {made.sees} method; merge_state_dicts has no layers to run, use merge")
    if post is not None:
        after, name, given = recipes.find_post(post, "post")
        values = recipes.check_parameters(after, name, given, len(models))
        made = cast(methods.TileMethod, methods.build(after, {"of": made, **values}))
    if why := made.refusal("cpu"):
        raise RecipeError(f"{method} {why}")
    crew = Crew(threads or cores())
    try:
        stored = None if dtype is None else from_recipe(dtype)
        return merge_tensors(made, models, base, stored, crew, seed)
    finally:
        crew.close()
