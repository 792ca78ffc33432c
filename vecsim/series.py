"""Series of a fleet, from those of its workers."""

import numpy as np

from vecsim.kernel.state import Array


def total_over_time(time: Array, values: Array, worker: Array) -> tuple[Array, Array]:
    """Sum over workers of a number that each sets when it begins a step.

    Parameters
    ----------
    time, values, worker : array
        [step] When a step begins, the number then, and the worker; each worker's steps in their order.

    Returns
    -------
    time, total : array
        [step] In the order of time.
    """
    if not worker.any():
        return time, values
    change = np.empty_like(values)
    order = np.argsort(worker, kind="stable")
    first = np.diff(worker[order], prepend=-1) != 0
    change[order] = np.where(first, values[order], np.diff(values[order], prepend=0))
    order = np.argsort(time, kind="stable")
    return time[order], np.cumsum(change[order])


def mean_in_intervals(begin: Array, lasts: Array, values: Array, edges: Array) -> Array:
    """Time-weighted mean of a number in intervals; 0 where nothing lasts.

    Parameters
    ----------
    begin, lasts, values : array
        [step] When a step begins, how long it takes, and the number during it; in the order of time.
    edges : array
        [interval + 1] Ascending.
    """
    if not begin.size:
        return np.zeros(edges.size - 1)
    knots = np.stack([begin, begin + lasts], -1).ravel()
    spent = np.cumsum(np.stack([np.zeros(begin.size), lasts * values], -1).ravel())
    return np.diff(np.interp(edges, knots, spent)) / np.diff(edges)
