"""Write a Dataset or a picture so that its final name only ever holds a whole file."""

import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import xarray as xr

DATASETS = (".nc", ".zarr")
PICTURES = (".png", ".pdf", ".svg")


def check_output(path: Path, endings: tuple[str, ...], force: bool) -> None:
    """Refuse a path that can't be written, before anything is computed.

    Raises
    ------
    ValueError
        When the ending is unknown, the folder isn't there or isn't writable, the file exists and `force` is
        off, or a package is missing.
    """
    if path.suffix not in endings:
        raise ValueError(f"{path}: a name that ends in {' or '.join(endings)} is needed")
    folder = path.parent
    if not folder.is_dir():
        raise ValueError(f"{path}: there is no folder {folder}")
    if path.exists() and not force:
        raise ValueError(f"{path} exists already: choose another name, or --force to overwrite it")
    if path.is_dir() and path.suffix != ".zarr":
        raise ValueError(f"{path} is a folder")
    if path.suffix == ".zarr" and importlib.util.find_spec("zarr") is None:
        raise ValueError(f"{path}: writing Zarr needs a package more: pip install 'vecsim[zarr]'")
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(f"{path}: the folder {folder} can't be written to ({error.strerror})") from None


def free_name(stem: str, endings: tuple[str, ...]) -> str:
    """The stem, or stem-2, stem-3, ...: the first of which there is no file with any of the endings."""
    number = 1
    while True:
        name = stem if number == 1 else f"{stem}-{number}"
        if not any(Path(name + ending).exists() for ending in endings):
            return name
        number += 1


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Write beside the final name, then rename; leaves nothing behind when `write` fails."""
    partial = Path(tempfile.mkdtemp(prefix=f".{path.stem}-", dir=path.parent)) / path.name
    try:
        write(partial)
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial.parent, ignore_errors=True)


def write_dataset(dataset: "xr.Dataset", path: Path) -> None:
    """Write NetCDF (`.nc`) or Zarr (`.zarr`)."""
    if path.suffix == ".nc":
        write_whole(path, lambda partial: dataset.to_netcdf(partial, engine="h5netcdf"))
    else:
        # Version 2 of the format stores fixed-length text, which version 3 hasn't standardised.
        write_whole(path, lambda partial: dataset.to_zarr(partial, zarr_format=2))
