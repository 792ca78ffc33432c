"""What one simulates, and what one gets back from a single run."""

from typing import TYPE_CHECKING

from vecsim.batching import AnyBatcher, IFBatcher
from vecsim.declaration import Count, Declaration
from vecsim.load import AnyLoadGenerator
from vecsim.step_time import AnyStepTime, TickStepTime

if TYPE_CHECKING:
    from collections.abc import Sequence

    from vecsim.run import Run


class Engine(Declaration, frozen=True, kw_only=True):
    """An inference engine under a load.

    Parameters
    ----------
    max_batch_size : int
        Slots of the running batch (vLLM: `max_num_seqs`).
    load_generator : LoadGenerator
        When requests arrive and how long they are.
    batcher : Batcher
        Who is let into the running batch.
    step_time : StepTime
        How long a step takes; `TickStepTime()` is the tick model.

    Raises
    ------
    ValueError
        When a field has a wrong value.
    """

    max_batch_size: Count = 4
    load_generator: AnyLoadGenerator
    batcher: AnyBatcher = IFBatcher()
    step_time: AnyStepTime = TickStepTime()

    def run(self, time_limit: float, *, warmup: float = 0.0, quantiles: "Sequence[float] | None" = None) -> "Run":
        """Simulate once and keep every request and step.

        Parameters
        ----------
        time_limit : float
            The run ends at the first boundary at or after it [ticks].
        warmup : float
            Requests that arrive and steps that begin before it are simulated, not measured [ticks].
        quantiles : sequence of float, optional
            Quantiles of the latencies, each in [0, 1]; 0.5, 0.9, 0.95 and 0.99 unless given.

        Returns
        -------
        Run

        Raises
        ------
        ValueError
            When an argument is out of its range, or the run would not fit in memory.
        """
        from vecsim.run import run

        return run(self, time_limit, warmup=warmup, quantiles=quantiles)
