"""How a figure is taken: clocks, interleaved repeats, medians of ratios, and how busy the machine was with others.

One core means CPU time of this process, which the parent has pinned to one CPU; all cores means wall time. Candidates
take turns within a run, so that whatever slows the machine slows all of them, and a ratio is the median over turns.
"""

import dataclasses
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

_MIN_REPEATS, _MAX_REPEATS = 3, 25


@dataclasses.dataclass(frozen=True)
class Setting:
    """One core or all of them, and how many seconds of repeats a case may take."""

    cores: str  # "one" or "all"
    is_quick: bool

    @property
    def clock(self) -> Callable[[], float]:
        """CPU time on one core, wall time on all."""
        return time.process_time if self.cores == "one" else time.perf_counter

    @property
    def seconds_a_case(self) -> float:
        """What the repeats of one case aim at, all candidates together."""
        return 0.5 if self.is_quick else 1.5


@dataclasses.dataclass
class Candidate:
    """Something to time: a call without arguments, and what compiling it cost."""

    call: Callable[[], Any]
    compile_seconds: float | None = None
    temporaries: int | None = None
    executable: Any = None


@dataclasses.dataclass
class Row:
    """One figure of a table. ``ratio`` is the section's own: time of its baseline over time of this, or the reverse."""

    section: str
    case: str
    name: str
    cores: str = ""
    seconds: float | None = None
    ratio: float | None = None
    temporaries: int | None = None
    compile_seconds: float | None = None
    others: float | None = None
    note: str = ""


class Samples:
    """The times of several candidates, turn by turn."""

    def __init__(self, seconds: dict[str, list[float]], others: float):
        self.seconds, self.others = seconds, others

    def median(self, name: str) -> float:
        """Median time of a candidate, in seconds."""
        return statistics.median(self.seconds[name])

    def ratio(self, over: str, under: str) -> float:
        """Median over turns of the time of ``over`` divided by that of ``under``."""
        turns = zip(self.seconds[over], self.seconds[under], strict=True)
        return statistics.median(a / b for a, b in turns)


def compiled(function: Callable[..., Any], *args: Any) -> Candidate:
    """A jitted function, compiled for its arguments. The compiler gets no options: they were seen to change timings."""
    start = time.perf_counter()
    executable = jax.jit(function).lower(*args).compile()
    seconds = time.perf_counter() - start
    return Candidate(lambda: executable(*args), seconds, temporaries(executable), executable)


def temporaries(executable: Any) -> int | None:
    """Bytes that a compiled function needs besides its arguments and results."""
    analysis = executable.memory_analysis()
    return None if analysis is None else analysis.temp_size_in_bytes


def interleaved(candidates: dict[str, Candidate], setting: Setting) -> Samples:
    """Time the candidates in turns, after one warm-up each."""
    calls = {name: candidate.call for name, candidate in candidates.items()}
    warm = {name: _timed(call, setting.clock) for name, call in calls.items()}
    warm = {name: _timed(call, setting.clock) if warm[name] < 2 else warm[name] for name, call in calls.items()}
    repeats = int(setting.seconds_a_case / max(sum(warm.values()), 1e-6))
    repeats = min(max(repeats, _MIN_REPEATS), _MAX_REPEATS)
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    load = _Load()
    for _ in range(repeats):
        for name, call in calls.items():
            seconds[name].append(_timed(call, setting.clock))
    return Samples(seconds, load.others())


def read(shape: tuple[int, int], dtype: Any) -> Candidate:
    """READ: one pass of `jnp.sum` over an array of ``shape``; what merely reading that many bytes costs."""
    few = jax.random.normal(jax.random.key(0), (1024, shape[1])).astype(dtype)
    array = jax.jit(lambda few: jnp.take(few, jnp.arange(shape[0]) % few.shape[0], axis=0))(few)
    return compiled(lambda x: jnp.sum(x, dtype=jnp.float32), array)


def matmul(size: int) -> tuple[Candidate, float]:
    """MATMUL: a square float32 `jnp.dot`, and its floating-point operations."""
    a = jax.random.normal(jax.random.key(0), (size, size))
    return compiled(jnp.dot, a, a), 2.0 * size**3


def progress(section: str, setting: Setting, cases: list[Any]) -> Iterator[Any]:
    """The cases, each announced on stderr."""
    for i, case in enumerate(cases):
        cores = "one core" if setting.cores == "one" else "all cores"
        print(f"[{section}, {cores}, {i + 1}/{len(cases)}] {case}", file=sys.stderr, flush=True)
        yield case


def _timed(call: Callable[[], Any], clock: Callable[[], float]) -> float:
    start = clock()
    jax.block_until_ready(call())
    return clock() - start


class _Load:
    """Cores that processes other than this one kept busy since it was made; 0 where the system doesn't say."""

    def __init__(self):
        self._wall, self._own, self._all = time.perf_counter(), time.process_time(), _busy_seconds()

    def others(self) -> float:
        wall = time.perf_counter() - self._wall
        busy = _busy_seconds() - self._all - (time.process_time() - self._own)
        return max(0.0, busy / wall)


def _busy_seconds() -> float:
    stat = pathlib.Path("/proc/stat")
    if not stat.exists():
        return 0.0
    user, nice, system = map(int, stat.read_text().split(maxsplit=4)[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")
