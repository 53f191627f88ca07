"""TSV-Merge and WUDI as their authors compute them, one matrix at a time, in plain torch: what ours is held against.

    tsvm_svd             every decomposition a whole SVD                                        arXiv:2412.00081
    wudi_autograd        Adam on the loss itself, T products of m x m per step and their gradients    arXiv:2503.08099
    wudi_gram_adam       the same steps from C and D, one product each: a plain loop, without what makes ours fast
    wudi_spectral_eigh   gradient flow for a time t through the eigenvectors of C               arXiv:2606.07289

Restated from the formulas in streammerge/methods/tsvm.py and wudi.py. Task vectors are [m, n] tensors of one device,
all of them at once; the merged one has their shape and the dtype of the arithmetic.

    python benchmarks/matrix_rivals.py tsvm_svd BASE OUT --expert DIR --expert DIR --matrix NAME --matrix NAME

merges checkpoint folders of one shard each: the matrices by that function, the rest by the mean of the task vectors.
Stdout is JSON with the seconds that the function took; reading and writing are not in them.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import click
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def tsvm_svd(deltas: Sequence[Tensor], rank: int | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
    """TSV-Merge with `rank` singular triplets of each expert; min(m, n) // T if it is left out."""
    (rows, columns), count = deltas[0].shape, len(deltas)
    kept = rank or min(rows, columns) // count
    lefts, values, rights = (
        deltas[0].new_empty(shape, dtype=dtype)
        for shape in ((rows, count * kept), (count * kept,), (count * kept, columns))
    )
    for i, delta in enumerate(deltas):  # copied, so that one whole decomposition is held at a time
        left, value, right = _svd(delta.to(dtype))
        some = slice(i * kept, (i + 1) * kept)
        lefts[:, some], values[some], rights[some] = left[:, :kept], value[:kept], right[:kept]
        del left, value, right
    return _nearest(lefts) * values @ _nearest(rights)


def _nearest(matrix: Tensor) -> Tensor:
    """The nearest matrix with orthonormal rows or columns."""
    left, _, right = _svd(matrix)
    return left @ right


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    driver = "gesvd" if matrix.is_cuda else None  # the default there, Jacobi's, is the slower one at these sizes
    found: tuple[Tensor, Tensor, Tensor] = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    return found


def wudi_autograd(
    deltas: Sequence[Tensor], iterations: int = 300, lr: float = 1e-5, dtype: torch.dtype = torch.float32
) -> Tensor:
    """WUDI with the authors' arithmetic: L = sum_i |(M - tau_i) tau_i^T|^2 / |tau_i|^2, and torch's own gradient."""
    stacked = torch.stack(list(deltas)).to(dtype)
    merged = stacked.sum(0).requires_grad_()
    sizes = stacked.square().sum((1, 2))
    adam = torch.optim.Adam([merged], lr=lr)
    for _ in range(iterations):
        products = (merged - stacked) @ stacked.mT  # [T, m, m]
        loss = (products.square() / sizes[:, None, None]).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return merged.detach()


def wudi_gram_adam(
    deltas: Sequence[Tensor], iterations: int = 300, lr: float = 1e-5, dtype: torch.dtype = torch.float32
) -> Tensor:
    """WUDI's steps with the gradient 2 (M C - D)."""
    merged, gram, target = _sums(deltas, dtype)
    adam = torch.optim.Adam([merged], lr=lr)
    for _ in range(iterations):
        merged.grad = 2 * (merged @ gram - target)
        adam.step()
    return merged


def wudi_spectral_eigh(deltas: Sequence[Tensor], t: float = 300.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gradient flow for a time t, not in units of the mean eigenvalue: M - (M C - D) V f(x) V^T, x C's eigenvalues."""
    merged, gram, target = _sums(deltas, dtype)
    values, vectors = torch.linalg.eigh(gram)
    values = values.clamp(min=1e-8)
    strength = -torch.expm1(-t * values) / values
    return merged - ((merged @ gram - target) @ vectors) * strength @ vectors.T


def _sums(deltas: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of the task vectors [m, n], C [n, n] and D [m, n]."""
    merged = torch.zeros_like(deltas[0], dtype=dtype)
    target = torch.zeros_like(merged)
    gram = merged.new_zeros(merged.shape[1], merged.shape[1])
    for delta in deltas:
        wide = delta.to(dtype)
        own = wide.T @ wide / wide.square().sum()
        merged += wide
        gram += own
        target += wide @ own
    return merged, gram, target


@click.command(help=__doc__.splitlines()[0] if __doc__ else None)
@click.argument("route", type=click.Choice(["tsvm_svd", "wudi_autograd", "wudi_gram_adam", "wudi_spectral_eigh"]))
@click.argument("base", type=click.Path(path_type=Path, exists=True))
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--expert", "experts", multiple=True, type=click.Path(path_type=Path, exists=True))
@click.option("--matrix", "matrices", multiple=True, help="A tensor that the route merges.")
@click.option("--steps", default=300, show_default=True, help="Of the two routes that use Adam.")
def main(route: str, base: Path, out: Path, experts: tuple[Path, ...], matrices: tuple[str, ...], steps: int) -> None:
    routes: dict[str, Callable[[Sequence[Tensor]], Tensor]] = {
        "tsvm_svd": tsvm_svd,
        "wudi_autograd": partial(wudi_autograd, iterations=steps),
        "wudi_gram_adam": partial(wudi_gram_adam, iterations=steps),
        "wudi_spectral_eigh": wudi_spectral_eigh,
    }
    merged, others = (load_file(base / "model.safetensors"), [load_file(e / "model.safetensors") for e in experts])
    seconds = 0.0
    for name, tensor in merged.items():
        deltas = [other[name] - tensor for other in others]
        if name in matrices:
            began = time.perf_counter()
            tensor += routes[route](deltas)
            seconds += time.perf_counter() - began
        else:
            tensor += torch.stack(deltas).mean(0)
    out.mkdir()
    for path in base.iterdir():
        if path.suffix != ".safetensors":
            shutil.copyfile(path, out / path.name)
    save_file(merged, out / "model.safetensors")
    print(json.dumps({"seconds": seconds, "steps": steps}))


if __name__ == "__main__":
    main()
