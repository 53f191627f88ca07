"""What the C library does with matrices that are freed."""

from __future__ import annotations

import ctypes
import sys
from functools import cache

APART = 4 << 20  # bytes of a block that goes back to the system as soon as it is freed
MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of mallopt(3)


@cache
def give_back() -> None:
    """From now on, and for all of this process, glibc maps blocks of APART bytes and more one by one.

    By itself it goes over to taking those up to 32 MiB, matrices of one to two thousand rows, from its heap, which then
    keeps much of what is freed: more than a prediction could allow for.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
        if mallopt is not None:
            mallopt(MMAP_THRESHOLD, APART)
