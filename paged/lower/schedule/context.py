"""`schedules`: a context in which what is lowered takes its schedules from somewhere."""

import contextlib
import contextvars
import os
from collections.abc import Hashable, Iterator

from ..base import Schedule
from .file import TuningFile

# Innermost first. None: neither those further out nor the file are asked.
_SOURCES: contextvars.ContextVar[tuple[Schedule | TuningFile | None, ...]] = contextvars.ContextVar(
    "paged.schedules", default=()
)


@contextlib.contextmanager
def schedules(source: "Schedule | TuningFile | str | os.PathLike[str] | None") -> Iterator[None]:
    """Inside, `lower` takes schedules from ``source``; an explicit ``schedule=`` still goes first.

    * A tuning file, or a path of one: what it has for the call at hand. For the others the next context outwards is
      asked, then the file of the process, then the heuristic.
    * A `Schedule`: for every call that its lowering takes; others are as without it. Where it cannot run that is an
      error, as for ``schedule=``.
    * None: the heuristic alone, whatever the process's file and contexts further out say.

    It is `lower` that listens: what was lowered before keeps its schedules, and what is lowered inside keeps these.

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


def sources() -> Iterator[tuple[str, Schedule | TuningFile]]:
    """What to ask, in order, by the name that `explain` gives it."""
    for source in _SOURCES.get():
        if source is None:
            return
        yield ("context" if isinstance(source, Schedule) else f"context, {source}"), source
    file = TuningFile.at()
    if file is not None:
        yield str(file), file


def in_force() -> Hashable:
    """A value that changes whenever what `sources` say may: for who keeps what was lowered."""
    return tuple((source, source.stamp() if isinstance(source, TuningFile) else None) for _, source in sources())
