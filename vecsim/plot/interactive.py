"""The picture of a run under the pointer, with plotly."""

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vecsim.fleet import Cluster, TickDisaggregatedEngine
from vecsim.kernel.state import Array
from vecsim.plot import tokens
from vecsim.plot.runs import by_slot, first_slots, place_name, queue_over_time, timeline
from vecsim.plot.style import DECODE, E2E, EMPTY, PREFILL, TTFT, heading

if TYPE_CHECKING:
    from vecsim.run import Run

# Slots x columns of the picture, each some 40 bytes of the file; a longer run is sampled.
MOST_CELLS = 60_000
MOST_POINTS = 20_000  # of a line, or of a kind of mark


class Cells(NamedTuple):
    """What each slot does in each column of the picture [slot, column]."""

    edges: Array  # [column + 1] ticks
    phase: Array  # 0 empty, 1 prefill, 2 decode
    request: Array
    token: Array  # tokens there are at the begin of the step; 0 in prefill
    latency: Array  # ticks since the request was enqueued
    queue: Array
    at: Array  # the instant that this is told of


def cells(run: "Run") -> Cells:
    """A column for each step, or evenly spaced samples where those would be too many."""
    times = timeline(run)
    slots = run.engine.max_batch_size
    boundaries, end = np.unique(run.steps.time.values), float(run.metrics.end_time)
    most = max(MOST_CELLS // slots, 1)
    if boundaries.size <= most:
        edges = np.append(boundaries, end)
        at = boundaries
    else:
        edges = np.linspace(0.0, end, most + 1)
        at = (edges[1:] + edges[:-1]) / 2
    changes, queue = queue_over_time(run)
    # The request that last began in the slot, if it's still there.
    place = np.full((slots, at.size), -1)
    for slot, mine in enumerate(by_slot(times, slots)):
        latest = np.searchsorted(times.started_at[mine], at, side="right") - 1
        some = latest >= 0
        some[some] = times.left_at[mine[latest[some]]] > at[some]
        place[slot, some] = mine[latest[some]]
    busy = place >= 0
    # Place -1 is an empty slot's.
    request = np.append(times.request, -1)[place]
    enqueued_at, first_token_at = (np.append(x, 0.0)[place] for x in (times.enqueued_at, times.first_token_at))
    decoding = busy & (first_token_at <= at)
    if isinstance(run.engine, Cluster):
        tokens_there = np.concatenate(
            [
                np.searchsorted(own, at, side="right") - np.searchsorted(own, firsts)
                for own, firsts in zip(
                    boundaries_of(run, run.engine.workers),
                    np.split(first_token_at, first_slots(run.engine)[1:]),
                    strict=True,
                )
            ]
        )
    else:
        tokens_there = np.searchsorted(boundaries, at, side="right") - np.searchsorted(boundaries, first_token_at)
    if isinstance(run.engine, TickDisaggregatedEngine):  # whose steps are the times between changes
        tokens_there = ((at - first_token_at) / max(run.engine.load_generator.itl, 1.0)).astype(int) + 1
    return Cells(
        edges=edges,
        phase=np.where(decoding, 2, busy.astype(int)),
        request=request,
        token=np.where(decoding, tokens_there, 0),
        latency=np.where(busy, at - enqueued_at, 0.0),
        queue=np.broadcast_to(queue[np.searchsorted(changes, at, side="right") - 1], place.shape),
        at=np.broadcast_to(at, place.shape),
    )


def boundaries_of(run: "Run", workers: int) -> list[Array]:
    """The boundaries of each worker of a cluster."""
    time, worker = run.steps.time.values, run.steps.worker.values
    order = np.argsort(worker, kind="stable")
    return np.split(time[order], np.searchsorted(worker[order], np.arange(1, workers)))


def rows_of(run: "Run") -> list[Any]:
    """What each slot is called."""
    if isinstance(run.engine, Cluster):
        return [f"{worker}, slot {slot}" for worker, size in enumerate(run.engine.slots()) for slot in range(size)]
    return list(range(run.engine.max_batch_size))


def plotly() -> tuple[Any, Any]:
    """Plotly's graph objects, and what makes panels.

    Raises
    ------
    ImportError
        When it isn't there.
    """
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError:
        raise ImportError("an interactive picture needs a package more: pip install 'vecsim[interactive]'") from None
    return go, make_subplots


def draw(run: "Run") -> Any:
    """See `vecsim.plot.run`."""
    go, make_subplots = plotly()
    shown = cells(run)
    slots, place = rows_of(run), place_name(run)
    figure = make_subplots(3, 1, shared_xaxes=True, vertical_spacing=0.04, row_heights=[0.56, 0.18, 0.26])
    busy = shown.phase > 0
    # Two layers, for an empty slot has less to tell.
    empty_cells = go.Heatmap(
        z=np.where(busy, np.nan, 0.0).astype(np.float32),
        customdata=np.stack([shown.queue, shown.at], -1).astype(np.float32),
        colorscale=[[0, EMPTY], [1, EMPTY]],
        hovertemplate="%{customdata[1]:.2f} ticks<br>"
        + place
        + " %{y}: empty<br>queue %{customdata[0]}<extra></extra>",
    )
    busy_cells = go.Heatmap(
        z=np.where(busy, shown.phase, np.nan).astype(np.float32),
        text=np.array(["", "prefill", "decode"])[shown.phase],
        customdata=np.stack([shown.request, shown.token, shown.latency, shown.queue, shown.at], -1).astype(np.float32),
        zmin=1,
        zmax=2,
        colorscale=[[0, PREFILL], [0.5, PREFILL], [0.5, DECODE], [1, DECODE]],
        hovertemplate=f"%{{customdata[4]:.2f}} ticks<br>{place} %{{y}}: request %{{customdata[0]}}<br>"
        "%{text}, token %{customdata[1]}<br>latency so far %{customdata[2]:.2f} ticks<br>"
        "queue %{customdata[3]}<extra></extra>",
    )
    for layer in (empty_cells, busy_cells):
        layer.update(x=shown.edges, y=slots, hoverongaps=False, showscale=False)
        figure.add_trace(layer, 1, 1)
    for name, colour in (("empty", EMPTY), ("prefill", PREFILL), ("decode", DECODE)):
        key = {"color": colour, "symbol": "square", "size": 12}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=key), 1, 1)

    time, queue = queue_over_time(run)
    some = np.unique(np.linspace(0, time.size - 1, min(time.size, MOST_POINTS)).astype(int))
    figure.add_trace(
        go.Scatter(x=time[some], y=queue[some], hovertemplate="%{x:.2f} ticks<br>queue %{y}<extra></extra>", **QUEUE),
        2,
        1,
    )
    add_latencies(figure, run, 3)
    figure.update_yaxes(title_text=place, autorange="reversed", row=1, col=1)
    figure.update_yaxes(title_text="queue [requests]", rangemode="tozero", row=2, col=1)
    finish(figure, run, 3)
    return figure


