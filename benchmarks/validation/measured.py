"""Measured runs: a JSON file and a CSV each, read into what was run and what a client saw."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pandas as pd

import vecsim as sim

COLUMNS = ("prompt_slot", "arrival_us", "input_tokens", "ok", "ttft_us", "e2e_us")
# What follows a model's name in a repository's
SUFFIX = re.compile(r"-(hf|it|instruct|chat|base|fp8|v\d+(\.\d+)*)$")
MANY_FAILURES = 0.05  # share of the requests


@dataclass(frozen=True, eq=False)
class MeasuredRun:
    """What was run, and each request's latencies in order of arrival; times in seconds, NaN where a request failed."""

    name: str
    profile: str
    model: sim.Model
    gpu: str
    tp: int
    dtype: str
    server: dict[str, Any]  # fields of `vecsim.presets.fitted`
    load: sim.TraceLoadGenerator
    output_tokens: int
    ttft: np.ndarray
    e2e: np.ndarray
    stage: np.ndarray
    stages: list[str]  # their names
    overloaded: bool
    first_failure: float  # when the client gave up on a request for the first time; infinity if never

    @property
    def arrived_at(self) -> np.ndarray:
        return self.load.arrived_at.array

    @property
    def compared(self) -> np.ndarray:
        """Which requests a simulation can be held against.

        Those that succeeded; in an overloaded run those that were over before the first request failed: a server drops
        what a client gives up on, the simulated one serves it.
        """
        ok = ~np.isnan(self.e2e)
        return ok & (self.arrived_at + self.e2e < self.first_failure) if self.overloaded else ok

    def engine(self, fit: sim.Fit) -> sim.Engine:
        """The server that was measured, with fitted step times; efficiencies hold for its own GPU."""
        fit = msgspec.structs.replace(fit, gpu=self.gpu)
        engine = sim.presets.fitted(fit, model=self.model, tp=self.tp, load_generator=self.load, **self.server)
        step_time = msgspec.structs.replace(engine.step_time, dtype=self.dtype)
        return msgspec.structs.replace(engine, step_time=step_time)


def read_folder(folder: Path) -> tuple[list[MeasuredRun], dict[str, str]]:
    """The runs of a folder, and why others couldn't be read, by file."""
    runs, refused = [], {}
    for file in sorted(folder.glob("*.json")):
        try:
            runs.append(read_run(file))
        except (OSError, ValueError, TypeError) as error:
            refused[file.name] = str(error)
    return runs, refused


def read_run(file: Path) -> MeasuredRun:
    """One run.

    Raises
    ------
    ValueError
        When a field or a column is missing or wrong: names it.
    OSError
        When a file can't be read.
    """
    run = json.loads(file.read_text(encoding="utf-8"))
    server = {
        "max_batch_size": needed(run, "vllm_config.max_num_seqs", int),
        "max_num_batched_tokens": needed(run, "vllm_config.max_num_batched_tokens", int),
        "max_model_len": needed(run, "vllm_config.max_model_len", int),
        "block_size": needed(run, "vllm_config.block_size", int),
    }
    if run["vllm_config"].get("gpu_kv_blocks") is not None:  # else what the model leaves of the GPU's memory
        server["kv_blocks"] = needed(run, "vllm_config.gpu_kv_blocks", int)
    csv = file.parent / optional(run, "workload.per_request_csv", str, f"per_request/{file.stem}.csv")
    if not csv.exists():
        raise ValueError(f"{csv.relative_to(file.parent)} is not there")
    table = pd.read_csv(csv)
    if missing := [column for column in COLUMNS if column not in table]:
        raise ValueError(f"{csv.name} has no column {', '.join(missing)}")
    table = table.sort_values("arrival_us", kind="stable")
    ok = table["ok"].to_numpy().astype(bool)
    if not ok.any():
        raise ValueError(f"{csv.name} has no request that succeeded")
    arrived_at = (table["arrival_us"].to_numpy() - table["arrival_us"].min()) * 1e-6
    until_over = table["e2e_us"].to_numpy() * 1e-6
    output_tokens = needed(run, "workload.nominal_output_tokens", int)
    stage, stages = stages_of(run, arrived_at)
    precision = optional(run, "precision", str, "BF16")
    measured = MeasuredRun(
        name=optional(run, "id", str, file.stem),
        profile=optional(run, "workload.profile", str, "-"),
        model=model_of(run),
        gpu=gpu_of(needed(run, "gpu", str)),
        tp=needed(run, "tp", int),
        dtype="fp8" if "fp8" in precision.lower() else "bfloat16",
        server=server,
        load=load_of(table, arrived_at, output_tokens, server["block_size"]),
        output_tokens=output_tokens,
        ttft=np.where(ok, table["ttft_us"].to_numpy() * 1e-6, np.nan),
        e2e=np.where(ok, until_over, np.nan),
        stage=stage,
        stages=stages,
        overloaded=optional(run, "outcome.overload", bool, False) or 1 - ok.mean() > MANY_FAILURES,
        first_failure=float((arrived_at + until_over)[~ok].min()) if not ok.all() else np.inf,
    )
    measured.engine(sim.Fit.named("vllm-0.15-h100"))  # refuses what doesn't fit
    return measured


def optional(run: dict[str, Any], path: str, kind: type, default: Any) -> Any:
    """A value deep in a JSON document, or the default where it isn't there."""
    value: Any = run
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return default if value is None else needed(run, path, kind)


