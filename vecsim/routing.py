"""Routers: how the worker for a request is chosen."""

from vecsim.declaration import Declaration


class Router(Declaration, frozen=True, kw_only=True, tag=True):
    """How a worker is chosen for each request when it arrives. Equal ones go by number, the least first.

    What is drawn goes by the seed of the load: the same requests of the same seed meet the same draws.
    """


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


AnyRouter = RoundRobinRouter | RandomRouter | LeastOutstandingRouter | PowerOfTwoRouter | LeastKVRouter | SessionRouter

# In the order of the codes of `vecsim.kernel.routing`
ROUTERS = (
    RoundRobinRouter,
    RandomRouter,
    LeastOutstandingRouter,
    PowerOfTwoRouter,
    LeastKVRouter,
    SessionRouter,
)
