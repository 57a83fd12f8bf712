"""The host's side of `generate`: all requests go into one table, the serve loop runs, tokens come back by launches."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from paged.spec import Minimum

from ._asked import Asked
from ._groups import GroupUsage, Masks, names_of
from ._held import GroupSizes
from ._model_call import vocabulary_of
from ._new_pools import new_pool
from ._prefix_pools import pools_of_groups, with_pools_of_groups
from ._step_report import StepReport, report_of
from .prefix_cache import PrefixCache
from .sampling import Sampler
from .serving import ModelDraft, NewRequest, Queue, Reason, Requests, ServeState, Sizes, Status, serve_many
from .serving.forward import trusted
from .serving.placing import everywhere, placed
from .serving.served import Served
from .serving.shards import Shards, in_each
from .serving.speculation import Speculation

# Steps of one launch: for so many there is room in what it gives back. With reports there are fewer, so that what a
# step has drawn is told soon after it.
_STEPS, _STEPS_TO_REPORT = 32, 4
_REASONS: dict[int, Any] = {Reason.EOS: "eos", Reason.LENGTH: "length", Reason.NO_TOKEN: "no_token"}


class Pages(NamedTuple):
    """The pages of the pools, of each group of layers.

    * ``groups``: the masks of each.
    * ``sizes``: pages that the pools count: as many as the state's layers have, so that any number of pages that may be
      used compiles one program.
    * ``usable``: how many of them may be used, the first ones. ``pages_per_seq``: the width of block tables.
    """

    groups: tuple[Masks, ...]
    sizes: GroupSizes
    usable: tuple[int, ...]
    pages_per_seq: int


@dataclasses.dataclass
class Answering:
    """All that is asked of a model, and how far the answers have come. ``run`` ends when all of them have."""

    served: Served
    queue: Queue
    asked: Sequence[Asked]
    pages: Pages
    budget: int
    speculation: Speculation | None
    on_step: Callable[[StepReport], None] | None

    def vocabulary(self) -> int:
        """How many columns the logits have. The model is traced for it, as a step traces it, and nothing runs."""
        found: list[int] = []

        def one(model: Any, own: ServeState) -> tuple[ServeState, tuple]:
            batch, tokens = _batch(own.queue, self.budget, self.served.minima), jnp.zeros(self.budget, jnp.int32)
            found.append(vocabulary_of(model, tokens, batch, own.model_state))
            return own, ()

        (model, state), *drafting = self.served.models
        eqx.filter_eval_shape(in_each, self.served.shards, one, model, ServeState(self.queue, state))
        return self.served.vocabulary(self.queue, self.budget) if drafting else found[0]

    def take_state(self, *, is_copied: bool) -> None:
        """Put together what the loop carries: the model's state, or a copy of it, and a copy of a draft model's."""
        (model, state), *drafting = self.served.models
        copied = lambda state: jax.tree.map(jnp.copy, state)
        drafts = copied(drafting[0][1]) if drafting else None
        self.state = ServeState(self.queue, copied(state) if is_copied else state, drafts)
        self.model = model
        if self.served.shards is not None:
            self.model, self.state = everywhere(model), placed(model, self.state)
        speculation = self.speculation
        self._drafts = speculation.without_state if isinstance(speculation, ModelDraft) else speculation
        self._by_row = {request.row: request for request in self.asked}

    def run(self) -> None:
        while any(request.finish_reason is None for request in self.asked):
            for report in self._launch():
                if self.on_step is not None:
                    self.on_step(report)

    def _launch(self) -> list[StepReport]:
        """Run some steps, and take in what they have drawn, before anybody is told."""
        limit = jnp.asarray(_STEPS if self.on_step is None else _STEPS_TO_REPORT, jnp.int32)
        self.state, *told = _launch((self.model, limit, self.budget, self.served.minima, self._drafts), self.state)
        events, steps, preemptions = jax.device_get(told)
        for request in self.asked:
            request.preemptions = int(preemptions.reshape(-1)[request.row])
        return [self._taken(events, step) for step in range(int(steps))]

    def _taken(self, events: Any, step: int) -> StepReport:
        drawn: dict[int, tuple[int, ...]] = {}
        ended: list[int] = []
        for slot in np.flatnonzero(events.request[step] >= 0):
            request = self._by_row[int(events.request[step, slot])]
            tokens = events.token[step, slot, : events.count[step, slot]].tolist()
            request.tokens += tokens
            drawn |= {request.place: tuple(tokens)} if tokens else {}
            request.finish_reason = _REASONS.get(events.reason[step, slot])
            ended += [request.place] if request.finish_reason is not None else []
        if not events.figures.rows[step]:
            raise RuntimeError(
                f"The pool has too few pages for one sequence alone: {self.pages.usable} pages of "
                f"{self.pages.sizes.page_size} tokens. Does the coverage of a mask of yours rule out fewer pairs from "
                "later positions on? A page that it has hidden must stay hidden."
            )
        masks, sizes, usable, _ = self.pages
        rows, shards = zip(masks, usable, sizes.bytes_per_page, strict=True), self.served.num_shards
        idle = [GroupUsage(names_of(own), shards * most, 0, 0, size) for own, most, size in rows]
        out_of_use = [shards * (pages - most) for pages, most in zip(sizes.num_pages, usable, strict=True)]
        places = {row: request.place for row, request in self._by_row.items()}
        return report_of(events.figures, step, drawn, ended, idle, out_of_use, places)


def new_queue(
    asked: Sequence[Asked], pages: Pages, num_slots: int, sampler: Sampler, key: Any, ends: frozenset[int],
    has_cache: bool, shards: Shards | None,
) -> Queue:  # fmt: skip
    """A queue in which every request waits, in the row that it gets here.

    Sizes are rounded up, so that calls with other numbers of prompts and tokens compile nothing: rows and ids that end
    an answer to powers of two, tokens to what a block table holds.
    """
    dealt = _dealt(asked, 1 if shards is None else shards.count)
    sizes = Sizes(
        requests=rounded(max(map(len, dealt)), least=8),
        tokens=pages.pages_per_seq * pages.sizes.page_size + 1,
        ends=rounded(len(ends), least=4),
        stops=1,
        stop_tokens=1,
        biases=rounded(len(sampler.logit_bias), least=32),
        has_samples=any(own.index == next_.index for own, next_ in itertools.pairwise(asked)),
        has_cuts=any(request.cuts is not None for request in asked),
    )
    ids, any_key = tuple(sorted(ends)), jax.random.key(0)
    nobody = NewRequest((), 0, sampler, any_key, values=asked[0].values if asked else {})
    new, draws = [nobody] * (len(dealt) * sizes.requests), np.zeros(len(dealt) * sizes.requests, np.int32)
    for shard, own in enumerate(dealt):
        for row, request in enumerate(own, shard * sizes.requests):
            request.row, draws[row] = row, request.draw
            new[row] = NewRequest(
                request.prompt,
                len(request.prompt) + request.max_new_tokens,
                sampler,
                any_key,
                ids,
                arrival=request.place,
                values=request.values,
                cuts=request.cuts,
                family=request.index,
            )
    table = Requests.of(new, sizes, keys=_keys(key, jnp.asarray(draws)))
    numbers = jnp.asarray([len(own) for own in dealt], jnp.int32), jnp.asarray(pages.usable, jnp.int32)
    return _new_queue(table, *numbers, pages.groups, pages.sizes, num_slots, pages.pages_per_seq, has_cache, shards)


def _dealt(asked: Sequence[Asked], shards: int) -> list[list[Asked]]:
    """The requests of each shard of sequences: those of a prompt go where the fewest tokens are so far."""
    dealt: list[list[Asked]] = [[] for _ in range(shards)]
    tokens = [0] * shards
    for _, samples in itertools.groupby(asked, lambda request: request.index):
        shard = tokens.index(min(tokens))
        for request in samples:
            dealt[shard].append(request)
            tokens[shard] += request.most_cached
    return dealt


def rounded(number: int, least: int = 1) -> int:
    """The least power of two that is at least a number, and at least another."""
    return 1 << (max(number, least) - 1).bit_length()


@eqx.filter_jit
def _keys(key: Any, draws: Int[Array, " requests"]) -> Any:
    return jax.vmap(lambda draw: jax.random.fold_in(key, draw))(draws)


@eqx.filter_jit
def _new_queue(
    table: Requests, counts: Int[Array, " shards"], usable: Int[Array, " groups"], groups: Any, sizes: GroupSizes,
    num_slots: int, pages_per_seq: int, has_cache: bool, shards: Shards | None,
) -> Queue:  # fmt: skip
    """A queue of the first rows of a table, over pools of which the first pages are free, and no other ever is.

    ``table`` has the rows of all shards of sequences, one shard after the other, and ``counts`` are of each.
    """
    row = jnp.arange(table.status.shape[0] // counts.shape[0], dtype=jnp.int32)
    status = jnp.where(row[None] < counts[:, None], Status.WAITING, Status.FREE).astype(jnp.int32).reshape(-1)
    table = dataclasses.replace(table, status=status)
    pool = new_pool(groups, sizes, num_slots, pages_per_seq)
    pools = [
        eqx.tree_at(
            lambda own: own.ref_counts, own, (jnp.arange(own.num_pages, dtype=jnp.int32) >= most).astype(jnp.int32)
        )
        for own, most in zip(pools_of_groups(pool), usable, strict=True)
    ]
    pool = with_pools_of_groups(pool, pools)
    own = table if shards is None else jax.tree.map(lambda x: x[: row.shape[0]], table)
    queue = Queue.init(own, pool, PrefixCache.init(pool) if has_cache else None)
    if shards is not None:
        of_shards = jax.tree.map(lambda x: x.reshape(shards.count, -1, *x.shape[1:]), table)
        queue = eqx.tree_at(lambda queue: queue.requests, shards.stacked(queue), of_shards)
    # A new pool and a new cache have arrays in common, which cannot be donated twice.
    return jax.tree.map(jnp.copy, queue)


def _batch(queue: Queue, budget: int, minima: tuple[Minimum, ...]) -> Any:
    return trusted(queue.pool.ragged_batch(jnp.zeros_like(queue.request)), queue, budget, minima)


# All but the state are one argument, because Equinox donates either every argument or all but the first: the state is
# donated, so that pages are updated in place, and the parameters are not.
@eqx.filter_jit(donate="all-except-first")
def _launch(inputs: tuple, state: ServeState) -> tuple:
    model, limit, budget, minima, speculation = inputs
    how: Any = {"budget": budget, "minima": minima, "speculation": speculation, "has_figures": True}
    state, events, steps = serve_many(model, state, _STEPS, limit, **how)
    return state, events, steps, state.queue.requests.preemptions
