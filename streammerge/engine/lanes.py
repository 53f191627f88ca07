"""Tensors that are settled side by side, each on one core: decompositions gain little from a second one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Lanes:
    """`count` threads that compute alone. With one lane there is no thread: work is done on all cores when it comes.

    Work rounds the same on one core as on many, so nobody can see from a result how many lanes there were.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._cores = 0  # that torch used before
        self._pool: ThreadPoolExecutor | None = None

    def do(self, work: Callable[[], None]) -> Future[None]:
        """Start work; the future has what it raised."""
        if self.count > 1:
            return self._threads().submit(work)
        done: Future[None] = Future()
        work()
        done.set_result(None)
        return done

    def _threads(self) -> ThreadPoolExecutor:
        if self._pool is None:
            import torch

            self._cores = torch.get_num_threads()
            self._pool = ThreadPoolExecutor(self.count, "lane", initializer=torch.set_num_threads, initargs=(1,))
        return self._pool

    def close(self) -> None:
        """Wait for what runs, drop what waits."""
        if self._pool is not None:
            import torch

            self._pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(self._cores)  # its products' library has one number for all threads
            self._pool = None
