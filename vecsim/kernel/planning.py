"""What a planner is shown of a fleet, and what it has done."""

import numpy as np

from vecsim import scaling
from vecsim.kernel.address import call_planner
from vecsim.kernel.duration import decodes_of, duration, step_of
from vecsim.kernel.handover import QUEUED_FOR_PREFILL, QUEUED_TOKENS
from vecsim.kernel.jit import bare, unsigned, whole
from vecsim.kernel.kv import FREE
from vecsim.kernel.life import (
    CAME,
    CAME_TOKENS,
    GAPS_SEEN,
    GAPS_SUM,
    LEFT_BY_END,
    LEFT_TOKENS,
    NEXT_SAMPLE,
    NEXT_TICK,
    OUTAGE_END,
    PHASE,
    READY,
    STARTING,
    TICKS,
    TTFT_SUM,
    add_worker,
    remove_worker,
    workers_on,
)
from vecsim.kernel.routing import not_started, outstanding
from vecsim.kernel.state import PlannerView
from vecsim.kernel.token_scenarios import GROUP_GPUS, memory_of, policy_of
from vecsim.kernel.token_state import BEGUN_BLOCKS, CONTEXT, DECODING, LEFT_BLOCKS
from vecsim.kernel.world import bring_up, kind_of, tables_of

rules = scaling.compiled(bare)
sample, decide, bounded, next_change = rules.sample, rules.decide, rules.bounded, rules.next_change

# Rows of `life.shown` [worker]: `PlannerView`'s arrays
(
    IS_READY, IS_STARTING, RUNS, WAITS, KV_USE, KV_WAITING, QUEUED, PREDICTED_TTFT, OWN_TTFT, PREDICTED_ITL, OWN_ITL,
) = range(11)  # fmt: skip


