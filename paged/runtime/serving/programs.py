"""What the engine gives to the device: few programs, each compiled once, whatever the requests are."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp

from .._page_counts import counts_of
from .cancelling import cancel, renewed
from .packing import put_packed
from .shards import Shards, in_each, own_rows, shards_of, total
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
    model, limits, *facts = inputs
    how = dict(zip(("budget", "minima", "speculation", "has_figures", "log_probs"), facts, strict=True))
    state, events, done = serve_many(model, state, MOST_STEPS, limits[1], limits[0], **how)
    return state, events, done, _figures(shards_of(model), state.queue)


# Of shards of sequences each program runs in each one: ``shards`` are None where there are none.
@eqx.filter_jit
def figures(shards: Shards | None, queue: Queue) -> tuple:
    """The counts, and of all groups together the pages that slots hold, that several hold, and only the cache."""
    return _figures(shards, queue)


def _figures(shards: Shards | None, queue: Queue) -> tuple:
    def of_one(_: None, queue: Queue) -> tuple[Queue, tuple]:
        return queue, (queue.counts, jnp.stack([jnp.sum(pages) for pages in counts_of(queue.pool, queue.cache)]))

    return total(shards, in_each(shards, of_one, None, queue)[1])


@eqx.filter_jit(donate="all-except-first")
def put(new: tuple[Shards | None, Any, Any], queue: Queue) -> Queue:
    """The queue with new requests: their words and keys, see `put_packed`."""
    shards, *whole = new

    def in_one(whole: Any, queue: Queue) -> tuple[Queue, tuple]:
        words, keys = whole
        rows = own_rows(shards, jax.lax.bitcast_convert_type(words[:, 0], jnp.int32), queue.requests.status.shape[0])
        return queue.replace(requests=put_packed(rows, words[:, 1:], keys, queue.requests)), ()

    return in_each(shards, in_one, whole, queue)[0]


@eqx.filter_jit(donate="all-except-first")
def renew(shards: Shards | None, queue: Queue) -> Queue:
    """The queue for other weights, see `renewed`."""
    return in_each(shards, lambda _, queue: (renewed(queue), ()), None, queue)[0]


@eqx.filter_jit(donate="all-except-first")
def end(rows: tuple[Shards | None, Any], queue: Queue) -> Queue:
    """The queue without the requests in some rows, see `cancel`."""
    shards, numbers = rows

    def in_one(numbers: Any, queue: Queue) -> tuple[Queue, tuple]:
        return cancel(queue, own_rows(shards, numbers, queue.requests.status.shape[0])), ()

    return in_each(shards, in_one, numbers, queue)[0]
