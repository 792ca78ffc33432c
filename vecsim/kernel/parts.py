"""Means over the requests of a disaggregated fleet: what their time to first token was made of. O(1) a request."""

import numpy as np

from vecsim.kernel.handover import NOTICED_AT, PREFILLED_AT, REMOTE, RESERVED_AT, TO_PREFILL_AT, TRANSFER_AT
from vecsim.kernel.jit import bare, inlined, unsigned
from vecsim.kernel.token_state import FIRST_AT, STARTED_AT

# Places in `parts`: share that was prefilled elsewhere, seconds of a transfer, then the parts of the time to first
# token in the order of `vecsim.paths.PARTS`
REMOTE_SHARE, TRANSFER_TIME, FIRST_PART = range(3)
PARTS = 9
MEANS = FIRST_PART + PARTS


@inlined
def placed_between(least, moment, following):
    """A moment that isn't before the least nor after the following one: that one where it isn't known."""
    return max(min(moment, following), least) if moment >= 0.0 else following


@bare
def write_parts(world):
    """Write the means over the measured requests that have a first token, once both parts of each are together.

    `vecsim.paths.first_token_moments` has the same moments of each request.
    """
    fleet, load, times, split = world.fleet, world.load, world.work.times, world.split
    instants, parts = fleet.instants, fleet.parts
    for i in range(parts.size):
        parts[i] = 0.0
    requests = transfers = remotes = 0
    for request in range(load.prompt_tokens.size):
        r = unsigned(request)
        arrived, first = load.arrived_at[r], times[FIRST_AT, r]
        if not first >= arrived or arrived < world.warmup:  # it has none, or isn't measured
            continue
        remote = fleet.way[REMOTE, r] == 1
        requests += 1
        remotes += remote
        routed = arrived + load.before_queue
        # Blocks were reserved before the prefill, unless a crash made it choose another worker after that
        first_reserved = remote and instants[RESERVED_AT, r] <= instants[TO_PREFILL_AT, r]
        reserved = instants[RESERVED_AT, r] if first_reserved else routed
        started = times[STARTED_AT, r]
        prefilled = instants[PREFILLED_AT, r] if remote else first
        began = noticed = decodes = prefilled
        if remote and instants[NOTICED_AT, r] >= 0.0:
            transfers += 1
            parts[TRANSFER_TIME] += instants[NOTICED_AT, r] - instants[TRANSFER_AT, r]
        if remote and not split.first_by_prefill:
            began, noticed = instants[TRANSFER_AT, r], instants[NOTICED_AT, r]
            decodes = fleet.times[STARTED_AT, r]
            if not decodes >= noticed:  # it lost its blocks before it was admitted
                decodes = noticed
        if world.control.changes:  # what was lost and done anew may be missing, or come after the token
            decodes = placed_between(routed, decodes, first)
            noticed = placed_between(routed, noticed, decodes)
            began = placed_between(routed, began, noticed)
            prefilled = placed_between(routed, prefilled, began)
            started = placed_between(routed, started, prefilled)
            reserved = placed_between(routed, reserved, started)
        parts[FIRST_PART] += routed - arrived
        parts[FIRST_PART + 1] += reserved - routed
        parts[FIRST_PART + 2] += started - reserved
        parts[FIRST_PART + 3] += prefilled - started
        parts[FIRST_PART + 4] += began - prefilled
        parts[FIRST_PART + 5] += noticed - began
        parts[FIRST_PART + 6] += decodes - noticed
        parts[FIRST_PART + 7] += first - decodes
        parts[FIRST_PART + 8] += load.per_token
    for i in range(parts.size):
        count = transfers if i == TRANSFER_TIME else requests
        parts[i] = parts[i] / count if count > 0 else np.nan
    parts[REMOTE_SHARE] = remotes / requests if requests > 0 else np.nan
