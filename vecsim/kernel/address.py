"""Functions that kernels call by their addresses, which are whole numbers: the types that they take and return.

numba has function types of its own for this. They look up each function anew at every call from Python, by the hash
of its signature: 0.25 ms for the token model's step loop, as long as a third of a scenario.
"""

import warnings
from typing import Any

import numba
import numpy as np
from numba.core import cgutils
from numba.core.errors import NumbaExperimentalFeatureWarning, TypingError
from numba.extending import intrinsic

from vecsim.kernel.links import links_for
from vecsim.kernel.placed import Placed, finder
from vecsim.kernel.runs import allocator_for
from vecsim.kernel.state import (
    Array,
    Batch,
    Cache,
    Control,
    Fleet,
    Formula,
    Life,
    Memory,
    Outcome,
    Place,
    PlannerView,
    Policy,
    Requests,
    Router,
    RouterView,
    Split,
    StepBatch,
    StepModel,
    StepRecord,
    Tiers,
    TokenBatch,
    TokenLoad,
    TokenWork,
    Transfer,
    World,
)

COUNT, TIME = numba.int64, numba.float64


def like(kind: Any, **arrays: Any) -> Any:
    """An example of a tuple of `vecsim.kernel.state`: numbers as annotated, `arrays` as given, others of int32."""
    values = {
        name: np.empty(0, np.int32) if annotation is Array else annotation(0)
        for name, annotation in kind.__annotations__.items()
        if name not in arrays
    }
    return kind(**values, **arrays)


KINDS = (np.float64, np.int32, np.int64, np.uint8)
FLOATS, WHOLES, NUMBERS, BYTES = (np.empty(0, kind) for kind in KINDS)
FLOAT_ROWS, WHOLE_ROWS, NUMBER_ROWS, _ = (np.empty((0, 0), kind) for kind in KINDS)

# What a function of the user's own is given
GIVEN: dict[str, Any] = {
    "tick": Batch,
    "token": TokenBatch,
    "step": StepBatch,
    "router": RouterView,
    "planner": PlannerView,
}
ARRAYS = {"router": RouterView._fields[:8], "planner": PlannerView._fields[:11]}
BATCHES = {
    kind: numba.typeof(like(given, **dict.fromkeys(ARRAYS.get(kind, ()), FLOATS))) for kind, given in GIVEN.items()
}

# The arguments of a function of the user's own; a planner's has an array to remember things in too
OWN_ARGUMENTS: dict[str, tuple[Any, ...]] = {kind: (given,) for kind, given in BATCHES.items()}
OWN_ARGUMENTS["planner"] += (numba.typeof(FLOATS),)

# The arguments of the step loop of each model, in their order
TICK_LOOP = (
    COUNT,  # batcher
    TIME,  # parameter
    COUNT,  # max_batch_size
    TIME,  # prefill_time
    TIME,  # itl
    COUNT,  # chunks
    COUNT,  # target
    TIME,  # time_limit
    TIME,  # warmup
    numba.typeof(like(Requests, arrived_at=FLOATS)),
    numba.typeof(FLOATS),  # time
    numba.typeof(NUMBERS),  # calendar
    numba.typeof(FLOATS),  # prefill_sum
    numba.typeof(NUMBERS),  # itl_samples
    numba.typeof(BYTES),  # stop
)

TOKEN_TUPLES = (
    like(Policy),
    like(Memory),
    like(StepModel, formula=like(Formula), terms=FLOAT_ROWS, grids=FLOATS, values=FLOATS, outside=NUMBERS),
    like(TokenLoad, arrived_at=FLOATS, think=FLOATS, urgency=FLOATS, ttft_limits=FLOATS, itl_limits=FLOATS),
    like(
        TokenWork,
        counts=NUMBERS,
        sums=FLOATS,
        gaps=NUMBERS,
        own=WHOLE_ROWS,
        times=FLOAT_ROWS,
        joined_at=FLOATS,
        late=NUMBERS,
    ),
    like(
        Cache,
        nodes=WHOLE_ROWS,
        owned=WHOLE_ROWS,
        own=BYTES,
        ids=(NUMBERS, 1, NUMBERS, WHOLES, NUMBERS, NUMBERS),
        own_start=NUMBERS,
        seen=FLOATS,
    ),
    like(StepRecord, times=FLOAT_ROWS, counts=NUMBER_ROWS),
)

# What the step loop of an engine is given: a `Place` in memory
PLACE = Placed(
    numba.typeof(
        Place(
            **dict(zip(Place._fields, TOKEN_TUPLES, strict=False)), warmup=0.0, stop=BYTES, own_rule=0, own_duration=0
        )
    )
)

TOKEN_LOOP = (
    PLACE,
    COUNT,  # kind of visit
    TIME,  # time_limit
)

# Arrays of a fleet with a row for each worker, as long as it has slots or tokens
SLOTS = (
    *("first", "unclip", "residues", "prefills", "chunk_of", "chunk_tokens", "stack", "ended", "joined", "newcomers"),
    "starving",
)