QUEUE = {
    "name": "queue",
    "line": {"shape": "hv", "color": "#595959", "width": 1.2},
    "fill": "tozeroy",
    "showlegend": False,
}


def add_latencies(figure: Any, run: "Run", row: int) -> None:
    """A mark for each latency at the time at which it was recorded, which tells its request."""
    go, _ = plotly()
    requests, unit, token = run.requests, run.unit, run.engine.is_token
    digits = 3 if token else 2
    since = requests.arrived_at if token else requests.enqueued_at
    for name, at, colour, symbol in (
        ("time to first token", "first_token_at", TTFT, "x"),
        ("end-to-end latency", "completed_at", E2E, "circle"),
    ):
        recorded = np.flatnonzero(~np.isnan(requests[at].values))
        recorded = recorded[np.linspace(0, recorded.size - 1, min(recorded.size, MOST_POINTS)).astype(int)]
        told = [recorded]
        template = f"%{{x:.{digits}f}} {unit}<br>request %{{customdata[0]}}<br>{name} %{{y:.{digits}f}} {unit}"
        if token:
            told += [requests[length].values[recorded] for length in ("prompt_tokens", "output_tokens", "hit_tokens")]
            template += "<br>prompt %{customdata[1]} tokens, %{customdata[3]} of them cached"
            template += "<br>output %{customdata[2]} tokens"
        figure.add_trace(
            go.Scattergl(
                x=requests[at].values[recorded].astype(np.float32),
                y=(requests[at] - since).values[recorded].astype(np.float32),
                customdata=np.stack(told, -1).astype(np.int32),
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 5 if recorded.size < 1000 else 2},
                hovertemplate=template + "<extra></extra>",
            ),
            row,
            1,
        )
    figure.update_yaxes(title_text=f"latency [{unit}]", rangemode="tozero", row=row, col=1)


