"""Fitted sets: what a server was found to take, for any model on its GPU."""

from typing import Any

import msgspec

from vecsim.named import Named
from vecsim.overheads import Overheads


class Fit(Named, frozen=True, kw_only=True):
    """What was fitted to measurements of a server; see `vecsim.presets.fitted` for an engine that has it.

    Parameters
    ----------
    name : str
    version : str
        Of vLLM.
    gpu : str
        Name of the GPU.
    step_time : dict
        Fields of `RooflineStepTime`, the same for all models.
    overheads : Overheads
    standard_errors : dict
        Of the fields that were fitted.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    folder = "fits"

    version: str
    gpu: str
    step_time: dict[str, float]
    overheads: Overheads = Overheads()
    standard_errors: dict[str, float] = msgspec.field(default_factory=dict)

    def fields(self) -> dict[str, Any]:
        """The fields of `RooflineStepTime` but the model and what it is shared out among."""
        return {"gpu": self.gpu, **self.step_time}
