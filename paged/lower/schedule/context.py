"""`schedules`: a context in which `lower` uses schedules from a source of the caller's choice."""

import contextlib
import contextvars
import os
from collections.abc import Hashable, Iterator

from ..base import Schedule
from .file import TuningFile

# Innermost first. None ends the list: neither outer contexts nor the tuning file are asked.
_SOURCES: contextvars.ContextVar[tuple[Schedule | TuningFile | None, ...]] = contextvars.ContextVar(
    "paged.schedules", default=()
)


@contextlib.contextmanager
def schedules(source: "Schedule | TuningFile | str | os.PathLike[str] | None") -> Iterator[None]:
    """A context in which `lower` uses schedules from ``source``, unless it is given one by ``schedule=``.

    What counts is where `lower` is called: an attention that was lowered before keeps its schedules inside, and one
    that is lowered inside keeps its schedules outside.

    **Arguments:**

    - `source`: where schedules come from.
        - A `Schedule` is used for every call that its lowering accepts; if it cannot run such a call, that is an
          error, as for ``schedule=``.
        - A `TuningFile`, or the path of one, gives the schedules of the calls that it has entries for. For other calls
          the next outer context is asked, then the process's tuning file, then the lowering's heuristic.
        - None is for the heuristic alone: neither outer contexts nor the process's tuning file are asked.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=2, num_kv_heads=2, head_dim=8)
    >>> with schedules(paged.XlaSchedule(pages_per_block=4)):
    ...     attend = lower(spec, layout, "xla")
    >>> print(attend.schedule, attend.explain().source)
    xla-blocks(pages_per_block=4) context
    """
    chosen = source if source is None or isinstance(source, Schedule) else TuningFile.at(source)
    token = _SOURCES.set((chosen, *_SOURCES.get()))
    try:
        yield
    finally:
        _SOURCES.reset(token)


def sources_in_force() -> Iterator[tuple[str, Schedule | TuningFile]]:
    """The sources to ask at this moment, highest precedence first, each with the name that `explain` uses."""
    for source in _SOURCES.get():
        if source is None:
            return
        yield ("context" if isinstance(source, Schedule) else f"context, {source}"), source
    file = TuningFile.at()
    if file is not None:
        yield str(file), file


def sources_fingerprint() -> Hashable:
    """A fingerprint of the sources in force. Whoever caches a lowered attention includes it in the key."""
    return tuple(
        (source, source.stamp() if isinstance(source, TuningFile) else None) for _, source in sources_in_force()
    )
