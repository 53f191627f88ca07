"""Runs one method over arrays in memory, cut into tiles as asked: what the contract tests of methods share."""

import itertools
import zlib
from itertools import pairwise

import numpy as np

from streammerge.engine.tiles import Crew, Merger, look, settle_in_memory
from streammerge.formats.dtypes import DTYPES
from streammerge.kernels.numerics import Span
from streammerge.method import Tile

NUMPY = {"F32": np.float32, "BF16": np.uint16, "F16": np.float16, "F64": np.float64}


def bf16(values):
    """fp32 to the nearest bf16, as bits."""
    raw = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((raw + 0x7FFF + ((raw >> 16) & 1)) >> 16).astype(np.uint16)


def widen(array):
    """An array of any of our dtypes as float64."""
    if array.dtype == np.uint16:
        array = (array.astype(np.uint32) << 16).view(np.float32)
    return array.astype(np.float64)


def span(array, first, last):
    dtype = {np.dtype(kind): name for name, kind in NUMPY.items()}[array.dtype]
    return Span(array.ctypes.data + first * DTYPES[dtype].bits // 8, dtype, last - first)


def run(method, base, experts, *, tile=0, threads=1, dtype=None, seed=0, name="tensor", streamed=False):
    """The merged array. `tile` cuts it into so many elements; `streamed` surveys tile by tile from a sample."""
    experts = [np.require(e, requirements="C") for e in experts]
    base = None if base is None else np.require(base, requirements="C")
    shape, numel = experts[0].shape, experts[0].size
    method = method.for_tensor(name, shape, len(experts))
    out = np.full(shape, 0, NUMPY[dtype] if dtype else experts[0].dtype)
    grain = method.grain(shape)
    size = max(grain, tile // grain * grain) if tile else max(1, numel)
    edges = [*range(0, numel, size), numel] if numel else [0, 0]
    tiles = [
        Tile(
            name=name,
            tensor_id=zlib.crc32(name.encode()),
            shape=shape,
            start=lo,
            numel=hi - lo,
            base=None if base is None else span(base, lo, hi),
            experts=tuple(span(e, lo, hi) for e in experts),
            out=span(out, lo, hi),
            seed=seed,
        )
        for lo, hi in pairwise(edges)
    ]
    crew = Crew(threads)
    try:
        survey = method.survey(shape, len(experts))
        if survey is not None and streamed:
            if survey.wants_sample:
                survey.sample([t.part(0, max(1, t.numel // 7)) for t in tiles], resident=False)
            rounds = method.rounds(len(experts))
            for number in itertools.count():
                reads = method.reads(min(number, rounds - 1), len(experts))
                if survey.settle(list(look(crew, method, survey, [t.only(reads) for t in tiles]))):
                    break
        elif survey is not None:
            settle_in_memory(crew, method, survey, tiles)
        merger = Merger(crew, method, survey)
        for each in tiles:
            merger.merge(each)
    finally:
        crew.close()
    return out, merger
