"""`generate`: serve a batch of unequal prompts by continuous batching, over one page pool."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from paged.lower import check_values
from paged.spec import Everything, Pages, RaggedBatch

from ._scheduler import Request, Scheduler
from .pool import PagePool
from .sampling import Sampler, sample

Model = Callable[[Int[Array, " tokens"], RaggedBatch, eqx.nn.State], tuple[Float[Array, "tokens vocab"], eqx.nn.State]]
Integers = Sequence[int] | Int[Array | np.ndarray, "..."]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result for one prompt.

    * ``prompt``: its token ids.
    * ``tokens``: the generated ids. Where ``finish_reason`` is ``"eos"``, the last one is an ``eos`` token.
    * ``finish_reason``: ``"eos"``, or ``"length"`` where ``max_new_tokens`` were drawn.
    * ``preemptions``: how often the sequence gave up its pages and was prefilled again.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    finish_reason: Literal["eos", "length"]
    preemptions: int


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step of the model, as ``on_step`` sees it.

    * ``kind``: ``"prefill"``, a chunk of one sequence, or ``"decode"``, one row for each decoding sequence.
    * ``tokens``: how many tokens the step put into pages.
    * ``new_tokens``: how many generated tokens it added to sequences.
    * ``pages_in_use``, ``running``, ``waiting``: pages, running sequences and waiting ones while it ran.
    """

    kind: Literal["prefill", "decode"]
    tokens: int
    new_tokens: int
    pages_in_use: int
    running: int
    waiting: int


def generate(
    model: Model,
    state: eqx.nn.State,
    prompts: Sequence[Integers],
    *,
    max_new_tokens: int | Integers,
    num_slots: int,
    num_pages: int | None = None,
    page_size: int | None = None,
    pages_per_seq: int | None = None,
    chunk_size: int = 64,
    sampler: Sampler | None = None,
    key: PRNGKeyArray | None = None,
    eos: int | Integers | None = None,
    donate_state: bool = False,
    on_step: Callable[[StepReport], None] | None = None,
) -> list[Generation]:
    """Generate from a list of prompts of any lengths, by continuous batching over one page pool.

    Chunks of prompts and decode steps take turns, so that a long prompt does not hold up the sequences that decode.
    When the pool has no page left, the sequence that was admitted last gives up its pages, and is prefilled again
    later. The model is compiled twice, for chunks and for decode steps, whatever the lengths of the prompts.

    **Arguments:**

    - `model`: a callable pytree, ``logits, state = model(tokens, batch, state)``, that keeps its `Pages` in the state,
      such as a stack of `PagedAttention` layers. ``tokens`` is int32[rows], ``logits`` float[rows, vocab].
    - `state`: the model's Equinox state.
    - `prompts`: token ids of each prompt, at least one: a list or an array.
    - `max_new_tokens`: the most tokens to generate, one number for all prompts or one for each. The last token is
      never cached, so a prompt needs room for ``len(prompt) + max_new_tokens - 1`` tokens.
    - `num_slots`: how many sequences may run at once; rows of a decode step.
    - `num_pages`: pages of the pool. None: as many as the state's pages have.
    - `page_size`: tokens per page. None: the page size of the state's pages.
    - `pages_per_seq`: width of block tables. None: the least power of two that fits every prompt.
    - `chunk_size`: rows of a prefill step.
    - `sampler`: how tokens are drawn. None: the likeliest.
    - `key`: a PRNG key, needed by a sampler that draws at random. A draw depends on the key, the prompt's index and
      the token's index only. So scheduling changes no draw, except by what rounding changes of the logits.
    - `eos`: the token id, or several, that ends a sequence. None: only ``max_new_tokens`` ends it.
    - `donate_state`: whether the memory of ``state`` is used for the steps, after which ``state`` is gone. By default
      the state is copied, so that there are two caches.
    - `on_step`: called after each step with a `StepReport`.

    **Returns:** one `Generation` per prompt, in order; no prompts give an empty list.

    Before each step the values of its batch are checked on the host, for any mask, so that layers with ``check`` do
    not check them again. Raises ``ValueError`` or ``TypeError`` before anything runs: for an empty prompt or one that
    could never fit, naming it, for a pool that the state's pages cannot hold, and for a missing key.

    >>> class Parrot(eqx.Module):  # the likeliest next token is the token itself
    ...     def __call__(self, tokens, batch, state):
    ...         return jax.nn.one_hot(tokens, 10), state
    >>> model, state = eqx.nn.make_with_state(Parrot)()
    >>> results = generate(model, state, [[1, 2, 3], [4]], max_new_tokens=2, num_slots=2, num_pages=4, page_size=2)
    >>> [result.tokens for result in results]
    [(3, 3), (4, 4)]
    """
    sampler = Sampler() if sampler is None else sampler
    key = _require_key(sampler, key)
    num_pages, page_size = _pool_size(state, num_pages, page_size)
    requests = _requests(prompts, max_new_tokens)
    pages_per_seq = _table_width(requests, num_pages, page_size, pages_per_seq)
    ends = frozenset() if eos is None else frozenset(np.atleast_1d(np.asarray(eos)).tolist())
    if not donate_state:
        state = jax.tree.map(jnp.copy, state)
    scheduler = Scheduler(PagePool.init(num_pages, num_slots, pages_per_seq, page_size), requests)
    _Serve(model, state, scheduler, sampler, key, ends, chunk_size, on_step).run()
    return [_result(request, ends) for request in requests]


