"""`python -m vecsim.calibrate`: fit the step time to what the clients of one's own server measured."""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from vecsim import presets
from vecsim.axes import find, replace_all
from vecsim.declaration import cut, suggestion
from vecsim.engine import Engine
from vecsim.fits import Fit
from vecsim.fitting import Calibration, Measured, fit_step_time
from vecsim.gpus import GPU
from vecsim.load import TraceLoadGenerator, read_trace
from vecsim.models import Model
from vecsim.overheads import Overheads
from vecsim.roofline import RooflineStepTime
from vecsim.step_time import LinearStepTime
from vecsim.sweep.files import PICTURES, check_output, write_whole
from vecsim.sweep.spec import read_changes

COLUMNS = ("arrived_at", "prompt_tokens", "output_tokens", "ttft", "e2e")


def read_measured(path: str | Path) -> tuple[TraceLoadGenerator, Measured]:
    """Read what clients measured.

    Parameters
    ----------
    path : str or path
        A csv file with `arrived_at` [s, ascending], `prompt_tokens`, `output_tokens`, `ttft` and `e2e` [s], a row for
        each request; the latter two are empty where it failed.

    Returns
    -------
    load : TraceLoadGenerator
    measured : Measured

    Raises
    ------
    ValueError
        When the file can't be read, or a row is impossible: names file, line and reason.
    """
    path = Path(path)
    rows: dict[str, list[float]] = {name: [] for name in COLUMNS}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            heads = reader.fieldnames or []
            for name in COLUMNS:
                if name not in heads:
                    raise ValueError(f"{path}: no column {name}{suggestion(name, heads)}; got {cut(', '.join(heads))}")
            for row in reader:
                values = {name: _number(path, reader.line_num, name, row[name]) for name in COLUMNS}
                if reason := _impossible(values, rows["arrived_at"]):
                    raise ValueError(f"{path}, line {reader.line_num}: {reason}")
                for name, value in values.items():
                    rows[name].append(value)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path} can't be read: {getattr(error, 'strerror', None) or error}") from None
    if not rows["arrived_at"]:
        raise ValueError(f"{path}: no request in it")
    return read_trace(path, "csv"), Measured(ttft=rows["ttft"], e2e=rows["e2e"])


def _number(path: Path, line: int, name: str, text: str | None) -> float:
    if name in ("ttft", "e2e") and not (text or "").strip():
        return math.nan
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"{path}, line {line}: {name} must be a number, got {cut(repr(text))}")
    return value


