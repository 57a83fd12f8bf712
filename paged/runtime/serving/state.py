"""`Queue` and `ServeState`: everything that the serve loop carries, on the device."""

import dataclasses
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from .._prefix_pools import pools_of_groups, with_pools_of_groups
from ..prefix_cache import PrefixCache
from .requests import Requests, Status


class Counts(eqx.Module):
    """What has been done since the state was made, i32[] each.

    * ``steps``, ``decode_steps``: of the model; those in which every sequence had one row, and drafts.
    * ``prompt_tokens``: rows that were prefilled, again after a preemption too. ``new_tokens``: tokens drawn.
    * ``reused_tokens``: found in the prefix cache or in the pages of another sample. ``evicted_pages``: that the cache
      gave up. ``copied_pages``: that others held when a sequence went on to write in them.
    * ``freed_pages``: that slots gave up because their masks hide them from every later query.
    * ``admitted``, ``preempted``, ``done``: requests.
    """

    steps: Int[Array, ""]
    decode_steps: Int[Array, ""]
    prompt_tokens: Int[Array, ""]
    new_tokens: Int[Array, ""]
    reused_tokens: Int[Array, ""]
    evicted_pages: Int[Array, ""]
    freed_pages: Int[Array, ""]
    copied_pages: Int[Array, ""]
    admitted: Int[Array, ""]
    preempted: Int[Array, ""]
    done: Int[Array, ""]

    @classmethod
    def zero(cls) -> "Counts":
        return cls(*(jnp.zeros((), jnp.int32) for _ in dataclasses.fields(cls)))

    def plus(self, **more: Any) -> "Counts":
        """These, with some of them increased."""
        return dataclasses.replace(
            self, **{name: getattr(self, name) + jnp.asarray(n, jnp.int32) for name, n in more.items()}
        )


class Queue(eqx.Module):
    """Which requests there are, which slots they have, and which pages: all but the pages' contents.

    * ``requests``: the table of requests.
    * ``pool``: pages and lengths of the slots, a `PagePool` or a `GroupedPool`.
    * ``request`` i32[slots]: the row of the request in each slot; -1 for none.
    * ``admission`` i32[slots]: the number of the admission that filled the slot: the largest is the newest.
    * ``cache``: pages of tokens that were computed before; None where none are kept.
    * ``kept``, ``nodes`` i32[slots]: how many pages of each slot, in token order, are in the cache, and the node of the
      last one, -1 for none. Of a slot without a request, anything.
    * ``counts``: what has been done.
    """

    requests: Requests
    pool: Any
    request: Int[Array, " slots"]
    admission: Int[Array, " slots"]
    cache: PrefixCache | None
    kept: Int[Array, " slots"]
    nodes: Int[Array, " slots"]
    counts: Counts

    @classmethod
    def init(cls, requests: Requests, pool: Any, cache: PrefixCache | None = None) -> "Queue":
        """A queue in which no slot has a request."""
        nobody, zero = jnp.full(pool.num_slots, -1, jnp.int32), jnp.zeros(pool.num_slots, jnp.int32)
        return cls(requests, pool, nobody, zero, cache, zero, nobody, Counts.zero())

    @property
    def is_running(self) -> Bool[Array, " slots"]:
        """Which slots have a request."""
        return self.request >= 0

    @property
    def is_waiting(self) -> Bool[Array, " requests"]:
        """Which requests wait for a slot."""
        return self.requests.status == Status.WAITING

    @property
    def of_slots(self) -> Requests:
        """The request of each slot; any where there is none."""
        return self.requests.at(self.request)

    def tokens_at(self, slot: Int[Array, "*#rows"], place: Int[Array, "*#rows"]) -> Int[Array, "..."]:
        """The token at a place of the request of a slot, for each of many; any where there is none.

        `of_slots` would copy whole rows of the table of tokens.
        """
        tokens = self.requests.tokens
        return tokens[jnp.maximum(self.request, 0)[slot], jnp.clip(place, 0, tokens.shape[1] - 1)]

    def replace(self, **changes: Any) -> "Queue":
        """This queue with some parts changed."""
        return dataclasses.replace(self, **changes)

    def with_lengths(self, lengths: Int[Array, " slots"]) -> "Queue":
        """This queue with other lengths of its slots. Their pages stay."""
        pools = [dataclasses.replace(own, lengths=lengths) for own in pools_of_groups(self.pool)]
        return self.replace(pool=with_pools_of_groups(self.pool, pools))

    def rows_of(self, which: Bool[Array, " slots"]) -> Int[Array, " slots"]:
        """The row of each of these slots' requests, and for the others a row past the table: to scatter to."""
        return jnp.where(which & self.is_running, self.request, self.requests.status.shape[0])

    def with_column(self, which: Bool[Array, " slots"], **columns: Any) -> "Queue":
        """This queue with values in some columns of the table, for the requests of some slots."""
        rows, requests = self.rows_of(which), self.requests
        changed = {name: getattr(requests, name).at[rows].set(x, mode="drop") for name, x in columns.items()}
        return self.replace(requests=dataclasses.replace(requests, **changed))

    def without(self, which: Bool[Array, " slots"], status: Any) -> "Queue":
        """This queue with some slots emptied, their requests set to a status."""
        queue = self.with_column(which, status=status)
        return queue.replace(pool=self.pool.release(which), request=jnp.where(which, -1, self.request))


class ServeState(eqx.Module):
    """What the serve loop carries: a pytree of fixed shapes.

    * ``queue``: requests, slots and the pool.
    * ``model_state``: of the model, with the pages.
    * ``draft_state``: of a draft model, with its pages; None without one.
    """

    queue: Queue
    model_state: eqx.nn.State
    draft_state: eqx.nn.State | None = None
