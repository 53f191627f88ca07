"""Speed of the CPU kernels, one thread and two, beside the same formula in torch eager (one thread).

    python benchmarks/host_kernels.py [--numel 33554432] [--only NAME]

GB/s counts every byte that the formula must touch once: inputs and output, not temporaries. `copy` is the ceiling:
what one thread of this machine reads plus writes in a plain copy. Best of five; one thread is timed by its processor
time (a neighbour that takes the core does not count), two threads by the clock. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from streammerge import kernel
from streammerge.kernels import numerics, reference
from streammerge.kernels.host import sign_elect
from streammerge.kernels.numerics import ITEMSIZE, Array, Span

Part = Callable[[int, int], object]  # works on elements [start, stop)


class Row(NamedTuple):
    name: str
    bytes_per_element: int
    part: Part
    torch: Callable[[], object] | None


def cut(span: Span, start: int, stop: int) -> Span:
    return Span(span.address + start * ITEMSIZE[span.dtype], span.dtype, stop - start)


def add_deltas(dtype: str, experts: int, numel: int) -> Row:
    tensors = reference.tensors(numel, (dtype,), experts + 2, "cpu", 0, odd=False)
    out, base, *others = spans = reference.spans(tensors)
    coefs = np.array([[1, *np.linspace(0.3, 0.6, experts)]], np.float32)

    def part(a: int, b: int) -> object:
        return kernel.run("add_deltas", cut(out, a, b), cut(base, a, b), [cut(s, a, b) for s in others], coefs, a)

    def eager() -> object:
        b = tensors[1].float()
        total = sum(float(c) * (t.float() - b) for c, t in zip(coefs[0, 1:], tensors[2:], strict=True))
        return tensors[0].copy_(b + total)

    return Row(f"add_deltas {dtype} K={experts}", ITEMSIZE[dtype] * len(spans), part, eager)


def histogram(label: str, low: int, shift: int, bins: int, numel: int) -> Row:
    _, *tensors = reference.tensors(numel, ("BF16",), 3, "cpu", 0, odd=False)
    base, expert = reference.spans(tensors)

    def part(a: int, b: int) -> object:
        counts = np.zeros(bins + 2, np.int64)
        return kernel.run("magnitude_histogram", cut(base, a, b), cut(expert, a, b), low, shift, counts)

    def eager() -> object:
        key = (tensors[1].float() - tensors[0].float()).abs().view(torch.int32)
        return torch.bincount((key - low).clamp(-1, (bins << shift) - 1) + 1 >> shift)

    return Row(f"magnitude_histogram {label}", 4, part, eager)


def signs(label: str, elect: bool, trims: Array | None, density: float | None, numel: int) -> Row:
    tensors = reference.tensors(numel, ("BF16",), 5, "cpu", 0, odd=False)
    out, base, *others = reference.spans(tensors)
    weights = np.array([0.3, 0.4, 0.5], np.float32)

    def part(a: int, b: int) -> object:
        drop = None if density is None else sign_elect.Drop(density, 7, 9, (0, 1, 2), a)
        spans = cut(out, a, b), cut(base, a, b), [cut(s, a, b) for s in others]
        return kernel.run("sign_elect", *spans, weights, None, 1.0, elect, elect, trims, None, drop)

    def eager() -> object:
        b, votes = tensors[1].float(), []
        for weight, t in zip(weights, tensors[2:], strict=True):
            v = t.float() - b
            if trims is not None:
                v = v * (v.abs() > 0.1)
            if density is not None:
                v = v * torch.bernoulli(torch.full_like(v, density))
            votes.append(float(weight) * v)
        stack = torch.stack(votes)
        if elect:
            majority = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
            mask = stack.sign() == majority
            stack = stack * mask
            b = b + stack.sum(0) / (mask * torch.from_numpy(weights)[:, None]).sum(0).clamp(min=1e-9)
        else:
            b = b + stack.sum(0)
        return tensors[0].copy_(b)

    return Row(f"sign_elect {label} K=3", 10, part, eager)


def dropped(numel: int) -> Row:
    _, *tensors = reference.tensors(numel, ("BF16",), 3, "cpu", 0, odd=False)
    base, expert = reference.spans(tensors)

    def part(a: int, b: int) -> object:
        partials = np.empty((-(-(b - a) // 4096), 2))
        return kernel.run("drop_rescale", cut(base, a, b), cut(expert, a, b), 0.3, 7, 9, 0, a, partials)

    def eager() -> object:
        delta = tensors[1].float() - tensors[0].float()
        return delta.abs().sum(), (delta * torch.bernoulli(torch.full_like(delta, 0.3))).abs().sum()

    return Row("drop_rescale BF16", 4, part, eager)


def norms(count: int, columns: int | None, numel: int) -> Row:
    _, base, *others = reference.tensors(numel, ("BF16",), count + 2, "cpu", 0, odd=False)
    b_span, spans, pairs = reference.span(base), reference.spans(others), count * (count + 1) // 2

    def part(a: int, b: int) -> object:
        cuts = [cut(s, a, b) for s in spans], cut(b_span, a, b)
        if columns:
            return kernel.host("norms_and_dots").columns(*cuts, columns, np.zeros((columns, pairs)))
        return kernel.run("norms_and_dots", *cuts, 4096, np.empty((-(-(b - a) // 4096), pairs)))

    def eager() -> object:
        rows = [(t.double() - base.double()).view(-1, columns or 1) for t in others]
        products = [x * y for i, x in enumerate(rows) for y in rows[i:]]
        return [p.sum(0) for p in products] if columns else torch.stack([p.sum() for p in products])

    name = f"norms_and_dots M={count}" + (f" columns={columns}" if columns else "")
    return Row(name, 2 * (count + 1), part, eager)


def rows(numel: int, only: str) -> Iterator[Row]:
    source, target = np.ones(numel, np.uint16), np.ones(numel, np.uint16)
    low = int(np.float32(0.1).view(np.int32))
    trims = np.array([(low, 0, 1 << 40, *sign_elect.ALL[3:])] * 3, np.int64)
    makers: dict[str, Callable[[], Row]] = {
        "copy": lambda: Row("copy", 4, lambda a, b: np.copyto(target[a:b], source[a:b]), None),
        "add_deltas": lambda: add_deltas("BF16", 2, numel),
        "add_deltas 4": lambda: add_deltas("BF16", 4, numel),
        "add_deltas f32": lambda: add_deltas("F32", 2, numel),
        "add_deltas f16": lambda: add_deltas("F16", 2, numel),
        "add_deltas f8": lambda: add_deltas("F8_E4M3", 2, numel),
        "histogram": lambda: histogram("whole, 65536 bins", 0, 15, 1 << 16, numel),
        "histogram narrow": lambda: histogram("one bracket of 2^15 keys", low >> 15 << 15, 0, 1 << 15, numel),
        "sign_elect ties": lambda: signs("trim+elect", True, trims, None, numel),
        "sign_elect dare": lambda: signs("drop", False, None, 0.3, numel),
        "sign_elect all": lambda: signs("trim+drop+elect", True, trims, 0.3, numel),
        "drop_rescale": lambda: dropped(numel),
        "norms": lambda: norms(2, None, numel),
        "columns": lambda: norms(2, 4096, numel),
    }
    for name, make in makers.items():
        if only in name:
            yield make()


def best(work: Callable[[], object], repeats: int = 5, clock: Callable[[], float] = time.thread_time) -> float:
    seconds = []
    for _ in range(repeats):
        start = clock()
        work()
        seconds.append(clock() - start)
    return min(seconds)


def philox_rate() -> float:
    """Random words per second and thread, in units of 1e9."""
    import numba

    philox, blocks, calls = numerics.philox, 1 << 10, 1 << 10

    @numba.njit(nogil=True, error_model="numpy")  # type: ignore[misc]
    def draw(words: Array) -> None:
        for i in range(calls):
            philox(words, i * blocks, blocks, 7, 9, 0)

    words = np.empty(4 * blocks, np.uint32)
    draw(words)
    return 4e-9 * blocks * calls / best(lambda: draw(words))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--numel", type=int, default=1 << 25)
    parser.add_argument("--only", default="")
    options = parser.parse_args()
    torch.set_num_threads(1)
    numel, half, results = options.numel, options.numel // 2 // 4096 * 4096, {}
    print(f"{'':44}{'1 thread':>20}{'2 threads':>12}{'torch':>12}{'ratio':>8}")
    with ThreadPoolExecutor(2) as pool:
        for row in rows(numel, options.only):
            size = row.bytes_per_element * numel / 1e9
            row.part(0, numel)
            one = best(lambda row=row: row.part(0, numel))
            halves = (0, half), (half, numel)
            two = best(lambda row=row, h=halves: list(pool.map(row.part, *h)), clock=time.perf_counter)
            eager = best(row.torch, 2) if row.torch else one
            print(
                f"{row.name:44}{size / one:7.1f} GB/s {numel / one / 1e9:5.2f} G/s{size / two:7.1f} GB/s"
                f"{size / eager:7.1f} GB/s{eager / one:7.1f}x"
            )
            results[row.name] = {"GB/s": round(size / one, 2), "GB/s_2": round(size / two, 2)}
            results[row.name] |= {"Gelements/s": round(numel / one / 1e9, 3), "torch_GB/s": round(size / eager, 2)}
    print(f"{'philox':44}{'':12}{(words := philox_rate()):7.2f} Gwords/s")
    results["philox"] = {"Gwords/s": round(words, 3)}
    print(json.dumps({"benchmark": "host_kernels", "numel": numel, "torch": torch.__version__, "rows": results}))


if __name__ == "__main__":
    main()