@bare
def survey(world, t):
    """Fill the view [row, worker]: how each worker is at `t`. O(workers)."""
    fleet, life = world.fleet, world.life
    view, sums = life.shown, life.sums
    prompt = whole(sums[CAME_TOKENS] / sums[CAME]) if sums[CAME] > 0.0 else whole(0)
    for worker in range(fleet.group.size):
        w = unsigned(worker)
        phase = life.whole[PHASE, w]
        view[:, w] = 0.0
        view[IS_READY, w] = phase == READY
        view[IS_STARTING, w] = phase == STARTING
        if phase != READY:
            continue
        bring_up(world, worker, t)
        p = world.groups[kind_of(world, worker)]
        memory, policy, model = memory_of(p), policy_of(p), tables_of(p, world.tables)
        counts = fleet.counts[w]
        here, waits = outstanding(fleet, worker), not_started(fleet, worker)
        view[RUNS, w] = here - waits
        view[WAITS, w] = waits
        view[KV_USE, w] = (fleet.blocks[w] - counts[FREE]) / fleet.blocks[w]
        if waits > 0:
            mean_blocks = (fleet.sent_blocks[w] - counts[LEFT_BLOCKS]) / here
            view[KV_WAITING, w] = waits * mean_blocks / fleet.blocks[w]
        tokens = float(max(fleet.sent_new[w] - counts[BEGUN_BLOCKS], 0) * memory.block_size)
        view[QUEUED, w] = tokens
        decoding, context = whole(counts[DECODING]), whole(counts[CONTEXT])
        view[OWN_TTFT, w] = seconds_of(world, policy, model, float(prompt), whole(0), whole(0))
        view[PREDICTED_TTFT, w] = seconds_of(world, policy, model, tokens + prompt, decoding, context)
        if prompt == 0:
            view[OWN_TTFT, w] = view[PREDICTED_TTFT, w] = np.nan
        if decoding > 0:
            view[PREDICTED_ITL, w] = duration(model, decodes_of(model.formula, decoding, context), world.own_duration)
            alone = decodes_of(model.formula, whole(1), whole(context // decoding))
            view[OWN_ITL, w] = duration(model, alone, world.own_duration)
        else:
            view[PREDICTED_ITL, w] = view[OWN_ITL, w] = np.nan


@bare
def seconds_of(world, policy, model, tokens, decoding, context):
    """How long prompts of so many tokens take, in steps as full as they may be, beside what decodes."""
    room = max(policy.budget - decoding, 1)
    steps = max(np.ceil(tokens / room), 1.0)
    size = tokens / steps
    step = step_of(
        model.formula, whole(1), whole(size), 0.5 * size * size, size * size, whole(0), decoding, context
    )  # fmt: skip
    return steps * duration(model, step, world.own_duration)


@bare
def shown(world, t):
    """The view of a planner at `t`."""
    fleet, life, split = world.fleet, world.life, world.split
    view, sums = life.shown, life.sums
    waiting, tokens = 0.0, 0.0
    if split.queued:
        waiting, tokens = float(fleet.between[QUEUED_FOR_PREFILL]), float(fleet.between[QUEUED_TOKENS])
    first = split.prefill_workers
    for worker in range(first if first > 0 else fleet.group.size):
        waiting += view[WAITS, unsigned(worker)]
    p = world.groups[0]
    longest = policy_of(p).longest
    return PlannerView(
        view[0], view[1], view[2], view[3], view[4], view[5], view[6], view[7], view[8], view[9], view[10],
        whole(first), whole(p[GROUP_GPUS]), whole(world.groups[world.groups.shape[0] - 1, GROUP_GPUS]),
        whole(longest if longest < 1 << 30 else 0), whole(waiting), whole(tokens), whole(sums[CAME]),
        whole(sums[CAME_TOKENS]), whole(sums[LEFT_BY_END]), whole(sums[LEFT_TOKENS]),
        sums[TTFT_SUM] / sums[LEFT_BY_END] if sums[LEFT_BY_END] > 0.0 else np.nan,
        sums[GAPS_SUM] / sums[GAPS_SEEN] if sums[GAPS_SEEN] > 0.0 else np.nan,
        t,
    )  # fmt: skip


@bare
def plan(world, t):
    """A planner looks at the fleet; at a tick, it changes it too. During an outage it does nothing."""
    control, life = world.control, world.life
    numbers, memory = life.planner, life.memory
    is_out = t < life.times[OUTAGE_END]
    is_tick = life.times[NEXT_TICK] == t
    if control.planner == scaling.SCHEDULE:
        if is_out:
            life.times[NEXT_TICK] = life.times[OUTAGE_END]
            return
    elif is_tick:
        life.numbers[TICKS] += 1
        life.times[NEXT_TICK] = (life.numbers[TICKS] + 1) * numbers[scaling.INTERVAL]
    if numbers[scaling.SAMPLE_INTERVAL] > 0.0 and life.times[NEXT_SAMPLE] == t:
        step = numbers[scaling.SAMPLE_INTERVAL]
        life.times[NEXT_SAMPLE] = (np.rint(t / step) + 1.0) * step
    if is_out:
        return
    survey(world, t)
    view = shown(world, t)
    if numbers[scaling.SAMPLE_INTERVAL] > 0.0 or is_tick:
        sample(control.planner, numbers, view, memory)
    if not is_tick:
        return
    if control.planner == scaling.CUSTOM:
        prefill, decode = call_planner(world.own_planner, (view, memory))
        prefill, decode = bounded(numbers, view, prefill, decode)
    else:
        prefill, decode = decide(control.planner, numbers, view, memory)
    if control.planner == scaling.SCHEDULE:
        life.times[NEXT_TICK] = next_change(numbers, memory)
    life.sums[:] = 0.0
    last = whole(world.groups.shape[0] - 1)
    if last > 0:
        resize(world, whole(0), whole(min(prefill, 0)), t)
    resize(world, last, whole(min(decode, 0)), t)
    if last > 0:
        resize(world, whole(0), whole(max(prefill, 0)), t)
    resize(world, last, whole(max(decode, 0)), t)


@bare
def resize(world, group, change, t):
    """Add workers to a pool, or take them away."""
    for _ in range(change):
        if not add_worker(world, group, t):
            break
    for _ in range(-change):
        if workers_on(world, group) <= 1 or not remove_worker(world, group, t):
            break