@dataclasses.dataclass
class _Serve:
    """The loop of one `generate`: the scheduler decides, the device computes, drawn tokens go back."""

    model: Model
    state: eqx.nn.State
    scheduler: Scheduler
    sampler: Sampler
    key: PRNGKeyArray
    ends: frozenset[int]
    chunk_size: int
    on_step: Callable[[StepReport], None] | None

    def __post_init__(self) -> None:
        if self.chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1 row; got {self.chunk_size}.")

    def run(self) -> None:
        scheduler = self.scheduler
        while scheduler.waiting or scheduler.running:
            scheduler.admit()
            slot = scheduler.next_prefill()
            if slot is not None:
                self._prefill(slot)
            self._decode()

    def _prefill(self, slot: int) -> None:
        """One chunk of one sequence, padded to the chunk size."""
        scheduler, request = self.scheduler, self.scheduler.running[slot]
        start = request.cached
        chunk = request.known[start : start + self.chunk_size]
        scheduler.extend_prefill(slot, len(chunk))
        tokens = np.zeros(self.chunk_size, np.int32)
        tokens[: len(chunk)] = chunk
        drawn = self._step(scheduler.prefill_batch(slot, len(chunk)), tokens, [len(chunk) - 1], [request])
        # Only the last chunk's row has seen the whole prompt: what the others draw is dropped.
        finished = [slot] if request.cached == len(request.known) else []
        self._finish("prefill", len(chunk), finished, drawn)

    def _decode(self) -> None:
        """One row for every slot; the rows of slots that do not decode are empty."""
        scheduler = self.scheduler
        slots = scheduler.extend_decoding()
        if not slots:
            return
        tokens = np.zeros(scheduler.pool.num_slots, np.int32)
        requests: list[Request | None] = [None] * scheduler.pool.num_slots
        for slot in slots:
            requests[slot] = scheduler.running[slot]
            tokens[slot] = scheduler.running[slot].known[-1]
        drawn = self._step(scheduler.decode_batch(slots), tokens, range(len(requests)), requests)
        self._finish("decode", len(slots), slots, drawn[slots])

    def _step(self, batch: RaggedBatch, tokens: Any, rows: Any, requests: Sequence[Request | None]) -> np.ndarray:
        """Run the model, and draw one token for each of ``requests`` from the logits of its row."""
        pool = self.scheduler.pool
        # A batch that is sound where every key is visible is sound for any layer's mask.
        sizes = {"page_size": pool.page_size, "num_pages": pool.num_pages}
        batch = check_values(batch, **sizes, tokens=len(tokens), mask=Everything())
        draws = np.asarray([(r.index, r.num_generated) if r else (0, 0) for r in requests], np.int32)
        tokens, rows, draws = jnp.asarray(tokens), jnp.asarray(rows, jnp.int32), jnp.asarray(draws)
        drawn, self.state = _model_step((self.model, tokens, batch, rows, draws, self.key, self.sampler), self.state)
        return np.asarray(drawn)

    def _finish(self, kind: Literal["prefill", "decode"], tokens: int, slots: Sequence[int], drawn: np.ndarray) -> None:
        """Add the drawn tokens to the sequences in ``slots``, release those that are done, and report the step."""
        scheduler, in_use = self.scheduler, self.scheduler.pool.pages_in_use
        report = StepReport(kind, tokens, len(slots), int(in_use), len(scheduler.running), len(scheduler.waiting))
        done = []
        for slot, token in zip(slots, drawn[: len(slots)].tolist(), strict=True):
            request = scheduler.running[slot]
            request.known.append(token)
            if token in self.ends or request.num_generated == request.max_new_tokens:
                done.append(slot)
        if done:
            scheduler.release(done)
        if self.on_step is not None:
            self.on_step(report)


