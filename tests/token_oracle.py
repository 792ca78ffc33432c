"""A literal, slow reading of the token model's rules: an object a request, a list of who is scheduled in each step.

The vLLM V1 scheduler (token budget, chunked prefill, preemption by recomputation) over countable KV blocks; times in
whatever unit the step times have.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass
class Request:
    arrived_at: float
    prompt_tokens: int
    output_tokens: int
    computed: int = 0  # tokens whose keys and values are held
    blocks: int = 0
    token_at: list[float] = field(default_factory=list)
    admitted_at: list[float] = field(default_factory=list)  # once more after each preemption
    dropped: bool = False

    @property
    def known(self) -> int:
        """Tokens that there are: the prompt and what has been generated."""
        return self.prompt_tokens + len(self.token_at)

    @property
    def in_prefill(self) -> bool:
        return self.computed < self.known - 1 or not self.token_at


@dataclass
class Scheduled:
    request: Request
    before: int  # tokens computed before the step
    tokens: int  # computed in it
    is_prefill: bool


@dataclass
class Result:
    requests: list[Request]
    steps: list[tuple[float, float, list[Scheduled]]] = field(default_factory=list)  # begin, end, who
    preemptions: int = 0


class Engine:
    """One engine; see `simulate`."""

    def __init__(self, slots: int, budget: int, blocks: int, block_size: int, most_prompt_tokens: int) -> None:
        self.slots, self.budget, self.blocks, self.block_size = slots, budget, blocks, block_size
        self.most_prompt_tokens = most_prompt_tokens
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preempted = 0

    def held(self) -> int:
        return sum(request.blocks for request in self.running)

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def wanted(self, request: Request, budget: int) -> int:
        tokens = request.known - request.computed
        if self.most_prompt_tokens and tokens > 1:
            tokens = min(tokens, self.most_prompt_tokens)
        return min(tokens, budget)

    def take(self, request: Request, tokens: int) -> bool:
        """Blocks for so many more tokens, if they are free."""
        blocks = self.needed(request.computed + tokens)
        if self.held() - request.blocks * (request in self.running) + blocks > self.blocks:
            return False
        request.blocks = blocks
        return True

    def preempt_last(self) -> Request:
        victim = self.running.pop()
        victim.computed = victim.blocks = 0
        self.waiting.appendleft(victim)
        self.preempted += 1
        return victim

    def schedule(self, t: float) -> list[Scheduled]:
        """Who computes how many tokens in the step that begins at `t`."""
        budget, chosen, before = self.budget, [], self.preempted
        for request in list(self.running):
            if request not in self.running:  # preempted for one before it
                continue
            tokens = self.wanted(request, budget)
            if tokens == 0:
                continue
            while request in self.running and not self.take(request, tokens):
                self.preempt_last()
            if request in self.running:
                chosen.append(Scheduled(request, request.computed, tokens, request.in_prefill))
                budget -= tokens
        while self.waiting and self.preempted == before and len(self.running) < self.slots and budget > 0:
            request = self.waiting[0]
            tokens = self.wanted(request, budget)
            if not self.take(request, tokens):
                break
            self.waiting.popleft()
            self.running.append(request)
            request.admitted_at.append(t)
            chosen.append(Scheduled(request, request.computed, tokens, request.in_prefill))
            budget -= tokens
        return chosen

    def finish_step(self, chosen: list[Scheduled], t: float) -> None:
        for one in chosen:
            request = one.request
            request.computed += one.tokens
            if request.computed == request.known:
                request.token_at.append(t)
                if len(request.token_at) == request.output_tokens:
                    self.running.remove(request)
                    request.blocks = 0


def simulate(
    requests: Sequence[tuple[float, int, int]],
    *,
    slots: int,
    budget: int,
    blocks: int,
    block_size: int,
    duration: Callable[[list[Scheduled]], float],
    most_prompt_tokens: int = 0,
) -> Result:
    """Serve (arrival, prompt tokens, output tokens) in the order of arrival until all are done."""
    result = Result([Request(*request) for request in requests])
    engine = Engine(slots, budget, blocks, block_size, most_prompt_tokens)
    arrivals = deque(result.requests)
    t = 0.0
    while arrivals or engine.waiting or engine.running:
        if not engine.waiting and not engine.running:
            t = max(t, arrivals[0].arrived_at)
        while arrivals and arrivals[0].arrived_at <= t:
            request = arrivals.popleft()
            request.dropped = engine.needed(request.prompt_tokens + request.output_tokens) > blocks
            if not request.dropped:
                engine.waiting.append(request)
        if not engine.waiting and not engine.running:
            continue
        chosen = engine.schedule(t)
        end = t + duration(chosen)
        result.steps.append((t, end, chosen))
        engine.finish_step(chosen, end)
        t = end
    result.preemptions = engine.preempted
    return result
