"""vecsim: a vectorised simulator of LLM inference serving."""

from vecsim import plot
from vecsim.batching import Batcher, CustomBatcher, IFBatcher, IFBatcherWithOnePrefillOnly, StaticBatcher
from vecsim.engine import Engine
from vecsim.growth import queue_growth
from vecsim.lengths import Constant, Distribution, Empirical, LogNormal, Normal, Uniform
from vecsim.load import (
    BatchLoadGenerator,
    ConcurrentLoadGenerator,
    GammaLoadGenerator,
    LoadGenerator,
    PoissonLoadGenerator,
    RequestRateLoadGenerator,
)
from vecsim.run import Run
from vecsim.step_time import StepTime, TickStepTime
from vecsim.sweep import sweep

__version__ = "0.1.0"

__all__ = [
    "BatchLoadGenerator",
    "Batcher",
    "ConcurrentLoadGenerator",
    "Constant",
    "CustomBatcher",
    "Distribution",
    "Empirical",
    "Engine",
    "GammaLoadGenerator",
    "IFBatcher",
    "IFBatcherWithOnePrefillOnly",
    "LoadGenerator",
    "LogNormal",
    "Normal",
    "PoissonLoadGenerator",
    "RequestRateLoadGenerator",
    "Run",
    "StaticBatcher",
    "StepTime",
    "TickStepTime",
    "Uniform",
    "plot",
    "queue_growth",
    "sweep",
]
