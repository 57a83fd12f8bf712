"""What an engine is made of: the pool of a model's groups, the table of requests, and what requests are checked for."""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from paged.spec import Everything, Minimum, values_of

from .._arguments import integer
from .._cuts import AheadMasks
from .._groups import Masks, keeps_all, mask_of, most_pages, page_groups
from .._held import GroupSizes, group_sizes
from .._masks import specs_of
from .._new_pools import new_pool, why_not_shared
from ..prefix_cache import PrefixCache
from .drafting import ModelDraft
from .forward import logits_of
from .intake import Intake, PagesOfValues
from .requests import Requests, Sizes
from .shards import Shards, in_each, shards_of_all
from .speculation import require_speculation
from .state import Queue, ServeState


class Setup(NamedTuple):
    """What an engine is made of.

    * ``intake``: what requests are checked against. * ``queue``: without requests.
    * ``budget``: the most rows of a step. * ``minima``: what the numbers of requests are checked for.
    """

    intake: Intake
    queue: Queue
    budget: int
    minima: tuple[Minimum, ...]

    @classmethod
    def of(
        cls, model: Any, state: eqx.nn.State, most: dict[str, int], *, num_slots: Any, chunk_size: Any, num_pages: Any,
        page_size: Any, prefix_cache: Any, speculation: Any, log_probs: int | None,
    ) -> "Setup":  # fmt: skip
        """The parts of an engine, see `Engine`. ``ValueError`` or ``TypeError`` for a model that it cannot serve."""
        num_slots, chunk_size = integer("num_slots", num_slots, 1), integer("chunk_size", chunk_size, 1)
        served = _served(model, state, speculation)
        shards = shards_of_all(served)
        if shards is not None:
            num_slots = shards.share("num_slots", num_slots)
            most = most | {"requests": -(-most["requests"] // shards.count)}
        budget = num_slots + chunk_size
        drafts = 0 if speculation is None else speculation.num_tokens
        budget = max(budget, num_slots * (1 + drafts))  # a step in which every sequence has all its drafts must fit
        specs = tuple(dict.fromkeys(spec for one, _ in served for spec in specs_of(one)))
        ahead = AheadMasks.of([spec.visibility for spec in specs], most["tokens"])
        facts = {"has_cuts": bool(ahead.masks), "has_samples": True, "has_log_probs": log_probs is not None}
        sizes = Sizes(**most, **facts)
        groups = page_groups(specs) or ((Everything(),),)
        held = _sizes(served, groups, num_pages, page_size)
        if shards is not None:
            held = held._replace(num_pages=tuple(shards.share("num_pages", n) for n in held.num_pages))
        width = -(-(sizes.tokens - 1 + drafts) // held.page_size)
        reason = _why_not_shared(served)
        reason = "a mask shows tokens to others before them" if reason is None and ahead.masks else reason
        if prefix_cache and reason is not None:
            raise ValueError(f"prefix_cache=True needs pages that depend on the tokens before them alone: {reason}.")
        has_cache = reason is None if prefix_cache is None else prefix_cache
        # Any numbers: those of a row without a request are read by nobody.
        values = {v.name: jnp.ones(() if v.size is None else v.size, v.dtype) for s in specs for v in s.values}
        queue = _new_queue((sizes, groups, held, num_slots, width, bool(has_cache), shards), values)
        minima = tuple(dict.fromkeys(minimum for spec in specs for minimum in spec.minima))
        vocab, (capacity, unknown) = (
            _vocab(shards, served, queue, budget, minima),
            _capacity(groups, held, sizes.tokens, budget),
        )
        pages = PagesOfValues(unknown, held.page_size, budget)
        return cls(Intake(sizes, vocab, capacity, specs, ahead, chunk_size, pages), queue, budget, minima)


def _served(model: Any, state: eqx.nn.State, speculation: Any) -> list[tuple[Any, Any]]:
    """The models that are run, with their states: the served one, and a draft model."""
    if speculation is None:
        return [(model, state)]
    require_speculation(state, speculation)
    draft = [(speculation.model, speculation.state)] if isinstance(speculation, ModelDraft) else []
    return [(model, state), *draft]


def _sizes(served: Any, groups: tuple[Masks, ...], num_pages: Any, page_size: Any) -> GroupSizes:
    """The sizes of the pools. ``ValueError`` where a draft model has fewer pages than the served model alone has."""
    (model, state), *drafting = served
    held = group_sizes(model, state, groups, num_pages, page_size, drafting)
    if drafting:
        own = group_sizes(model, state, page_groups(specs_of(model)) or ((Everything(),),), num_pages, page_size)
        if max(held.num_pages) < max(own.num_pages):
            raise ValueError(
                f"A ModelDraft needs as many pages as the model that it drafts for, because both use the same block "
                f"tables: that one has {max(own.num_pages)}, and the draft model {max(held.num_pages)}. Make its state "
                f"with as many, or the engine with num_pages={max(held.num_pages)}."
            )
    return held


def _why_not_shared(served: Any) -> str | None:
    """Why a prefix cache cannot share the pages of these models. A draft model without any has none to share."""
    (model, state), *drafting = served
    having = [(own, pages) for own, pages in drafting if any(map(eqx.is_array, jax.tree.leaves(pages)))]
    reasons = (why_not_shared(specs_of(own), pages) for own, pages in ((model, state), *having))
    return next((reason for reason in reasons if reason is not None), None)


@eqx.filter_jit
def _new_queue(facts: tuple, values: Any) -> Queue:
    """A queue without requests. One program makes it: each of its arrays alone would be compiled as long."""
    sizes, groups, held, num_slots, width, has_cache, shards = facts
    pool = new_pool(groups, held, num_slots, width)
    queue = Queue.init(Requests.init(sizes, values), pool, PrefixCache.init(pool) if has_cache else None)
    return queue if shards is None else shards.stacked(queue)


def _vocab(shards: Shards | None, served: Any, queue: Queue, budget: int, minima: Any) -> int:
    """How many tokens the model knows: as many as its draft model."""

    def logits(model: Any, own: ServeState) -> tuple[ServeState, Any]:
        return own, logits_of(model, own.queue, own.model_state, budget, minima)

    told = [
        eqx.filter_eval_shape(in_each, shards, logits, model, ServeState(queue, state))[1] for model, state in served
    ]
    sizes = [own.shape[-1] for own in told]
    if len(set(sizes)) > 1:
        raise ValueError(
            f"A ModelDraft must know the tokens of the model that it drafts for: that one has {sizes[0]} logits, and "
            f"the draft model {sizes[1]}."
        )
    return sizes[0]


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
