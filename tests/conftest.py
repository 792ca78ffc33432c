import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real traces and expected results; the test is skipped where there is none."""
    folder = os.environ.get("VECSIM_DATA")
    if not folder:
        pytest.skip("VECSIM_DATA is not set")
    return Path(folder)


def pytest_configure(config: pytest.Config) -> None:
    """Compile the token model's kernels beside the first tests: it takes a minute, and needs no test to wait."""
    if not getattr(config.option, "collectonly", False):
        config.stash[COMPILER] = subprocess.Popen([sys.executable, "-c", COMPILE_TOKEN_KERNELS])


def pytest_unconfigure(config: pytest.Config) -> None:
    if compiler := config.stash.get(COMPILER, None):
        compiler.kill()
        compiler.wait()


COMPILER = pytest.StashKey[subprocess.Popen]()
COMPILE_TOKEN_KERNELS = """
import vecsim as sim
load = sim.PoissonLoadGenerator(prompt_tokens=10, output_tokens=5, requests=10)
sim.Engine(load_generator=load, batcher=sim.TokenBudgetBatcher(), step_time=sim.LinearStepTime(base=1)).run()
"""
