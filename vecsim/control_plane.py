"""The control plane: what a fleet takes to learn of its workers, and workers that crash."""

import math
from itertools import pairwise
from typing import Annotated

from vecsim.declaration import Declaration, Range, Time

MeanTime = Annotated[float, Range(0, low_allowed=False, infinity_allowed=True)]
Number = Annotated[int, Range(0, 2**30)]


class ControlPlane(Declaration, frozen=True, kw_only=True):
    """How workers crash, who learns of it when, and what becomes of their requests.

    A crash strikes at the end of the step that is under way: its tokens are seen. All that the worker has in its memory
    is lost, and it starts again, which takes its pool's `start_up_time`. Routers learn of it when its lease ends: until
    then, requests that are sent to it fail to reach it, and are routed again. Those that it was serving migrate, or
    fail.

    Parameters
    ----------
    request_plane : float
        Seconds from a router's choice until the request is at the worker: also where it's only to have blocks reserved.
    queue_push, queue_pop : float
        Seconds into the queue for prefill, and from it to a worker.
    watch : float
        Seconds until routers learn that a worker is ready, or drains.
    ttl, renewal : float
        Seconds of a worker's lease, and between two renewals: routers notice a crash after `ttl` less a uniform share
        of `renewal`.
    connect_timeout : float
        Seconds until it is found that a worker can't be reached.
    shun : float
        Seconds that routers avoid such a worker.
    break_delay : float
        Seconds until the requests of a crashed worker learn of it: 0 where connections break at once.
    migration_limit : int
        How often a request may move to another worker, which computes its prompt and its tokens anew, before it fails.
    mtbf : float
        Mean time between failures of a worker, exponential, from when it is ready [seconds].
    crashes : tuple of (float, int)
        Crashes that are certain: when, and of which worker.
    restarts : bool
        Whether a worker that has crashed starts again.
    outages : tuple of (float, float)
        When the control plane is gone, and how long [seconds]: nobody learns of workers that come and go, nobody
        scales, and workers that can't renew their lease in time stop, to start again when it is over.

    Raises
    ------
    ValueError
        When a field has a wrong value: a lease below the renewal's interval, or outages that overlap.
    """

    request_plane: Time = 0.0
    queue_push: Time = 0.0
    queue_pop: Time = 0.0
    watch: Time = 0.0
    ttl: Time = 10.0
    renewal: Time = 5.0
    connect_timeout: Time = 1.0
    shun: Time = 5.0
    break_delay: Time = 0.0
    migration_limit: Number = 0
    mtbf: MeanTime = math.inf
    crashes: tuple[tuple[float, int], ...] = ()
    restarts: bool = True
    outages: tuple[tuple[float, float], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.connect_timeout == 0.0 and self.shun == 0.0:
            raise ValueError("connect_timeout or shun must be > 0, or a request could be sent again without end, got 0")
        if self.ttl < self.renewal:
            raise ValueError(f"ttl must be at least renewal, {self.renewal:g} s, got {self.ttl:g}")
        for field, events in (("crashes", self.crashes), ("outages", self.outages)):
            for event in events:
                if not 0 <= event[0] < math.inf:
                    raise ValueError(f"{field} must be at finite times >= 0, got {event}")
        for _, worker in self.crashes:
            if worker < 0:
                raise ValueError(f"crashes must be of workers >= 0, got {worker}")
        if list(self.crashes) != sorted(self.crashes):
            raise ValueError("crashes must be in the order of time")
        for start, lasts in self.outages:
            if not 0 < lasts < math.inf:
                raise ValueError(f"outages must last a finite time > 0, got {lasts:g} at {start:g}")
        for (start, lasts), (following, _) in pairwise(self.outages):
            if following <= start + lasts:
                raise ValueError(f"outages must not overlap or touch, got one at {following:g} in that from {start:g}")

    @property
    def fails(self) -> bool:
        """Whether anything crashes, or the control plane is ever gone."""
        return bool(self.crashes or self.outages) or self.mtbf < math.inf

    @property
    def matters(self) -> bool:
        """Whether a fleet whose workers neither come nor go differs from one without it."""
        return self.fails or max(self.request_plane, self.queue_push, self.queue_pop) > 0.0

    def kernel(self) -> tuple[float, ...]:
        """The numbers of the kernel, in their order."""
        return (
            *(self.request_plane, self.queue_push, self.queue_pop),
            *(self.watch, self.ttl, self.renewal, self.connect_timeout, self.shun, self.break_delay),
            *(float(self.migration_limit), self.mtbf, float(self.restarts)),
        )
