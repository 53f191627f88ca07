"""Which tensors a sweep votes on, which have their signs already, and which stay as they are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from streammerge.engine.voting import Voter
from streammerge.errors import CheckpointError, RecipeError
from streammerge.formats.dtypes import SIGNS
from streammerge.formats.header import TensorSpec, build_header
from streammerge.method import build, find
from streammerge.models.stack import Stack
from streammerge.planner.jobs import COPY, Job, Resolution
from streammerge.planner.steps import PlannedTensor
from streammerge.planner.transport import FORMAT, packed, sets_of
from streammerge.store.checkpoint import Checkpoint

SHOWN = 3  # names in a warning


@dataclass(frozen=True)
class Jobs:
    """Every tensor's job, told apart by what a sweep does for it."""

    jobs: tuple[Job, ...]
    voters: Mapping[str, Voter]  # of every tensor that is masked
    voted: tuple[str, ...]  # those of them whose signs a sweep finds
    warnings: tuple[str, ...]

    @property
    def alphas(self) -> tuple[float, ...]:
        """Those to choose from; tensors with one of their own have no say.

        Raises:
            RecipeError: tensors have lists of different lengths.
        """
        lists = {voter.alphas for voter in self.voters.values()}
        longest = max(lists, key=len, default=(0.0,))
        if any(len(each) not in (1, len(longest)) for each in lists):
            raise RecipeError("alpha has lists of different lengths; give one list, or equally long ones")
        return longest


def needs_samples(resolution: Resolution) -> bool:
    """Whether some tensor has no signs yet, so that there must be samples to vote."""
    return any(_is_open(job) for job in resolution.jobs)


def _is_open(job: Job) -> bool:
    """Whether the signs of a tensor are still to be found."""
    if job.method == COPY or job.parameters.get("whole") or job.parameters["mode"] == "random":
        return False
    return not any(spec.dtype == SIGNS for spec in job.experts)


def count_alphas(resolution: Resolution) -> int:
    """How many alphas there are to choose from."""
    found = [job.parameters["alpha"] for job in resolution.jobs if job.method != COPY]
    return max((len(each) for each in found if isinstance(each, tuple)), default=1)


def sort_out(resolution: Resolution, stack: Stack) -> Jobs:
    """What no layer runs with is copied, or passes."""
    inside = {name for stage in stack.stages for name in stage.tensors}
    known = {job.name for job in resolution.jobs if job.method != COPY}
    jobs: list[Job] = []
    voters: dict[str, Voter] = {}
    voted: list[str] = []
    outside: list[str] = []
    for job in resolution.jobs:
        if job.method != COPY and _is_open(job):
            if job.name in inside or stack.copies.get(job.name) in known:
                voted.append(job.name)
            else:
                outside.append(job.name)
                job = _unmatched(job)
        if job.method != COPY:
            voters[job.name] = build(find(job.method), job.parameters)  # type: ignore[assignment]
        jobs.append(job)
    shown = ", ".join([*outside[:SHOWN], *(["..."] if len(outside) > SHOWN else [])])
    told = f"{len(outside)} tensor{'' if len(outside) == 1 else 's'} that no layer runs with ({shown})"
    return Jobs(tuple(jobs), voters, tuple(voted), (told,) if outside else ())


def _unmatched(job: Job) -> Job:
    assert job.base is not None
    if job.parameters["unmatched"] == "pass":
        return replace(job, parameters=job.parameters | {"whole": True})
    return Job(job.name, None, (job.base,), {}, COPY, job.dtype, job.shape)


def votes_file(jobs: Jobs, target: Checkpoint) -> tuple[bytes, dict[str, TensorSpec], int]:
    """Header of a file of votes, the place of each tensor in it, and its size."""
    rows = [
        (job.name, "U8", (job.parameters["voters"], packed(job.base.numel)))
        for job in jobs.jobs
        if job.name in set(jobs.voted) and job.base is not None
    ]
    header = build_header(rows, {**FORMAT, "target": target.fingerprint()})
    found, at = {}, len(header)
    for name, dtype, shape in rows:
        found[name] = TensorSpec(name, dtype, shape, "", at, at + shape[0] * shape[1])
        at += shape[0] * shape[1]
    return header, found, at


def signed(job: Job, signs: Mapping[str, TensorSpec]) -> Job:
    """A job whose signs will be in the file of votes."""
    if job.name not in signs or job.base is None:
        return job
    return replace(job, experts=(*job.experts, *sets_of(signs[job.name], job.base.numel)))


def find_twins(stack: Stack, jobs: Jobs, planned: Mapping[str, PlannedTensor]) -> dict[str, list[str]]:
    """Tensors that are stored once more under other names, with those names."""
    twins: dict[str, list[str]] = {}
    for copy, first in stack.copies.items():
        if copy in jobs.voted:
            _check_twin(planned[copy], planned[first])
            twins.setdefault(first, []).append(copy)
    return twins


def _check_twin(copy: PlannedTensor, first: PlannedTensor) -> None:
    if (copy.job.dtype, copy.job.shape) != (first.job.dtype, first.job.shape):
        raise CheckpointError(
            f"tensors {copy.job.name!r} and {first.job.name!r} are one in the model and differ in dtype or shape; "
            "save the target again with transformers"
        )
