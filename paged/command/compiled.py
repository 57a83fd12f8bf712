"""What the command line compiles is kept for its next run, by JAX's compilation cache."""

import hashlib
import pathlib
import platform
from typing import Any

import jax

from paged.lower import cache_folder

_SETTINGS: Any = jax.config  # whose types do not name its settings


def keep_compiled() -> pathlib.Path | None:
    """Let JAX keep the programs of this process in the user's cache folder, and take those of earlier ones from there.

    JAX's own settings come first: where ``JAX_COMPILATION_CACHE_DIR`` names a folder, or
    ``JAX_ENABLE_COMPILATION_CACHE`` is false, nothing changes. Call it before anything is compiled.

    **Returns:** the folder; None where nothing changes, and on a system without a cache folder.

    >>> keep_compiled()  # not in these tests
    """
    cache, settings = cache_folder(), _SETTINGS
    if cache is None or settings.jax_compilation_cache_dir or not settings.jax_enable_compilation_cache:
        return None
    folder = cache / "paged" / "compiled" / _processor()
    settings.update("jax_compilation_cache_dir", str(folder))
    return folder


def _processor() -> str:
    """A name for this kind of processor. A program that was compiled for another one may use what this one lacks, and
    JAX tells CPUs apart by no more than that they are CPUs."""
    told = pathlib.Path("/proc/cpuinfo")
    lines = told.read_text(errors="replace").splitlines() if told.exists() else []
    own = sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))})
    words = "\n".join([platform.machine(), platform.processor(), *own])
    return f"{platform.machine()}-{hashlib.sha256(words.encode()).hexdigest()[:12]}"
