"""Requests that end from outside of the loop."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Int

from .requests import Reason, Status
from .state import Queue


def renewed(queue: Queue) -> Queue:
    """The queue for other weights: nothing in the prefix cache is found again, and what runs is computed again."""
    queue = queue.without(queue.is_running, Status.WAITING)
    return queue if queue.cache is None else queue.replace(cache=queue.cache.with_new_weights())


def cancel(queue: Queue, rows: Int[Array, " some"]) -> Queue:
    """End requests, whether they wait or run: their slots and pages are free.

    **Arguments:**

    - `queue`: which requests there are.
    - `rows`: theirs; a negative number for none. Those that are done stay as they are.
    """
    requests = queue.requests
    is_row = jnp.zeros(requests.status.shape, bool).at[jnp.where(rows < 0, requests.status.shape[0], rows)]
    ends = is_row.set(True, mode="drop") & ((requests.status == Status.WAITING) | (requests.status == Status.RUNNING))
    queue = queue.without(queue.is_running & ends[jnp.maximum(queue.request, 0)], Status.DONE)
    status = jnp.where(ends, Status.DONE, queue.requests.status)
    reason = jnp.where(ends, Reason.CANCELLED, queue.requests.reason)
    return queue.replace(requests=dataclasses.replace(queue.requests, status=status, reason=reason))
