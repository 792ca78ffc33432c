import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """The folder of real traces and expected results; the test is skipped where there is none."""
    folder = os.environ.get("VECSIM_DATA")
    if not folder:
        pytest.skip("VECSIM_DATA is not set")
    return Path(folder)
