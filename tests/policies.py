"""Batching policies as users write them."""

import numba


@numba.njit
def every_field(batch):
    """A policy that depends on all it is told."""
    late = batch.waited > batch.parameter * batch.total_prefill_chunks
    short = batch.prefill_time * batch.prefilling <= batch.itl * (batch.decoding + 1)
    if late or (short and int(batch.time) % 3 == 1):
        return batch.free
    return 1 if batch.running < batch.queued else 0


@numba.njit
def static(batch):
    return batch.free if batch.running == 0 else 0


@numba.njit
def in_flight(batch):
    return batch.free


@numba.njit
def one_prefill(batch):
    return batch.prefilling == 0


@numba.njit
def negative_later(batch):
    return -1 if batch.time > 20 else 0


@numba.njit
def all_queued(batch):
    return batch.queued


@numba.njit
def divides(batch):
    return 1 // batch.decoding


@numba.njit
def least_waiting(view):
    """A router that depends on what it is told of the tick model."""
    workers = view.able.size
    if int(view.now) % 2:
        return view.request % workers
    best = 0
    for worker in range(1, workers):
        if view.waiting[worker] < view.waiting[best] or (
            view.waiting[worker] == view.waiting[best] and view.running[worker] > view.running[best]
        ):
            best = worker
    return best


@numba.njit
def nobody(view):
    return view.able.size


@numba.njit
def divides_by_none(view):
    return 1 // int(view.prefill_blocks[0])