# All but the state are one argument, because Equinox donates either every argument or all but the first: the state is
# donated, so that pages are updated in place, and the parameters are not.
@eqx.filter_jit(donate="all-except-first")
def _model_step(inputs: tuple, state: eqx.nn.State) -> tuple[Int[Array, " requests"], eqx.nn.State]:
    """The one step on the device: run the model, and draw a token from the logits of each of ``rows``."""
    model, tokens, batch, rows, draws, key, sampler = inputs
    logits, state = model(tokens, batch, state)
    keys = jax.vmap(lambda draw: jax.random.fold_in(jax.random.fold_in(key, draw[0]), draw[1]))(draws)
    return sample(logits[rows], sampler, keys), state


def _require_key(sampler: Sampler, key: PRNGKeyArray | None) -> PRNGKeyArray:
    if key is None and not sampler.is_greedy:
        raise ValueError(f"key is missing: {sampler} draws at random. Pass key=jax.random.key(seed).")
    return jax.random.key(0) if key is None else key  # a greedy step is traced with a key as well, and ignores it


def _pool_size(state: eqx.nn.State, num_pages: int | None, page_size: int | None) -> tuple[int, int]:
    """The pool's number of pages and page size. All `Pages` in the state must have them: else writes are dropped."""
    leaves = jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Pages))
    held = [(_num_pages(x), x.layout.page_size) for x in leaves if isinstance(x, Pages)]
    if not held and (num_pages is None or page_size is None):
        raise ValueError("The state holds no Pages that would say num_pages and page_size: pass both.")
    num_pages = min(held)[0] if num_pages is None else num_pages
    page_size = held[0][1] if page_size is None else page_size
    for pages, size in held:
        if size != page_size or pages < num_pages:
            raise ValueError(
                f"The pool has num_pages={num_pages} of page_size={page_size} tokens, which every layer's pages must "
                f"hold; the state has a layer with {pages} pages of {size}."
            )
    return num_pages, page_size


def _num_pages(pages: Pages) -> int:
    """How many pages one layer has, also where the pages of layers are stacked on leading axes."""
    shape = pages.layout.array_shapes(-1)[0]
    return pages.arrays[0].shape[pages.arrays[0].ndim - len(shape) + shape.index(-1)]


def _requests(prompts: Sequence[Integers], max_new_tokens: int | Integers) -> list[Request]:
    limits = np.asarray(max_new_tokens)
    limits = np.broadcast_to(limits, len(prompts)) if limits.ndim == 0 else limits
    if len(limits) != len(prompts):
        raise ValueError(
            f"max_new_tokens must be one int, or one for each of {len(prompts)} prompts; got {len(limits)}."
        )
    requests = []
    for index, (prompt, limit) in enumerate(zip(prompts, limits, strict=True)):
        ids = tuple(int(token) for token in prompt)
        if not ids:
            raise ValueError(f"prompts[{index}] is empty, so no token can follow it: begin it with a bos token.")
        if limit < 1:
            raise ValueError(f"max_new_tokens must be at least 1; got {limit} for prompts[{index}].")
        requests.append(Request(index, ids, int(limit), list(ids)))
    return requests


def _table_width(requests: Sequence[Request], num_pages: int, page_size: int, pages_per_seq: int | None) -> int:
    """``pages_per_seq`` or, left out, the least power of two that fits every request, so that few widths compile."""
    most = num_pages if pages_per_seq is None else min(num_pages, pages_per_seq)
    longest = 1
    for request in requests:
        needed = -(-(len(request.prompt) + request.max_new_tokens - 1) // page_size)
        if needed > most:
            raise ValueError(
                f"prompts[{request.index}] can never be served: its {len(request.prompt)} tokens and "
                f"{request.max_new_tokens} new ones need {needed} pages of {page_size} tokens, and a sequence can have "
                f"{most} (num_pages={num_pages}, pages_per_seq={pages_per_seq}). Shorten it, or make the pool larger."
            )
        longest = max(longest, needed)
    return 1 << (longest - 1).bit_length() if pages_per_seq is None else pages_per_seq


def _result(request: Request, ends: frozenset[int]) -> Generation:
    tokens = tuple(request.known[len(request.prompt) :])
    reason = "eos" if tokens[-1] in ends else "length"
    return Generation(request.prompt, tokens, reason, request.preemptions)
