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
    """Compile the kernels once, on two cores, before workers start that would each compile them all."""
    if not hasattr(config, "workerinput") and not config.option.collectonly:
        script = Path(__file__).parent / "compile_kernels.py"
        with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            compilers = [subprocess.Popen([sys.executable, script, model]) for model in ("tokens", "ticks")]
        try:
            for compiler in compilers:
                compiler.wait()
        finally:
            for compiler in compilers:
                compiler.kill()
