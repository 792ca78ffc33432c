"""Load generators: when requests arrive and how long they are. Declaration and rule side by side."""

import math
import warnings
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, Self

import msgspec

from vecsim.declaration import (
    LONGEST_TIME,
    Count,
    Declaration,
    NonNegative,
    Number,
    Offset,
    Positive,
    Range,
    Seed,
    Time,
    Values,
    check,
    check_array,
    shown,
)
from vecsim.lengths import (
    CHOICE,
    MOST_TOKENS,
    SEQUENCE,
    AnyDistribution,
    Constant,
    Distribution,
    Empirical,
    Normal,
    choice,
)

# Codes of the rule `arrival_time`, and of the closed loop
AT_ONCE, EVENLY, RENEWAL, CLOSED, PIECEWISE, TRACED = range(6)

# Streams of whole numbers that the requests of the token model are made of; each has a random stream of its own
OUTPUT, PROMPT, CAP, CLASS, GROUP, TURNS = range(6)


class Stream(NamedTuple):
    """What a stream of whole numbers is drawn from; see `vecsim.lengths.output_tokens`."""

    code: int
    a: float
    b: float
    table: tuple[int, ...] | Values
    expected: float
    purpose: int  # streams of one purpose and one seed come from the same random numbers

    @classmethod
    def of(cls, length: Distribution, purpose: int) -> "Stream":
        return cls(*length.parameters(), length.expected(), purpose)


ONES = Stream.of(Constant(value=1), OUTPUT)


class SLO(Declaration, frozen=True, kw_only=True):
    """Limits that a request must keep to count as good; those left out don't matter.

    Parameters
    ----------
    ttft : float, optional
        Time to first token [s].
    tpot : float, optional
        Mean time between its tokens [s].
    itl : float, optional
        Longest time between two of its tokens [s].
    e2e : float, optional
        End-to-end latency [s].
    """

    ttft: Positive | None = None
    tpot: Positive | None = None
    itl: Positive | None = None
    e2e: Positive | None = None


class RequestClass(Declaration, frozen=True, kw_only=True):
    """A kind of requests.

    Parameters
    ----------
    name : str
        Along the dimension `class` of results.
    share : float
        Of all requests, in proportion to the other classes' shares. Without meaning for a trace with classes, whose
        requests belong to the class of their label.
    priority : int
        The least goes first under `order="priority"`.
    slo : SLO, optional
        The engine's unless given.
    """

    name: str
    share: Positive = 1.0
    priority: Annotated[int, Range(-(2**31), 2**31)] = 0
    slo: SLO | None = None


class SharedPrefix(Declaration, frozen=True, kw_only=True):
    """Prompts begin with one of several shared texts (system prompts, documents), before their own `prompt_tokens`.

    Parameters
    ----------
    tokens : int
        Length of each shared text.
    groups : int
        How many there are.
    exponent : float
        The k-th is as popular as k^-exponent; 0 makes all equally popular.
    """

    tokens: Number
    groups: Annotated[int, Range(1, 2**20)] = 1
    exponent: NonNegative = 0.0


class Sessions(Declaration, frozen=True, kw_only=True):
    """Requests come as conversations: each turn's prompt is all that was said before, and `prompt_tokens` more.

    Arrivals are those of the conversations: a load's rate is theirs, and its number of requests (`requests`,
    `initial_batch`) is how many conversations there are.

    Parameters
    ----------
    turns : int or distribution
        Requests of a conversation.
    think_time : float
        From the end of one answer to the next request [s].
    """

    turns: AnyDistribution | Number = 4
    think_time: Time = 0.0


UP = 0.6 * 2.0**-52


