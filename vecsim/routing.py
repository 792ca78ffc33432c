"""Routers: how the worker for a request is chosen."""

from typing import Annotated, Any, Self

import msgspec

from vecsim.declaration import Declaration, Range, Time
from vecsim.own import compiled_rule, name_of, stands_for

Share = Annotated[float, Range(0, 1)]


class Router(Declaration, frozen=True, kw_only=True, tag=True):
    """How a worker is chosen for each request when it arrives. Equal ones go by number, the least first.

    What is drawn goes by the seed of the load: the same requests of the same seed meet the same draws.
    """

    def numbers(self) -> tuple[float, ...]:
        """Worth of a cached block, weight of prefill, temperature, latency of events [s], credits of host and disk."""
        return 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


class RoundRobinRouter(Router, frozen=True, kw_only=True, tag=True):
    """One after the other."""


class RandomRouter(Router, frozen=True, kw_only=True, tag=True):
    """Any worker, each as likely."""


class LeastOutstandingRouter(Router, frozen=True, kw_only=True, tag=True):
    """The worker with the fewest requests that were sent to it and have not ended."""


class PowerOfTwoRouter(Router, frozen=True, kw_only=True, tag=True):
    """Of two workers drawn at random, the one with fewer outstanding requests (Mitzenmacher, 2001).

    Of equal ones that which was drawn first.
    """


class LeastKVRouter(Router, frozen=True, kw_only=True, tag=True):
    """The worker with the least share of its KV memory in use."""


class SessionRouter(Router, frozen=True, kw_only=True, tag=True):
    """The worker that did the same for the session's last request; new sessions, and requests of none, take turns."""


class KVAwareRouter(Router, frozen=True, kw_only=True, tag=True):
    """The worker with the least to do for a request, cached blocks counted (Dynamo's second generation).

    A worker's cost, in blocks: prefill_load_scale x max(those of prompts yet to be computed there + those of this
    prompt - overlap_credit x those of this prompt that it has cached, 0) + those of the prompts of all requests there.
    Of equal ones any. Where prefill is kept apart, what is cached doesn't count for the worker that decodes, nor
    do the requests there for the one that prefills. Blocks must have one size in all of its pools.

    Parameters
    ----------
    overlap_credit : float
        Blocks' worth of a cached one; 0 is to look at the load alone.
    host_credit, disk_credit : float
        Share of that for a block that must be brought up from the worker's host memory, or its disk. These follow the
        leading ones in its GPU memory.
    prefill_load_scale : float
        Weight of blocks to be computed.
    temperature : float
        With 0 the least cost is chosen, else any with weight exp(-cost / temperature), the costs scaled to [0, 1].
    event_latency : float
        Seconds from the end of the step in which a worker caches or evicts a block (of the next one, if none is under
        way) until the router knows; from when a block comes to a lower tier, or goes.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    overlap_credit: Annotated[float, Range(0)] = 1.0
    prefill_load_scale: Annotated[float, Range(0)] = 1.0
    temperature: Annotated[float, Range(0)] = 0.0
    event_latency: Time = 0.0
    host_credit: Share = 0.75
    disk_credit: Share = 0.25

    def numbers(self) -> tuple[float, ...]:
        return (
            *(self.overlap_credit, self.prefill_load_scale, self.temperature, self.event_latency),
            *(self.host_credit, self.disk_credit),
        )


class OverlapRouter(Router, frozen=True, kw_only=True, tag=True):
    """The worker with the highest score (Dynamo's first generation).

    That is 2 x cached share of the prompt - KV use - share of waiting. KV use is the share of its KV memory in use; the
    requests that wait there are counted in those of the worker with the most.
    Of equal ones any. Lower tiers of caches don't count.

    Parameters
    ----------
    event_latency : float
        Seconds from the end of the step in which a worker caches or evicts a block until the router knows.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    event_latency: Time = 0.0

    def numbers(self) -> tuple[float, ...]:
        return 1.0, 1.0, 0.0, self.event_latency, 0.0, 0.0


class CustomRouter(Router, frozen=True, kw_only=True, tag=True):
    """A rule of the user's own.

    Parameters
    ----------
    rule : function
        Compiled with `numba.njit`. Gets the state of the workers and the request (see
        `vecsim.kernel.state.RouterView`) and returns the place of a worker; where that could not hold the request, the
        first that could is chosen. Text of the form "module:name" names one to be imported; so it is written in TOML.
    event_latency : float
        Seconds from the end of the step in which a worker caches or evicts a block until the router knows.

    Raises
    ------
    ValueError
        When the function isn't compiled, can't be, or returns no whole number.
    """

    rule: Any
    event_latency: Time = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        msgspec.structs.force_setattr(self, "rule", compiled_rule(self.rule, "router"))

    @classmethod
    def standing_for(cls, value: Any) -> Self | None:
        return cls(rule=value) if stands_for(value) else None

    @property
    def name(self) -> str:
        return name_of(self.rule)

    def numbers(self) -> tuple[float, ...]:
        return 1.0, 1.0, 0.0, self.event_latency, 0.0, 0.0


AnyRouter = (
    RoundRobinRouter
    | RandomRouter
    | LeastOutstandingRouter
    | PowerOfTwoRouter
    | LeastKVRouter
    | SessionRouter
    | KVAwareRouter
    | OverlapRouter
    | CustomRouter
)

# In the order of the codes of `vecsim.kernel.routing`
ROUTERS = (
    RoundRobinRouter,
    RandomRouter,
    LeastOutstandingRouter,
    PowerOfTwoRouter,
    LeastKVRouter,
    SessionRouter,
    KVAwareRouter,
    OverlapRouter,
    CustomRouter,
)

# Those that go by what the tick model has too
TICK_ROUTERS = (RoundRobinRouter, RandomRouter, LeastOutstandingRouter, PowerOfTwoRouter, CustomRouter)
