"""Scenarios of the token model: prepare the requests, run the step loop, tally. Each call does a range of rows."""

import math

import numpy as np

from vecsim.kernel import token_state
from vecsim.kernel.address import call_fleet_loop, call_token_loop
from vecsim.kernel.jit import bare, entry, inner, unsigned
from vecsim.kernel.placed import placed
from vecsim.kernel.quantiles import weighted_quantiles
from vecsim.kernel.scenarios import fill_arrivals
from vecsim.kernel.state import (
    ALONE,
    DONE,
    INTERRUPTED,
    OUT_OF_REQUESTS,
    TOO_LONG,
    Cache,
    Control,
    Fleet,
    Formula,
    Life,
    Memory,
    Place,
    Policy,
    Router,
    Split,
    StepModel,
    Tiers,
    TokenLoad,
    Transfer,
    World,
)
from vecsim.kernel.tally import E2E, QUEUE_TIME, TPOT, TTFT, write_latencies
from vecsim.kv_cache import ENDLESS as ENDLESS_BLOCKS
from vecsim.kv_cache import TIER_FIELDS
from vecsim.lengths import MOST_TOKENS
from vecsim.load import AT_ONCE, CAP, CLASS, CLOSED, EVENLY, GROUP, OUTPUT, PIECEWISE, PROMPT, TURNS

# What a scenario is told, number by number
FIELDS = (
    *Policy._fields,
    *Memory._fields,
    *Formula._fields,
    "context_step",
    "tables",  # first term of its step-time table, and how many it has
    "terms",
    "arrivals",
    "request_rate",
    "requests",
    "think_time",
    "stage",  # first of its stages, and how many
    "stages",
    "repeats",
    "capped",
    "prefix_tokens",
    "prefix_groups",
    "sessions",
    "session_think",
    "trace",  # first request of its trace's ids, -1 if there are none
    "id_blocks",  # blocks that an id stands for
    "first_class",
    "classes",
    "before_queue",
    "per_token",
    "at_completion",
    "fleet",  # its row in the fleets, -1 if it is one engine alone
    "seed",
)

# What a fleet is told: where its kinds of workers begin, and how many there are; how many workers; then its routers,
# how prefill is kept apart, and how keys and values move
ROUTER_FIELDS = ("code", "credit", "scale", "decode_counts", "temperature", "latency", "host_credit", "disk_credit")
FLEET_FIELDS = (
    "first_group",
    "groups",
    "workers",
    *(f"router.{name}" for name in ROUTER_FIELDS),
    *(f"prefill_router.{name}" for name in ROUTER_FIELDS),
    *Split._fields,
    *Transfer._fields,
    *Control._fields,
)
FIRST_GROUP, GROUPS, WORKERS, ROUTER = range(4)
PREFILL_ROUTER = ROUTER + len(ROUTER_FIELDS)
SPLIT = PREFILL_ROUTER + len(ROUTER_FIELDS)
TRANSFER = SPLIT + len(Split._fields)
CONTROL = TRANSFER + len(Transfer._fields)
# What each kind is told: the numbers of an engine; how many workers there may be of it, and are at first; the seconds
# that one takes to start (of a lognormal time, mean and deviation of its logarithm); its GPUs; what is below its cache
GROUP_WORKERS = len(FIELDS)
READY_WORKERS, START_UP, START_UP_SIGMA, GROUP_GPUS, TIERS = range(GROUP_WORKERS + 1, GROUP_WORKERS + 6)
GROUP_FIELDS = TIERS + len(TIER_FIELDS)
CAPACITY, OFFLOAD_BATCH, IN_FLIGHT, DISK_AFTER, BLOCK_BYTES = (
    TIERS + TIER_FIELDS.index(name)
    for name in ("host_blocks", "offload_batch", "offloads_in_flight", "disk_after", "block_bytes")
)

POLICY = 0
MEMORY = POLICY + len(Policy._fields)
MODEL = MEMORY + len(Memory._fields)
TABLES, TERMS, ARRIVALS, RATE, REQUESTS, THINK, STAGE, STAGES, REPEATS, CAPPED = range(
    FIELDS.index("tables"), FIELDS.index("tables") + 10
)
(
    PREFIX_TOKENS, PREFIX_GROUPS, SESSIONS, SESSION_THINK, TRACE, ID_BLOCKS, FIRST_CLASS, CLASSES, BEFORE_QUEUE,
    PER_TOKEN, AT_COMPLETION, FLEET, SEED,
) = range(FIELDS.index("prefix_tokens"), FIELDS.index("prefix_tokens") + 13)  # fmt: skip

