"""Compiled loops over rows of tensors on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def over_rows(loop: Callable[..., None], n: int, like: Tensor, *given: Tensor | int | None) -> None:
    """loop(rows, n, *given), block of rows by block, on the threads that torch may use; nothing on meta.

    There are as many rows as `like` has times n elements. Contiguous tensors are given by the address of the block's
    first row, those of one dimension whole; None is 0, numbers are themselves.
    """
    from streammerge.methods._spectra import crew_for

    rows = like.numel() // n
    if like.is_meta or not rows:
        return
    places = [_place(each, rows) for each in given]
    crew_for(like).each(lambda first, last: loop(last - first, n, *(at + first * step for at, step in places)), rows)


def _place(given: Tensor | int | None, rows: int) -> tuple[int, int]:
    """What the first row is given, and by how much it grows from row to row."""
    if given is None or isinstance(given, int):
        return given or 0, 0
    assert given.is_contiguous()
    return given.data_ptr(), given.numel() // rows * given.element_size() if given.dim() > 1 else 0
