"""Declarations that come with the package by name, a TOML file each in `vecsim/data`; read when asked for."""

from pathlib import Path
from typing import ClassVar, Self

from vecsim.declaration import Declaration, suggestion

DATA = Path(__file__).parent / "data"


class Named(Declaration, frozen=True, kw_only=True):
    """Base of what comes with the package by name; the name may stand where such a declaration is asked for."""

    folder: ClassVar[str]  # of `vecsim/data`

    name: str

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Those that come with the package, in order."""
        return tuple(sorted(path.name.removesuffix(".toml") for path in (DATA / cls.folder).glob("*.toml")))

    @classmethod
    def named(cls, name: str) -> Self:
        """The one of that name, in any case.

        Raises
        ------
        ValueError
            When there is none: lists those like it, or all.
        """
        known = cls.names()
        wanted = str(name).lower()
        if wanted not in known:
            hint = suggestion(wanted, known) or f"; there are {', '.join(known)}"
            raise ValueError(f"no {cls.__name__} is named {name!r}{hint}")
        return cls.from_toml((DATA / cls.folder / f"{wanted}.toml").read_text(encoding="utf-8"))

    @classmethod
    def standing_for(cls, value: object) -> Self | None:
        return cls.named(value) if isinstance(value, str) else None

    def label(self) -> str:
        return self.name
