"""`python -m vecsim.sweep`: sweeps from the command line."""

import argparse
import inspect
import math
import sys
from collections.abc import Sequence
from pathlib import Path

from vecsim.axes import fields, meant
from vecsim.declaration import suggestion
from vecsim.growth import queue_growth
from vecsim.sweep import sweep
from vecsim.sweep.files import (
    DATASETS,
    PICTURES,
    check_output,
    free_name,
    write_dataset,
    write_whole,
)
from vecsim.sweep.spec import read_changes, read_spec, ready_made
from vecsim.variables import output_names

DEFAULT = "batching"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    options = parser().parse_args(arguments)
    written: list[str] = []
    try:
        return run(options, written)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\ninterrupted: {' and '.join(written) or 'nothing'} was written", file=sys.stderr)
        return 130


def parser() -> argparse.ArgumentParser:
    """The command line's options, with the ready-made specs in the help."""
    specs = "\n".join(f"  {name:13} {read_spec(name).description}" for name in ready_made())
    result = argparse.ArgumentParser(
        prog="python -m vecsim.sweep",
        description="Simulate every combination of the axes of a spec; print a table, save a Dataset and a picture.",
        epilog=f"ready-made specs:\n{specs}\n\n"
        "values:\n"
        "  0.05:0.6:56      56 evenly spaced numbers, both ends included\n"
        "  0..31            whole numbers, both ends included\n"
        "  1,2,4            a list\n"
        "  IFBatcher        a declaration; LogNormal(mean=10, std=5) one with fields; RandomRouter and such\n"
        "  none             nothing, for what is optional: local_prefill=none,QueueAndLengthRule\n"
        "  true, fcfs       what a field takes: prefix_caching=true,false or order=fcfs,shortest_prompt\n"
        "  policies:mine    a batcher's rule of one's own: @numba.njit function `mine` in policies.py\n"
        "  3                one value: pins the field\n"
        "names:\n"
        "  workers          any field, however deep, of which there is but one\n"
        "  prefill.workers  else its path, of which the last parts do; prefill_workers means the same\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    result.add_argument("spec", nargs="?", default=DEFAULT, metavar="SPEC.toml|NAME", help=f"default: {DEFAULT}")
    result.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUES",
        dest="changes",
        help="replace or add an axis",
    )
    result.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="save the Dataset as .nc or .zarr (without -o and --plot: the next free NAME.nc and NAME.png)",
    )
    result.add_argument("--plot", type=Path, metavar="FILE", help="save the picture as .png, .pdf or .svg")
    result.add_argument("--time-limit", type=float, metavar="T", help="ticks (or seconds) to simulate")
    result.add_argument("--warmup", type=float, metavar="T", help="ticks (or seconds) simulated but not measured")
    result.add_argument("--short", type=float, metavar="T", help="queue growth: also simulate so long, and compare")
    result.add_argument("--at-load", type=float, metavar="X", help="load at which the table reads the TTFT")
    result.add_argument("--variables", metavar="NAME,...", help="what the table and the picture tell: gpu_hours,ttft")
    result.add_argument("--x", metavar="NAME", help="axis along which they tell it")
    result.add_argument("--threads", type=int, metavar="N", help="default: all cores")
    result.add_argument("--force", action="store_true", help="overwrite existing files")
    result.add_argument("--quiet", action="store_true", help="no progress bar, no table")
    return result


def run(options: argparse.Namespace, written: list[str]) -> int:
    """Check everything that can be checked, compute, then write and print; notes the files in `written`."""
    spec = read_spec(options.spec)
    changes = read_changes(options.changes)
    for name in ("time_limit", "warmup"):
        if name in changes:
            raise ValueError(f"--set varies fields of the engine: use --{name.replace('_', '-')} for {name}")
    paths = [path for path, _ in fields(spec.engine)]
    changed = {field for name in changes for field in named(name, paths)}
    kept = {name: values for name, values in spec.keywords().items() if not changed & named(name, paths)}
    axes = {**kept, **changes}
    arguments = [name for function in (sweep, queue_growth) for name in inspect.signature(function).parameters]
    for name in sorted(set(axes) & set(arguments)):
        raise ValueError(f"{name} is no field of the engine: it can't be an axis")
    if options.at_load is not None and not math.isfinite(options.at_load):
        raise ValueError(f"--at-load must be a finite number, got {options.at_load}")
    variables = spec.variables if options.variables is None else tuple(map(str.strip, options.variables.split(",")))
    if unknown := [name for name in variables if name not in output_names(spec.engine.is_token)]:
        hint = suggestion(unknown[0], output_names(spec.engine.is_token))
        raise ValueError(f"variables must be names of output variables, got {unknown[0]!r}{hint}")
    if options.x is not None and not any(named(options.x, paths) & named(name, paths) for name in axes):
        raise ValueError(f"--x must be an axis, one of {', '.join(axes)}, got {options.x!r}")
    output, picture = options.output, options.plot
    if output is None and picture is None:
        # The default sweep is `sweep`, so that the first files a user sees are sweep.nc and sweep.png.
        stem = "sweep" if options.spec == DEFAULT else Path(options.spec).stem
        name = stem if options.force else free_name(stem, (".nc", ".png"))
        output, picture = Path(f"{name}.nc"), Path(f"{name}.png")
    if output is not None:
        check_output(output, DATASETS, options.force)
    if picture is not None:
        check_output(picture, PICTURES, options.force)
    time_limit = spec.time_limit if options.time_limit is None else options.time_limit
    warmup = spec.warmup if options.warmup is None else options.warmup
    short = spec.short if options.short is None else options.short
    common = {"threads": options.threads, "progress": not options.quiet}
    if short is None:
        dataset = sweep(spec.engine, time_limit, warmup=warmup, **common, **axes)
    else:
        if variables or options.x:
            raise ValueError("--variables and --x must be left out for queue growth")
        if warmup > 0:
            raise ValueError(f"--warmup must be 0 for queue growth, got {warmup:g}")
        dataset = queue_growth(spec.engine, short, time_limit, **common, **axes)
    from vecsim.sweep.report import drawable, growth_table, table, variables_table

    x = options.x or (spec.x if spec.x in drawable(dataset) else None)
    if not options.quiet:
        if short is not None:
            print(growth_table(dataset))
        else:
            print(variables_table(dataset, variables, x) if variables else table(dataset, options.at_load))
    if output is not None:
        write_dataset(dataset, output)
        written.append(str(output))
    if picture is not None:
        import matplotlib

        matplotlib.use("Agg")
        from vecsim import plot

        figure = plot.lines(dataset, x, variables or None) if variables or x else plot.sweep(dataset)
        write_whole(picture, lambda path: figure.savefig(path, dpi=150))
        written.append(str(picture))
    if not options.quiet:
        print(f"saved {' and '.join(written)}")
    return 0


def named(name: str, paths: Sequence[str]) -> set[str]:
    """The fields that an axis may name; where only a component on another axis has them, the last part of the name."""
    return set(meant(name, paths)) or {name.rpartition(".")[2]}


if __name__ == "__main__":
    sys.exit(main())