# What a fleet's loop is given: a `World` in memory
WORLD = Placed(
    numba.typeof(
        World(
            step_loop=0,
            fleet=like(
                Fleet,
                links=links_for(0, 0),
                allocator=allocator_for(0, 0, False),
                **dict.fromkeys(
                    (
                        "blocks",
                        "all_blocks",
                        "present",
                        "ghosts",
                        "sent",
                        "sent_blocks",
                        "sent_new",
                        "turn",
                        "between",
                        "waiting",
                        "unmeasured",
                    ),
                    NUMBERS,
                ),
                **dict.fromkeys(("counts", "late", "put"), NUMBER_ROWS),
                **dict.fromkeys(("clock", "moved", "left", "bandwidths", "parts", "view_age", "views"), FLOATS),
                **dict.fromkeys(("loads", "instants", "times", "sums", "joined_at", "seen", "survey"), FLOAT_ROWS),
                **dict.fromkeys(("fits", "away", "own_blocks"), BYTES),
                **dict.fromkeys(
                    ("way", "own", "owned", "node_of", "next_block", "chains", "places", *SLOTS), WHOLE_ROWS
                ),
                nodes=np.empty((0, 0, 0), np.int32),
            ),
            split=like(Split),
            router=like(Router),
            prefill_router=like(Router),
            transfer=like(Transfer),
            control=like(Control),
            life=like(
                Life,
                **dict.fromkeys(("due", "spent", "rings", "log", "events", "shown"), FLOAT_ROWS),
                **dict.fromkeys(("clock", "times", "sums", "planner", "memory", "metrics"), FLOATS),
                whole=NUMBER_ROWS,
                fate=WHOLE_ROWS,
                alarms=WHOLE_ROWS,
                numbers=NUMBERS,
            ),
            tiers=like(
                Tiers,
                links=links_for(0, 0),
                bandwidths=FLOATS,
                means=FLOATS,
                instants=FLOAT_ROWS,
                **dict.fromkeys(("sightings", "way"), WHOLE_ROWS),
                numbers=NUMBER_ROWS,
                **dict.fromkeys(("after", "before", "line"), np.empty((0, 0, 0), np.int32)),
                lists=np.empty((0, 0, 0), np.int64),
                changed=np.empty((0, 0, 0)),
            ),
            groups=FLOAT_ROWS,
            **dict(zip(("tables", "load", "work", "cache", "record"), TOKEN_TUPLES[2:], strict=True)),
            time_limit=0.0,
            warmup=0.0,
            stop=BYTES,
            own_rule=0,
            own_duration=0,
            own_planner=0,
            live=0,
            tiers_act=0,
        )
    )
)

# What is called at the events of workers' lives
LIVE = (WORLD, TIME, COUNT)

# What is called for tiers: what to do, a request, a worker, when
TIERS_ACT = (WORLD, COUNT, COUNT, COUNT, TIME)


def compiled(dispatcher: Any, kinds: tuple[Any, ...]) -> Any:
    """The record of a jitted function compiled for arguments of some types."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NumbaExperimentalFeatureWarning)
        dispatcher.compile(kinds)
    return dispatcher.overloads[kinds]


def address_of(dispatcher: Any, kinds: tuple[Any, ...], returned: Any) -> int:
    """Where the machine code of a jitted function is; valid as long as the function lives."""
    record = compiled(dispatcher, kinds)
    if record.signature.return_type != returned:
        raise TypeError(f"{dispatcher.py_func.__name__} returns {record.signature.return_type}, not {returned}")
    return int(record.library.get_pointer_to_function(record.fndesc.llvm_func_name))


def caller(kinds: tuple[Any, ...], returned: Any) -> Any:
    """A function for kernels that calls what is at an address: `call(address, arguments)`."""

    @intrinsic
    def call(typing: Any, address: Any, arguments: Any) -> Any:
        """Call a compiled function by its address, with a tuple of arguments."""
        if tuple(arguments.types) != kinds:
            raise TypingError(f"called with {arguments}, not {kinds}")

        def generate(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            kind = context.call_conv.get_function_type(returned, kinds)
            function = builder.inttoptr(values[0], kind.as_pointer())
            given = cgutils.unpack_tuple(builder, values[1])
            status, result = context.call_conv.call_function(builder, function, returned, kinds, given)
            with cgutils.if_unlikely(builder, status.is_error):
                context.call_conv.return_status_propagate(builder, status)
            return result

        return returned(numba.int64, arguments), generate

    return call


call_tick_rule = caller((BATCHES["tick"],), COUNT)
call_rule = caller((BATCHES["token"],), COUNT)
call_router = caller((BATCHES["router"],), COUNT)
call_step_time = caller((BATCHES["step"],), TIME)
call_token_loop = caller(TOKEN_LOOP, COUNT)
found = finder(PLACE)
call_fleet_loop = caller((WORLD,), COUNT)
call_live = caller(LIVE, COUNT)
call_tiers = caller(TIERS_ACT, COUNT)
PLANNED = numba.types.UniTuple(COUNT, 2)
call_planner = caller(OWN_ARGUMENTS["planner"], PLANNED)
TICK_OUTCOME = numba.typeof(like(Outcome))
call_tick_loop = caller(TICK_LOOP, TICK_OUTCOME)
