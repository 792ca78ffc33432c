"""A single run: the sweep of one scenario that keeps every request and every step."""

import functools
import html
from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import numpy as np

from vecsim.axes import Plan
from vecsim.fleet import AnyEngine, Cluster, DisaggregatedEngine, Fleet, TickDisaggregatedEngine, is_changing
from vecsim.gather import base_attrs, describe, metrics_dataset, record_variables
from vecsim.kernel.state import ApartScratch, ClusterOutcome, ClusterScratch, Outcome, Scratch, StepRecord
from vecsim.lives import LIFE_VARIABLES, Lives, counts_dataset, events_dataset
from vecsim.measure import check_quantiles, check_times
from vecsim.paths import (
    HOP_TIME,
    HOPS,
    PATH_VARIABLES,
    RISE_VARIABLES,
    TRANSFER_TIME,
    hop_times,
    links_dataset,
    rise_values,
    tiers_dataset,
    transfer_parts,
    ttft_parts,
    workers_dataset,
    workers_over_time,
)
from vecsim.scenarios import lower
from vecsim.simulate import Measured, Single, simulate_one
from vecsim.sweep.report import has_slo
from vecsim.tick_fleets import present, steps_of, tick_workers, tick_workers_over_time
from vecsim.transfer import KVTransfer
from vecsim.variables import (
    APART_REQUEST_VARIABLES,
    APART_STEP_VARIABLES,
    FLEET_STEP_VARIABLES,
    STEP_VARIABLES,
    TOKEN_STEP_VARIABLES,
    VIEW_REQUEST_VARIABLES,
    stat_labels,
)

if TYPE_CHECKING:
    import xarray as xr


