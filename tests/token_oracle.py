"""A literal, slow reading of the token model's rules: an object a request, a list of who is scheduled in each step.

Every batcher schedules over the same KV blocks with their prefix cache; times in whatever unit the step times have.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import Any, NamedTuple


@dataclass(eq=False)
class Request:
    arrived_at: float = 0.0  # of a closed loop's or a follow-up: set when it is sent
    prompt_tokens: int = 1
    output_tokens: int = 1
    ids: Sequence[Hashable] = ()  # of its first blocks, those of generated tokens too where a follow-up shares them
    max_tokens: int | None = None  # the client's cap on the output, which a batcher may know
    priority: int = 0  # lower is more urgent
    ttft_limit: float = inf
    after: int | None = None  # index of the request that it follows in a session
    think: float = 0.0  # from the completion of that one
    itl_limit: float = inf  # of the time between two of its tokens

    index: int = field(init=False, default=0)
    computed: int = field(init=False, default=0)  # tokens whose keys and values are held
    blocks: list[int] = field(init=False, default_factory=list)
    hits: list[int] = field(init=False, default_factory=list)  # cached blocks found at each admission
    enqueued_at: float | None = field(init=False, default=None)
    preempted: int = field(init=False, default=0)
    dropped: bool = field(init=False, default=False)
    admitted_at: list[float] = field(init=False, default_factory=list)  # once more after each preemption
    token_at: list[float] = field(init=False, default_factory=list)  # the ends of the steps
    seen_at: list[float] = field(init=False, default_factory=list)  # by the client
    completed_at: float | None = field(init=False, default=None)  # as the client sees it

    @property
    def cap(self) -> int:
        return self.output_tokens if self.max_tokens is None else self.max_tokens

    @property
    def generated(self) -> int:
        return len(self.token_at)

    @property
    def known(self) -> int:
        return self.prompt_tokens + self.generated

    @property
    def rest(self) -> int:
        """Known tokens that are still to be computed."""
        return self.known - self.computed

    @property
    def decodes(self) -> bool:
        return self.generated > 0 and self.rest == 1

    @property
    def ended(self) -> bool:
        return self.generated == self.output_tokens

    @property
    def in_time(self) -> bool:
        """Whether it kept to its limits, as the client sees it."""
        gaps = [after - before for before, after in zip(self.seen_at, self.seen_at[1:], strict=False)]
        return self.seen_at[0] - self.arrived_at <= self.ttft_limit and max(gaps, default=0.0) <= self.itl_limit

    def block_id(self, i: int) -> Hashable:
        return self.ids[i] if i < len(self.ids) else ("own", self.index, i)


class Pool:
    """KV blocks: those that nobody holds wait in a queue, the least recently used first, and may still be found."""

    def __init__(self, blocks: int, uncached_first: bool = False) -> None:
        self.free = OrderedDict.fromkeys(range(blocks))
        self.uncached_first = uncached_first
        self.holders = [0] * blocks
        self.id_of: list[Hashable] = [None] * blocks
        self.block_of: dict[Hashable, int] = {}

    def take(self) -> int:
        """A free block; what it held is forgotten."""
        block, _ = self.free.popitem(last=False)
        self.forget(block)
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
                if self.uncached_first and self.id_of[block] is None:
                    self.free.move_to_end(block, last=False)

    def name(self, block: int, id_: Hashable) -> bool:
        """From now on the block can be found by its id, unless another one is."""
        if self.id_of[block] is not None or id_ in self.block_of:
            return False
        self.id_of[block] = id_
        self.block_of[id_] = block
        return True

    def forget(self, block: int) -> None:
        if self.id_of[block] is not None:
            del self.block_of[self.id_of[block]]
            self.id_of[block] = None


@dataclass(eq=False)
class Scheduled:
    request: Request
    before: int  # tokens computed before the step
    tokens: int  # computed in it
    is_prefill: bool
    named: list[int]  # blocks that it fills and that can be found from now on


class Step(NamedTuple):
    begin: float
    end: float
    chosen: list[Scheduled]
    queue: int  # requests that wait while it runs
    used: int  # blocks held while it runs


@dataclass
class Result:
    requests: list[Request]
    pool: Pool
    steps: list[Step] = field(default_factory=list)
    preemptions: int = 0


@dataclass
class Overheads:
    before_queue: float = 0.0
    per_step: float = 0.0
    per_output_token: float = 0.0
    at_completion: float = 0.0


ORDERS: dict[str, Callable[[Request], Any]] = {
    "shortest_prompt": lambda request: request.prompt_tokens,
    "priority": lambda request: request.priority,
    "deadline": lambda request: request.arrived_at + request.ttft_limit,
    "shortest_output": lambda request: request.output_tokens,
}


@dataclass(eq=False)
class Engine:
    """The queue, the running requests and their blocks; a batcher decides who is computed in a step."""

    batcher: "Batcher"
    slots: int
    pool: Pool
    block_size: int
    caching: bool
    kept_free: int  # blocks, at an admission beside others
    order: str
    asynchronous: bool
    max_model_len: int | None
    overheads: Overheads

    arrivals: list[Request] = field(default_factory=list)  # that are known, not yet in the queue
    waiting: list[Request] = field(default_factory=list)
    running: list[Request] = field(default_factory=list)  # as admitted; who has ended stays until its blocks are freed
    chosen: list[Scheduled] = field(default_factory=list)  # for the step that is being formed
    preemptions: int = 0
    now: float = 0.0

    @property
    def blocks(self) -> int:
        return len(self.pool.holders)

    # Blocks

    def needed(self, tokens: int) -> int:
        return -(-tokens // self.block_size)

    def missing(self, request: Request, tokens: int) -> int:
        """Blocks that it doesn't hold yet and that so many more tokens need."""
        return max(0, self.needed(request.computed + tokens) - len(request.blocks))

    def found(self, request: Request) -> list[int]:
        """The cached blocks that its known tokens begin with; the last token is always computed."""
        found: list[int] = []
        for i in range((request.known - 1) // self.block_size if self.caching else 0):
            block = self.pool.block_of.get(request.block_id(i))
            if block is None:
                break
            found.append(block)
        return found

    def found_idle(self, request: Request) -> int:
        """Those of them that nobody holds: to find one saves computing, not room."""
        return sum(self.pool.holders[block] == 0 for block in self.found(request))

    def found_tokens(self, request: Request) -> int:
        return len(self.found(request)) * self.block_size

    # What a batcher asks for

    def live(self) -> list[Request]:
        return [request for request in self.running if not request.ended]

    def head(self) -> Request | None:
        """The waiting request whose turn it is, if there is a slot for it; nobody overtakes it."""
        return self.waiting[0] if self.waiting and len(self.running) < self.slots else None

    def left(self, budget: float) -> float:
        return max(0, budget - sum(one.tokens for one in self.chosen))

    def admit(self, request: Request, hold: int, must_fit: int = 0) -> bool:
        """To the running ones, with so many blocks, if those (or the more that must fit) are free."""
        found = self.found(request)
        needed = max(hold, must_fit) - len(found) + self.found_idle(request)
        if len(self.pool.free) - needed < (self.kept_free if self.running else 0):
            return False
        self.waiting.remove(request)
        self.running.append(request)
        self.forget_own(request, len(found))
        request.admitted_at.append(self.now)
        request.hits.append(len(found))
        for block in found:
            self.pool.share(block)
        request.computed = len(found) * self.block_size
        request.blocks = found + [self.pool.take() for _ in range(hold - len(found))]
        return True

    def forget_own(self, request: Request, found: int) -> None:
        """What a request that comes back has of its own and doesn't find can't be found any more."""
        for i in range(max(found, len(request.ids)), request.known // self.block_size + 1):
            if (block := self.pool.block_of.get(request.block_id(i))) is not None:
                self.pool.forget(block)

    def compute(self, request: Request, tokens: int) -> None:
        """In this step, with the blocks that it takes; those that it fills can be found at once."""
        request.blocks += [self.pool.take() for _ in range(self.missing(request, tokens))]
        filled = range(request.computed // self.block_size, (request.computed + tokens) // self.block_size)
        named = [
            request.blocks[i] for i in filled if self.caching and self.pool.name(request.blocks[i], request.block_id(i))
        ]
        self.chosen.append(Scheduled(request, request.computed, tokens, not request.decodes, named))

    def compute_preempting(self, request: Request, tokens: int) -> None:
        """Preempt until the blocks are free; nothing if the request is preempted itself, now or before its turn."""
        while request in self.running and self.missing(request, tokens) > len(self.pool.free):
            self.preempt(self.victim())
        if request in self.running:
            self.compute(request, tokens)

    def decode_all(self) -> None:
        for request in self.live():
            if request.decodes:
                self.compute_preempting(request, 1)

    def continue_prefills(self, budget: float) -> None:
        for request in self.live():
            tokens = min(request.rest, self.left(budget))
            if not request.decodes and tokens > 0:
                self.compute(request, tokens)

    def victim(self) -> Request:
        if self.order == "priority":
            return max(self.live(), key=lambda request: (request.priority, request.arrived_at, request.index))
        return self.live()[-1]

    def preempt(self, victim: Request) -> None:
        for one in self.chosen:
            if one.request is victim:  # what it was to fill in this step is not filled
                for block in one.named:
                    self.pool.forget(block)
        self.chosen = [one for one in self.chosen if one.request is not victim]
        self.running.remove(victim)
        self.pool.release(victim.blocks)
        victim.computed, victim.blocks = 0, []
        victim.preempted += 1
        self.preemptions += 1
        self.queue_up(victim, front=self.batcher.preempted_to_front)

    # Time

    def queue_up(self, request: Request, front: bool = False) -> None:
        self.waiting.insert(0 if front else len(self.waiting), request)
        if self.order != "fcfs":
            key = ORDERS[self.order]
            self.waiting.sort(key=lambda waiting: (key(waiting), waiting.arrived_at, waiting.index))

    def queued_at(self, request: Request) -> float:
        return request.arrived_at + self.overheads.before_queue

    def refuses(self, request: Request) -> bool:
        """Whether it could never be served."""
        total = request.prompt_tokens + request.output_tokens
        too_long = self.max_model_len is not None and total > self.max_model_len
        return too_long or self.needed(total) > self.blocks or self.batcher.refuses(self, request)

    def enqueue(self) -> list[Request]:
        """Who has arrived until now joins the queue; those that could never be served are refused and returned."""
        refused = []
        before_queue = self.overheads.before_queue
        arrived = [request for request in self.arrivals if request.arrived_at + before_queue <= self.now]
        for request in sorted(arrived, key=lambda request: (request.arrived_at, request.index)):
            self.arrivals.remove(request)
            if self.refuses(request):
                request.dropped = True
                refused.append(request)
            else:
                request.enqueued_at = self.now
                self.queue_up(request)
        return refused

    def release(self) -> None:
        for request in self.batcher.leaving(self.running):
            self.running.remove(request)
            self.pool.release(request.blocks)
            request.blocks = []

    def form_batch(self) -> list[Scheduled]:
        self.chosen = []
        self.batcher.schedule(self)
        return self.chosen

    def begin_step(self, now: float, enqueue: Callable[[], None]) -> list[Scheduled]:
        """Who is computed in the step that begins now.

        Asynchronously the batch has been formed when the step that ends now began: without what that step frees,
        and without whoever arrived since. (That its prompts are done and who ends with it was known.)
        """
        self.now = now
        chosen = self.form_batch() if self.asynchronous else []
        self.release()
        enqueue()
        return chosen or self.form_batch()

    def finish_step(self, end: float) -> list[Request]:
        """Tokens appear; who ended, in the order of the running."""
        for one in self.chosen:
            request = one.request
            request.computed += one.tokens
            if request.rest == 0:
                request.token_at.append(end)
                request.seen_at.append(end + request.generated * self.overheads.per_output_token)
        return [request for request in self.running if request.ended and request.completed_at is None]


class Batcher:
    preempted_to_front = True

    def refuses(self, engine: Engine, request: Request) -> bool:
        """Whether it could never be admitted."""
        return False

    def leaving(self, running: list[Request]) -> list[Request]:
        return [request for request in running if request.ended]

    def is_too_long(self, engine: Engine, request: Request, budget: float) -> bool:
        """Whether a prompt that can't be split has no room in this step.

        A resumed request may have outgrown the whole budget: it is the only prefill of its step, then.
        """
        tokens = request.known - engine.found_tokens(request)
        outgrown = tokens > budget and not any(one.is_prefill for one in engine.chosen)
        return tokens > engine.left(budget) and not outgrown

    def schedule(self, engine: Engine) -> None:
        raise NotImplementedError


@dataclass
class TokenBudget(Batcher):
    """As vLLM V1."""

    budget: int
    threshold: int = 0  # the most prompt tokens of one request in a step; 0: no limit
    reserve_full_prompt: bool = False

    def schedule(self, engine: Engine) -> None:
        before = engine.preemptions
        for request in engine.live():
            tokens = min(request.rest, self.threshold or inf, engine.left(self.budget))
            if tokens > 0:
                engine.compute_preempting(request, tokens)
        while engine.preemptions == before and engine.left(self.budget) > 0 and (head := engine.head()):
            found = engine.found_tokens(head)
            tokens = min(head.known - found, self.threshold or inf, engine.left(self.budget))
            whole = engine.needed(head.known) if self.reserve_full_prompt else 0
            if not engine.admit(head, hold=engine.needed(found + tokens), must_fit=whole):
                break
            engine.compute(head, tokens)


@dataclass
class Chunked(Batcher):
    """As Sarathi-Serve: decodes first, chunks of prompts in what they leave of the budget."""

    chunk_tokens: int

    def schedule(self, engine: Engine) -> None:
        engine.decode_all()
        engine.continue_prefills(self.chunk_tokens)
        while engine.left(self.chunk_tokens) > 0 and (head := engine.head()):
            if not engine.admit(head, hold=engine.needed(head.known)):
                break
            engine.compute(head, min(head.rest, engine.left(self.chunk_tokens)))


@dataclass
class IF(Batcher):
    """As Orca: whole prompts join the decodes; the blocks of the longest sequence are reserved."""

    budget: float | None = None
    reserve_tokens: int | None = None

    def reserved(self, engine: Engine, request: Request) -> int:
        if self.reserve_tokens is not None:
            return engine.needed(self.reserve_tokens)
        return engine.needed(engine.max_model_len or request.prompt_tokens + request.cap)

    def refuses(self, engine: Engine, request: Request) -> bool:
        total = request.prompt_tokens + request.output_tokens
        return (
            self.reserved(engine, request) > engine.blocks
            or (self.reserve_tokens is not None and total > self.reserve_tokens)
            or request.prompt_tokens > (self.budget or inf)
        )

    def schedule(self, engine: Engine) -> None:
        engine.decode_all()
        while self.admit_next(engine):
            pass

    def admit_next(self, engine: Engine) -> bool:
        head = engine.head()
        if head is None or self.is_too_long(engine, head, self.budget or inf):
            return False
        if not engine.admit(head, hold=self.reserved(engine, head)):
            return False
        engine.compute(head, head.rest)
        return True


class OnePrefill(IF):
    """As IF, a prompt a step."""

    def schedule(self, engine: Engine) -> None:
        engine.decode_all()
        self.admit_next(engine)


class Static(IF):
    """As FasterTransformer: a batch begins when the one before it is done, and keeps all its blocks until then."""

    def leaving(self, running: list[Request]) -> list[Request]:
        return list(running) if all(request.ended for request in running) else []

    def schedule(self, engine: Engine) -> None:
        if engine.running:
            engine.decode_all()
        else:
            while self.admit_next(engine):
                pass


@dataclass
class PrefillFirst(Batcher):
    """As vLLM V0: a step of whole prompts if any can be admitted, else a step of decodes."""

    budget: int
    padded: bool = False

    def refuses(self, engine: Engine, request: Request) -> bool:
        return request.prompt_tokens > self.budget

    def schedule(self, engine: Engine) -> None:
        while head := engine.head():
            tokens = [one.tokens for one in engine.chosen] + [head.known - engine.found_tokens(head)]
            cost = len(tokens) * max(tokens) if self.padded else sum(tokens)
            # A resumed request may have outgrown the budget: it may come first, and then alone.
            if (cost > self.budget and engine.chosen) or not engine.admit(head, hold=engine.needed(head.known)):
                break
            engine.compute(head, head.rest)
        if not engine.chosen:
            engine.decode_all()


@dataclass
class NoEvict(Batcher):
    """As TensorRT-LLM's GUARANTEED_NO_EVICT: the blocks to a request's `max_tokens` are reserved."""

    budget: float | None = None
    chunked: bool = False

    def reserved(self, engine: Engine, request: Request) -> int:
        return engine.needed(request.prompt_tokens + request.cap)

    def refuses(self, engine: Engine, request: Request) -> bool:
        too_long = not self.chunked and request.prompt_tokens > (self.budget or inf)
        return too_long or self.reserved(engine, request) > engine.blocks

    def schedule(self, engine: Engine) -> None:
        budget = self.budget or inf
        engine.decode_all()
        engine.continue_prefills(budget)
        while engine.left(budget) > 0 and (head := engine.head()):
            if not self.chunked and self.is_too_long(engine, head, budget):
                break
            if not engine.admit(head, hold=self.reserved(engine, head)):
                break
            engine.compute(head, min(head.rest, engine.left(budget)) if self.chunked else head.rest)


@dataclass
class MaxUtilization(Batcher):
    """As TensorRT-LLM's MAX_UTILIZATION: only this step's blocks."""

    budget: float | None = None
    chunked: bool = False

    def refuses(self, engine: Engine, request: Request) -> bool:
        return not self.chunked and request.prompt_tokens > (self.budget or inf)

    def schedule(self, engine: Engine) -> None:
        budget = self.budget or inf
        before = engine.preemptions
        for request in engine.live():
            tokens = min(request.rest, engine.left(budget))
            if tokens > 0:
                engine.compute_preempting(request, tokens)
        while engine.preemptions == before and engine.left(budget) > 0 and (head := engine.head()):
            found = engine.found_tokens(head)
            tokens = head.known - found
            if self.chunked:
                tokens = min(tokens, engine.left(budget))
            elif self.is_too_long(engine, head, budget):
                break
            if not engine.admit(head, hold=engine.needed(found + tokens)):
                break
            engine.compute(head, tokens)


@dataclass
class SGLang(Batcher):
    """Prefill first, admitting by an estimate of what the running ones will still need."""

    chunk_tokens: int = 8192
    init_ratio: float = 0.7
    min_factor: float = 0.14
    decay_steps: int = 600
    max_new: int = 4096

    preempted_to_front = False

    def __post_init__(self) -> None:
        self.cut: Request | None = None  # whose prompt was split last
        self.ratio = self.init_ratio
        self.min_ratio = self.init_ratio * self.min_factor
        self.decay = (self.init_ratio - self.min_ratio) / self.decay_steps

    def to_come(self, request: Request) -> int:
        return min(request.cap - request.generated, self.max_new)

    def refuses(self, engine: Engine, request: Request) -> bool:
        needed = request.prompt_tokens + self.to_come(request) + engine.block_size
        return needed > engine.blocks * engine.block_size

    def schedule(self, engine: Engine) -> None:
        assert self.chunk_tokens >= engine.block_size  # or a longer prompt would never begin
        partly = [request for request in engine.live() if not request.decodes or request is self.cut]
        assert len(partly) <= 1
        for request in partly:
            tokens = min(request.rest, self.chunk_tokens)
            if not self.retract(engine, [(request, tokens)]):
                return
        free = len(engine.pool.free)
        for request in partly:
            if request in engine.running:
                engine.compute(request, tokens)
                self.cut = request if tokens < request.rest else None
        self.admit(engine, free)
        if not engine.chosen:
            self.decode(engine)

    def admit(self, engine: Engine, free: int) -> None:
        cut = False
        while not cut and engine.left(self.chunk_tokens) > 0 and (head := engine.head()):
            size = engine.block_size
            found = engine.found_tokens(head)
            tokens = head.known - found
            needed = tokens + engine.found_idle(head) * size + self.to_come(head) + size
            # A resumed request may look too long for the whole memory, though it isn't: not if it is alone.
            if engine.running and needed > self.room(engine, free):
                break
            if tokens > engine.left(self.chunk_tokens):
                tokens = engine.left(self.chunk_tokens) // size * size
                cut = True
            if tokens == 0 or not engine.admit(head, hold=engine.needed(found + tokens)):
                break
            engine.compute(head, tokens)
            self.cut = head if cut else None

    def room(self, engine: Engine, free: int) -> float:
        """Tokens that the free blocks have left when all that run have what they will need."""
        size = engine.block_size
        prefilling = [one.request for one in engine.chosen]
        decoding = [request for request in engine.live() if request not in prefilling]
        return (
            free * size
            - self.ratio * sum(self.to_come(request) for request in decoding)
            - sum(engine.needed(one.tokens) * size + self.to_come(one.request) for one in engine.chosen)
        )

    def decode(self, engine: Engine) -> None:
        before = engine.preemptions
        if engine.live() and self.retract(engine, [(request, 1) for request in engine.live()]):
            engine.decode_all()
            if engine.preemptions == before:
                self.ratio = max(self.ratio - self.decay, self.min_ratio)

    def retract(self, engine: Engine, wanted: list[tuple[Request, int]]) -> bool:
        """Preempt until the blocks for so many tokens each are free; False if they aren't for the last one left."""

        def fits() -> bool:
            there = [(request, tokens) for request, tokens in wanted if request in engine.running]
            return sum(engine.missing(*one) for one in there) <= len(engine.pool.free)

        before = engine.preemptions
        while not fits() and len(engine.live()) > 1:
            latest_first = reversed(engine.live())
            engine.preempt(min(latest_first, key=lambda request: (request.generated, -request.prompt_tokens)))
        if engine.preemptions > before:
            left = engine.live()
            generated = sum(request.generated for request in left) + 20 * len(left)
            self.ratio = min(1.0, generated / sum(min(request.cap, self.max_new) for request in left))
        return fits()


def simulate(
    requests: Sequence[Request],
    *,
    batcher: Batcher,
    slots: int,
    blocks: int,
    block_size: int,
    duration: Callable[[list[Scheduled]], float],
    prefix_caching: bool = False,
    uncached_first: bool = False,
    watermark: float = 0.0,
    order: str = "fcfs",
    async_scheduling: bool = False,
    max_model_len: int | None = None,
    overheads: Overheads | None = None,
    concurrency: int | None = None,
    think_time: float = 0.0,
    time_limit: float = inf,
) -> Result:
    """Serve the requests to the end, or as long as steps begin before the time limit.

    With a concurrency so many users send the requests, each its next one when its last has ended. Copies are served;
    a batcher of SGLang's kind remembers its ratio, so each run needs its own.
    """
    overheads = overheads or Overheads()
    pool = Pool(blocks, uncached_first)
    engine = Engine(
        batcher, slots, pool, block_size, prefix_caching, int(watermark * blocks), order, async_scheduling,
        max_model_len, overheads,
    )  # fmt: skip
    result = Result([replace(request) for request in requests], pool)
    unsent: list[Request] = []  # of a closed loop
    followers: dict[int, list[Request]] = defaultdict(list)
    for index, request in enumerate(result.requests):
        request.index = index
        if concurrency is not None:
            request.arrived_at = inf
            unsent.append(request)
        elif request.after is not None:
            request.arrived_at = inf
            followers[request.after].append(request)
        else:
            engine.arrivals.append(request)

    def send(request: Request, at: float) -> None:
        request.arrived_at = at
        engine.arrivals.append(request)

    def send_next(at: float) -> None:
        if unsent:
            send(unsent.pop(0), at)

    def enqueue() -> None:
        for _ in engine.enqueue():
            send_next(engine.now + max(think_time, 1.0))  # a user whose request is refused never asks without end

    for _ in range(concurrency or 0):
        send_next(0.0)
    t = 0.0
    while t < time_limit:
        chosen = engine.begin_step(t, enqueue)
        if chosen:
            end = t + (duration(chosen) + overheads.per_step)
            used = blocks - len(pool.free)
            result.steps.append(Step(t, end, chosen, len(engine.waiting), used))
            for request in engine.finish_step(end):
                request.completed_at = request.seen_at[-1] + overheads.at_completion
                send_next(request.completed_at + think_time)
                for follower in followers[request.index]:
                    send(follower, request.completed_at + follower.think)
            t = end
        else:
            stuck = engine.waiting + engine.running
            assert not stuck
            if not engine.arrivals:
                break
            t = min(engine.queued_at(request) for request in engine.arrivals)
    result.preemptions = engine.preemptions
    return result
