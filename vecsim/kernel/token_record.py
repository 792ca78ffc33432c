"""What is kept of one scenario of the token model: the instants of each request."""

import numpy as np

from vecsim.kernel import token_state
from vecsim.kernel.jit import entry
from vecsim.kernel.routing import DECODES_AT
from vecsim.kernel.token_scenarios import AT_COMPLETION, FLEET, PER_TOKEN


@entry
def write_token_record(row, requests, job, record):
    """Write the row of the scenario that has just been run in the job's room; returns how many requests came.

    Those that never came, for the run ended before, aren't written.
    """
    scratch, own, times = job.scratch, job.work.own, job.work.times
    p = job.scenarios[row]
    in_fleet = p[FLEET] >= 0
    kept = 0
    for i in range(requests):
        state = own[token_state.STATE, i]
        if state == token_state.UNSEEN:
            continue
        length = scratch.output_tokens[i]
        record.arrived_at[row, kept] = scratch.arrived_at[i]
        record.prompt_tokens[row, kept] = scratch.prompt_tokens[i]
        record.output_tokens[row, kept] = length
        record.class_number[row, kept] = scratch.classes[i]
        record.worker[row, kept] = job.fleet.way[DECODES_AT, i] if in_fleet else 0
        record.refused[row, kept] = state == token_state.DROPPED_AT_ONCE
        if state != token_state.DROPPED_AT_ONCE:
            record.started_at[row, kept] = times[token_state.STARTED_AT, i]
            record.first_token_at[row, kept] = times[token_state.FIRST_AT, i] + p[PER_TOKEN]
            record.completed_at[row, kept] = times[token_state.ENDED_AT, i] + length * p[PER_TOKEN] + p[AT_COMPLETION]
            record.hit_tokens[row, kept] = own[token_state.HIT, i]
            record.preempted[row, kept] = own[token_state.PREEMPTIONS, i]
        kept += 1
    record.arrived_at[row, kept:] = np.nan
    return kept