# Fields of a class
URGENCY, TTFT_LIMIT, TPOT_LIMIT, ITL_LIMIT, E2E_LIMIT, CLASS_FIELDS = range(6)

# So many rounds of stages without a request are passed over at once
MANY_ROUNDS = 1000.0

# Metrics of a class, after those of all requests
CLASS_METRICS = 3


@inner
def policy_of(p):
    return Policy(
        int(p[0]), int(p[1]), int(p[2]), p[3] != 0, int(p[4]), p[5] != 0, p[6] != 0, p[7] != 0, p[8] != 0, int(p[9]),
        int(p[10]), p[11] != 0, p[12] != 0, int(p[13]), p[14] != 0, int(p[15]), p[16] != 0, p[17], p[18], p[19],
        int(p[20]), int(p[21]), int(p[22]), p[23] != 0, p[24],
    )  # fmt: skip


@inner
def memory_of(p):
    return Memory(
        int(p[MEMORY]),
        int(p[MEMORY + 1]),
        int(p[MEMORY + 2]),
        int(p[MEMORY + 3]),
        p[MEMORY + 4] != 0,
        p[MEMORY + 5] != 0,
        p[MEMORY + 6] != 0,
    )


@inner
def model_of(p, streams):
    first, terms = int(p[TABLES]), int(p[TERMS])
    formula = Formula(
        int(p[MODEL]), p[MODEL + 1], p[MODEL + 2], p[MODEL + 3], p[MODEL + 4], p[MODEL + 5], p[MODEL + 6], p[MODEL + 7],
        p[MODEL + 8], int(p[MODEL + 9]),
    )  # fmt: skip
    terms_of_it = streams.terms[first : first + terms]
    return StepModel(formula, int(p[MODEL + 10]), terms_of_it, streams.grids, streams.values, streams.outside)


@bare
def fill_stages(stages, first, number, repeats, scale, units, time_limit, out):
    """Due times of a load whose rate changes in stages; returns how many come before the limit."""
    t = area = 0.0
    stage = 0
    n = out.size - 1
    area_of_all = time_of_all = 0.0
    for i in range(first, first + number):
        time_of_all += stages[i, 0]
        area_of_all += stages[i, 0] * stages[i, 1]
    for i in range(n):
        target = units[i] / scale
        if repeats and target - area > MANY_ROUNDS * area_of_all:
            rounds = math.floor((target - area) / area_of_all) - 1.0
            area += rounds * area_of_all
            t += rounds * time_of_all
        while True:
            duration, rate = stages[first + stage, 0], stages[first + stage, 1]
            is_last = stage == number - 1 and not repeats
            # An area too small to be added up never comes to more.
            if rate > 0.0 and (is_last or area + rate * duration >= target or area + rate * duration == area):
                out[i] = t + (target - area) / rate
                break
            if is_last or t >= time_limit:
                out[i] = np.inf
                break
            area += rate * duration
            t += duration
            stage = stage + 1 if stage + 1 < number else 0
        if not out[i] < time_limit:
            n = i
            break
    out[n] = np.inf
    return n


@inner
def stream_of(streams, at):
    """The values of a stream."""
    return streams.values[streams.start[at] : streams.start[at] + streams.size[at]]


