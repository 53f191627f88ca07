"""GradFix on tensors in memory: ballots of gradients or panels, masks, and a case that was worked by hand."""

import zlib
from itertools import pairwise

import numpy as np
import torch

from streammerge import kernel
from streammerge.engine.tiles import Crew, Merger, settle_in_memory
from streammerge.formats.dtypes import SIGNS
from streammerge.kernels.numerics import Span
from streammerge.method import Tile
from streammerge.methods._ballots import Ballot
from streammerge.methods._masked_whole import MaskedWhole
from streammerge.methods.gradfix import GradFix

NAN, INF = float("nan"), float("inf")
# Worked by hand: one weight [2, 3] of a linear layer, three samples of two, one and two tokens; dW = G^T X.
SAMPLES = [
    ([[1, -1], [-1, 2]], [[1, 2, 0], [3, -1, 0]], [[-2, 3, 0], [5, -4, 0]]),
    ([[2, 1]], [[-1, 1, 0]], [[-2, 2, 0], [-1, 1, 0]]),
    ([[0, 1], [1, 0]], [[4, 0, 0], [1, -3, 0]], [[1, -3, 0], [4, 0, 0]]),
]
TAU = [[0.5, -0.25, 0.125], [-1, 2, -0.5]]
VOTES = [[1, -1, 0], [-1, 0, 0]]
SUM = [[-3, 2, 0], [8, -3, 0]]
MASKED = [[0.5, -0.25, 0], [-1, 0, 0]]
MEAN_MASKED = [[0.5, -0.25, 0], [-1, 2, 0]]


def tensor(values):
    return torch.tensor(values, dtype=torch.float32)


def ballot(gradients, mean=False, tasks=None, apart=False):
    """The ballot of these per-sample gradients."""
    gradients = [tensor(each) for each in gradients]
    tasks = tasks or [0] * len(gradients)
    made = Ballot(gradients[0].numel(), tasks, mean, apart, torch.device("cpu"))
    for number, gradient in enumerate(gradients):
        made.add(gradient, number)
    made.close()
    return made


def panels(samples, mean=False, tasks=None, apart=False):
    """The same of a linear layer's panels."""
    tasks = tasks or [0] * len(samples)
    made = Ballot(len(samples[0][0][0]) * len(samples[0][1][0]), tasks, mean, apart, torch.device("cpu"))
    for number, (outputs, inputs, *_) in enumerate(samples):
        made.add_panel(tensor(inputs), tensor(outputs), number)
    made.close()
    return made


def votes(made):
    return [list(made._found[task].tolist()) for task in sorted(made._found)]


def span(values):
    kinds = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int8: "I8", torch.int16: "I16", torch.float16: "F16"}
    return Span(values.data_ptr(), kinds[values.dtype], values.numel())


def packed(signs):
    """Two-bit signs in memory, as a file has them, with who owns it."""
    memory = np.zeros(-(-signs.numel() // 4), np.uint8)
    kernel.host("sign_mask").pack(Span(memory.ctypes.data, "U8", memory.size), span(signs))
    return memory, Span(memory.ctypes.data, SIGNS, signs.numel())


def apply(method, target, taus, signs, *, source=None, name="w", cuts=(), threads=1, out=None, seed=0, told=None):
    """target + alpha * masked task vectors; the fine-tuned models are source + tau, exactly."""
    source = torch.zeros_like(target) if source is None else source
    experts = [source + tau for tau in taus]
    out = torch.full_like(target, NAN) if out is None else out
    spans = [each if isinstance(each, Span) else span(each) for each in signs]
    method = method.for_tensor(name, tuple(target.shape), len(taus)) if isinstance(method, GradFix) else method
    tile = Tile(
        name=name,
        tensor_id=zlib.crc32(name.encode()),
        shape=tuple(target.shape),
        start=0,
        numel=target.numel(),
        base=span(target),
        experts=(*(span(each) for each in experts), span(source), *spans),
        out=span(out),
        seed=seed,
    )
    edges = [0, *cuts, target.numel()]
    tiles = [tile.part(first, last) for first, last in pairwise(edges)]
    crew = Crew(threads)
    survey = method.survey(tile.shape, len(tile.experts)) or method.tally(tile.shape)
    if isinstance(method, MaskedWhole):
        settle_in_memory(crew, method, survey, tiles)
    merger = Merger(crew, method, survey)
    for each in tiles:
        merger.merge(each)
    crew.close()
    if told is not None:
        told.update(survey.figures, flags=merger.flags)
    return out


def masked(tau, signs, mode="agreement"):
    """mask(tau, signs) alone; signs are votes or a ballot."""
    tau = tensor(tau)
    spans = signs.signs() if isinstance(signs, Ballot) else [signs]
    return apply(GradFix(alpha=1.0, mode=mode), torch.zeros_like(tau), [tau], spans)


def signed(values):
    return torch.tensor(values, dtype=torch.int8)


def random_gradients(count, numel=500, seed=0):
    dice = np.random.default_rng(seed)
    return [np.where(dice.random(numel) < 0.2, 0, dice.standard_normal(numel)).tolist() for _ in range(count)]
