"""Where every output tensor lies: shard names, headers and offsets, known before the first read.

The base model's names, order and shards are kept unless the recipe makes a new stack or a shard size is asked for.
Data starts at a page; tensors follow each other without holes, as the format wants, sorted by item size only if their
order would leave one misaligned.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.formats.dtypes import DTYPES
from streammerge.formats.header import build_header
from streammerge.formats.index import build_index
from streammerge.planner.jobs import Job
from streammerge.store.writer import Shard

SHARD_SIZE = 5 * 10**9  # bytes of tensors in a shard where a new layout is made
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Place:
    """A job with its shard (a number) and its absolute bytes in that file."""

    job: Job
    shard: int
    begin: int
    end: int


@dataclass(frozen=True)
class Layout:
    """Every shard of the output, every tensor's place in output order, and the index file if there is more than one."""

    shards: tuple[Shard, ...]
    places: tuple[Place, ...]
    index: bytes | None
    index_name: str


def lay_out_output(
    jobs: Sequence[Job],
    kept: Sequence[tuple[str, Sequence[str]]] | None,
    shard_size: int | None,
    metadata: Mapping[str, str],
) -> Layout:
    """Group jobs into shards and give each tensor its bytes.

    Args:
        jobs: in output order.
        kept: the base's shards as (file name, tensor names), or None for a new layout.
        shard_size: bytes of tensors in a shard; overrides `kept`.
        metadata: the header's `__metadata__`; `format` is added, for loaders that insist on it.
    """
    by_name = {job.name: job for job in jobs}
    if kept is not None and shard_size is None:
        groups = [(file, [by_name[name] for name in names]) for file, names in kept]
    else:
        groups = _grouped(jobs, shard_size or SHARD_SIZE)
    shards: list[Shard] = []
    places: list[Place] = []
    for number, (file, members) in enumerate(groups):
        members = _aligned(members)
        header = build_header([(j.name, j.dtype, j.shape) for j in members], {"format": "pt", **metadata})
        at = len(header)
        for job in members:
            end = at + _bytes(job)
            places.append(Place(job, number, at, end))
            at = end
        shards.append(Shard(file, header, at))
    index = None
    if len(shards) > 1 or (kept is not None and shard_size is None and groups[0][0] != "model.safetensors"):
        weight_map = {place.job.name: shards[place.shard].name for place in places}
        index = build_index(weight_map, sum(place.end - place.begin for place in places))
    return Layout(tuple(shards), tuple(places), index, INDEX)


def _bytes(job: Job) -> int:
    return math.prod(job.shape) * DTYPES[job.dtype].bits // 8


def _grouped(jobs: Sequence[Job], shard_size: int) -> list[tuple[str, list[Job]]]:
    groups: list[list[Job]] = [[]]
    size = 0
    for job in jobs:
        if groups[-1] and size + _bytes(job) > shard_size:
            groups.append([])
            size = 0
        groups[-1].append(job)
        size += _bytes(job)
    if len(groups) == 1:
        return [("model.safetensors", groups[0])]
    return [(f"model-{i:05}-of-{len(groups):05}.safetensors", group) for i, group in enumerate(groups, 1)]


def _aligned(jobs: list[Job]) -> list[Job]:
    """The jobs in their order, or by falling item size if that order would misalign one."""
    at = 0
    for job in jobs:
        if at % max(1, DTYPES[job.dtype].bits // 8):
            return sorted(jobs, key=lambda job: -DTYPES[job.dtype].bits)
        at += _bytes(job)
    return jobs
