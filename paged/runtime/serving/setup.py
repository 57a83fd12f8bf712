"""What an engine is made of: the pool of a model's groups, the table of requests, and what requests are checked for."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax.numpy as jnp

from paged.spec import Minimum, values_of

from .._arguments import integer
from .._cuts import AheadMasks
from .._groups import Masks, keeps_all, mask_of, most_pages
from .._held import GroupSizes
from .._new_pools import new_pool
from ..prefix_cache import PrefixCache
from .intake import Intake, PagesOfValues
from .requests import Requests, Sizes
from .served import Served
from .state import Queue


class Setup(NamedTuple):
    """What an engine is made of.

    * ``intake``: what requests are checked against. * ``new_queue``: makes a queue without requests.
    * ``budget``: the most rows of a step. * ``minima``: what the numbers of requests are checked for.
    """

    intake: Intake
    new_queue: Callable[[], Queue]
    budget: int
    minima: tuple[Minimum, ...]

    @classmethod
    def of(
        cls, model: Any, state: eqx.nn.State, most: dict[str, int], *, num_slots: Any, chunk_size: Any, num_pages: Any,
        page_size: Any, prefix_cache: Any, speculation: Any, log_probs: int | None,
    ) -> "Setup":  # fmt: skip
        """The parts of an engine, see `Engine`. ``ValueError`` or ``TypeError`` for a model that it cannot serve."""
        num_slots, chunk_size = integer("num_slots", num_slots, 1), integer("chunk_size", chunk_size, 1)
        served = Served.of(model, state, speculation)
        num_slots, shards = served.share("num_slots", num_slots), served.shards
        specs, groups = served.specs, served.groups
        most = most | {"requests": -(-most["requests"] // served.num_shards)}
        budget, minima = served.budget(num_slots, chunk_size), served.minima
        ahead = AheadMasks.of([spec.visibility for spec in specs], most["tokens"])
        facts = {"has_cuts": bool(ahead.masks), "has_samples": True, "has_log_probs": log_probs is not None}
        sizes, held = Sizes(**most, **facts), served.sizes(num_pages, page_size)
        width = -(-(sizes.tokens - 1 + served.num_drafts) // held.page_size)
        reason = served.why_not_shared()
        reason = "a mask shows tokens to others before them" if reason is None and ahead.masks else reason
        if prefix_cache and reason is not None:
            raise ValueError(f"prefix_cache=True needs pages that depend on the tokens before them alone: {reason}.")
        has_cache = reason is None if prefix_cache is None else prefix_cache
        # Any numbers: those of a row without a request are read by nobody.
        values = {v.name: jnp.ones(() if v.size is None else v.size, v.dtype) for s in specs for v in s.values}
        facts = (sizes, groups, held, num_slots, width, bool(has_cache), shards)
        make = functools.partial(_new_queue, facts, values)
        queue = eqx.filter_eval_shape(make)
        vocab, (capacity, unknown) = (
            served.vocabulary(queue, budget),
            _capacity(groups, held, sizes.tokens, budget),
        )
        pages = PagesOfValues(unknown, held.page_size, budget)
        return cls(Intake(sizes, vocab, capacity, specs, ahead, chunk_size, pages), make, budget, minima)


@eqx.filter_jit
def _new_queue(facts: tuple, values: Any) -> Queue:
    """A queue without requests. One program makes it: each of its arrays alone would be compiled as long."""
    sizes, groups, held, num_slots, width, has_cache, shards = facts
    pool = new_pool(groups, held, num_slots, width)
    queue = Queue.init(Requests.init(sizes, values), pool, PrefixCache.init(pool) if has_cache else None)
    return queue if shards is None else shards.stacked(queue)


def _capacity(groups: Any, held: GroupSizes, tokens: int, budget: int) -> tuple[int, tuple[tuple[Masks, int], ...]]:
    """The most tokens that one sequence can have in pages when it has all of them.

    And groups whose pages may not suffice, by numbers that a request brings: their masks and pages.
    """
    most, unknown = tokens, []
    for masks, num_pages in zip(groups, held.num_pages, strict=True):
        if keeps_all(masks):
            most = min(most, num_pages * held.page_size)
        elif (needed := most_pages(mask_of(masks), tokens, held.page_size, budget)) <= num_pages:
            continue
        elif values_of(mask_of(masks)):
            unknown.append((masks, num_pages))
        else:
            raise ValueError(
                f"Layers with the mask {masks[0]} hold {needed} pages of {held.page_size} tokens at once for one "
                f"sequence of {tokens} tokens in steps of {budget} rows, and have {num_pages}. Make max_tokens or "
                "chunk_size smaller, or give these layers more pages."
            )
    return most, tuple(unknown)
