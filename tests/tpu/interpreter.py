"""Runs TPU kernels in Pallas's interpreter, which sees races, unwritten memory and reads out of bounds.

What differs between versions of JAX, and what has no public name, is here and nowhere else.
"""

import contextlib
import dataclasses
import functools
import io
import threading
import time
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

import paged
from paged.lower import Attend, Schedule
from paged.lower.tpu.decode.plan import compute_dtype
from paged.spec import AttentionState
from tests.support import ROUNDED_WEIGHTS, Built, Case, assert_state_close

# "eager" copies data when a copy starts, which shows what is overwritten too early. "on_wait" copies data when the copy
# is awaited, so that what is read too early is still NaN.
MODES = ("on_wait", "eager")


PATIENCE = 300.0  # seconds that a kernel of a few pages may run; on a busy machine, unoptimised, some take 60


class KernelFault(AssertionError):
    """A race, or a semaphore that still counts when a kernel ends: a copy that nobody waited for."""


def params(mode: str = "on_wait", cores: int = 1) -> pltpu.InterpretParams:
    """The interpreter at its strictest. From JAX 0.12 on it can raise at a race; here `watched` looks for races."""
    fields = {field.name for field in dataclasses.fields(pltpu.InterpretParams)}
    on_race: dict[str, Any] = {"on_race": "warn"} if "on_race" in fields else {}
    return pltpu.InterpretParams(
        dma_execution_mode=mode,  # pyright: ignore
        detect_races=True,
        uninitialized_memory="nan",
        out_of_bounds_reads="raise",
        num_cores_or_threads=cores,
        **on_race,
    )


@functools.lru_cache(maxsize=64)
def interpreted(case: Case, schedule: Schedule | None = None, mode: str = "on_wait", generation: str = "v4") -> Attend:
    """The case's attention by a TPU kernel, interpreted as if on that chip (v4: the one with the least memory, and two
    cores)."""
    attend = paged.lower(case.spec, case.layout, "tpu", schedule=schedule).on_chip(generation)
    settings = params(mode, attend.schedule.cores)
    return dataclasses.replace(attend, lowerings=tuple(low.interpreted(settings) for low in attend.lowerings))


def watched(run: Any, *args: Any, patience: float = PATIENCE) -> Any:
    """The finished results of ``run(*args)``.

    Raises `KernelFault` for a race or a semaphore left counting, and whatever the interpreter raises: a kernel that
    waits for what will never come is stopped, by a ``TimeoutError`` inside of it.
    """
    said, done = io.StringIO(), threading.Event()
    interpret_pallas_call.races = None
    guard = threading.Thread(target=_stop_when_stuck, args=(done, patience), daemon=True)
    guard.start()
    try:
        with contextlib.redirect_stdout(said):
            results = jax.block_until_ready(run(*args))
            jax.effects_barrier()
    except BaseException:
        pltpu.reset_tpu_interpret_mode_state()
        raise
    finally:
        done.set()
        guard.join()
    races = interpret_pallas_call.races
    if races is None:
        raise KernelFault("no kernel was interpreted, so nothing was watched")
    if races.races_found or "RACE DETECTED" in said.getvalue():
        raise KernelFault(f"race: {said.getvalue()[:1000]}")
    if "non-zero count" in said.getvalue():
        raise KernelFault(f"semaphore: {said.getvalue()[:1000]}")
    return results


def _stop_when_stuck(done: threading.Event, patience: float) -> None:
    """Fail a kernel that has run for too long; compiling it does not count."""
    memory, since = None, time.monotonic()
    while not done.wait(0.2):
        if interpret_pallas_call._shared_memory is not memory:
            memory, since = interpret_pallas_call._shared_memory, time.monotonic()
        if memory is not None and time.monotonic() - since > patience:
            memory.set_failed(TimeoutError(f"the kernel did not end in {patience} s"), top_level=False)
            return


def state_of(attend: Attend, built: Built, **watch: float) -> AttentionState:
    """The attention state of built arrays, by a watched kernel."""
    return watched(attend.state, built.q, built.pages, built.batch, built.sinks, **watch)


def assert_equals_reference(attend: Attend, built: Built, **watch: float) -> AttentionState:
    """Assert that a watched kernel computes the reference's state."""
    got = state_of(attend, built, **watch)
    is_narrow = compute_dtype(built.pages.layout, built.q.dtype) == jax.numpy.bfloat16
    assert_state_close(got, built, weights=ROUNDED_WEIGHTS if is_narrow else 0.0)
    return got