def _impossible(values: dict[str, float], arrived_at: list[float]) -> str:
    """What can't be in a row, if anything."""
    for name in ("prompt_tokens", "output_tokens"):
        if values[name] < 1 or values[name] % 1:
            return f"{name} must be a whole number >= 1, got {values[name]:g}"
    if arrived_at and values["arrived_at"] < arrived_at[-1]:
        return f"arrived_at must ascend, got {values['arrived_at']:g} after {arrived_at[-1]:g}"
    ttft, e2e = values["ttft"], values["e2e"]
    if math.isnan(ttft) != math.isnan(e2e):
        return "ttft and e2e must both be there, or both be empty"
    if ttft <= 0:
        return f"ttft must be > 0, got {ttft:g}"
    if e2e < ttft:
        return f"e2e must be at least ttft ({ttft:g}), got {e2e:g}"
    return ""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        run(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted: nothing was written", file=sys.stderr)
        return 130
    return 0


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    result = argparse.ArgumentParser(
        prog="python -m vecsim.calibrate",
        description="Fit a step time to what the clients of a vLLM server measured: simulates the same arrivals again "
        "and again until TTFT, ITL and E2E come near.",
        epilog=f"the csv file: {', '.join(COLUMNS)} (seconds; a row a request; no ttft and e2e where it failed).\n"
        f"models: {', '.join(Model.names())}\nGPUs: {', '.join(GPU.names())}\n\n"
        "example:\n"
        "  python -m vecsim.calibrate server.csv --model llama-3.1-8b --gpu h100 --set max_batch_size=256 -o mine.toml",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("file", metavar="FILE.csv")
    result.add_argument("--model", metavar="NAME|config.json", help="fit a roofline's efficiencies; needs --gpu")
    result.add_argument("--gpu", metavar="NAME")
    result.add_argument("--tp", type=int, default=1, metavar="N", help="GPUs that share the model (default: 1)")
    result.add_argument("--version", default="0.15", metavar="V", help="of vLLM (default: 0.15)")
    result.add_argument("--kv-blocks", type=int, metavar="N", help="KV memory, as the server's log says")
    result.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", dest="changes", help="a field of the engine"
    )
    result.add_argument("--fields", metavar="A,B", help="what to fit (default: depends on --model)")
    result.add_argument("-o", "--output", type=Path, metavar="FILE.toml", help="write the engine found, with this load")
    result.add_argument("--plot", type=Path, metavar="FILE", help="picture of TTFT and E2E, measured and predicted")
    result.add_argument("--force", action="store_true", help="overwrite existing files")
    return result


def run(options: argparse.Namespace) -> Calibration:
    """Check everything that can be checked, fit, print, then write."""
    if options.output is not None:
        check_output(options.output, (".toml",), options.force)
    if options.plot is not None:
        check_output(options.plot, PICTURES, options.force)
    load, measured = read_measured(options.file)
    engine = server(options, load)
    fields = None if options.fields is None else [name.strip() for name in options.fields.split(",")]
    found = fit_step_time([(engine, measured)], fields)
    print(found)
    if options.output is not None:
        text = f"# Fitted to {Path(options.file).name}, {measured.ttft.size:,} requests\n" + found.engines[0].to_toml()
        write_whole(options.output, lambda path: path.write_text(text, encoding="utf-8"))
        print(f"saved {options.output}")
    if options.plot is not None:
        figure = picture(found.engines[0], measured)
        write_whole(options.plot, lambda path: figure.savefig(path, dpi=150))
        print(f"saved {options.plot}")
    return found


def server(options: argparse.Namespace, load: TraceLoadGenerator) -> Engine:
    """The server as it is, with a step time to begin with."""
    if (options.model is None) != (options.gpu is None):
        raise ValueError("--model and --gpu must be given together, or neither for a linear step time")
    fields: dict[str, Any] = {"version": options.version, "load_generator": load, "kv_blocks": options.kv_blocks}
    if options.model is None:
        engine = presets.vllm(step_time=LinearStepTime(base=1e-2), overheads=Overheads(before_queue=5e-3), **fields)
    else:
        model: Any = options.model
        if model.endswith(".json"):
            model = Model.from_config(model)
        begin = Fit.named("vllm-0.15-h100")
        fit = msgspec.structs.replace(begin, version=options.version, gpu=options.gpu)
        engine = presets.fitted(fit, model=model, tp=options.tp, **fields)
    changes = read_changes(options.changes)
    engine = replace_all(engine, {find(name, engine, "field"): value for name, value in changes.items()})
    known = engine.kv_cache is not None and engine.kv_cache.blocks is not None
    if known or not isinstance(engine.step_time, RooflineStepTime):
        return engine
    return presets.with_memory(engine, engine.step_time)


def picture(engine: Engine, measured: Measured) -> Any:
    """Cumulated shares of the requests over TTFT and E2E, measured and predicted."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    requests = engine.run().requests
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for ax, name, seen, instant in (
        (axes[0], "TTFT [s]", measured.ttft, requests.first_token_at),
        (axes[1], "E2E [s]", measured.e2e, requests.completed_at),
    ):
        for latencies, label, line in (
            (seen, "measured", "-"),
            ((instant - requests.arrived_at).values, "predicted", "--"),
        ):
            values = np.sort(latencies[measured.ok])
            ax.plot(values, np.arange(1, values.size + 1) / values.size, line, label=label)
        ax.set(xlabel=name, ylabel="share of the requests", ylim=(0, 1), xlim=(0, None))
        ax.grid(alpha=0.3)
    axes[0].legend(frameon=False)
    return figure


if __name__ == "__main__":
    sys.exit(main())
