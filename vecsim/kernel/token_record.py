"""What is kept of one scenario of the token model: the instants of each request."""

import numpy as np

from vecsim.kernel import token as loop
from vecsim.kernel.jit import entry
from vecsim.kernel.token_scenarios import AT_COMPLETION, PER_TOKEN


@entry
def write_token_record(row, requests, job, record):
    """Write the row of the scenario that has just been run in the job's room; returns how many requests came.

    Those that never came, for the run ended before, aren't written.
    """
    scratch, own, times = job.scratch, job.work.own, job.work.times
    p = job.scenarios[row]
    kept = 0
    for i in range(requests):
        state = own[loop.STATE, i]
        if state == loop.UNSEEN:
            continue
        length = scratch.output_tokens[i]
        record.arrived_at[row, kept] = scratch.arrived_at[i]
        record.prompt_tokens[row, kept] = scratch.prompt_tokens[i]
        record.output_tokens[row, kept] = length
        record.class_number[row, kept] = scratch.classes[i]
        record.refused[row, kept] = state == loop.DROPPED_AT_ONCE
        if state != loop.DROPPED_AT_ONCE:
            record.started_at[row, kept] = times[loop.STARTED_AT, i]
            record.first_token_at[row, kept] = times[loop.FIRST_AT, i] + p[PER_TOKEN]
            record.completed_at[row, kept] = times[loop.ENDED_AT, i] + length * p[PER_TOKEN] + p[AT_COMPLETION]
            record.hit_tokens[row, kept] = own[loop.HIT, i]
            record.preempted[row, kept] = own[loop.PREEMPTIONS, i]
        kept += 1
    record.arrived_at[row, kept:] = np.nan
    return kept
