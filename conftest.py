"""The root of all tests: settings for speed and repeatability, and the names that every doctest may use."""

import importlib.metadata
import os

# Tests compile hundreds of tiny programs and run each for milliseconds, so what XLA takes to compile is what a test
# takes. Measured, CPU time to compile a decode step, a ragged step, a prefill, and their gradients: 8.3 s at level 1,
# and 2.8 s at level 0 with the emitters that JAX 0.10 still has. Without these, or with the code of a program in one
# piece, level 0 gives infinities in gradients that the other levels compute rightly. To test what the optimiser makes
# of our programs, set PAGED_TEST_OPTIMISED. XLA reads its flags once, so this comes before JAX.
if "PAGED_TEST_OPTIMISED" not in os.environ:
    _FAST = "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    if importlib.metadata.version("jaxlib").startswith("0.10."):
        _FAST = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST}".strip()

# Eight devices for the tests of many; what names no mesh runs on the first. XLA takes no such flag twice.
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()

# Tests run what the heuristics choose, on whichever machine and whatever was tuned there.
os.environ["PAGED_TUNING"] = "off"
# Nor do they find programs there, or leave any.
os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"

import ctypes
import dataclasses
import gc
import importlib
import importlib.util
import pathlib
import resource
import sys
from typing import Any

import equinox as eqx
import hypothesis
import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest

# XLA has read its flags when it has compiled. The compiler for TPUs reads them later, and ends at one that it lacks.
# Without that one a process that a test starts compiles at level 1.
jax.block_until_ready(jax.jit(jnp.negative)(1.0))
_EMITTERS = "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(_EMITTERS, "--xla_backend_optimization_level=1")

pytest.register_assert_rewrite("tests.support", "tests.tpu")

# A program that names its ranks and dtypes means the same whatever a user's settings are. A missing axis is an error,
# and so is an integer that meets a float.
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

_Raises: Any = type(pytest.raises(Exception))


def _let_annotations_rest(method: Any, is_disabled: bool) -> Any:
    """Inside of `pytest.raises` an argument is wrong on purpose. The function's own error must come, and name it."""

    def wrapped(self: Any, *args: Any) -> Any:
        jaxtyping.config.update("jaxtyping_disable", is_disabled)
        return method(self, *args)

    return wrapped


_Raises.__enter__ = _let_annotations_rest(_Raises.__enter__, True)
_Raises.__exit__ = _let_annotations_rest(_Raises.__exit__, False)

hypothesis.settings.register_profile("paged", deadline=None, derandomize=True, database=None, max_examples=60)
hypothesis.settings.load_profile("paged")

# Scripts that make checkpoints, with packages that no test needs.
collect_ignore_glob = ["tests/models/checkpoints/*.py"]

_PACKAGES = ("paged.spec", "paged.lower", "paged.runtime", "paged.models", "paged.compat", "paged.testing", "paged")


# Every compiled program keeps some of the memory mappings that a process may have; Linux allows 65530.
_MOST_MAPPINGS = 20_000
# What a process may hold in memory between two tests. The peak of a process must stay under 2.5 GB; every run ends with
# a line that says what it was.
_MOST_BYTES = 1_900_000_000
_PEAKS: dict[str, int] = {}

# Tracing makes millions of objects, of which few are garbage. Measured over tests of gradients: a full collection takes
# 0.3 s, comes 7 times in 20 s, and frees next to nothing. Full collections come where memory asks for them, below.
gc.set_threshold(10_000, 20, 1_000)

# The compiler frees and takes tens of MB for every program. The C library keeps these, so that the system does not
# clear them again each time: a quarter less time in the system (measured over tests of gradients).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
for _option, _size in ((_TRIM_THRESHOLD, 256), (_TOP_PAD, 16), (_MMAP_THRESHOLD, 64)):
    getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)(_option, _size * 2**20)


def _resident() -> int:
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _forget_programs() -> None:
    jax.clear_caches()
    gc.collect()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown():
    """After a test: give back what XLA's compiler has freed, if it is much; then forget programs."""
    if not sys.platform.startswith("linux"):
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)
    # The first, measured after 19 tests of layers: 0.95 GB, of which the C library keeps 0.5 GB for later. A collection
    # alone takes 0.5 s of a full process, and gives back next to nothing (measured over the whole suite).
    for free in (lambda: None, _forget_programs):
        if _resident() > _MOST_BYTES:
            free()
            trim(0)


@pytest.fixture(autouse=True, scope="module")
def _let_go_of_programs():
    """After a module: forget compiled programs, if there are many."""
    yield
    mappings = pathlib.Path("/proc/self/maps")
    if mappings.exists() and mappings.read_bytes().count(b"\n") > _MOST_MAPPINGS:
        _forget_programs()


@pytest.hookimpl(trylast=True)
def pytest_collection_finish():
    """What stands before the first test stays to the end: no collection looks at it again."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish(session):
    """Keep the most memory that this process had. A worker of pytest-xdist sends it to the one that reports."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["peak"] = peak
    else:
        _PEAKS["this process"] = peak


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    """Of pytest-xdist: a worker ends."""
    _PEAKS[node.gateway.id] = getattr(node, "workeroutput", {}).get("peak", 0)


def pytest_terminal_summary(terminalreporter):
    """The peak of each process, which must stay under 2.5 GB."""
    peaks = ", ".join(f"{name} {peak / 1e9:.2f} GB" for name, peak in sorted(_PEAKS.items()))
    terminalreporter.write_line(f"most memory: {peaks}")


@pytest.fixture(autouse=True, scope="session")
def _doctest_names(doctest_namespace):
    """Every public name of the packages, as a reader of the documentation would have imported them."""
    doctest_namespace.update(jax=jax, jnp=jnp, np=np, eqx=eqx, dataclasses=dataclasses, hypothesis=hypothesis)
    for name in _PACKAGES:
        if importlib.util.find_spec(name) is not None:
            module = importlib.import_module(name)
            doctest_namespace.update({k: v for k, v in vars(module).items() if not k.startswith("_")})
    doctest_namespace["paged"] = importlib.import_module("paged")
