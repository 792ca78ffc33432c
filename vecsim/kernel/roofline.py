"""The rule of `RooflineStepTime`: seconds of a step from its aggregates."""


def seconds(
    numbers, prefill_requests, prefill_tokens, prefill_attention, prefill_context, decode_requests, decode_context
):
    """Seconds of a step from its aggregates (see `vecsim.kernel.state.StepBatch`); `numbers` are those of
    `vecsim.roofline.Numbers`.

    Groups of operators follow one another; each takes as long as the slower of its arithmetic and its memory traffic
    (the roofline: Williams, Waterman, Patterson, CACM 52(4), 2009).
    """
    (
        base, per_token, per_request, matrix_compute, matrix_weights, matrix_moved, expert_compute, expert_weights,
        expert_moved, expert_missed, head_compute, head_weights, attention_compute, decode_compute, kv_read, expand,
    ) = numbers  # fmt: skip
    tokens = float(prefill_tokens + decode_requests)
    requests = float(prefill_requests + decode_requests)
    total = base + per_token * tokens + per_request * requests
    total += max(matrix_compute * tokens, matrix_weights + matrix_moved * tokens)
    if expert_weights > 0.0:
        touched = 1.0 - expert_missed**tokens
        total += max(expert_compute * tokens, expert_weights * touched + expert_moved * tokens)
    total += max(head_compute * requests, head_weights)
    if prefill_requests > 0:
        context = float(prefill_context + prefill_tokens)
        total += max(attention_compute * prefill_attention, kv_read * context) + expand * float(prefill_context)
    if decode_requests > 0:
        total += max(decode_compute * decode_context, kv_read * decode_context)
    return total