class LoadGenerator(Declaration, frozen=True, kw_only=True, tag_field="type"):
    """Base of all load generators.

    With `prompt_tokens` a load is one of the token model: times are seconds. Without, of the tick model.

    Parameters
    ----------
    prompt_tokens : int or distribution, optional
        Token model. Prompt length [tokens].
    max_tokens : int or distribution, optional
        Token model. The client's cap on the output, which batchers may know and outputs keep to; the output's own
        length unless given.
    joint : bool
        Token model. Draw rows of two `Empirical` lengths of prompt and output together.
    classes : sequence of RequestClass
        Token model. Kinds of requests; each request is of one, by their shares.
    prefix : SharedPrefix, optional
        Token model. What prompts begin with.
    sessions : Sessions, optional
        Token model. Requests come as conversations.
    prefill_time : float
        Time that the prefill of one prompt takes [ticks].
    itl : float
        Time that the decode of one token takes [ticks].
    total_prefill_chunks : int
        Steps over which a prefill is spread; above 1 this is "chunked context".
    output_tokens : int or distribution, optional
        Output length [tokens]: a number, `Constant`, `Normal`, `Uniform`, `LogNormal`, `Zipf` or `Empirical`.
        Needed in the token model.
    target_output_len_tokens, target_output_len_std : float, optional
        Shorthand for `output_tokens=Normal(mean, std)`; 4 (in the tick model) and 0 unless given.
    seed : int
        The same seed gives the same requests, whatever else differs.
    stream_offset : int
        Draws of the seed's stream of lengths that are passed over: the first request gets the next one. So a run goes
        on where another one stopped.

    Raises
    ------
    ValueError
        When a field is out of its range, or a length is given both ways, or prompts are given and outputs aren't.
    """

    prompt_tokens: AnyDistribution | Number | None = None
    max_tokens: AnyDistribution | Number | None = None
    joint: bool = False
    classes: tuple[RequestClass, ...] = ()
    prefix: SharedPrefix | None = None
    sessions: Sessions | None = None
    prefill_time: Time = 2.0
    itl: Time = 1.0
    total_prefill_chunks: Count = 1
    output_tokens: AnyDistribution | Number | None = None
    target_output_len_tokens: NonNegative | None = None
    target_output_len_std: NonNegative | None = None
    seed: Seed = 0
    stream_offset: Offset = 0

    arrivals: ClassVar[int]

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_tokens()
        if self.output_tokens is None:
            return
        for name in ("target_output_len_tokens", "target_output_len_std"):
            if getattr(self, name) is not None:
                raise ValueError(f"{name} must be left out where output_tokens is given, got {getattr(self, name)!r}")

    def _check_tokens(self) -> None:
        """Refuse what contradicts itself among the fields of the token model."""
        classes = tuple(self.classes) if isinstance(self.classes, Sequence) else (self.classes,)
        if any(not isinstance(kind, RequestClass) for kind in classes):
            raise ValueError(f"classes must be a list of RequestClass, got {shown(self.classes)}")
        if len({kind.name for kind in classes}) < len(classes):
            raise ValueError(f"classes must have different names, got {', '.join(kind.name for kind in classes)}")
        msgspec.structs.force_setattr(self, "classes", classes)
        if self.joint:
            sizes = [
                len(length.values) if isinstance(length, Empirical) else None
                for length in (self.prompt_tokens, self.output_tokens)
            ]
            if None in sizes or sizes[0] != sizes[1]:
                raise ValueError("joint: prompt_tokens and output_tokens must be Empirical, with as many values")
        if self.is_token and self.output_tokens is None and self.target_output_len_tokens is None:
            raise ValueError("output_tokens must be given where prompt_tokens is")
        if self.sessions is not None and self.arrivals == CLOSED:
            raise ValueError("sessions must be left out in a closed loop, where requests follow one another already")

    @property
    def is_token(self) -> bool:
        """Whether this is a load of the token model."""
        return self.prompt_tokens is not None

    def refuse_clock(self, token: bool) -> None:
        """Refuse the fields of the other clock.

        Raises
        ------
        ValueError
            When this load is none of the clock, or has a field that means nothing there.
        """
        kind = type(self).__name__
        if token and not self.is_token:
            raise ValueError(f"{kind}: prompt_tokens must be given where step_time isn't TickStepTime")
        if not token and self.is_token:
            raise ValueError(f"{kind}: prompt_tokens must be left out where step_time is TickStepTime")
        if not token and self.arrivals == PIECEWISE:
            raise ValueError(f"{kind} needs a step_time in seconds and prompt_tokens, got TickStepTime")
        wrong = ("prefill_time", "itl", "total_prefill_chunks") if token else TOKEN_FIELDS
        defaults = {field.name: field.default for field in msgspec.structs.fields(self)}
        for name in wrong:
            if name in defaults and getattr(self, name) != defaults[name]:
                clock = "token" if token else "tick"
                raise ValueError(f"{kind}: {name} means nothing in the {clock} model, got {shown(getattr(self, name))}")

    def length_streams(self) -> tuple[Stream, Stream, Stream]:
        """Streams of outputs, prompts and caps."""
        prompt = as_distribution(self.prompt_tokens)
        return (
            Stream.of(self.output_length, OUTPUT),
            Stream.of(prompt, OUTPUT if self.joint else PROMPT),
            ONES if self.max_tokens is None else Stream.of(as_distribution(self.max_tokens), CAP),
        )

    def class_stream(self) -> Stream:
        """The stream of classes."""
        return ONES if len(self.classes) < 2 else _choice([kind.share for kind in self.classes], CLASS)

    def streams(self) -> list[Stream]:
        """What the requests of the token model are made of, in the order OUTPUT, PROMPT, CAP, CLASS, GROUP, TURNS."""
        group = ONES
        if self.prefix is not None and self.prefix.groups > 1:
            group = _choice([k**-self.prefix.exponent for k in range(1, self.prefix.groups + 1)], GROUP)
        turns = ONES if self.sessions is None else Stream.of(as_distribution(self.sessions.turns), TURNS)
        return [*self.length_streams(), self.class_stream(), group, turns]

    @property
    def output_length(self) -> Distribution:
        """The distribution of output lengths, however it was declared."""
        if self.output_tokens is None:
            mean, std = self.target_output_len_tokens, self.target_output_len_std
            return Normal(mean=4.0 if mean is None else mean, std=0.0 if std is None else std)
        if isinstance(self.output_tokens, Distribution):
            return self.output_tokens
        return Constant(value=self.output_tokens)

    def arrival_parameters(self) -> dict[str, Any]:
        """Columns of the scenario table that describe the arrivals."""
        raise NotImplementedError


