"""Threads that share work in small pieces."""

import itertools
import os
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np

# A piece of work for one thread costs about this many simulated steps or requests: some 20 ms.
PIECE = 2_000_000

# Below this many, threads cost more than they save.
INLINE = 500_000


def available_threads() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Workers:
    """Threads that share a range of work in small pieces, whoever is free taking the next.

    Attributes
    ----------
    stop : numpy.ndarray
        One byte that kernels watch: set when the main thread leaves the `with` block, for whatever reason.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.stop = np.zeros(1, np.uint8)
        self._pool: ThreadPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error: object) -> None:
        if self._pool is not None:
            self.stop[0] = 1
            self._pool.shutdown(cancel_futures=True)

    def share(
        self,
        task: Callable[[int, int], Any],
        size: int,
        cost: float,
        progress: Callable[[int], Any] = lambda done: None,
    ) -> None:
        """Call `task(first, last)` over range(size) in pieces; `cost` is that of the whole range."""
        if cost < INLINE:
            task(0, size)
            progress(size)
            return
        # At least some pieces a thread, so that all end at about the same time.
        least = 4 * self.threads if self.threads > 1 else 1
        pieces = int(min(size, max(cost / PIECE, least)))
        cuts = [size * i // pieces for i in range(pieces + 1)]
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="vecsim")
        sizes: dict[Future[Any], int] = {
            self._pool.submit(task, first, last): last - first for first, last in itertools.pairwise(cuts)
        }
        waiting = set(sizes)
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                progress(sizes[future])
