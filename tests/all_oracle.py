"""Fleets that change and fail, with tiers below their workers' caches: `changing_oracle` and `tier_oracle` in one.

    simulate(requests, fleet, **as changing_oracle.simulate) -> changing_oracle.Result

`fleet` has `tier_oracle.TieredWorkers`. Chosen where neither has a rule:

- A worker that crashes, or is off, has nothing in its tiers, nor anything on its way up or down. Who waits there to be
  brought up, or is being brought up, learns of a crash as those do that are served there.
- What was brought up for a request, and when, is told of the admission that its hits are told of: the first one at a
  worker that serves all of it, the last one at a prefill worker.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import changing_oracle
from changing_oracle import ChangingRequest, ChangingWorker, Result
from tier_oracle import Tier, TieredPool, TieredSimulation, TieredWorker


@dataclass(eq=False)
class Worker(ChangingWorker, TieredWorker):
    def empty(self) -> None:
        for request in self.sent:
            request.rose, request.in_line = None, False
        super().empty()
        self.pool = TieredPool(self.blocks, self.kind.uncached_first)
        self.sightings, self.rising, self.done = Counter(), [], []
        self.tiers = [
            Tier(tier.capacity, tier.bandwidth, came=tier.came, went=tier.went, dropped=tier.dropped)
            for tier in self.tiers
        ]


class Simulation(changing_oracle.Simulation, TieredSimulation):
    worker_type = Worker

    def send(self, worker: Worker, request: ChangingRequest) -> None:
        if not request.holds and tells(request):
            told = request.of or request
            told.rose_tokens = (0, 0)
            told.rise_began_at = told.rise_ended_at = None
        super().send(worker, request)

    def note(self, request: ChangingRequest, name: str, value: Any) -> None:
        if tells(request):
            super().note(request, name, value)

    def lose(self, worker: Worker) -> None:
        for request in worker.rising:
            self.note(request, "rise_began_at", None)
        super().lose(worker)
        self.stop_moving(worker)

    def turn_off(self, worker: Worker, reason: str) -> None:
        super().turn_off(worker, reason)
        self.stop_moving(worker)

    def stop_moving(self, worker: Worker) -> None:
        self.tier_flows = [flow for flow in self.tier_flows if flow.link[0] != worker.number]


def tells(request: ChangingRequest) -> bool:
    """Whether hits of its next admission are those that are told."""
    return request.of is not None or not (request.admitted_at or request.prefill_ended_at is not None)


def simulate(requests: Any, fleet: Any, **fields: Any) -> Result:
    """Serve the requests to the end, or as long as steps begin before the time limit."""
    return changing_oracle.simulate(requests, fleet, **fields, simulation_type=Simulation)
