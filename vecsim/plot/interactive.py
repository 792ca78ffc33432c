"""The picture of a run under the pointer, with plotly."""

import textwrap
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from vecsim.kernel.state import Array
from vecsim.plot.runs import by_slot, timeline
from vecsim.plot.style import DECODE, E2E, EMPTY, PREFILL, TTFT

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
    boundaries, end = run.steps.time.values, float(run.metrics.end_time)
    most = max(MOST_CELLS // slots, 1)
    if boundaries.size <= most:
        edges = np.append(boundaries, end)
        at = boundaries
    else:
        edges = np.linspace(0.0, end, most + 1)
        at = (edges[1:] + edges[:-1]) / 2
    step = np.searchsorted(boundaries, at, side="right") - 1
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
    first_step = np.searchsorted(boundaries, first_token_at)
    return Cells(
        edges=edges,
        phase=np.where(decoding, 2, busy.astype(int)),
        request=request,
        token=np.where(decoding, step - first_step + 1, 0),
        latency=np.where(busy, at - enqueued_at, 0.0),
        queue=np.broadcast_to(run.steps.queue_size.values[step], place.shape),
        at=np.broadcast_to(at, place.shape),
    )


def draw(run: "Run") -> Any:
    """See `vecsim.plot.run`."""
    try:
        import plotly.graph_objects as go
        from plotly.subplots import make_subplots
    except ImportError:
        raise ImportError("an interactive picture needs a package more: pip install 'vecsim[interactive]'") from None

    shown = cells(run)
    slots = np.arange(run.engine.max_batch_size)
    figure = make_subplots(3, 1, shared_xaxes=True, vertical_spacing=0.04, row_heights=[0.56, 0.18, 0.26])
    busy = shown.phase > 0
    # Two layers, for an empty slot has less to tell.
    empty_cells = go.Heatmap(
        z=np.where(busy, np.nan, 0.0).astype(np.float32),
        customdata=np.stack([shown.queue, shown.at], -1).astype(np.float32),
        colorscale=[[0, EMPTY], [1, EMPTY]],
        hovertemplate="%{customdata[1]:.2f} ticks<br>slot %{y}: empty<br>queue %{customdata[0]}<extra></extra>",
    )
    busy_cells = go.Heatmap(
        z=np.where(busy, shown.phase, np.nan).astype(np.float32),
        text=np.array(["", "prefill", "decode"])[shown.phase],
        customdata=np.stack([shown.request, shown.token, shown.latency, shown.queue, shown.at], -1).astype(np.float32),
        zmin=1,
        zmax=2,
        colorscale=[[0, PREFILL], [0.5, PREFILL], [0.5, DECODE], [1, DECODE]],
        hovertemplate="%{customdata[4]:.2f} ticks<br>slot %{y}: request %{customdata[0]}<br>"
        "%{text}, token %{customdata[1]}<br>latency so far %{customdata[2]:.2f} ticks<br>"
        "queue %{customdata[3]}<extra></extra>",
    )
    for layer in (empty_cells, busy_cells):
        layer.update(x=shown.edges, y=slots, hoverongaps=False, showscale=False)
        figure.add_trace(layer, 1, 1)
    for name, colour in (("empty", EMPTY), ("prefill", PREFILL), ("decode", DECODE)):
        key = {"color": colour, "symbol": "square", "size": 12}
        figure.add_trace(go.Scatter(x=[None], y=[None], mode="markers", name=name, marker=key), 1, 1)

    time, queue = run.steps.time.values, run.steps.queue_size.values
    some = np.unique(np.linspace(0, time.size - 1, min(time.size, MOST_POINTS)).astype(int))
    figure.add_trace(
        go.Scatter(
            x=time[some],
            y=queue[some],
            name="queue",
            line={"shape": "hv", "color": "#595959", "width": 1.2},
            fill="tozeroy",
            showlegend=False,
            hovertemplate="%{x:.2f} ticks<br>queue %{y}<extra></extra>",
        ),
        2,
        1,
    )
    requests = run.requests
    for name, at, colour, symbol in (
        ("time to first token", "first_token_at", TTFT, "x"),
        ("end-to-end latency", "completed_at", E2E, "circle"),
    ):
        recorded = np.flatnonzero(~np.isnan(requests[at].values))
        recorded = recorded[np.linspace(0, recorded.size - 1, min(recorded.size, MOST_POINTS)).astype(int)]
        figure.add_trace(
            go.Scattergl(
                x=requests[at].values[recorded].astype(np.float32),
                y=(requests[at] - requests.enqueued_at).values[recorded].astype(np.float32),
                customdata=recorded.astype(np.int32),
                mode="markers",
                name=name,
                marker={"color": colour, "symbol": symbol, "size": 5 if recorded.size < 1000 else 2},
                hovertemplate="%{x:.2f} ticks<br>request %{customdata}<br>" + name + " %{y:.2f} ticks<extra></extra>",
            ),
            3,
            1,
        )
    figure.update_yaxes(title_text="slot", autorange="reversed", row=1, col=1)
    figure.update_yaxes(title_text="queue [requests]", rangemode="tozero", row=2, col=1)
    figure.update_yaxes(title_text="latency [ticks]", rangemode="tozero", row=3, col=1)
    figure.update_xaxes(range=[0, shown.edges[-1]])
    figure.update_xaxes(title_text="time [ticks]", row=3, col=1)
    figure.update_layout(
        title={"text": textwrap.fill(run.title, 120).replace("\n", "<br>"), "font": {"size": 14}},
        template="plotly_white",
        height=640,
        legend={"orientation": "h", "y": 1.06, "x": 1, "xanchor": "right"},
    )
    return figure