def finish(figure: Any, run: "Run", row: int) -> None:
    """The time axis, the title and the legend; `row` is the last."""
    figure.update_xaxes(range=[0, float(run.metrics.end_time) or 1.0])
    figure.update_xaxes(title_text=f"time [{run.unit}]", row=row, col=1)
    figure.update_layout(
        title={"text": heading(run).replace("\n", "<br>"), "font": {"size": 14}},
        template="plotly_white",
        height=200 + 150 * row,
        # Below the panels, where no title is so long as to reach it.
        legend={"orientation": "h", "y": -60 / (150 * row), "yanchor": "top", "x": 0.5, "xanchor": "center"}
        | {"traceorder": "normal", "itemsizing": "constant"},
    )


class Batches(NamedTuple):
    """What the batch does in each column of the picture [column]; means where a column has several steps."""

    edges: Array  # [column + 1] s
    prefilling: Array  # requests
    decoding: Array
    prefill_tokens: Array  # tokens/s
    decode_tokens: Array
    queue: Array  # requests
    memory: Array  # %, 0 where memory has no end


def batches(run: "Run") -> Batches:
    """A column for each step and each time without one, or evenly spaced ones where those would be too many."""
    end = float(run.metrics.end_time) or 1.0
    begin, lasts = run.steps.time.values, run.steps.duration.values
    edges = np.linspace(0.0, end, MOST_POINTS // 2 + 1)
    if 2 * begin.size <= MOST_POINTS // 2:
        edges = np.unique([0.0, end, *begin, *(begin + lasts)])
        edges = edges[np.diff(edges, prepend=-1.0) > 1e-12 * end]
    decoding, prefilling = tokens.requests_in_batch(run, edges)
    decode_tokens, prefill_tokens = tokens.tokens_per_second(run, edges)
    memory = tokens.memory_in_use(run, edges) if tokens.has_memory(run) else np.zeros(edges.size - 1)
    queue = tokens.mean_over_time(run, run.steps.queue_size.values, edges)
    return Batches(edges, prefilling, decoding, prefill_tokens, decode_tokens, queue, memory)


def draw_tokens(run: "Run") -> Any:
    """See `vecsim.plot.run`: a run of the token model."""
    go, make_subplots = plotly()
    shown = batches(run)
    finite = tokens.has_memory(run)
    heights = [0.32, 0.17, *([0.15] if finite else []), 0.14, 0.22]
    figure = make_subplots(len(heights), 1, shared_xaxes=True, vertical_spacing=0.03, row_heights=heights)
    told = (
        "%{x:.3f} s<br>%{customdata[0]:.4~g} prefill, %{customdata[1]:.4~g} decode<br>"
        "prompts %{customdata[2]:.4~s} tokens/s, outputs %{customdata[3]:.4~s} tokens/s<br>"
        "queue %{customdata[4]:.4~g}" + ("<br>KV memory %{customdata[5]:.1f} %" if finite else "") + "<extra></extra>"
    )
    common = {"x": shown.edges[:-1], "customdata": np.stack(shown[1:], -1).astype(np.float32), "hovertemplate": told}

    def add(row: int, values: Array, **style: Any) -> None:
        figure.add_trace(go.Scatter(y=values.astype(np.float32), mode="lines", **common, **style), row, 1)

    for row, parts in ((1, (shown.decoding, shown.prefilling)), (2, (shown.decode_tokens, shown.prefill_tokens))):
        for name, colour, values in zip(("decode", "prefill"), (DECODE, PREFILL), parts, strict=True):
            line = {"shape": "hv", "width": 0, "color": colour}
            add(row, values, name=name, stackgroup=str(row), line=line, fillcolor=colour, showlegend=row == 1)
    if finite:
        memory = {"name": "KV memory", "line": {"shape": "hv", "color": "#8C8C8C", "width": 1}, "fill": "tozeroy"}
        add(3, shown.memory, showlegend=False, **memory)
        figure.update_yaxes(title_text="KV memory [%]", range=[0, 105], row=3, col=1)
    queue, latency = len(heights) - 1, len(heights)
    add(queue, shown.queue, **QUEUE)
    add_latencies(figure, run, latency)
    figure.update_yaxes(title_text="batch [requests]", row=1, col=1)
    figure.update_yaxes(title_text="computed [tokens/s]", row=2, col=1)
    figure.update_yaxes(title_text="queue [requests]", row=queue, col=1)
    figure.update_yaxes(rangemode="tozero")
    finish(figure, run, latency)
    if not run.steps.sizes["step"]:
        figure.add_annotation(text=tokens.why_nothing(run), showarrow=False, xref="paper", yref="paper", x=0.5, y=0.9)
    return figure
