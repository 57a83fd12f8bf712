"""`generate`: serve a batch of unequal prompts by continuous batching, over one page pool."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PRNGKeyArray
from jaxtyping import Integer as AnyInt

from paged.spec import AttentionSpec, as_bool

from ._answering import Answering, Pages, new_queue, rounded
from ._arguments import end_ids, integer, limits_of, prompts_of, values_of_prompts
from ._asked import Asked
from ._groups import Masks, keeps_all
from ._held import GroupSizes
from ._masks import set_cuts
from ._model_call import Model
from ._step_report import StepReport
from .sampling import Sampler
from .serving.served import Served
from .serving.speculation import Speculation

Integer = int | np.integer | AnyInt[Array | np.ndarray, ""]
Integers = Sequence[Integer] | AnyInt[Array | np.ndarray, " _"]
Prompts = Sequence[Integers] | AnyInt[Array | np.ndarray, "prompts tokens"]
FinishReason = Literal["eos", "length", "no_token", "interrupted"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """The result for one prompt.

    * ``prompt``: its token ids.
    * ``tokens``: the generated ids. Where ``finish_reason`` is ``"eos"``, the last one is an ``eos`` token.
    * ``finish_reason``: ``"eos"``; ``"length"`` where ``max_new_tokens`` were drawn; ``"no_token"`` where the logits
      after ``tokens`` held NaN, or nothing but ``-inf``, so that no token could be drawn; ``"interrupted"`` where an
      exception stopped `generate` before the end.
    * ``preemptions``: how often the sequence gave up its pages and was prefilled again.
    """

    prompt: tuple[int, ...]
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    preemptions: int


@dataclasses.dataclass(frozen=True)
class PartialGenerations:
    """What `generate` had when an exception stopped it. It is the exception's attribute ``partial``.

    * ``generations``: one `Generation` per prompt, in order, with the tokens drawn so far.
    * ``state``: with ``donate_state`` the model's state, to be used again. None without, and where the exception
      stopped a step that had consumed the state already.
    """

    generations: list[Generation]
    state: eqx.nn.State | None


# fmt: off
@overload
def generate(
    model: Model, state: eqx.nn.State, prompts: Prompts, *, max_new_tokens: Integer | Integers, num_slots: Integer,
    num_pages: Integer | None = None, page_size: Integer | None = None, pages_per_seq: Integer | None = None,
    chunk_size: Integer = 64, sampler: Sampler | None = None, key: PRNGKeyArray | None = None,
    eos: Integer | Iterable[Integer] | None = None, donate_state: Literal[False] = False,
    on_step: Callable[[StepReport], None] | None = None, values: Mapping[str, Any] | None = None, n: Integer = 1,
    prefix_cache: bool | np.bool_ | None = None, speculation: Speculation | None = None,
) -> list[Generation]: ...
@overload
def generate(
    model: Model, state: eqx.nn.State, prompts: Prompts, *, max_new_tokens: Integer | Integers, num_slots: Integer,
    num_pages: Integer | None = None, page_size: Integer | None = None, pages_per_seq: Integer | None = None,
    chunk_size: Integer = 64, sampler: Sampler | None = None, key: PRNGKeyArray | None = None,
    eos: Integer | Iterable[Integer] | None = None, donate_state: Literal[True],
    on_step: Callable[[StepReport], None] | None = None, values: Mapping[str, Any] | None = None, n: Integer = 1,
    prefix_cache: bool | np.bool_ | None = None, speculation: Speculation | None = None,
) -> tuple[list[Generation], eqx.nn.State]: ...
# fmt: on
def generate(
    model: Model,
    state: eqx.nn.State,
    prompts: Prompts,
    *,
    max_new_tokens: Integer | Integers,
    num_slots: Integer,
    num_pages: Integer | None = None,
    page_size: Integer | None = None,
    pages_per_seq: Integer | None = None,
    chunk_size: Integer = 64,
    sampler: Sampler | None = None,
    key: PRNGKeyArray | None = None,
    eos: Integer | Iterable[Integer] | None = None,
    donate_state: bool | np.bool_ = False,
    on_step: Callable[[StepReport], None] | None = None,
    values: Mapping[str, Any] | None = None,
    n: Integer = 1,
    prefix_cache: bool | np.bool_ | None = None,
    speculation: Speculation | None = None,
) -> list[Generation] | tuple[list[Generation], eqx.nn.State]:
    """Generate from a list of prompts of any lengths, by continuous batching over one page pool.

    It submits all prompts to the serve loop, runs it, and collects what it draws: see `Engine` for requests that come
    at any time. The loop is one program on the device. A step has a row for each sequence that decodes and chunks of
    prompts, so that a long prompt does not hold up the others. When the pool has no page left, the sequence that was
    admitted last gives up its pages, and is prefilled again later. Sizes are rounded up: calls with other prompts,
    samplers and numbers of pages compile nothing anew, as long as block tables have the same width and the number of
    answers the same power of two.

    **Arguments:**

    - `model`: a callable pytree, ``logits, state = model(tokens, batch, state)``, that keeps its `Pages` in the state,
      such as a `LayerStack` of blocks. ``tokens`` is int32[rows], ``logits`` float[rows, vocab]. A model that also has
      the methods ``x, state = model.features(tokens, batch, state)`` and ``model.logits(x)`` is called by them, and
      makes logits of the rows only from which tokens are drawn.
    - `state`: the model's Equinox state.
    - `prompts`: token ids of each prompt, at least one: a list or an array.
    - `max_new_tokens`: the most tokens to generate, one number for all prompts or one for each. The last token is
      never cached, so a prompt needs room for ``len(prompt) + max_new_tokens - 1`` tokens.
    - `num_slots`: how many sequences may run at once; rows of a step in which all decode.
    - `num_pages`: pages of the pool. None: as many as the state's pages have. Layers form groups whose masks keep the
      same pages, and each group has a pool, see `GroupedPool`: with no more pages than its layers have in the state.
    - `page_size`: tokens per page. None: the page size of the state's pages.
    - `pages_per_seq`: width of block tables. None: the least power of two that fits every prompt.
    - `chunk_size`: the most rows of one prompt in a step. A step has so many for prompts, and one for each slot.
    - `sampler`: how tokens are drawn. None: the likeliest.
    - `key`: a typed PRNG key, needed by a sampler that draws at random. A draw depends on the key, the prompt's index
      and the token's index only. So scheduling changes no draw, except by what rounding changes of the logits.
    - `eos`: the token id, or a list or set of several, that ends a sequence. None: only ``max_new_tokens`` ends it.
    - `donate_state`: whether the memory of ``state`` is used for the steps, after which ``state`` is gone, and the new
      state is returned. By default the state is copied, so that there are two caches.
    - `on_step`: called with the `StepReport` of each step, in order. Steps run in launches, of 4 with ``on_step`` and
      of 32 without: it is called when the launch has come back.
    - `values`: numbers of each prompt that the model's specs name by `Value`: for each name [prompts], or
      [prompts, size]. None where they name nothing.
    - `n`: samples of each prompt. A prompt is prefilled once, and its samples share the pages of its tokens: see
      `PagePool.fork`. Draws of other samples than the first depend on the number of the sample and of the prompts too.
    - `prefix_cache`: whether pages are kept when their sequence has ended, for prompts that begin with the same tokens,
      see `PrefixCache`. Such tokens are not prefilled again. A sequence that was preempted finds its own. Kept pages
      are given up when the pool has no others. None: where it changes no result but by rounding, which is where every
      mask of the model is known and shows no token a later one, no number of a request is named by a mask or a score,
      and the state holds nothing but pages. True: raise where that is not so.
    - `speculation`: where drafts of the next tokens come from, `NGramDraft` or `ModelDraft`; None for none. A step
      verifies the drafts of a sequence at once, and draws the same tokens in fewer steps: see `Engine`. The state of a
      `ModelDraft` is copied, so that it can be used again.

    **Returns:** one `Generation` per prompt, in order, or with `n` the samples of the first prompt, then those of the
    second, and so on; no prompts give an empty list. With ``donate_state`` a pair:
    this list, and the state, to be used again. What its pages hold means nothing to another call.

    A pool's tables are sound, and the numbers of prompts are checked before anything runs, so that layers with
    ``check`` do not check them again. Logits from which no token can be drawn end their own sequence, with the finish
    reason ``"no_token"``.

    **Raises** ``ValueError`` or ``TypeError`` before anything runs, naming the argument: for an empty prompt or one
    that could never fit, for a pool that the state's pages cannot hold, for a missing key, for ids of prompts and
    ``eos`` that are no column of the logits, and for a mask that sees ahead where a sequence is cut. A row that sees a
    key of a later chunk or a token generated later would be computed without it. The error says which ``chunk_size``
    suffices. The masks are those of all `PagedAttention`, `PagedCache` and lowered attentions that the model holds; the
    masks of attentions that it finds in global variables are not known.

    An exception of the model or of ``on_step``, and ``KeyboardInterrupt``, are raised as they are. Their attribute
    ``partial`` is a `PartialGenerations`: every token drawn so far.

    >>> class Parrot(eqx.Module):  # the likeliest next token is the token itself
    ...     def __call__(self, tokens, batch, state):
    ...         return jax.nn.one_hot(tokens, 10), state
    >>> model, state = eqx.nn.make_with_state(Parrot)()
    >>> results = generate(model, state, [[1, 2, 3], [4]], max_new_tokens=2, num_slots=2, num_pages=4, page_size=2)
    >>> [result.tokens for result in results]
    [(3, 3), (4, 4)]
    """
    _require_kinds(model, state, on_step)
    sampler, key = _require_sampler(sampler, key)
    num_slots, chunk_size = integer("num_slots", num_slots, 1), integer("chunk_size", chunk_size, 1)
    donate_state, ends = as_bool("donate_state", donate_state), end_ids(eos)
    served = Served.of(model, state, speculation)
    num_slots, specs, groups = served.share("num_slots", num_slots), served.specs, served.groups
    sizes = served.sizes(num_pages, page_size)
    samples = integer("n", n, 1)
    requests = _requests(prompts, max_new_tokens, values, specs, samples)
    pages_per_seq = _table_width(requests, groups, sizes, pages_per_seq, chunk_size)
    set_cuts([spec.visibility for spec in specs], requests, chunk_size)
    pages = _pages(served, sizes, pages_per_seq)
    has_cache = _has_prefix_cache(prefix_cache, served, requests)
    queue = new_queue(requests, pages, num_slots, sampler, key, ends, has_cache, served.shards)
    answering = Answering(served, queue, requests, pages, served.budget(num_slots, chunk_size), speculation, on_step)
    if requests:
        _require_in_vocabulary(requests, ends, answering.vocabulary())
    answering.take_state(is_copied=not donate_state)
    try:
        answering.run()
    except BaseException as error:
        own = answering.state.model_state if donate_state else None
        _attach(error, [_result(request) for request in requests], own)
        raise
    results = [_result(request) for request in requests]
    return (results, answering.state.model_state) if donate_state else results


def _require_kinds(model: Any, state: Any, on_step: Any) -> None:
    if not callable(model):
        raise TypeError(f"model must be callable, logits, state = model(tokens, batch, state); got {model!r}.")
    if not isinstance(state, eqx.nn.State):
        raise TypeError(f"state must be the state of eqx.nn.make_with_state; got {type(state).__name__}.")
    if on_step is not None and not callable(on_step):
        raise TypeError(f"on_step must be callable or None; got {on_step!r}.")


def _require_sampler(sampler: Any, key: Any) -> tuple[Sampler, PRNGKeyArray]:
    if sampler is not None and not isinstance(sampler, Sampler):
        raise TypeError(f"sampler must be one Sampler for all prompts, or None; got {sampler!r}.")
    sampler = Sampler() if sampler is None else sampler
    if key is None:
        if not sampler.is_greedy:
            raise ValueError(f"key is missing: {sampler} draws at random. Pass key=jax.random.key(seed).")
        return sampler, jax.random.key(0)  # a greedy step is traced with a key as well, and ignores it
    if not isinstance(key, jax.Array) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.ndim:
        got = f"{key.dtype} of shape {key.shape}" if isinstance(key, jax.Array) else repr(key)
        raise TypeError(f"key must be one typed PRNG key, such as jax.random.key(0); got {got}.")
    return sampler, key


def _has_prefix_cache(asked: Any, served: Served, requests: Sequence[Asked]) -> bool:
    """Whether a prefix cache is used. ``ValueError`` where it is asked for, and equal tokens may have other pages."""
    if asked is not None and not as_bool("prefix_cache", asked):
        return False
    reason = served.why_not_shared()
    if reason is None and any(request.cuts is not None for request in requests):
        reason = "a mask shows tokens to others before them"
    if asked is not None and reason is not None:
        raise ValueError(f"prefix_cache=True needs pages that depend on the tokens before them alone: {reason}.")
    return reason is None


def _requests(
    prompts: Any, max_new_tokens: Any, values: Any, specs: Sequence[AttentionSpec], samples: int
) -> list[Asked]:
    ids = prompts_of(prompts)
    numbers = values_of_prompts(values, specs, len(ids))
    for index, prompt in enumerate(ids):
        if not prompt:
            raise ValueError(f"prompts[{index}] is empty, so no token can follow it: begin it with a bos token.")
    limits = limits_of(max_new_tokens, len(ids))
    own = [{name: x[i] for name, x in numbers.items()} for i in range(len(ids))]
    pairs = itertools.product(range(len(ids)), range(samples))
    return [
        Asked(i, place, i + sample * len(ids), ids[i], limits[i], own[i]) for place, (i, sample) in enumerate(pairs)
    ]


def _table_width(
    requests: Sequence[Asked], groups: Sequence[Masks], sizes: GroupSizes, pages_per_seq: Any, chunk_size: int
) -> int:
    """``pages_per_seq`` or, left out, the least power of two that fits every request, so that few widths compile."""
    pages_per_seq = None if pages_per_seq is None else integer("pages_per_seq", pages_per_seq, 1)
    longest, page_size = 1, sizes.page_size
    for request in requests:
        entries = -(-request.most_cached // page_size)
        longest = max(longest, entries)
        for masks, num_pages in zip(groups, sizes.num_pages, strict=True):
            needed = request.most_pages(masks, page_size, chunk_size)
            if needed > num_pages or (pages_per_seq is not None and entries > pages_per_seq):
                most = num_pages if pages_per_seq is None else min(num_pages, pages_per_seq)
                needed = entries if keeps_all(masks) or needed <= num_pages else needed
                layers = "" if keeps_all(masks) else f" at once in layers with the mask {masks[0]}"
                raise ValueError(
                    f"prompts[{request.index}] can never be served: its {len(request.prompt)} tokens and "
                    f"{request.max_new_tokens} new ones need {needed} pages of {page_size} tokens{layers}, and a "
                    f"sequence can have {most} (num_pages={num_pages}, pages_per_seq={pages_per_seq}). Shorten it, or "
                    "make the pool larger."
                )
    return rounded(longest) if pages_per_seq is None else pages_per_seq


def _pages(served: Served, sizes: GroupSizes, pages_per_seq: int) -> Pages:
    """Pools that count as many pages as there are, of which as many may be used as ``sizes`` says."""
    if any(sizes.bytes_per_page):
        counted = served.sizes(None, sizes.page_size)
    else:
        counted = sizes._replace(num_pages=tuple(rounded(pages, least=16) for pages in sizes.num_pages))
    return Pages(served.groups, counted, sizes.num_pages, pages_per_seq)


def _require_in_vocabulary(requests: Sequence[Asked], ends: frozenset[int], size: int) -> None:
    named = [(f"prompts[{r.index}][{i}]", token) for r in requests for i, token in enumerate(r.prompt) if token >= size]
    named += [("eos", token) for token in sorted(ends) if token >= size]
    for name, token in named:
        raise ValueError(f"{name} = {token} is no token: the model's logits have {size} columns, for [0, {size}).")


def _result(request: Asked) -> Generation:
    reason = request.finish_reason or "interrupted"
    return Generation(request.prompt, tuple(request.tokens), reason, request.preemptions)


def _attach(error: BaseException, generations: list[Generation], state: eqx.nn.State | None) -> None:
    """Give an exception its ``partial``, also where its class forbids to set attributes."""
    if any(leaf.is_deleted() for leaf in jax.tree.leaves(state) if isinstance(leaf, jax.Array)):
        state = None
    error.__dict__["partial"] = PartialGenerations(generations, state)
    drawn = sum(len(generation.tokens) for generation in generations)
    note = f"generate had drawn {drawn} tokens, which the exception's partial.generations holds."
    error.__dict__.setdefault("__notes__", []).append(note)
