"""vecsim: a vectorised simulator of LLM inference serving."""

from vecsim import plot, presets
from vecsim.batching import (
    Batcher,
    ChunkedPrefillBatcher,
    CustomBatcher,
    IFBatcher,
    IFBatcherWithOnePrefillOnly,
    MaxUtilizationBatcher,
    NoEvictBatcher,
    PrefillFirstBatcher,
    SGLangBatcher,
    StaticBatcher,
    TokenBudgetBatcher,
)
from vecsim.control_plane import ControlPlane
from vecsim.engine import Engine
from vecsim.fits import Fit
from vecsim.fitting import Calibration, Measured, fit_step_time
from vecsim.fleet import (
    Cluster,
    DisaggregatedEngine,
    LengthOrLoadRule,
    LocalPrefill,
    Pool,
    PrefillLoadRule,
    PromptLengthRule,
    QueueAndLengthRule,
    TickDisaggregatedEngine,
)
from vecsim.gpus import GPU
from vecsim.growth import queue_growth
from vecsim.kv_cache import CacheTiers, KVCache
from vecsim.lengths import Constant, Distribution, Empirical, LogNormal, Normal, Uniform, Zipf
from vecsim.load import (
    SLO,
    BatchLoadGenerator,
    ConcurrentLoadGenerator,
    GammaLoadGenerator,
    LoadGenerator,
    PiecewiseLoadGenerator,
    PoissonLoadGenerator,
    RequestClass,
    RequestRateLoadGenerator,
    Sessions,
    SharedPrefix,
    TraceLoadGenerator,
    read_trace,
)
from vecsim.models import Model
from vecsim.overheads import Overheads
from vecsim.roofline import RooflineStepTime
from vecsim.routing import (
    CustomRouter,
    KVAwareRouter,
    LeastKVRouter,
    LeastOutstandingRouter,
    OverlapRouter,
    PowerOfTwoRouter,
    RandomRouter,
    RoundRobinRouter,
    Router,
    SessionRouter,
)
from vecsim.run import Run
from vecsim.scaling import (
    CustomPlanner,
    LoadPlanner,
    Planner,
    ReactivePlanner,
    Schedule,
    SLAPlanner,
    ThroughputPlanner,
)
from vecsim.step_time import (
    CustomStepTime,
    LinearStepTime,
    PolynomialStepTime,
    StepTime,
    TableStepTime,
    TableTerm,
    TickStepTime,
)
from vecsim.sweep import sweep
from vecsim.transfer import KVTransfer, Link

__version__ = "0.1.0"

__all__ = [
    "GPU",
    "SLO",
    "BatchLoadGenerator",
    "Batcher",
    "CacheTiers",
    "Calibration",
    "ChunkedPrefillBatcher",
    "Cluster",
    "ConcurrentLoadGenerator",
    "Constant",
    "ControlPlane",
    "CustomBatcher",
    "CustomPlanner",
    "CustomRouter",
    "CustomStepTime",
    "DisaggregatedEngine",
    "Distribution",
    "Empirical",
    "Engine",
    "Fit",
    "GammaLoadGenerator",
    "IFBatcher",
    "IFBatcherWithOnePrefillOnly",
    "KVAwareRouter",
    "KVCache",
    "KVTransfer",
    "LeastKVRouter",
    "LeastOutstandingRouter",
    "LengthOrLoadRule",
    "LinearStepTime",
    "Link",
    "LoadGenerator",
    "LoadPlanner",
    "LocalPrefill",
    "LogNormal",
    "MaxUtilizationBatcher",
    "Measured",
    "Model",
    "NoEvictBatcher",
    "Normal",
    "Overheads",
    "OverlapRouter",
    "PiecewiseLoadGenerator",
    "Planner",
    "PoissonLoadGenerator",
    "PolynomialStepTime",
    "Pool",
    "PowerOfTwoRouter",
    "PrefillFirstBatcher",
    "PrefillLoadRule",
    "PromptLengthRule",
    "QueueAndLengthRule",
    "RandomRouter",
    "ReactivePlanner",
    "RequestClass",
    "RequestRateLoadGenerator",
    "RooflineStepTime",
    "RoundRobinRouter",
    "Router",
    "Run",
    "SGLangBatcher",
    "SLAPlanner",
    "Schedule",
    "SessionRouter",
    "Sessions",
    "SharedPrefix",
    "StaticBatcher",
    "StepTime",
    "TableStepTime",
    "TableTerm",
    "ThroughputPlanner",
    "TickDisaggregatedEngine",
    "TickStepTime",
    "TokenBudgetBatcher",
    "TraceLoadGenerator",
    "Uniform",
    "Zipf",
    "fit_step_time",
    "plot",
    "presets",
    "queue_growth",
    "read_trace",
    "sweep",
]
