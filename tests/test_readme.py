"""The README and the pages in docs do what they say: their Python prints what they show, specs and commands run."""

import contextlib
import io
import re
import runpy
import shlex
import sys
from pathlib import Path

import matplotlib.image
import pytest

import vecsim as sim
from vecsim.sweep.__main__ import parser
from vecsim.sweep.spec import read_spec

README = Path(__file__).parent.parent / "README.md"
PAGES = [README, *sorted((README.parent / "docs").glob("*.md"))]


def blocks(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(\w+)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_block_prints_what_is_shown_below_it(page):
    names: dict = {"__name__": "page"}
    printed = ""
    shown = 0
    for kind, text in blocks(page.read_text()):
        if kind == "python":
            output = io.StringIO()
            with contextlib.redirect_stdout(output):
                exec(compile(text, str(page), "exec"), names)
            printed = output.getvalue()
        elif kind == "text":
            assert printed == text
            shown += 1
    assert shown >= 2


def test_every_picture_and_page_linked_is_there():
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_every_picture_is_drawn_by_the_script(tmp_path, monkeypatch):
    sweep = sim.sweep

    def short(engine, time_limit=None, **axes):
        """A tenth of the time and two seeds: a picture has its size whatever it shows."""
        return sweep(engine, time_limit and time_limit / 10, progress=False, **axes | {"seed": range(2)})

    monkeypatch.setattr(sim, "sweep", short)
    monkeypatch.setattr(sys, "argv", ["pictures.py", str(tmp_path)])
    runpy.run_path(str(README.parent / "docs" / "pictures.py"), run_name="__main__")
    for path in (README.parent / "docs").glob("*.png"):
        drawn, shown = (matplotlib.image.imread(place) for place in (tmp_path / path.name, path))
        assert drawn.std() > 0.05
        assert drawn.shape == shown.shape


def test_the_spec_shown_can_be_read(tmp_path):
    (spec,) = (text for kind, text in blocks(README.read_text()) if kind == "toml")
    (tmp_path / "mine.toml").write_text(spec)
    assert set(read_spec(str(tmp_path / "mine.toml")).keywords()) == {
        "batcher", "request_rate", "seed", "max_batch_size", "prefill_time",
    }  # fmt: skip


def test_every_command_shown_is_understood():
    lines = [line for kind, text in blocks(README.read_text()) if kind == "sh" for line in text.splitlines()]
    commands = [line for line in lines if "-m vecsim.sweep" in line]
    assert len(commands) >= 4
    for line in commands:
        arguments = shlex.split(line.partition("-m vecsim.sweep")[2], comments=True)
        if arguments == ["--help"]:
            with pytest.raises(SystemExit):
                parser().parse_args(arguments)
        else:
            parser().parse_args(arguments)


def test_ci_runs_the_test_command_of_the_readme():
    command = "pip install uv && uv run pytest"
    assert command in README.read_text()
    assert command in (README.parent / ".ci" / "run").read_text()
