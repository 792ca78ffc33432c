"""The one place with jit options, and with the folder that holds compiled kernels.

`inner` is for functions that other kernels call, `entry` for those that Python calls: only these are
cached on disk, since a cached function carries the machine code of all that it calls.

numba checks a cached kernel against its own file alone: after an edit of a function that it calls in
another file, it would run the old machine code. So the cache folder is named by a hash of every source
file that kernels are made of. No `fastmath`: results must not depend on the compiler's mood.
"""

import atexit
import hashlib
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numba
import numpy as np

PACKAGE = Path(__file__).resolve().parent.parent

# What kernels import of the package, besides each other: rules and codes
RULES = ("batching", "declaration", "kv_cache", "lengths", "load", "named", "own", "scaling", "step_time", "transfer")

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy"}

# Only entries are called from Python: the others need no code that unpacks Python objects.
inner: Any = cast(Any, numba.njit)(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True)

# Without reference counts on arrays, for functions that make none: their callers hold them. An atomic count for each
# array that a function is given cost the token model's step loop nine tenths of its time.
bare: Any = cast(Any, numba.njit)(**OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False)

# The same, always compiled into its caller: passing dozens of arrays takes longer than most steps.
inlined: Any = cast(Any, numba.njit)(
    **OPTIONS, no_cpython_wrapper=True, no_cfunc_wrapper=True, _nrt=False, forceinline=True
)

# An unsigned index spares the check for a negative one at each access: measured 7 to 37 % of the step loop.
unsigned = np.uint64

# numba takes NumPy's whole numbers for ints; mypy doesn't.
whole: Any = np.int64


def sources() -> list[Path]:
    """The files that kernels are made of."""
    return [*sorted(PACKAGE.glob("kernel/*.py")), *(PACKAGE / f"{name}.py" for name in RULES)]


def source_hash() -> str:
    """Hash of the kernels' sources and of what else decides the machine code."""
    digest = hashlib.sha256(f"{numba.__version__} {np.__version__} {platform.python_version()}".encode())
    for path in sources():
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def cache_folder() -> Path:
    """Where compiled kernels are kept: under VECSIM_CACHE_DIR, else in the user's cache, else for this process only.

    Folders of other sources go after a month.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    root = Path(os.environ.get("VECSIM_CACHE_DIR") or home / "vecsim")
    folder = root / source_hash()
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            for other in root.iterdir():
                if time.time() - other.stat().st_mtime > 30 * 86400:
                    shutil.rmtree(other, ignore_errors=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        own = tempfile.mkdtemp(prefix="vecsim-")
        atexit.register(shutil.rmtree, own, ignore_errors=True)
        return Path(own)


CACHE_FOLDER = cache_folder()


def is_compiled(name: str) -> bool:
    """Whether the disk cache has machine code of an entry."""
    return any(CACHE_FOLDER.rglob(f"*.{name}-*.nbc"))


def entry(function: Callable[..., Any], **options: Any) -> Any:
    """Compile at first call and keep the machine code on disk."""
    # Set for this call alone: a user's own cached functions stay where they were.
    config: Any = numba.config
    before, config.CACHE_DIR = config.CACHE_DIR, str(CACHE_FOLDER)
    try:
        return numba.njit(cache=True, **OPTIONS, **options)(function)
    finally:
        config.CACHE_DIR = before


def bare_entry(function: Callable[..., Any]) -> Any:
    """An entry that other entries call by its address; no reference counts, as in `bare`."""
    return entry(function, no_cpython_wrapper=True, _nrt=False)
