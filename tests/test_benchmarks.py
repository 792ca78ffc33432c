"""Every benchmark runs once, tiny, so that none rots."""

import importlib
import inspect
import itertools
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"
KINDS = ("time_", "track_", "peakmem_")


@pytest.fixture(scope="module")
def suite():
    """The modules of the suite, tiny."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VECSIM_BENCHMARKS_TINY", "1")
        patch.syspath_prepend(str(FOLDER))
        yield [importlib.import_module(f"suite.{name}") for name in ("kernel", "around", "tokens", "fleets")]


def test_asv_finds_the_suite():
    configuration = json.loads((FOLDER / "asv.conf.json").read_text())
    assert (FOLDER / configuration["benchmark_dir"] / "__init__.py").exists()


def test_every_benchmark_runs(suite):
    ran = []
    for module in suite:
        for kind in vars(module).values():
            if not inspect.isclass(kind) or kind.__module__ != module.__name__:
                continue
            methods = [name for name in dir(kind) if name.startswith(KINDS)]
            params = getattr(kind, "params", [])
            lists = params if params and isinstance(params[0], list) else [params] if params else []
            for values in itertools.product(*lists) if lists else [()]:
                one = kind()
                if hasattr(one, "setup"):
                    one.setup(*values)
                for name in methods:
                    result = getattr(one, name)(*values)
                    if name.startswith("track_"):
                        assert result > 0
                        assert getattr(kind, name).unit
                    ran.append(name)
    assert {kind for kind in KINDS for name in ran if name.startswith(kind)} == set(KINDS)