Variation = Annotated[float, Range(1e-3, 1e3)]


def limited(requests: int | None) -> dict[str, Any]:
    """The column of a limit on the requests, if there is one."""
    return {} if requests is None else {"requests": requests}


# Fields that mean nothing in the tick model
TOKEN_FIELDS = ("max_tokens", "joint", "classes", "prefix", "sessions", "think_time")


def as_distribution(length: Any) -> Distribution:
    """A length, whether it is given as a number or a distribution."""
    return length if isinstance(length, Distribution) else Constant(value=length)


def _choice(weights: list[float], purpose: int) -> Stream:
    """A stream of 1, 2, ... with probabilities proportional to weights."""
    mean = sum(k * weight for k, weight in enumerate(weights, 1)) / sum(weights)
    return Stream(CHOICE, 0.0, 0.0, choice(weights), mean, purpose)


def _recorded(values: Values, scale: float) -> Stream:
    """A stream of recorded numbers times a scale, rounded up."""
    return Stream(SEQUENCE, scale, 0.0, values, scale * float(values.array.mean()), OUTPUT)


class BatchLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """All requests at once, at time 0.

    Parameters
    ----------
    initial_batch : int
        Number of requests; of conversations, where there are `sessions`.
    """

    initial_batch: Number = 3

    arrivals = AT_ONCE

    def arrival_parameters(self) -> dict[str, Any]:
        return {"requests": self.initial_batch}


class ConcurrentLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """A closed loop: at each boundary, as many new requests as have left since the last.

    Parameters
    ----------
    target_concurrency : int
        Requests in the system (running and queued) after each boundary; in the token model, users.
    think_time : float
        Token model. From the end of a user's request to the arrival of his next one [s]; where a request is refused, at
        least 1.
    """

    target_concurrency: Number = 3
    think_time: Time = 0.0

    arrivals = CLOSED

    def arrival_parameters(self) -> dict[str, Any]:
        return {"requests": self.target_concurrency}


class RequestRateLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """Evenly spaced arrivals: the i-th request is due at i / request_rate.

    Parameters
    ----------
    request_rate : float
        Requests per tick (per second in the token model).
    requests : int, optional
        No more than so many arrive; conversations, where there are `sessions`.
    """

    request_rate: Positive = 1.0
    requests: Number | None = None

    arrivals = EVENLY

    def arrival_parameters(self) -> dict[str, Any]:
        return {"request_rate": self.request_rate, **limited(self.requests)}


class PoissonLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """Poisson arrivals: independent exponential gaps.

    Parameters
    ----------
    request_rate : float
        Mean requests per tick (per second in the token model).
    requests : int, optional
        No more than so many arrive; conversations, where there are `sessions`.
    """

    request_rate: Positive = 1.0
    requests: Number | None = None

    arrivals = RENEWAL

    def arrival_parameters(self) -> dict[str, Any]:
        return {"request_rate": self.request_rate, "shape": 1.0, **limited(self.requests)}


class GammaLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """Independent gamma gaps: burstier than Poisson above a coefficient of variation of 1, smoother below.

    Parameters
    ----------
    request_rate : float
        Mean requests per tick (per second in the token model).
    coefficient_of_variation : float
        Standard deviation of the gaps over their mean; 1 is Poisson's law.
    requests : int, optional
        No more than so many arrive; conversations, where there are `sessions`.

    Notes
    -----
    The gaps' shape is 1 / cv^2 and their mean 1 / request_rate.
    """

    request_rate: Positive = 1.0
    coefficient_of_variation: Variation = 1.0
    requests: Number | None = None

    arrivals = RENEWAL

    def arrival_parameters(self) -> dict[str, Any]:
        return {
            "request_rate": self.request_rate,
            "shape": self.coefficient_of_variation**-2.0,
            **limited(self.requests),
        }


class PiecewiseLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """Arrivals whose rate changes in steps: stages of a test, the hours of a day, bursts. Of the token model alone.

    Parameters
    ----------
    request_rates : sequence of float
        Mean requests per second in each stage; 0 is a pause.
    durations : sequence of float
        How long each stage lasts [s].
    repeat : bool
        Begin anew after the last stage; else its rate goes on.
    rate_scale : float
        All rates times this; an axis for sweeps.
    coefficient_of_variation : float
        Of the gaps, in the time in which the rate is constant; 1 is a Poisson process.
    requests : int, optional
        No more than so many arrive; conversations, where there are `sessions`.

    Notes
    -----
    The i-th request is due when the integral of the rate reaches the i-th instant of a renewal process of rate 1.
    """

    request_rates: tuple[float, ...]
    durations: tuple[float, ...]
    repeat: bool = False
    rate_scale: Positive = 1.0
    coefficient_of_variation: Variation = 1.0
    requests: Number | None = None

    arrivals = PIECEWISE

    def __post_init__(self) -> None:
        for name, low in (("request_rates", 0.0), ("durations", 1e-9)):
            values = check_array(name, getattr(self, name), float, low=low, high=1e12).array
            msgspec.structs.force_setattr(self, name, tuple(values.tolist()))
        super().__post_init__()
        if len(self.request_rates) != len(self.durations) or not self.durations:
            raise ValueError(
                f"request_rates and durations must be one or more, and as many, got {len(self.request_rates)} and "
                f"{len(self.durations)}"
            )
        if not any(self.request_rates):
            raise ValueError("request_rates must not all be 0")

    @classmethod
    def diurnal(
        cls, *, mean_rate: float, peak_to_mean: float = 1.8, period: float = 86_400.0, stages: int = 96, **fields: Any
    ) -> Self:
        """Rates of a day: a sine around the mean in so many stages, lowest at time 0, repeated.

        Raises
        ------
        ValueError
            When an argument is out of its range; above a `peak_to_mean` of 2 the lowest rate would be negative.
        """
        mean_rate = check("mean_rate", mean_rate, (float,), Range(0, low_allowed=False))
        peak_to_mean = check("peak_to_mean", peak_to_mean, (float,), Range(1, 2))
        period = check("period", period, (float,), Range(0, LONGEST_TIME, low_allowed=False))
        stages = check("stages", stages, (int,), Range(1, 2**20))
        rates = [
            mean_rate * (1 - (peak_to_mean - 1) * math.cos(2 * math.pi * (i + 0.5) / stages)) for i in range(stages)
        ]
        return cls(request_rates=tuple(rates), durations=(period / stages,) * stages, repeat=True, **fields)

    @classmethod
    def bursts(
        cls, *, base_rate: float, burst_rate: float, burst_duration: float, period: float, **fields: Any
    ) -> Self:
        """A burst at the end of each period.

        Raises
        ------
        ValueError
            When an argument is out of its range, or a burst takes longer than a period.
        """
        base_rate = check("base_rate", base_rate, (float,), Range(0))
        burst_rate = check("burst_rate", burst_rate, (float,), Range(0))
        period = check("period", period, (float,), Range(0, LONGEST_TIME, low_allowed=False))
        burst_duration = check("burst_duration", burst_duration, (float,), Range(0, low_allowed=False))
        if burst_duration >= period:
            raise ValueError(f"burst_duration must be > 0 and < period ({period:g}), got {burst_duration:g}")
        return cls(
            request_rates=(base_rate, burst_rate),
            durations=(period - burst_duration, burst_duration),
            repeat=True,
            **fields,
        )

    def arrival_parameters(self) -> dict[str, Any]:
        return {
            "request_rate": self.rate_scale,
            "shape": self.coefficient_of_variation**-2.0,
            **limited(self.requests),
        }

    def mean_rate(self, time_limit: float) -> float:
        """Requests per second until the limit, before `rate_scale`."""
        cycle = sum(self.durations)
        area = sum(rate * duration for rate, duration in zip(self.request_rates, self.durations, strict=True))
        if math.isinf(time_limit):
            return area / cycle
        cycles = math.floor(time_limit / cycle) if self.repeat else 0
        total, left = cycles * area, time_limit - cycles * cycle
        for rate, duration in zip(self.request_rates, self.durations, strict=True):
            total += rate * min(left, duration)
            left = max(left - duration, 0.0)
        return (total + self.request_rates[-1] * left) / time_limit


# Fields of a trace that a file may have
ARRAYS = ("arrived_at", "prompt_tokens", "output_tokens", "max_tokens", "block_ids", "block_counts", "class_names")