def needed(run: dict[str, Any], path: str, kind: type) -> Any:
    """A value deep in a JSON document.

    Raises
    ------
    ValueError
        When it's missing or of another kind: names it.
    """
    value: Any = run
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    if value is None:
        raise ValueError(f"{path} is missing")
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"{path} must be of type {kind.__name__}, got {value!r}")
    return value


def model_of(run: dict[str, Any]) -> sim.Model:
    """The package's model of that name, else one made of the `arch` block."""
    name = optional(run, "model.short", str, "") or needed(run, "model.id", str)
    for given in (name, optional(run, "model.id", str, name)):
        bare = given.rsplit("/", 1)[-1].lower()
        while bare not in sim.Model.names() and SUFFIX.search(bare):
            bare = SUFFIX.sub("", bare)
        if bare in sim.Model.names():
            return sim.Model.named(bare)
    heads, hidden = needed(run, "model.arch.num_heads", int), needed(run, "model.arch.hidden_dim", int)
    intermediate = needed(run, "model.arch.intermediate_dim", int)
    fields = {
        "layers": needed(run, "model.arch.num_layers", int),
        "kv_heads": needed(run, "model.arch.num_kv_heads", int),
        "head_dim": optional(run, "model.arch.head_dim", int, hidden // heads),
        "vocab": needed(run, "model.arch.vocab_size", int),
        "max_positions": needed(run, "vllm_config.max_model_len", int),
    }
    if experts := optional(run, "model.arch.num_local_experts", int, 0):
        fields |= {
            "experts": experts,
            "experts_per_token": needed(run, "model.arch.num_experts_per_tok", int),
            "expert_intermediate": optional(run, "model.arch.moe_intermediate_dim", int, intermediate),
        }
    else:
        fields["intermediate"] = intermediate
    return sim.Model(name=name, heads=heads, hidden=hidden, **fields)


def gpu_of(text: str) -> str:
    """The package's name of a GPU that a text tells of, such as "NVIDIA H100 80GB HBM3 SXM".

    Raises
    ------
    ValueError
        When it tells of none: lists those there are.
    """
    words = re.findall(r"[a-z]+\d+[a-z]*|\d+(?=gb)|\d+|[a-z]+", text.lower())
    for name in sim.GPU.names():
        first, *others = name.split("-")
        sizes = re.findall(r"(\d+) ?gb", text.lower())
        if first not in words or not all(other in words or (first == "a100" and not sizes) for other in others):
            continue
        if sim.GPU.named(name).link == "nvlink" and {"pcie", "nvl"} & set(words):
            continue  # a slower card of the same name
        return name
    raise ValueError(f"gpu must tell of one of {', '.join(sim.GPU.names())} (SXM), got {text!r}")


def stages_of(run: dict[str, Any], arrived_at: np.ndarray) -> tuple[np.ndarray, list[str]]:
    """Each request's stage, and the stages' names: by how many requests were sent in each, else by time of arrival."""
    declared = [stage for stage in optional(run, "workload.stages", list, []) if isinstance(stage, dict)]
    durations = [stage.get("duration", 0) for stage in declared]
    rates = [stage.get("rate", 0) for stage in declared]
    seen = [stage for stage in optional(run, "measured.stages", list, []) if isinstance(stage, dict)]
    sent = [stage.get("sent") or 0 for stage in seen]
    planned = [round(duration * rate) for duration, rate in zip(durations, rates, strict=True)]
    for counts in (sent, planned):
        if sum(counts) == arrived_at.size:
            stage = np.repeat(np.arange(len(counts)), counts)
            break
    else:
        stage = np.searchsorted(np.cumsum(durations)[:-1], arrived_at, side="right")
    names = []
    for index in range(int(stage.max()) + 1):
        if index < len(rates) and rates[index]:
            rate = rates[index]
        else:
            inside = arrived_at[stage == index]
            rate = inside.size / max(np.ptp(inside), 1e-9) if inside.size else 0
        names.append(f"{rate:.3g}/s")
    return stage, names


def load_of(table: pd.DataFrame, arrived_at: np.ndarray, output_tokens: int, block_size: int) -> sim.TraceLoadGenerator:
    """The requests; those of one prompt have the same blocks."""
    prompt, tokens = prompts(table["prompt_slot"].to_numpy(), table["input_tokens"].to_numpy())
    counts = -(-tokens // block_size)
    within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    return sim.TraceLoadGenerator(
        arrived_at=arrived_at,
        prompt_tokens=tokens,
        output_tokens=np.full(tokens.size, output_tokens),
        block_ids=np.repeat(prompt * counts.max(), counts) + within,
        block_counts=counts,
        id_block_tokens=block_size,
    )


def prompts(slot: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each request's prompt, and its length.

    A slot's prompt is that of its most frequent length. A request of another length has changed places: its prompt is
    that of the nearest slot with that length. Failed requests have no length: their slot's is taken.
    """
    slot, tokens = slot.astype(int), tokens.astype(int)
    usual = {int(one): int(np.median(tokens[tokens > 0])) for one in np.unique(slot)}
    lengths = pd.Series(tokens[tokens > 0]).groupby(slot[tokens > 0]).agg(lambda values: values.mode().iloc[0])
    usual |= {int(one): int(length) for one, length in lengths.items()}
    slots_of: dict[int, list[int]] = {}
    for one, length in usual.items():
        slots_of.setdefault(length, []).append(one)
    own = np.array([usual[one] for one in slot])
    tokens = np.where(tokens > 0, tokens, own)
    prompt = slot.copy()
    for row in np.flatnonzero(tokens != own):
        at = slot[row]
        prompt[row] = min(slots_of.get(tokens[row], [at]), key=lambda other: abs(other - at))
    return prompt, tokens
