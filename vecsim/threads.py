"""Threads that share work in small pieces."""

import itertools
import os
import queue
import threading
from collections.abc import Callable
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
        One byte that kernels watch: set when a piece fails or the user interrupts.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        self.stop = np.zeros(1, np.uint8)

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
        todo = iter(list(itertools.pairwise(cuts)))
        # Not an executor: an interruption while it waits for many futures leaves some of them locked, and it hangs.
        done: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()

        def work() -> None:
            try:
                for first, last in todo:
                    if self.stop[0]:
                        break
                    task(first, last)
                    done.put(last - first)
            except BaseException as error:
                done.put(error)

        started: list[threading.Thread] = []
        try:
            for _ in range(min(self.threads, pieces)):
                started.append(threading.Thread(target=work, name="vecsim"))
                started[-1].start()
            for _ in range(pieces):
                result = done.get()
                if isinstance(result, BaseException):
                    raise result
                progress(result)
        except BaseException:
            self.stop[0] = 1
            raise
        finally:
            for thread in started:
                if thread.ident is not None:
                    thread.join()
