"""`StepFigures`: what a step of the loop computed, and which pages were held while it ran."""

import dataclasses
from collections.abc import Callable

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from paged.spec import GroupedBatch

from .._page_counts import counts_of
from .._prefix_pools import pools_of_groups
from ..grouped_pool import pages_trimmed
from .state import Queue


class StepFigures(eqx.Module):
    """Figures of one step, i32[] each unless it says otherwise, or of many steps, with a leading axis.

    * ``rows``, ``prompt_rows``: tokens put into pages; those of sequences that lacked more than one.
    * ``running``, ``waiting``: requests while it ran.
    * ``pages`` i32[4, groups]: of each group of layers the pages that are in use, but for those that only the prefix
      cache holds; those that several slots hold; those that only the prefix cache holds; and how many more there would
      be if none had been trimmed.
    * ``copied``: pages that it copied because several held them.
    * ``freed``: pages that slots gave up before it because no query sees them any more, in all groups.
    * ``reused``: tokens of requests that it admitted, found in the prefix cache. ``evicted``: pages that the cache gave
      up.
    * ``preempted``: requests that gave up their slot before it, and wait again.
    * ``request``, ``slot_rows`` i32[slots]: of each slot the row of its request, -1 for none, and how many rows it had.
    * ``is_prompt`` bool[slots]: whether these were of a sequence that lacked more than one.
    """

    rows: Int[Array, "*steps"]
    prompt_rows: Int[Array, "*steps"]
    running: Int[Array, "*steps"]
    waiting: Int[Array, "*steps"]
    pages: Int[Array, "*steps counts groups"]
    copied: Int[Array, "*steps"]
    freed: Int[Array, "*steps"]
    reused: Int[Array, "*steps"]
    evicted: Int[Array, "*steps"]
    preempted: Int[Array, "*steps"]
    request: Int[Array, "*steps slots"]
    slot_rows: Int[Array, "*steps slots"]
    is_prompt: Bool[Array, "*steps slots"]

    @classmethod
    def zero(cls, queue: Queue) -> "StepFigures":
        """Figures of no step, for a queue's groups."""
        zero = jnp.zeros((), jnp.int32)
        pages = jnp.zeros((4, len(pools_of_groups(queue.pool))), jnp.int32)
        nobody, none = jnp.full_like(queue.request, -1), jnp.zeros_like(queue.request)
        of_slots = nobody, none, jnp.zeros(queue.request.shape, bool)
        return cls(zero, zero, zero, zero, pages, zero, zero, zero, zero, zero, *of_slots)

    @classmethod
    def of(cls, before: Queue, queue: Queue, rows: Int[Array, " slots"]) -> "StepFigures":
        """Those of a step that is about to run.

        **Arguments:**

        - `before`: the queue before requests were admitted.
        - `queue`: with room for the rows.
        - `rows`: of each slot.
        """
        total = lambda x: jnp.sum(x, dtype=jnp.int32)
        counts, old = queue.counts, before.counts
        batch = queue.pool.ragged_batch(rows)
        copies = [own.copy_from for own in (batch.batches if isinstance(batch, GroupedBatch) else (batch,))]
        trimmed = jnp.stack([pages_trimmed(own) for own in pools_of_groups(queue.pool)])
        missing = queue.of_slots.known - queue.pool.lengths + rows
        return cls(
            rows=total(rows),
            prompt_rows=total(jnp.where(missing > 1, rows, 0)),
            running=total(queue.is_running),
            waiting=total(queue.is_waiting),
            pages=jnp.stack([*counts_of(queue.pool, queue.cache), trimmed]),
            copied=sum((total(x >= 0) for x in copies if x is not None), start=jnp.zeros((), jnp.int32)),
            freed=counts.freed_pages - old.freed_pages,
            reused=counts.reused_tokens - old.reused_tokens,
            evicted=counts.evicted_pages - old.evicted_pages,
            preempted=counts.preempted - old.preempted,
            request=queue.request,
            slot_rows=rows,
            is_prompt=(missing > 1) & (rows > 0),
        )

    def of_all(self, request: Int[Array, "shards steps slots"], joined: Callable[[Array], Array]) -> "StepFigures":
        """The figures of several shards of sequences, which have a leading axis, as those of one loop.

        **Arguments:**

        - `request`: as rows among all shards. - `joined`: puts the slots of all shards side by side.
        """
        of_slots = {
            "request": joined(request),
            "slot_rows": joined(self.slot_rows),
            "is_prompt": joined(self.is_prompt),
        }
        names = [field.name for field in dataclasses.fields(self) if field.name not in of_slots]
        return StepFigures(
            **{name: jnp.sum(getattr(self, name), axis=0, dtype=jnp.int32) for name in names}, **of_slots
        )

    def kept_after(self, steps: Int[Array, ""], queue: Queue) -> "StepFigures":
        """These of many steps, with the pages of a queue after the last one of ``steps``: nothing runs any more."""
        is_over = jnp.arange(self.rows.shape[0], dtype=jnp.int32) >= steps
        pages = jnp.stack([*counts_of(queue.pool, queue.cache), jnp.zeros(self.pages.shape[2], jnp.int32)])
        return dataclasses.replace(self, pages=jnp.where(is_over[:, None, None], pages[None], self.pages))