@inner
def prepare(p, numbers, arrival_stream, streams, time_limit, scratch):
    """Make a scenario's requests in `scratch`.

    Returns (status, requests, those of them whose time of arrival is known).
    """
    arrivals = int(p[ARRIVALS])
    wanted = int(p[REQUESTS])
    arrived_at, prompt, output, caps = (
        scratch.arrived_at,
        scratch.prompt_tokens,
        scratch.output_tokens,
        scratch.max_tokens,
    )
    outputs = stream_of(streams.numbers, numbers[OUTPUT])
    prompts = stream_of(streams.numbers, numbers[PROMPT])
    room = min(outputs.size, prompts.size, prompt.size)
    has_sessions = p[SESSIONS] != 0
    turns = stream_of(streams.numbers, numbers[TURNS])
    available = min(room, turns.size) if has_sessions else room
    if arrivals == CLOSED:
        static = min(wanted, available)
        arrived_at[:static] = 0.0
        arrived_at[static:] = np.inf
        n = available
        if static < wanted:
            return OUT_OF_REQUESTS, n, static
    else:
        units = stream_of(streams.arrivals, arrival_stream)
        if arrivals not in (AT_ONCE, EVENLY):
            available = min(available, units.size)
        out = arrived_at[: min(wanted, available) + 1]
        if arrivals == PIECEWISE:
            static = fill_stages(
                streams.stages, int(p[STAGE]), int(p[STAGES]), p[REPEATS] != 0, p[RATE], units, time_limit, out
            )
        else:
            static = fill_arrivals(arrivals, p[RATE], units, time_limit, out)
        n = static
        if static == available < wanted:
            return OUT_OF_REQUESTS, n, static
    if has_sessions:
        for i in range(static):
            n += turns[i] - 1
        if n > room:
            return OUT_OF_REQUESTS, n, static

    prefix_tokens = int(p[PREFIX_TOKENS])
    for i in range(n):
        output[i] = outputs[i]
        prompt[i] = prompts[i] + prefix_tokens
    if p[CAPPED] != 0:
        cap = stream_of(streams.numbers, numbers[CAP])
        for i in range(n):
            caps[i] = cap[i]
            output[i] = min(output[i], cap[i])
    if p[CLASSES] > 1:
        classes = stream_of(streams.numbers, numbers[CLASS])
        for i in range(n):
            scratch.classes[i] = classes[i] - 1
    if has_sessions:
        follower, think = scratch.follower, scratch.think
        last = static
        for i in range(static):
            before = i
            for _ in range(turns[i] - 1):
                follower[before] = last
                think[last] = p[SESSION_THINK]
                arrived_at[last] = np.inf
                tokens = prompt[last] + int(prompt[before]) + output[before] - prefix_tokens
                if tokens > MOST_TOKENS:
                    return TOO_LONG, n, static
                prompt[last] = tokens
                scratch.classes[last] = scratch.classes[i]
                before = last
                last += 1
            follower[before] = -1
    return DONE, n, static


