"""`explain`: what a call of an entry point will run, without running it."""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any

import jax

from paged.lower import Attend, Explanation, ShardedAttend
from paged.spec import Pages, RaggedBatch

_IS_ASKED: contextvars.ContextVar[bool] = contextvars.ContextVar("paged.compat.explain", default=False)


class _Answer(Exception):
    """Ends a call that is only to be explained, at the point where all is known and nothing has run."""

    def __init__(self, attend: Attend | ShardedAttend, q: Any, pages: Pages, batch: RaggedBatch):
        super().__init__()
        self.of = attend, q, pages, batch


def explain(entry: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Explain what a call will run: the attention, the schedule, who picked it, and the pages that it visits.

    **Arguments:**

    - `entry`: an entry point of `paged.compat`.
    - `args`, `kwargs`: the arguments of the call, with concrete arrays. Nothing is written, and nothing is donated.

    **Returns:** the `paged.Explanation`. Print it to read it. Where a kernel runs, its source says whether the hints of
    the call were followed, "hints, ...", or which they are the nearest to, "hints, the nearest to ...".

    Raises what the call raises, and ``TypeError`` for another function.

    >>> from paged.compat import explain, page_attention
    >>> cache = jnp.ones((2, 8, 4, 16))
    >>> explanation = explain(page_attention, jnp.ones((1, 4, 16)), cache, cache, [9], [[3, 1, 0]], sliding_window=3)
    >>> explanation.pages_visited, explanation.pages_held, explanation.source
    (2, 3, 'heuristic')
    """
    try:
        # Without jit every call is traced anew, so that the answer does not depend on what was traced before.
        with _asked(), jax.disable_jit():
            entry(*args, **kwargs)
    except _Answer as answer:
        attend, q, pages, batch = answer.of
        return attend.explain(q, pages, batch)
    raise TypeError(f"entry must be an entry point of paged.compat; got {entry!r}.")


def answer_if_asked(attend: Attend | ShardedAttend, q: Any, pages: Pages, batch: RaggedBatch) -> None:
    """End the call here, where `explain` has asked for it. This costs a traced call nothing."""
    if _IS_ASKED.get():
        raise _Answer(attend, q, pages, batch)


@contextlib.contextmanager
def _asked() -> Iterator[None]:
    token = _IS_ASKED.set(True)
    try:
        yield
    finally:
        _IS_ASKED.reset(token)
