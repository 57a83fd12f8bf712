"""What the engine gives to the device: few programs, each compiled once, whatever the requests are."""

from typing import Any

import equinox as eqx
import jax.numpy as jnp

from .._page_counts import counts_of
from .cancelling import cancel, renewed
from .packing import put_packed
from .state import Queue, ServeState
from .step import serve_many

# Requests that one upload brings, and rows that one cancellation ends: static, so that neither is traced again.
AT_ONCE = 8
# The most steps of a launch: for so many there is room in what it gives back.
MOST_STEPS = 64


# All but the state are one argument, because Equinox donates either every argument or all but the first: the state is
# donated, so that pages are updated in place, and the parameters are not.
@eqx.filter_jit(donate="all-except-first")
def serve(inputs: tuple, state: ServeState) -> tuple:
    """Run steps: the state, and what the host is told."""
    model, limit, *facts = inputs
    how = dict(zip(("budget", "minima", "speculation", "has_figures", "log_probs"), facts, strict=True))
    state, events, done = serve_many(model, state, MOST_STEPS, limit, **how)
    return state, events, done, _figures(state.queue)


@eqx.filter_jit
def figures(queue: Queue) -> tuple:
    """The counts, and of all groups together the pages that slots hold, that several hold, and only the cache."""
    return _figures(queue)


def _figures(queue: Queue) -> tuple:
    return queue.counts, jnp.stack([jnp.sum(pages) for pages in counts_of(queue.pool, queue.cache)])


@eqx.filter_jit(donate="all-except-first")
def put(new: tuple[Any, Any], queue: Queue) -> Queue:
    """The queue with new requests: their words and keys, see `put_packed`."""
    return queue.replace(requests=put_packed(*new, queue.requests))


@eqx.filter_jit(donate="all")
def renew(queue: Queue) -> Queue:
    """The queue for other weights, see `renewed`."""
    return renewed(queue)


@eqx.filter_jit(donate="all-except-first")
def end(rows: Any, queue: Queue) -> Queue:
    """The queue without the requests in some rows, see `cancel`."""
    return cancel(queue, rows)