@inner
def name_blocks(p, numbers, streams, memory, scratch, n, static):
    """Which blocks of the requests have given ids, and which; returns (ids, blocks with given ids) in all."""
    size = memory.block_size
    prompt, output, shared, own_start = scratch.prompt_tokens, scratch.output_tokens, scratch.shared, scratch.own_start
    prefix, prefix_id, own_id = scratch.prefix, scratch.prefix_id, scratch.own_id
    total = ids = 0
    if p[TRACE] >= 0:
        first, ratio = int(p[TRACE]), int(p[ID_BLOCKS])
        for i in range(n):
            scratch.id_start[i] = streams.id_start[first + i]
            shared[i] = min(int(streams.id_count[first + i]) * ratio, prompt[i] // size)
            own_start[i] = total
            total += shared[i]
        return streams.ids.size * ratio, total
    prefix_blocks = int(p[PREFIX_TOKENS]) // size
    ids = prefix_blocks * int(p[PREFIX_GROUPS])
    groups = stream_of(streams.numbers, numbers[GROUP])
    has_sessions = p[SESSIONS] != 0
    for i in range(n):
        prefix[i] = prefix_blocks
        prefix_id[i] = (groups[i] - 1) * prefix_blocks
        shared[i] = prefix_blocks
    if has_sessions:
        follower = scratch.follower
        for i in range(static):
            at = i
            while True:
                prefix_id[at] = prefix_id[i]
                own_id[at] = ids - prefix_blocks
                shared[at] = (prompt[at] + output[at]) // size
                if follower[at] < 0:
                    break
                at = follower[at]
            ids += max(shared[at] - prefix_blocks, 0)
    for i in range(n):
        own_start[i] = total
        total += shared[i]
    return ids, total


@inner
def late(limit, value):
    """Whether a latency exceeds its limit; no limit is infinite."""
    return value > limit


@inner
def tally(p, policy, memory, load, work, scratch, classes, warmup, n, wanted, out):
    """Write the row of metrics of one scenario: the order of `vecsim.variables.TOKEN_VARIABLES`, then by class."""
    counts, sums, own, times = work.counts, work.sums, work.own, work.times
    arrived_at, output = load.arrived_at, load.output_tokens
    per_token, at_completion = load.per_token, load.at_completion
    values = scratch.values
    e2e, ttft, tpot, queue_time = values[E2E], values[TTFT], values[TPOT], values[QUEUE_TIME]
    end_time = sums[token_state.END_TIME]
    queue_time_sum = ttft_sum = e2e_sum = tpot_sum = 0.0
    queue_time_max = ttft_max = e2e_max = tpot_max = 0.0
    queue_time_min = ttft_min = e2e_min = tpot_min = np.inf
    arrived = started = first_tokens = completed = tpots = tokens = dropped = failed = preempted = good = 0
    backlog = sums[token_state.BACKLOG]
    number_of_classes = int(p[CLASSES])
    first_class = int(p[FIRST_CLASS])
    stats = wanted.size + 2
    by_class = out[5 * stats + SCALARS :]
    by_class[:] = np.nan
    for i in range(CLASS_METRICS * number_of_classes):
        by_class[i] = 0.0
    for i in range(n):
        r = unsigned(i)
        state = own[token_state.STATE, r]
        if state == token_state.UNSEEN:
            continue
        came = arrived_at[r]
        if state == token_state.QUEUED:
            backlog += max(end_time - max(times[token_state.SINCE, r], warmup), 0.0)
        if came < warmup:
            continue
        arrived += 1
        if state == token_state.DROPPED_AT_ONCE:
            dropped += 1
            if number_of_classes > 0:
                by_class[CLASS_METRICS * token_state.class_of(load, r) + 1] += 1
            continue
        if state == token_state.FAILED:
            failed += 1
            if number_of_classes > 0:
                by_class[CLASS_METRICS * token_state.class_of(load, r) + 1] += 1
        preempted += own[token_state.PREEMPTIONS, r]
        value = times[token_state.STARTED_AT, r] - came
        if not value >= 0.0:  # it has not started
            continue
        queue_time[unsigned(started)] = value
        queue_time_sum += value
        queue_time_max = max(queue_time_max, value)
        queue_time_min = min(queue_time_min, value)
        started += 1
        first = times[token_state.FIRST_AT, r] - came + per_token
        if not first >= 0.0:
            continue
        ttft[unsigned(first_tokens)] = first
        ttft_sum += first
        ttft_max = max(ttft_max, first)
        ttft_min = min(ttft_min, first)
        first_tokens += 1
        if state != token_state.GONE:
            tokens += token_state.generated(counts, own, i)
            continue
        length = int(output[r])
        tokens += length
        last = times[token_state.ENDED_AT, r] - came + length * per_token
        value = last + at_completion
        e2e[unsigned(completed)] = value
        e2e_sum += value
        e2e_max = max(e2e_max, value)
        e2e_min = min(e2e_min, value)
        completed += 1
        mean_gap = 0.0
        if length > 1:
            mean_gap = (last - first) / (length - 1)
            tpot[unsigned(tpots)] = mean_gap
            tpot_sum += mean_gap
            tpot_max = max(tpot_max, mean_gap)
            tpot_min = min(tpot_min, mean_gap)
            tpots += 1
        class_ = token_state.class_of(load, r)
        at = first_class + class_
        if not (
            first > classes[TTFT_LIMIT, at]
            or mean_gap > classes[TPOT_LIMIT, at]
            or value > classes[E2E_LIMIT, at]
            or own[token_state.LATE, r] < 0
        ):
            good += 1
            if number_of_classes > 0:
                by_class[CLASS_METRICS * class_] += 1
        if number_of_classes > 0:
            by_class[CLASS_METRICS * class_ + 2] += 1

    sizes = (completed, first_tokens, tpots, started)
    write_latencies(
        values, sizes, (e2e_sum, ttft_sum, tpot_sum, queue_time_sum), (e2e_min, ttft_min, tpot_min, queue_time_min),
        (e2e_max, ttft_max, tpot_max, queue_time_max), wanted, scratch.bin_counts, scratch.bin_places, scratch.bins,
        scratch.kept, out,
    )  # fmt: skip
    at = 4 * stats
    row = out[at : at + stats]
    gaps = counts[token_state.GAPS]
    if gaps > 0:
        low, high = counts[token_state.GAP_LOW], counts[token_state.GAP_HIGH]
        middles = scratch.gap_values[: high - low + 1]
        for i in range(middles.size):
            middles[i] = token_state.gap_of(low + i)
        row[0] = sums[token_state.GAP_SUM] / gaps + per_token
        weighted_quantiles(middles, work.gaps[low : high + 1], gaps, wanted, row[1:-1])
        for i in range(1, stats - 1):
            row[i] = min(row[i], sums[token_state.GAP_MAX]) + per_token
        row[stats - 1] = sums[token_state.GAP_MAX] + per_token
    else:
        row[:] = np.nan
    at += stats
    spent = end_time - warmup
    steps = counts[token_state.STEPS]
    endless = memory.blocks == ENDLESS_BLOCKS
    known = counts[token_state.PROMPT_TOKENS]
    out[at] = arrived
    out[at + 1] = started
    out[at + 2] = first_tokens
    out[at + 3] = completed
    out[at + 4] = dropped
    out[at + 5] = preempted
    out[at + 6] = gaps
    out[at + 7] = completed / spent if spent > 0.0 else np.nan
    out[at + 8] = tokens / spent if spent > 0.0 else np.nan
    out[at + 9] = good / spent if spent > 0.0 else np.nan
    out[at + 10] = good / (completed + dropped + failed) if completed + dropped + failed > 0 else np.nan
    out[at + 11] = counts[token_state.WAITING]
    out[at + 12] = backlog / spent if spent > 0.0 else np.nan
    out[at + 13] = counts[token_state.MAX_QUEUE]
    slots, room = policy.slots * spent, memory.blocks * spent
    if sums[token_state.SLOT_SECONDS] > 0.0:
        slots, room = sums[token_state.SLOT_SECONDS], sums[token_state.BLOCK_SECONDS]
    out[at + 14] = sums[token_state.BUSY] / slots if spent > 0.0 else np.nan
    out[at + 15] = sums[token_state.USED] / room if spent > 0.0 and not endless else np.nan
    out[at + 16] = counts[token_state.PEAK] / memory.blocks if not endless else np.nan
    out[at + 17] = counts[token_state.HIT_TOKENS] / known if known > 0 else np.nan
    out[at + 18] = counts[token_state.SCHEDULED] / steps if steps > 0 else np.nan
    out[at + 19] = counts[token_state.TOKENS] / steps if steps > 0 else np.nan
    out[at + 20] = end_time
    out[at + 21] = steps
    for class_ in range(number_of_classes):
        kept = by_class[CLASS_METRICS * class_]
        done = by_class[CLASS_METRICS * class_ + 2] + by_class[CLASS_METRICS * class_ + 1]
        by_class[CLASS_METRICS * class_] = kept / spent if spent > 0.0 else np.nan
        by_class[CLASS_METRICS * class_ + 1] = kept / done if done > 0 else np.nan


SCALARS = 22

# Places among them, and among `life.metrics`
COMPLETED, GOODPUT, ENDED = 3, 9, 20
CHANGED_GPU_HOURS, CHANGED_PER_REQUEST, CHANGED_ATTAINED = range(6, 9)


@inner
def write_changes(job, row):
    """Complete what is told of workers that come and go, and write it at the end of a scenario's row."""
    metrics, out = job.metrics[row], job.life.metrics
    first = 5 * (job.quantiles.size + 2)
    completed, spent = metrics[first + COMPLETED], metrics[first + ENDED] - job.warmup
    hours = out[CHANGED_GPU_HOURS]
    out[CHANGED_PER_REQUEST] = 3600.0 * hours / completed if completed > 0.0 else np.nan
    out[CHANGED_ATTAINED] = metrics[first + GOODPUT] * spent / hours if hours > 0.0 else np.nan
    for i in range(out.size):
        metrics[metrics.size - out.size + i] = out[i]


@inner
def router_of(row, seed, place, first, number, rule):
    return Router(
        int(row[0]), seed, place, first, number, row[1], row[2], row[3] != 0, row[4], row[5], row[6], row[7], rule
    )


@inner
def split_of(row):
    return Split(
        int(row[SPLIT]), row[SPLIT + 1] != 0, row[SPLIT + 2] != 0, row[SPLIT + 3] != 0, int(row[SPLIT + 4]),
        row[SPLIT + 5], row[SPLIT + 6], row[SPLIT + 7], row[SPLIT + 8],
    )  # fmt: skip


@inner
def transfer_of(row):
    n = row[TRANSFER:]
    return Transfer(
        n[0], n[1], n[2], n[3], n[4], int(n[5]), n[6], n[7] != 0, n[8] != 0, int(n[9]), n[10], n[11], n[12], n[13] != 0
    )


@inner
def control_of(row):
    n = row[CONTROL:]
    return Control(
        n[0] != 0, n[1], n[2], n[3], n[4], n[5], n[6], n[7], n[8], n[9], int(n[10]), n[11], n[12] != 0, int(n[13]),
        int(n[14]), int(n[15]), int(n[16]), int(n[17]), int(n[18]),
    )  # fmt: skip


@inner
def life_of(life, streams, control, workers):
    """The room of the lives of so many workers, if they change."""
    leaves = 1
    while leaves < workers:
        leaves *= 2
    return Life(
        life.whole, life.due, life.clock[: 2 * leaves], life.spent, life.fate, life.rings, life.alarms,
        life.numbers, life.times, life.log, streams.events, life.shown, life.sums,
        streams.planners[control.first_number : control.first_number + control.numbers], life.memory, life.metrics,
    )  # fmt: skip


@inner
def tiers_of(tiers, groups, workers):
    """The room of what is below the caches of so many workers, if anything is."""
    on = False
    for group in range(groups.shape[0]):
        on = on or groups[group, CAPACITY] > 0.0
    return Tiers(
        on, tiers.links, tiers.bandwidths, tiers.after, tiers.before, tiers.line, tiers.lists, tiers.sightings,
        tiers.changed, tiers.way, tiers.instants, tiers.numbers, tiers.means,
    )  # fmt: skip


@inner
def room_of(fleet, groups, workers):
    """The room of so many workers, each of its kind."""
    at = 0
    for group in range(groups.shape[0]):
        for _ in range(int(groups[group, GROUP_WORKERS])):
            fleet.group[at] = group
            at += 1
    leaves = 1
    while leaves < workers:
        leaves *= 2
    return Fleet(
        fleet.group[:workers], fleet.put, fleet.blocks[:workers], fleet.all_blocks, fleet.fits, fleet.present,
        fleet.away, fleet.ghosts, fleet.sent, fleet.sent_blocks,
        fleet.sent_new, fleet.expected, fleet.survey, fleet.turn, fleet.before, fleet.clock[: 2 * leaves], fleet.loads,
        fleet.way,
        fleet.instants, fleet.moved, fleet.left, fleet.runs, fleet.allocator, fleet.next_block,
        fleet.chains, fleet.places, fleet.timers, fleet.between, fleet.waiting, fleet.ones, fleet.own, fleet.times,
        fleet.owned, fleet.own_blocks, fleet.links, fleet.bandwidths[: workers + 1], fleet.unmeasured, fleet.counts,
        fleet.sums, fleet.first, fleet.unclip, fleet.residues, fleet.prefills, fleet.chunk_of, fleet.chunk_tokens,
        fleet.stack, fleet.ended, fleet.joined, fleet.joined_at, fleet.newcomers, fleet.late, fleet.starving,
        fleet.nodes, fleet.node_of, fleet.seen, fleet.parts, fleet.view_age, fleet.views,
    )  # fmt: skip


@entry
def run_token_scenarios(
    step_loop, fleet_loop, live, tiers_act, own_rule, own_duration, own_router, own_planner, first, last, job
):  # fmt: skip
    """Run the scenarios [first, last) of a `TokenJob`; returns (status, requests) of the last one.

    The loops of an engine and of a fleet are called by their addresses, and so are the user's own rule of a batcher,
    step time and router where a scenario has them: compiled into this, the loop would be optimised again as a part of
    it, which takes as long as compiling it.
    """
    scratch, work, streams = job.scratch, job.work, job.streams
    n = 0
    status = DONE
    for row in range(first, last):
        p = job.scenarios[row]
        policy, memory = policy_of(p), memory_of(p)
        status, n, static = prepare(p, job.stream[row], job.arrival_stream[row], streams, job.time_limit, scratch)
        job.status[row] = status
        if status != DONE:
            continue
        ids = with_ids = 0
        if memory.caching:
            ids, with_ids = name_blocks(p, job.stream[row], streams, memory, scratch, n, static)
            if ids > job.cache_node_of.size or with_ids > job.cache_own.size:
                status = job.status[row] = OUT_OF_REQUESTS
                continue
        has_classes = n if p[CLASSES] > 1 else 0
        has_sessions = n if p[SESSIONS] != 0 else 0
        number = max(int(p[CLASSES]), 1)
        first_class = int(p[FIRST_CLASS])
        itl_limits = streams.classes[ITL_LIMIT, first_class : first_class + number] - p[PER_TOKEN]
        watches_gaps = itl_limits.min() < np.inf
        load = TokenLoad(
            scratch.arrived_at,
            scratch.prompt_tokens[:n],
            scratch.output_tokens[:n],
            scratch.max_tokens[:n] if p[CAPPED] != 0 else scratch.output_tokens[:n],
            scratch.classes[:has_classes],
            scratch.follower[:has_sessions],
            scratch.think[:has_sessions],
            streams.classes[URGENCY, first_class : first_class + number],
            streams.classes[TTFT_LIMIT, first_class : first_class + number],
            itl_limits,
            watches_gaps,
            static,
            p[FLEET] < 0,
            0,
            int(p[ARRIVALS]) == CLOSED,
            p[THINK],
            p[BEFORE_QUEUE],
            p[PER_TOKEN],
            p[AT_COMPLETION],
        )
        traced = streams.ids.size if p[TRACE] >= 0 else 0
        cache = Cache(
            job.cache_nodes,
            job.cache_node_of[:ids],
            scratch.think[:0],  # nobody looks
            job.cache_owned,
            job.cache_own,
            (
                streams.ids[:traced],
                int(p[ID_BLOCKS]),
                scratch.id_start,
                scratch.prefix,
                scratch.prefix_id,
                scratch.own_id,
            ),
            scratch.shared[: n if with_ids > 0 else 0],
            scratch.own_start,
        )
        if p[FLEET] < 0:
            place = Place(
                policy, memory, model_of(p, streams), load, work, cache, job.record, job.warmup, job.stop, own_rule,
                own_duration,
            )  # fmt: skip
            status = call_token_loop(
                step_loop,
                (placed(place), ALONE, job.time_limit),
            )
        else:
            numbers = streams.fleets[int(p[FLEET])]
            first_group, workers = int(numbers[FIRST_GROUP]), int(numbers[WORKERS])
            groups = streams.groups[first_group : first_group + int(numbers[GROUPS])]
            job.tiers.means[:-1] = 0.0  # where this one has no tiers; the last is a time
            job.tiers.means[-1:] = np.nan
            split, seed = split_of(numbers), int(p[SEED])
            tables = StepModel(
                model_of(p, streams).formula, 1, streams.terms, streams.grids, streams.values, streams.outside
            )
            world = World(
                step_loop,
                room_of(job.fleet, groups, workers),
                split,
                router_of(
                    numbers[ROUTER:], seed, 0, split.prefill_workers, workers - split.prefill_workers, own_router
                ),
                router_of(numbers[PREFILL_ROUTER:], seed, 1, 0, split.prefill_workers, own_router),
                transfer_of(numbers),
                control_of(numbers),
                life_of(job.life, streams, control_of(numbers), workers),
                tiers_of(job.tiers, groups, workers),
                groups,
                tables,
                load,
                work,
                cache,
                job.record,
                job.time_limit,
                job.warmup,
                job.stop,
                own_rule,
                own_duration,
                own_planner,
                live,
                tiers_act,
            )
            status = call_fleet_loop(fleet_loop, (placed(world),))
        job.status[row] = status
        if status == INTERRUPTED:
            break
        if status != DONE:
            continue
        job.enqueued[row] = work.counts[token_state.ENQUEUED]
        tally(p, policy, memory, load, work, scratch, streams.classes, job.warmup, n, job.quantiles, job.metrics[row])
        at = job.metrics.shape[1] - job.life.metrics.size
        for means in (job.tiers.means, job.fleet.views, job.fleet.parts):  # the last comes first
            at -= means.size
            for i in range(means.size):
                job.metrics[row, at + i] = means[i]
        if job.life.metrics.size > 0:
            write_changes(job, row)
    return status, n