class Run:
    """What one gets back from `Engine.run`.

    Attributes
    ----------
    engine : Engine, Cluster, DisaggregatedEngine or TickDisaggregatedEngine
        What was run.
    time_limit, warmup : float
        As given [ticks].
    metrics : xarray.Dataset
        One value a metric; the latencies over `stat`.
    requests : xarray.Dataset
        Over `request`: `arrived_at`, `enqueued_at`, `started_at`, `first_token_at`, `completed_at` [ticks, NaN where
        it never happened], `output_tokens`, `slot` (-1 if it never started).
    steps : xarray.Dataset
        Over `step`: `time`, `duration` [ticks], `queue_size`, `prefilling`, `decoding` [requests].

    In the token model times are seconds, latencies count from `arrived_at`, requests have `prompt_tokens`,
    `hit_tokens`, `preempted`, `refused` and `class_number` instead of `enqueued_at` and `slot`, and steps
    `prefill_tokens`, `kv_blocks` and `running` too. `ttft_parts` has what the time to first token is made of.

    Of fleets requests and steps have their `worker`, and there are `workers` and `workers_over_time`; a `slot` is that
    worker's. Where the router of a `Cluster` goes by what workers have cached they have the `expected_hit_tokens` that
    it counted on, and the `view_age` of what it knew. Where prefill is kept apart requests have the way they went
    (`prefill_worker`, `remote`, `reserved_at`, `prefilled_at`, `transfer_began_at`, `transfer_time`, `hop_time` and
    more), and there are `transfer_parts` and `links`. Where the workers' caches have lower tiers requests have
    `host_hit_tokens`, `disk_hit_tokens` and `onboarding_time`, and there is `tiers`.
    """

    def __init__(
        self,
        engine: AnyEngine,
        time_limit: float,
        warmup: float,
        quantiles: tuple[float, ...],
        single: Single,
    ) -> None:
        self.engine = engine
        self.time_limit = time_limit
        self.warmup = warmup
        self._quantiles = quantiles
        self._single = single

    @functools.cached_property
    def metrics(self) -> "xr.Dataset":
        attrs = base_attrs(self.engine, self.time_limit, self.warmup)
        token = self.engine.is_token
        classes = tuple(kind.name for kind in self.engine.load_generator.classes) if token else ()
        metrics, apart = self._single.metrics[np.newaxis], isinstance(self.engine, DisaggregatedEngine)
        changing = is_changing(self.engine)
        tiered, viewing = self._single.rise is not None, self._single.views is not None
        return metrics_dataset(
            metrics, {}, {}, self._quantiles, attrs, token, classes, apart, changing, tiered, viewing
        )  # fmt: skip

    @functools.cached_property
    def requests(self) -> "xr.Dataset":
        import xarray as xr

        variables = record_variables(self._single.record, (), (), isinstance(self.engine, Fleet))
        size = self._single.record.arrived_at.shape[1]
        coords: dict[str, Any] = {"request": np.arange(size)}
        if (path := self._single.path) is not None:
            assert isinstance(self.engine, DisaggregatedEngine)
            variables |= {
                variable.name: describe(variable, ("request",), getattr(path, variable.name))
                for variable in PATH_VARIABLES
            }
            value = {name: variable.values for name, variable in variables.items()}
            took = value["transfer_noticed_at"] - value["transfer_began_at"]
            variables[TRANSFER_TIME.name] = describe(TRANSFER_TIME, ("request",), took)
            waits = hop_times(value, self.engine.overheads.before_queue)
            variables[HOP_TIME.name] = describe(HOP_TIME, ("hop", "request"), waits)
            coords["hop"] = list(HOPS)
        if (lives := self._single.lives) is not None:
            for variable in LIFE_VARIABLES:
                variables[variable.name] = describe(variable, ("request",), getattr(lives, variable.name))
        if (views := self._single.views) is not None:
            assert isinstance(self.engine, Fleet)
            values = views.expected_blocks * self.engine.cached_block_size, views.view_age
            for variable, array in zip(VIEW_REQUEST_VARIABLES, values, strict=True):
                variables[variable.name] = describe(variable, ("request",), array)
        if (rise := self._single.rise) is not None:
            assert isinstance(self.engine, Fleet)
            brought = rise_values(rise, self.engine.cached_block_size)
            variables |= {kind.name: describe(kind, ("request",), brought[kind.name]) for kind in RISE_VARIABLES}
        if isinstance(self.engine, TickDisaggregatedEngine):
            scratch = self._single.scratch
            assert isinstance(scratch, ApartScratch)
            begun = scratch.decode_started_at[:size]
            values = np.where(begun < np.inf, begun, np.nan), scratch.decode_worker[:size]
            for variable, array in zip(APART_REQUEST_VARIABLES, values, strict=True):
                variables[variable.name] = describe(variable, ("request",), array)
        return xr.Dataset(
            variables,
            coords,
            base_attrs(self.engine, self.time_limit, self.warmup),
        )

    @functools.cached_property
    def ttft_parts(self) -> "xr.DataArray":
        """What the time to first token of each request is made of [part, request], seconds.

        Added up they are the time to first token to the last bit, in any order, and none is below 0; NaN where there is
        no first token. Where a worker does both, and in an `Engine`: before routing, wait for prefill, prefill, until
        seen. Where prefill is kept apart there are the waits for the decode worker's blocks, the transfer, and the wait
        and first step of the decode worker too; all 0 where they didn't delay the token. Where caches have lower tiers
        the wait for onboarding, until there are blocks, and onboarding come before the wait for prefill.

        Raises
        ------
        ValueError
            When it is no run in seconds.
        """
        if isinstance(self.engine, TickDisaggregatedEngine) or not self.engine.is_token:
            raise ValueError("ttft_parts are there for runs in seconds, not for one in ticks")
        first_by_prefill = isinstance(self.engine, DisaggregatedEngine) and self.engine.first_token == "prefill"
        return ttft_parts(self.requests, self.engine.overheads, first_by_prefill)

    @functools.cached_property
    def transfer_parts(self) -> "xr.DataArray":
        """What the `transfer_time` of each request is made of [part, request], seconds.

        Set-up, flow, transpose and polling: they add up as `ttft_parts` do; NaN where no transfer was noticed.

        Raises
        ------
        ValueError
            When prefill isn't kept apart.
        """
        engine = self._apart("transfer_parts")
        return transfer_parts(self.requests, engine.transfer or KVTransfer())

    @functools.cached_property
    def links(self) -> "xr.Dataset":
        """Bytes, seconds, transfers and use of each link over the whole run, its warm-up too [link].

        Bytes are those that moved after their prefill: what moved behind it, layer by layer, isn't among them.

        Raises
        ------
        ValueError
            When prefill isn't kept apart.
        """
        engine = self._apart("links")
        assert self._single.path is not None
        return links_dataset(self._single.path, self.requests, float(self.metrics.end_time), engine.prefill_places)

    @functools.cached_property
    def tiers(self) -> "xr.Dataset":
        """Host memory and disk of each worker over the whole run, its warm-up too [worker, tier, way of a link].

        Raises
        ------
        ValueError
            When no worker has any.
        """
        if self._single.rise is None:
            raise ValueError("tiers are there for fleets whose kv_cache has tiers")
        return tiers_dataset(self._single.rise, float(self.metrics.end_time))

    @functools.cached_property
    def workers(self) -> "xr.Dataset":
        """What each worker of a fleet did over the whole run, its warm-up too [worker].

        Raises
        ------
        ValueError
            When it is no fleet.
        """
        if isinstance(self.engine, Cluster) and not self.engine.is_token:
            return tick_workers(self.steps, self.requests, self.engine, float(self.metrics.end_time))
        steps, pools, blocks = self._of_workers("workers")
        return workers_dataset(steps, self.requests, pools, blocks, float(self.metrics.end_time))

    def workers_over_time(self, intervals: int = 200) -> "xr.Dataset":
        """What each worker of a fleet did over time [worker, time].

        Parameters
        ----------
        intervals : int
            Of equal length, into which the run is cut.

        Returns
        -------
        xarray.Dataset
            Means over each interval of `utilization`, `prefilling`, `decoding`, `running`, `queue_size`, `kv_use`; a
            worker counts as empty between its steps. In the tick model `utilization` is the share of the time with a
            request in the batch, and there is no `kv_use`.

        Raises
        ------
        ValueError
            When it is no fleet, or there is no interval.
        """
        if not isinstance(intervals, Integral) or isinstance(intervals, bool) or intervals < 1:
            raise ValueError(f"intervals must be a whole number >= 1, got {intervals!r}")
        if isinstance(self.engine, Cluster) and not self.engine.is_token:
            end_time = float(self.metrics.end_time)
            return tick_workers_over_time(self.steps, self.engine.workers, end_time, int(intervals))
        steps, pools, blocks = self._of_workers("workers_over_time")
        return workers_over_time(steps, pools, blocks, float(self.metrics.end_time) or 1.0, int(intervals))

    def _of_workers(self, what: str) -> tuple[StepRecord, list[int], list[int | None]]:
        """(steps, workers of each pool, KV blocks of a worker of each pool)."""
        if not isinstance(self.engine, Fleet):
            raise ValueError(f"{what} are there for fleets, not for an {type(self.engine).__name__}")
        assert self._single.steps is not None
        pools = self.engine.pools
        blocks = [pool.kv_cache.blocks if pool.kv_cache else None for pool in pools]
        return self._single.steps, self.engine.places(), blocks

    @functools.cached_property
    def worker_events(self) -> "xr.Dataset":
        """When workers came, went and crashed, and why [event].

        Raises
        ------
        ValueError
            When the workers of the fleet don't change: neither `scaling` nor `control_plane` is given.
        """
        return events_dataset(self._lives("worker_events"), base_attrs(self.engine, self.time_limit, self.warmup))

    def worker_counts(self, instants: int = 1000) -> "xr.Dataset":
        """How many workers of each pool are in each phase [pool, phase, time].

        Parameters
        ----------
        instants : int
            Evenly spaced over the run.

        Returns
        -------
        xarray.Dataset

        Raises
        ------
        ValueError
            When the workers of the fleet don't change.
        """
        lives = self._lives("worker_counts")
        assert isinstance(self.engine, Fleet)
        return counts_dataset(lives, self.engine.places(), float(self.metrics.end_time), instants)

    def _lives(self, what: str) -> Lives:
        if self._single.lives is None:
            raise ValueError(f"{what} are there for fleets with scaling or a control_plane, not for this one")
        return self._single.lives

    def _apart(self, what: str) -> DisaggregatedEngine:
        if not isinstance(self.engine, DisaggregatedEngine):
            raise ValueError(f"{what} are there for a DisaggregatedEngine, not for a {type(self.engine).__name__}")
        return self.engine

    @functools.cached_property
    def steps(self) -> "xr.Dataset":
        import xarray as xr

        if self.engine.is_token:
            variables, steps = self._token_steps()
        elif isinstance(self.engine, TickDisaggregatedEngine):
            variables, steps = self._apart_steps()
        elif isinstance(self.engine, Cluster):
            variables, steps = self._cluster_steps()
        else:
            variables, steps = self._tick_steps()
        return xr.Dataset(
            variables,
            {"step": np.arange(steps)},
            base_attrs(self.engine, self.time_limit, self.warmup),
        )

    def _token_steps(self) -> tuple[dict[str, Any], int]:
        """(variables of the steps, how many there are) in the token model."""
        record = self._single.steps
        assert record is not None
        values = (*record.times, *record.counts)
        variables = {
            variable.name: describe(variable, ("step",), array)
            for variable, array in zip((*TOKEN_STEP_VARIABLES, *FLEET_STEP_VARIABLES), values, strict=True)
            if isinstance(self.engine, Fleet) or variable in TOKEN_STEP_VARIABLES
        }
        return variables, record.times.shape[1]

    def _tick_steps(self) -> tuple[dict[str, Any], int]:
        """(variables of the steps, how many there are) in the tick model."""
        outcome, scratch = self._single.outcome, self._single.scratch
        assert isinstance(outcome, Outcome)
        assert isinstance(scratch, Scratch)
        steps = outcome.steps
        started = scratch.started_step[: outcome.started]
        first = started + self.engine.load_generator.total_prefill_chunks
        ended = first + self._single.record.output_tokens[0, : outcome.started] - 1

        values = {
            "time": scratch.time[:steps],
            "duration": np.diff(scratch.time[: steps + 1]),
            "queue_size": present(scratch.enqueued_step[: outcome.enqueued], started, steps),
            "prefilling": present(started, first, steps),
            "decoding": present(first, ended, steps),
        }
        variables = {variable.name: describe(variable, ("step",), values[variable.name]) for variable in STEP_VARIABLES}
        return variables, steps

    def _cluster_steps(self) -> tuple[dict[str, Any], int]:
        """(variables of the steps of all workers of a cluster in ticks, how many there are)."""
        outcome, scratch = self._single.outcome, self._single.scratch
        assert isinstance(outcome, ClusterOutcome)
        assert isinstance(scratch, ClusterScratch)
        lengths = self._single.record.output_tokens[0]
        values, steps = steps_of(scratch, outcome, lengths, self.engine.load_generator)
        return {
            variable.name: describe(variable, ("step",), values[variable.name])
            for variable in (*STEP_VARIABLES, *FLEET_STEP_VARIABLES)
        }, steps

    def _apart_steps(self) -> tuple[dict[str, Any], int]:
        """(times between changes of a disaggregated engine in ticks, how many there are)."""
        requests = self.requests
        names = ("enqueued_at", "started_at", "first_token_at", "decode_started_at", "completed_at")
        enqueued, started, first, begun, left = (np.nan_to_num(requests[name].values, nan=np.inf) for name in names)
        decodes = requests.output_tokens.values > 1
        assert isinstance(self.engine, TickDisaggregatedEngine)
        there = first[decodes] + self.engine.kv_transfer_time
        there[there >= self.time_limit] = np.inf  # nobody notices it
        both = np.concatenate([[0.0], enqueued, started, first, there, begun, left])
        time = np.unique(both[both < np.inf])

        def count(entered: np.ndarray, left: np.ndarray) -> np.ndarray:
            """How many are in a state from each instant on, from the instants at which they enter and leave it."""
            return np.searchsorted(np.sort(entered), time, "right") - np.searchsorted(np.sort(left), time, "right")

        waiting = count(there, begun[decodes])
        values = {
            "time": time,
            "duration": np.diff(time, append=float(self.metrics.end_time)),
            "queue_size": count(enqueued, started) + waiting,
            "prefilling": count(started, first),
            "decoding": count(begun[decodes], left[decodes]),
            "decode_queue_size": waiting,
        }
        return {
            variable.name: describe(variable, ("step",), values[variable.name])
            for variable in (*STEP_VARIABLES, *APART_STEP_VARIABLES)
        }, time.size

    def plot(self, *, interactive: bool = False) -> Any:
        """Draw the run over time; see `vecsim.plot.run`.

        Slots (batch and KV memory in the token model), queue, latencies.
        """
        from vecsim import plot

        return plot.run(self, interactive=interactive)

    def _rows(self) -> list[tuple[str, str]]:
        """(label, value) in the reference's words and digits."""
        metrics = self.metrics
        if self.engine.is_token:
            return self._token_rows()
        mean = {name: float(metrics[name].sel(stat="mean")) for name in ("e2e", "ttft", "itl")}
        each = "" if isinstance(self.engine, Fleet) else "/instance"
        return [
            ("Average E2E Latency", f"{mean['e2e']:.2f}"),
            ("Average TTFT", f"{mean['ttft']:.2f}"),
            ("Average ITL", f"{mean['itl']:.2f}"),
            (f"Requests/(1K ticks){each}", f"{float(metrics.request_throughput):.2f}"),
            (f"Tokens/(1K ticks){each}", f"{float(metrics.token_throughput):.2f}"),
            ("Final Queue Size", f"{int(metrics.final_queue)}"),
            ("Completed Requests", f"{int(metrics.completed)} of {int(metrics.arrived)}"),
            ("Slot Utilization", f"{100 * float(metrics.utilization):.1f} %"),
        ]

    def _token_rows(self) -> list[tuple[str, str]]:
        """(label, value) of the token model."""
        metrics = self.metrics

        def share(name: str) -> str:
            return f"{100 * float(metrics[name]):.1f} %"

        rows = [
            ("Requests/s", f"{float(metrics.request_throughput):.3f}"),
            ("Output tokens/s", f"{float(metrics.token_throughput):,.1f}"),
            (
                "Completed requests",
                f"{int(metrics.completed)} of {int(metrics.arrived)}, {int(metrics.dropped)} refused",
            ),
            ("Final queue", f"{int(metrics.final_queue)} (largest {int(metrics.max_queue)})"),
            ("Slot utilization", share("utilization")),
            ("Batch size", f"{float(metrics.batch_size):.1f} requests, {float(metrics.step_tokens):.1f} tokens a step"),
        ]
        if is_changing(self.engine):
            counts = {
                name: f"{int(metrics[name]):,}"
                for name in ("failed", "migrations", "retries", "scale_ups", "scale_downs", "crashes")
            }
            moved = f"{counts['failed']}; migrations {counts['migrations']}, retries {counts['retries']}"
            workers = f"{counts['scale_ups']} added, {counts['scale_downs']} removed, {counts['crashes']} crashed"
            rows.insert(3, ("Failed requests", moved))
            rows.append(("Workers", f"{workers}; {float(metrics.gpu_hours):.3f} GPU-hours"))
        if has_slo(metrics):
            kept = f"{float(metrics.goodput):.3f} (SLO attainment {share('slo_attainment')})"
            rows.insert(2, ("Goodput [requests/s]", kept))
        if not np.isnan(float(metrics.kv_use)):
            rows.append(("KV memory", f"{share('kv_use')} in use, peak {share('kv_peak')}"))
            rows.append(("Preemptions", f"{int(metrics.preemptions)}"))
        if self.engine.caches_prefixes:
            counted_on = f" (the router counted on {share('expected_hit_rate')})" if self._single.views else ""
            rows.append(("Prefix hit rate", share("prefix_hit_rate") + counted_on))
        return rows

    def _latencies(self) -> tuple[list[str], list[tuple[str, list[str]]]]:
        """Column heads, and a row of numbers for each latency."""
        digits = 4 if self.engine.is_token else 2
        rows = [
            (title, [f"{value:.{digits}f}" for value in self.metrics[name].values])
            for name, title in (
                ("e2e", "E2E"),
                ("ttft", "TTFT"),
                ("tpot", "TPOT"),
                ("queue_time", "Queue"),
                ("itl", "ITL"),
            )
        ]
        return stat_labels(self._quantiles), rows

    @property
    def title(self) -> str:
        """One line: what was run."""
        load = self.engine.load_generator.label()
        for kind in self.engine.load_generator.classes:
            # Without the fields at their default; its `name` is a field of its own.
            load = load.replace(repr(kind), f"RequestClass{kind.label().removeprefix(kind.name)}")
        limit = f"{self.time_limit:g} {self.unit}" if self.time_limit < np.inf else "to the end"
        return f"{self.engine.summary}, {load}, {limit}"

    @property
    def unit(self) -> str:
        """Of times: ticks, or s."""
        return "s" if self.engine.is_token else "ticks"

    def __str__(self) -> str:
        lines = [self.title, ""]
        lines += [f"{label} = {value}" if "/(" in label else f"{label}: {value}" for label, value in self._rows()]
        heads, rows = self._latencies()
        lines += ["", f"{f'[{self.unit}]':8}" + "".join(f"{head:>10}" for head in heads)]
        lines += [f"{title:8}" + "".join(f"{number:>10}" for number in numbers) for title, numbers in rows]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<Run of {self.title}>"

    def _repr_html_(self) -> str:
        def table(head: list[str], rows: list[list[str]]) -> str:
            cells = "".join(
                "<tr>"
                + "".join(
                    f"<td style='text-align:{'right' if i else 'left'}'>{html.escape(cell)}</td>"
                    for i, cell in enumerate(row)
                )
                + "</tr>"
                for row in rows
            )
            heads = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
            return f"<table>{f'<thead><tr>{heads}</tr></thead>' if head else ''}<tbody>{cells}</tbody></table>"

        heads, rows = self._latencies()
        return (
            f"<div><b>{html.escape(self.title)}</b>"
            + table([], [list(row) for row in self._rows()])
            + table([self.unit, *heads], [[title, *numbers] for title, numbers in rows])
            + "</div>"
        )


def run(
    engine: AnyEngine,
    time_limit: float | None = None,
    *,
    warmup: float = 0.0,
    quantiles: Sequence[float] | None = None,
) -> Run:
    """Simulate an engine or a fleet once; see `Engine.run`."""
    time_limit, warmup = check_times(time_limit, warmup, engine.is_token)
    wanted = check_quantiles(quantiles)
    table = lower(Plan(engine, (), {}, {}), time_limit)
    return Run(engine, time_limit, warmup, wanted, simulate_one(table, Measured(warmup, np.array(wanted), np.empty(0))))
