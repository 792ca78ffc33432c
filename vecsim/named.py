"""Declarations that come with the package by name, a TOML file each in `vecsim/data`; read when asked for."""

from pathlib import Path
from typing import TypeVar

from vecsim.declaration import Declaration, suggestion

DATA = Path(__file__).parent / "data"

Kind = TypeVar("Kind", bound=Declaration)


def names(folder: str) -> tuple[str, ...]:
    """The names in a folder of `vecsim/data`, in order."""
    return tuple(sorted(path.name.removesuffix(".toml") for path in (DATA / folder).glob("*.toml")))


def read_named(kind: type[Kind], folder: str, name: str) -> Kind:
    """The declaration of that name, in any case.

    Raises
    ------
    ValueError
        When there is none: lists those like it, or all.
    """
    known = names(folder)
    wanted = str(name).lower()
    if wanted not in known:
        hint = suggestion(wanted, known) or f"; there are {', '.join(known)}"
        raise ValueError(f"no {kind.__name__} is named {name!r}{hint}")
    return kind.from_toml((DATA / folder / f"{wanted}.toml").read_text(encoding="utf-8"))
