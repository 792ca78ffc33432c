"""What all pictures share: colours, labels, a figure that notebooks show by themselves."""

import io
import math
import textwrap
from typing import TYPE_CHECKING, Any

from matplotlib.figure import Figure

if TYPE_CHECKING:
    from vecsim.run import Run

# Okabe and Ito's colours, told apart by the colour-blind too (https://jfly.uni-koeln.de/color/)
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
DASHES: tuple[Any, ...] = ("-", "--", ":", "-.", (0, (8, 2)), (0, (3, 1, 1, 1, 1, 1)), (0, (1, 4)))
MARKERS = "osD^v<>"

EMPTY, PREFILL, DECODE = "#ECECEC", "#E69F00", "#56B4E9"
E2E, TTFT = "#D55E00", "#009E73"
PHASES = (("prefill", PREFILL), ("decode", DECODE))


class Picture(Figure):
    """A matplotlib figure that a notebook shows without pyplot."""

    def _repr_png_(self) -> bytes:
        buffer = io.BytesIO()
        self.savefig(buffer, format="png", dpi=100)
        return buffer.getvalue()


def check_dataset(dataset: Any) -> None:
    """Raise a ValueError unless it's a Dataset of a sweep."""
    import xarray as xr

    if not isinstance(dataset, xr.Dataset) or "time_limit" not in dataset.attrs:
        raise ValueError(f"dataset must be one from vecsim.sweep or vecsim.queue_growth, got {type(dataset).__name__}")


def ticks_at_integers(axis: Any, only: bool = True) -> None:
    """No ticks between whole numbers."""
    axis.get_major_locator().set_params(integer=only)


def heading(run: "Run") -> str:
    """What was run, in three lines at most."""
    return textwrap.fill(run.title, 120, max_lines=3, placeholder=" ...")


def run_time(dataset: Any) -> str:
    """How long each run of a sweep took, with its unit."""
    limit = float(dataset.attrs["time_limit"])
    return f"{limit:g} {dataset.end_time.attrs['units']}" if math.isfinite(limit) else "all requests served"
