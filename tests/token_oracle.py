"""A literal, slow reading of the token model's rules: an object a request, a list of who is scheduled in each step.

The vLLM V1 scheduler (token budget, chunked prefill, preemption by recomputation) over KV blocks with a prefix cache;
times in whatever unit the step times have.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field


@dataclass
class Request:
    arrived_at: float
    prompt_tokens: int
    output_tokens: int
    ids: Sequence[Hashable] = ()  # of the prompt's full blocks; no prefix is shared without
    computed: int = 0  # tokens whose keys and values are held
    blocks: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)  # cached blocks found at each admission
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


class Pool:
    """KV blocks: those that nobody holds wait in a queue, the least recently used first, and may still be found."""

    def __init__(self, blocks: int) -> None:
        self.free = OrderedDict.fromkeys(range(blocks))
        self.holders = [0] * blocks
        self.id_of: list[Hashable] = [None] * blocks
        self.block_of: dict[Hashable, int] = {}

    def take(self) -> int:
        """A free block; what it held is forgotten."""
        block, _ = self.free.popitem(last=False)
        if self.id_of[block] is not None:
            del self.block_of[self.id_of[block]]
            self.id_of[block] = None
        self.holders[block] = 1
        return block

    def share(self, block: int) -> None:
        self.free.pop(block, None)
        self.holders[block] += 1

    def release(self, blocks: list[int]) -> None:
        """Deepest first, so that the begin of a prompt stays longest."""
        for block in reversed(blocks):
            self.holders[block] -= 1
            if self.holders[block] == 0:
                self.free[block] = None

    def name(self, block: int, id_: Hashable) -> None:
        """From now on the block can be found by its id, unless another one is."""
        if self.id_of[block] is None and id_ not in self.block_of:
            self.id_of[block] = id_
            self.block_of[id_] = block


@dataclass
class Scheduled:
    request: Request
    before: int  # tokens computed before the step
    tokens: int  # computed in it
    is_prefill: bool


@dataclass
class Result:
    requests: list[Request]
    pool: Pool
    steps: list[tuple[float, float, list[Scheduled]]] = field(default_factory=list)  # begin, end, who
    preemptions: int = 0


class Engine:
    """One engine; see `simulate`."""

    def __init__(self, slots: int, budget: int, blocks: int, block_size: int, most_prompt_tokens: int) -> None:
        self.slots, self.budget, self.block_size = slots, budget, block_size
        self.pool = Pool(blocks)
        self.most_prompt_tokens = most_prompt_tokens
        self.running: list[Request] = []
        self.waiting: deque[Request] = deque()
        self.preempted = 0

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def wanted(self, request: Request, budget: int) -> int:
        tokens = request.known - request.computed
        if self.most_prompt_tokens and tokens > 1:
            tokens = min(tokens, self.most_prompt_tokens)
        return min(tokens, budget)

    def block_id(self, request: Request, i: int) -> Hashable:
        """Of a request's i-th block: the prompt's, or its own where it holds generated tokens."""
        return request.ids[i] if i < len(request.ids) else (id(request), i)

    def take(self, request: Request, tokens: int) -> bool:
        """Blocks for so many more tokens, if they are free."""
        after = request.computed + tokens
        more = self.needed(after) - len(request.blocks)
        if more > len(self.pool.free):
            return False
        request.blocks += [self.pool.take() for _ in range(more)]
        if request.ids:
            for i in range(request.computed // self.block_size, after // self.block_size):
                self.pool.name(request.blocks[i], self.block_id(request, i))
        return True

    def cached(self, request: Request) -> list[int]:
        """The cached blocks that its known tokens begin with; the last token is always computed."""
        found = []
        for i in range((request.known - 1) // self.block_size if request.ids else 0):
            block = self.pool.block_of.get(self.block_id(request, i))
            if block is None:
                break
            found.append(block)
        return found

    def admit(self, request: Request, budget: int) -> int:
        """Tokens that a waiting request may compute, its blocks taken; 0 if it can't be admitted."""
        if not self.pool.free:  # at least one block of its own is needed
            return 0
        hits = self.cached(request)
        idle = sum(self.pool.holders[block] == 0 for block in hits)
        request.computed = len(hits) * self.block_size
        tokens = self.wanted(request, budget)
        more = self.needed(request.computed + tokens) - len(hits)
        if more + idle > len(self.pool.free):
            request.computed = 0
            return 0
        for block in hits:
            self.pool.share(block)
        request.blocks = hits
        request.hits.append(len(hits))
        assert self.take(request, tokens)
        return tokens

    def preempt_last(self) -> Request:
        victim = self.running.pop()
        self.pool.release(victim.blocks)
        victim.computed, victim.blocks = 0, []
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
            tokens = self.admit(request, budget)
            if tokens == 0:
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
                    self.pool.release(request.blocks)
                    request.blocks = []


def simulate(
    requests: Sequence[tuple],
    *,
    slots: int,
    budget: int,
    blocks: int,
    block_size: int,
    duration: Callable[[list[Scheduled]], float],
    most_prompt_tokens: int = 0,
) -> Result:
    """Serve (arrival, prompt tokens, output tokens[, ids of full blocks]), in the order of arrival, to the end."""
    engine = Engine(slots, budget, blocks, block_size, most_prompt_tokens)
    result = Result([Request(*request) for request in requests], engine.pool)
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