class TraceLoadGenerator(LoadGenerator, frozen=True, kw_only=True, tag=True):
    """Requests as they were recorded.

    Parameters
    ----------
    arrived_at : array of float, optional
        Ascending [s]; all at once unless given.
    prompt_tokens, output_tokens : array of int
        Lengths.
    max_tokens : array of int, optional
        The client's caps on the outputs.
    block_ids : sequence of sequences of int, optional
        For each request the ids of its prompt's blocks: equal ids mean the same tokens up to there. With `block_counts`
        one flat array, and how many of it are each request's.
    id_block_tokens : int, optional
        Tokens that an id covers: a multiple of the engine's block size. Ids are given for full blocks alone, or for a
        partial last one too.
    class_names : sequence of str, optional
        The class of each request.
    rate_scale : float
        Arrivals come so many times as fast.
    requests : int, optional
        Only the first so many; conversations, where there are `sessions`.
    prompt_scale, output_scale : float
        Lengths are multiplied by this and rounded up; blocks beyond the shorter prompt, or beyond the given ids, are
        each request's own.
    file, format, on_error
        Instead of arrays: what to read, as for `read_trace`. An array that the file lacks may be given beside it.

    Raises
    ------
    ValueError
        When an array is wrong, or the file has it too: names it, the place and what is allowed.
    """

    arrived_at: Any = None
    prompt_tokens: Any = None
    output_tokens: Any = None
    max_tokens: Any = None
    block_ids: Any = None
    block_counts: Any = None
    id_block_tokens: Annotated[int, Range(1, 2**20)] | None = None
    class_names: Any = None
    rate_scale: Positive = 1.0
    prompt_scale: Positive = 1.0
    output_scale: Positive = 1.0
    file: str | None = None
    format: Literal["azure", "mooncake", "burstgpt", "qwen-bailian", "vidur", "csv"] = "csv"
    on_error: Literal["raise", "skip"] = "raise"
    requests: Number | None = None

    arrivals = TRACED

    def __post_init__(self) -> None:
        put = msgspec.structs.force_setattr
        if self.file is not None:
            self._read()
        if self.prompt_tokens is None or self.output_tokens is None:
            raise ValueError("prompt_tokens and output_tokens must be given, or a file to read them from")
        for name in ("prompt_tokens", "output_tokens", "max_tokens"):
            if getattr(self, name) is not None:
                put(self, name, check_array(name, getattr(self, name), int, low=1, high=MOST_TOKENS))
        size = len(self.prompt_tokens)
        if self.arrived_at is None:
            put(self, "arrived_at", Values([0.0] * size, self.prompt_tokens.read_from))
        put(self, "arrived_at", check_array("arrived_at", self.arrived_at, float, low=0, high=LONGEST_TIME))
        self._check_blocks()
        if size == 0:
            raise ValueError("prompt_tokens must be of one or more requests, got none")
        for name in ("arrived_at", "output_tokens", "max_tokens", "block_counts", "class_names"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, Sized):
                raise ValueError(f"{name} must be a sequence, got {shown(value)}")
            if value is not None and len(value) != size:
                raise ValueError(f"{name} must have as many values as prompt_tokens ({size}), got {len(value)}")
        if (self.arrived_at.array[1:] < self.arrived_at.array[:-1]).any():
            raise ValueError("arrived_at must ascend")
        if self.max_tokens is not None and (self.max_tokens.array < self.output_tokens.array).any():
            raise ValueError("max_tokens must be >= output_tokens")
        for name in ("sessions", "stream_offset"):
            if getattr(self, name):
                raise ValueError(f"{name} must be left out of a trace, got {shown(getattr(self, name))}")
        if self.block_ids is not None and self.prefix is not None:
            raise ValueError(f"prefix must be left out of a trace with block_ids, got {shown(self.prefix)}")
        if self.class_names is not None:
            names = tuple(self.class_names) if not isinstance(self.class_names, Values) else self.class_names
            if not isinstance(names, Values):
                if any(not isinstance(name, str) for name in names):
                    raise ValueError(f"class_names must be texts, got {shown(self.class_names)}")
                names = Values(names)
            put(self, "class_names", names)
        super().__post_init__()
        if self.class_names is not None:
            there = set(self.class_names.array.tolist())
            declared = {kind.name for kind in self.classes}
            if not self.classes:
                put(self, "classes", tuple(RequestClass(name=str(name)) for name in sorted(there)))
            elif missing := there - declared:
                raise ValueError(
                    f"classes must have all class_names of the trace: {', '.join(sorted(missing))} missing"
                )

    def _check_blocks(self) -> None:
        """Ids of blocks, flat and numbered from 0."""
        import numpy as np

        put = msgspec.structs.force_setattr
        if self.block_ids is None:
            if self.id_block_tokens is not None:
                raise ValueError(
                    f"id_block_tokens must be left out where there are no block_ids, got {shown(self.id_block_tokens)}"
                )
            return
        if self.id_block_tokens is None:
            raise ValueError("id_block_tokens must be given where block_ids are")
        if self.block_counts is None:
            try:
                counts = [len(ids) for ids in self.block_ids]
            except TypeError:
                raise ValueError(
                    f"block_ids must be a sequence of ids for each request, got {shown(self.block_ids)}"
                ) from None
            flat = check_array("block_ids", [id_ for ids in self.block_ids for id_ in ids] or np.empty(0), int)
            put(self, "block_counts", Values(np.array(counts, np.int64)))
        else:
            flat = check_array("block_ids", self.block_ids, int, low=0)
            put(self, "block_counts", check_array("block_counts", self.block_counts, int, low=0))
            if int(self.block_counts.array.sum()) != len(flat):
                raise ValueError(
                    f"block_counts must add up to the number of block_ids ({len(flat)}), "
                    f"got {int(self.block_counts.array.sum())}"
                )
        _, numbers = np.unique(flat.array, return_inverse=True)
        put(self, "block_ids", Values(numbers, read_from=flat.read_from))
        blocks = -(-self.prompt_tokens.array // self.id_block_tokens)
        if len(self.block_counts) == len(blocks) and (self.block_counts.array > blocks).any():
            at = int((self.block_counts.array > blocks).argmax())
            raise ValueError(
                f"block_ids must be at most {int(blocks[at])} for the {int(self.prompt_tokens.array[at])} prompt "
                f"tokens of request {at}, got {int(self.block_counts.array[at])}"
            )

    def _read(self) -> None:
        """Take the arrays from the file, unless they were read there before this was copied or pickled."""
        from vecsim.traces import read_columns

        put = msgspec.structs.force_setattr
        there = (self.file, self.format, self.on_error)
        given = {name: getattr(self, name) for name in ARRAYS if getattr(self, name) is not None}
        known = {name: value for name, value in given.items() if isinstance(value, Values) and value.read_from}
        if known.keys() >= {"prompt_tokens", "output_tokens"} and all(v.read_from == there for v in known.values()):
            return
        own_ids = "block_ids" in given.keys() - known.keys()
        trace = read_columns(
            Path(str(self.file)), self.format, self.on_error, id_block_tokens=None if own_ids else self.id_block_tokens
        )
        arrays = {name: getattr(trace, name) for name in ("arrived_at", "prompt_tokens", "output_tokens", "max_tokens")}
        if trace.id_block_tokens:
            arrays |= {"block_ids": trace.block_ids, "block_counts": trace.block_counts}
            put(self, "id_block_tokens", trace.id_block_tokens)
        if trace.classes:
            arrays["class_names"] = [trace.classes[i] for i in trace.class_]
        for name in ARRAYS:
            read = arrays.get(name)
            if read is not None and name in given.keys() - known.keys():
                raise ValueError(f"{name} must be left out where a file has it, got {shown(given[name])}")
            if read is not None or name in known:
                put(self, name, None if read is None else Values(read, there))
        if trace.skipped:
            warnings.warn(
                f"{self.file}: malformed rows left out: {trace.skipped}; the first: {trace.first_skipped}",
                stacklevel=4,
            )

    def length_streams(self) -> tuple[Stream, Stream, Stream]:
        return (
            _recorded(self.output_tokens, self.output_scale),
            _recorded(self.prompt_tokens, self.prompt_scale),
            ONES if self.max_tokens is None else _recorded(self.max_tokens, self.output_scale),
        )

    def class_stream(self) -> Stream:
        if self.class_names is None or len(self.classes) < 2:
            return super().class_stream()
        numbers = {kind.name: i + 1 for i, kind in enumerate(self.classes)}
        return _recorded(Values([numbers[str(name)] for name in self.class_names.array]), 1.0)

    def lengths(self) -> dict[str, Any]:
        """Fields for another generator that draws prompt and output lengths of this trace together."""
        return {
            "prompt_tokens": Empirical(values=tuple(self.prompt_tokens.array.tolist())),
            "output_tokens": Empirical(values=tuple(self.output_tokens.array.tolist())),
            "joint": True,
        }

    def arrival_parameters(self) -> dict[str, Any]:
        size = len(self.prompt_tokens)
        return {"request_rate": self.rate_scale, "requests": min(size, self.requests or size)}

    def label(self) -> str:
        scales = [
            f"{name}={getattr(self, name):g}"
            for name in ("rate_scale", "prompt_scale", "output_scale")
            if getattr(self, name) != 1.0
        ]
        what = Path(self.file).name if self.file else f"{len(self.prompt_tokens)} requests"
        return f"Trace({', '.join([what, *scales])})"


def read_trace(
    path: "str | Path",
    format: str = "csv",
    *,
    on_error: Literal["raise", "skip"] = "raise",
    **fields: Any,
) -> TraceLoadGenerator:
    """Read recorded requests.

    Parameters
    ----------
    path : path
        May be compressed (.gz).
    format : str
        "azure" (TIMESTAMP, ContextTokens, GeneratedTokens), "mooncake" and "qwen-bailian" (JSON lines with `hash_ids`),
        "burstgpt", "vidur" (num_prefill_tokens, num_decode_tokens, arrived_at if there) or "csv" (arrived_at,
        prompt_tokens, output_tokens and, optionally, max_tokens, class, block_ids).
    on_error : "raise" or "skip"
        What a malformed row does; rows left out are counted in a warning, with what is wrong with the first.
    **fields
        Of `TraceLoadGenerator`, such as `rate_scale`; `id_block_tokens` where a plain csv has block_ids.

    Returns
    -------
    TraceLoadGenerator

    Raises
    ------
    ValueError
        When the file or a row is wrong: names file, line, field, value and what is allowed.
    """
    return TraceLoadGenerator(file=str(path), format=format, on_error=on_error, **fields)  # type: ignore[arg-type]


AnyLoadGenerator = (
    BatchLoadGenerator
    | ConcurrentLoadGenerator
    | RequestRateLoadGenerator
    | PoissonLoadGenerator
    | GammaLoadGenerator
    | PiecewiseLoadGenerator
    | TraceLoadGenerator
)


def arrival_time(code, request_rate, i, unit):
    """Rule: when request i = 0, 1, ... of an open load is due [ticks].

    `unit` is the i-th instant of a renewal process of rate 1. An evenly spaced request is due at the first
    float64 t with `t // (1 / request_rate) >= i + 1`: the exact product (i + 1) x (1 / request_rate) rounded
    up. Dekker's product gives the rounding error exactly.
    """
    if code == AT_ONCE:
        return 0.0
    if code in (RENEWAL, TRACED):
        return unit / request_rate
    gap = 1.0 / request_rate
    count = i + 1.0
    product = count * gap
    split = 134217729.0 * gap  # 2**27 + 1
    gap_high = split - (split - gap)
    gap_low = gap - gap_high
    split = 134217729.0 * count
    count_high = split - (split - count)
    count_low = count - count_high
    error = ((count_high * gap_high - product) + count_high * gap_low + count_low * gap_high) + (count_low * gap_low)
    # Adding 0.6 to 1.2 units in the last place gives the next float64, without a branch that can't be foreseen.
    return product + product * (UP if error > 0.0 else 0.0)
