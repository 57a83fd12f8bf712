"""`Engine`: the host's face of the serve loop. Requests go in at any time, tokens come out as events."""

import asyncio
import collections
import dataclasses
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, NamedTuple, overload

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from .._arguments import integer
from ..sampling import Sampler
from .cancelling import cancel, renewed
from .drafting import ModelDraft
from .handles import EngineStats, Event, FinishReason, Handle
from .intake import keys_of_samples, require_key
from .record import StepEvents
from .requests import NewRequest, Reason, Requests
from .reuse import pages_cached
from .setup import Setup
from .speculation import Speculation
from .state import Counts, Queue, ServeState
from .step import serve_many

_NAMES: dict[int, FinishReason] = {
    Reason.EOS: "eos",
    Reason.STOP: "stop",
    Reason.LENGTH: "length",
    Reason.NO_TOKEN: "no_token",
}
# Requests that one upload brings, and rows that one cancellation ends: static, so that neither is traced again.
_AT_ONCE = 8
_COUNTED = ("steps", "decode_steps", "prompt_tokens", "reused_tokens", "new_tokens", "evicted_pages", "copied_pages")
# The most steps of a launch: for so many there is room in what it gives back.
_MOST_STEPS = 64


class _Launch(NamedTuple):
    """What a launch gives back, and whose the rows were when it began."""

    events: StepEvents
    steps: Any
    figures: Any
    handles: dict[int, Handle]


class Engine:
    """Serves requests with a model, over pages, with the whole loop on the device.

    One launch runs many steps. Each admits requests, plans one budget of rows over decoding sequences and chunks of
    prompts, pages, runs the model once, draws tokens and records them. The host uploads requests and reads events:
    those of one launch while the next one runs. It decides nothing that the device can decide.

    * `submit` takes a request at any time, `cancel` ends one, `stream` and ``async for`` give out events.
    * Tokens do not depend on the schedule, but for what rounding changes of logits: not on other requests, chunks,
      preemptions and pages that are found in the prefix cache.
    * Requests are admitted by priority, then by arrival. When pages run out, those that only the prefix cache holds are
      given up; then the sequence that was admitted last gives up its slot, and waits again.

    >>> class Parrot(eqx.Module):  # the likeliest next token is the token itself
    ...     def __call__(self, tokens, batch, state):
    ...         return jax.nn.one_hot(tokens, 10), state
    >>> model, state = eqx.nn.make_with_state(Parrot)()
    >>> engine = Engine(model, state, num_slots=2, max_tokens=8, num_pages=8, page_size=2)
    >>> one, other = engine.submit([1, 2, 3], max_new_tokens=2), engine.submit([4], max_new_tokens=9 - 2, stop=[[4, 4]])
    >>> for event in engine.stream():
    ...     print(event.tokens, event.finish_reason)
    (3, 3) length
    (4, 4) stop
    """

    def __init__(
        self,
        model: Any,
        state: eqx.nn.State,
        *,
        num_slots: int,
        max_tokens: int,
        num_pages: int | None = None,
        page_size: int | None = None,
        chunk_size: int = 64,
        prefix_cache: bool | None = None,
        max_requests: int = 256,
        max_ends: int = 4,
        max_stops: int = 4,
        max_stop_tokens: int = 8,
        max_biases: int = 16,
        steps: int = 16,
        speculation: Speculation | None = None,
        key: PRNGKeyArray | None = None,
    ):
        """**Arguments:**

        - `model`: a callable pytree, ``logits, state = model(tokens, batch, state)``, as `generate` takes it.
        - `state`: the model's state. Its memory is the engine's from now on: do not use it any more.
        - `num_slots`: how many sequences run at once.
        - `max_tokens`: the most tokens of a request, prompt and answer together.
        - `num_pages`, `page_size`: as for `generate`.
        - `chunk_size`: rows of a step for prompts, besides one for each slot. Where masks show tokens to others before
          them, at least as many as tokens of a prompt that may not be cut. There are more where
          all slots' drafts need more.
        - `prefix_cache`: whether pages are kept for later requests that begin with the same tokens. None: where the
          pages depend on nothing else. ``ValueError`` for True where they may.
        - `max_requests`: how many may wait or run on the device; more wait on the host.
        - `max_ends`, `max_stops`, `max_stop_tokens`, `max_biases`: how many ids of ``eos``, stop sequences, tokens of
          one, and logit biases a request may have.
        - `steps`: of one launch, at most 64. Tokens come back when it ends, and requests that come later wait for it.
        - `speculation`: where drafts come from, `NGramDraft` or `ModelDraft`; None for none. A step verifies the drafts
          of a sequence at once, and draws the same tokens in fewer steps. ``ValueError`` for models whose state holds
          more than pages, and for a draft model of other tokens or fewer pages.
        - `key`: a typed PRNG key. A request without a key of its own draws by this one and its number.

        Raises ``ValueError`` or ``TypeError`` that names the argument.
        """
        sizes = {"tokens": max_tokens, "requests": max_requests, "ends": max_ends, "stops": max_stops}
        sizes |= {"stop_tokens": max_stop_tokens, "biases": max_biases}
        self._intake, queue, self._budget, self._minima = Setup.of(
            model, state, {name: integer(f"max_{name}", n, 1) for name, n in sizes.items()},
            num_slots=num_slots, chunk_size=chunk_size, num_pages=num_pages, page_size=page_size,
            prefix_cache=prefix_cache, speculation=speculation,
        )  # fmt: skip
        self._model, self._state, self._speculation = model, ServeState(queue, state), speculation
        if isinstance(speculation, ModelDraft):
            self._state = ServeState(queue, state, speculation.state)
            self._speculation = speculation.without_state
        self._steps = integer("steps", steps, 1)
        if self._steps > _MOST_STEPS:
            raise ValueError(f"steps must be at most {_MOST_STEPS}; got {steps}.")
        self._key = require_key(jax.random.key(0) if key is None else key)
        self._handles: dict[int, Handle] = {}  # by row
        self._free = collections.deque(range(self._intake.sizes.requests))
        self._pending: collections.deque[tuple[Handle, NewRequest]] = collections.deque()
        self._ended: list[Handle] = []  # by the host, and not told yet
        self._in_flight: collections.deque[_Launch] = collections.deque()
        self._outbox: collections.deque[Event] = collections.deque()
        self._submitted = self._launches = self._done = self._drafted = self._accepted = 0
        self._figures: Any = (Counts.zero(), 0, 0)
        self._seconds_to_first, self._seconds_after = [], []

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs, and every event has been given out."""
        return not (self._handles or self._pending or self._in_flight or self._ended or self._outbox)

    # fmt: off
    @overload
    def submit(
        self, prompt: Any, max_new_tokens: Any = 64, *, n: None = None, sampler: Sampler | None = None, key: Any = None,
        eos: Any = None, stop: Sequence[Any] = (), priority: int = 0, salt: int = 0,
        deadline: float | None = None, values: Any = None,
    ) -> Handle: ...
    @overload
    def submit(
        self, prompt: Any, max_new_tokens: Any = 64, *, n: int, sampler: Sampler | None = None, key: Any = None,
        eos: Any = None, stop: Sequence[Any] = (), priority: int = 0, salt: int = 0,
        deadline: float | None = None, values: Any = None,
    ) -> list[Handle]: ...
    # fmt: on
    def submit(
        self, prompt: Any, max_new_tokens: Any = 64, *, n: int | None = None, sampler: Sampler | None = None,
        key: Any = None, eos: Any = None, stop: Sequence[Any] = (), priority: int = 0, salt: int = 0,
        deadline: float | None = None, values: Any = None,
    ) -> Handle | list[Handle]:  # fmt: skip
        """Take a request, at any time. It runs while events are asked for.

        **Arguments:**

        - `prompt`: its token ids.
        - `max_new_tokens`: the most tokens to draw.
        - `n`: how many samples of the prompt. It is computed once: they share its pages. Each sample is a request,
          with a handle of its own.
        - `sampler`: how they are drawn. None: the likeliest.
        - `key`: a typed PRNG key. Draws depend on it and on the token's number only. None: the engine's key and the
          number of the request. With `n`, sample ``i`` draws by ``fold_in(key, i)``; or `key` is ``n`` keys, one each.
        - `eos`: the token id, or a list or set of several, that ends the answer.
        - `stop`: sequences of token ids that end it. They must lie in the answer, of which they are part.
        - `priority`: requests of larger ones are admitted first.
        - `salt`: pages of equal tokens are shared only between requests of one salt, such as a tenant's number.
        - `deadline`: seconds from now, after which the request is ended.
        - `values`: the numbers that the model's specs name by `Value`, one for each name, or [size].

        **Returns:** the handle; with `n` a list of ``n`` handles. Raises ``ValueError`` or ``TypeError`` that names the
        argument, for a request that could never fit too; other requests go on.
        """
        key = jax.random.fold_in(self._key, self._submitted) if key is None else key
        keys = keys_of_samples(key, n)
        how: dict[str, Any] = {"sampler": sampler, "key": keys[0], "eos": eos, "stop": stop}
        how |= {"priority": priority, "salt": salt}
        new = self._intake.checked(prompt, max_new_tokens, **how, arrival=self._submitted, values=values)
        now, family = time.monotonic(), self._submitted if len(keys) > 1 else -1
        deadline = None if deadline is None else now + deadline
        handles = [Handle(new.prompt, sample=i, deadline=deadline, submitted=now) for i in range(len(keys))]
        for handle, key in zip(handles, keys, strict=True):
            own = dataclasses.replace(new, key=key, arrival=self._submitted, family=family)
            self._pending.append((handle, own))
            self._submitted += 1
        return handles[0] if n is None else handles

    def cancel(self, handle: Handle) -> None:
        """End a request, wherever it is. Its last event says so."""
        self._end(handle, "cancelled")

    def update_model(self, model: Any) -> None:
        """Serve with other weights from the next launch on: of the same structure, shapes and dtypes.

        Pages of the weights before are not used again: sequences that run are prefilled again, with their tokens.
        """
        old, new = (jax.tree.map(_kind, m) for m in (self._model, model))
        if not eqx.tree_equal(old, new):
            raise ValueError("update_model needs a model of the same structure, shapes and dtypes as the engine's.")
        self._model = model
        self._set_queue(_renewed(self._state.queue))

    def stats(self) -> EngineStats:
        """Figures up to now, or while a launch runs, up to the latest one that has come back."""
        if not self._in_flight:
            self._figures = jax.device_get(_figures(self._state.queue))
        counts, in_use, cached = self._figures
        mean = lambda values: sum(values) / len(values) if values else None
        running = sum(handle.first_token is not None for handle in self._handles.values())
        return EngineStats(
            **{name: int(getattr(counts, name)) for name in _COUNTED},
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            launches=self._launches,
            submitted=self._submitted,
            running=running,
            waiting=len(self._pending) + len(self._handles) - running,
            done=self._done,
            preemptions=int(counts.preempted),
            pages=int(np.sum(self._state.queue.pool.num_pages)),
            pages_in_use=int(np.sum(in_use)),
            pages_cached=int(np.sum(cached)),
            seconds_to_first_token=mean(self._seconds_to_first),
            seconds_per_token=mean(self._seconds_after),
        )

    def stream(self) -> Iterator[Event]:
        """Run until nothing is left to do, and give out events as they come. Requests may be submitted meanwhile.

        Whoever stops reading loses nothing: the next stream goes on where this one was left.
        """
        while not self.is_idle:
            if not self._outbox:
                self._advance()
            while self._outbox:
                yield self._outbox.popleft()

    async def __aiter__(self) -> AsyncIterator[Event]:
        """`stream` that lets other tasks run while the device works."""
        while not self.is_idle:
            if not self._outbox:
                await asyncio.to_thread(self._advance)
            while self._outbox:
                yield self._outbox.popleft()

    def _advance(self) -> None:
        """Launch what there is to do, and take in what came back from the launch before."""
        self._end_late()
        self._cancel_ended()
        is_working = bool(self._handles or self._pending)
        if is_working:
            self._launch()
        if self._in_flight and (len(self._in_flight) > 1 or not is_working):
            self._collect()

    def _launch(self) -> None:
        self._upload()
        inputs = self._model, jnp.asarray(self._steps, jnp.int32), self._budget, self._minima, self._speculation
        self._state, *told = _serve(inputs, self._state)
        self._launches += 1
        self._in_flight.append(_Launch(*told, handles=dict(self._handles)))

    def _upload(self) -> None:
        while self._pending and self._free:
            rows, new = np.full(_AT_ONCE, self._intake.sizes.requests, np.int32), []
            while self._pending and self._free and len(new) < _AT_ONCE:
                handle, request = self._pending.popleft()
                handle.row = rows[len(new)] = self._free.popleft()
                self._handles[handle.row] = handle
                new.append(request)
            new += [new[-1]] * (_AT_ONCE - len(new))
            table = Requests.of(new, self._intake.sizes)
            self._set_queue(_put((jnp.asarray(rows), table), self._state.queue))

    def _set_queue(self, queue: Queue) -> None:
        self._state = dataclasses.replace(self._state, queue=queue)

    def _end(self, handle: Handle, reason: FinishReason) -> None:
        if not handle.is_done:
            handle.finish_reason, handle.finished = reason, time.monotonic()
            self._ended.append(handle)

    def _end_late(self) -> None:
        now = time.monotonic()
        for handle in [*self._handles.values(), *(handle for handle, _ in self._pending)]:
            if handle.deadline is not None and handle.deadline < now:
                self._end(handle, "deadline")

    def _cancel_ended(self) -> None:
        self._pending = collections.deque(pair for pair in self._pending if not pair[0].is_done)
        rows = [handle.row for handle in self._ended if handle.row >= 0]
        for first in range(0, len(rows), _AT_ONCE):
            some = rows[first : first + _AT_ONCE]
            self._set_queue(_cancel(jnp.asarray(some + [-1] * (_AT_ONCE - len(some)), jnp.int32), self._state.queue))
        for row in rows:
            del self._handles[row]
            self._free.append(row)
        self._done += len(self._ended)
        self._outbox += [Event(handle, (), handle.finish_reason) for handle in self._ended]
        self._ended.clear()

    def _collect(self) -> None:
        """The events of the oldest launch: one read of the device."""
        launch = self._in_flight.popleft()
        events, steps, self._figures = jax.device_get(launch[:-1])
        tokens: dict[int, list[int]] = {}
        reasons: dict[int, FinishReason] = {}
        for step, slot in np.argwhere(events.request[: int(steps)] >= 0):
            row, count, reason = (int(x[step, slot]) for x in (events.request, events.count, events.reason))
            tokens.setdefault(row, []).extend(events.token[step, slot, :count].tolist())
            if events.drafted is not None:
                self._count_drafts(launch.handles[row], int(events.drafted[step, slot]), max(count - 1, 0))
            if reason != Reason.NONE:
                reasons[row] = _NAMES[reason]
        for row, own in tokens.items():
            self._record(launch.handles[row], own, reasons.get(row))

    def _count_drafts(self, handle: Handle, drafted: int, accepted: int) -> None:
        handle.drafted, handle.accepted = handle.drafted + drafted, handle.accepted + accepted
        self._drafted, self._accepted = self._drafted + drafted, self._accepted + accepted

    def _record(self, handle: Handle, tokens: list[int], reason: FinishReason | None) -> None:
        if handle.is_done:  # ended by the host meanwhile
            return
        now = time.monotonic()
        if handle.first_token is None and tokens:
            handle.first_token = now
            self._seconds_to_first.append(now - handle.submitted)
        handle.tokens += tokens
        if reason is not None:
            handle.finish_reason, handle.finished = reason, now
            if len(handle.tokens) > 1 and handle.first_token is not None:
                self._seconds_after.append((now - handle.first_token) / (len(handle.tokens) - 1))
            self._done += 1
            del self._handles[handle.row]
            self._free.append(handle.row)
        self._outbox.append(Event(handle, tuple(tokens), reason))


def _kind(x: Any) -> Any:
    return (x.shape, str(x.dtype)) if eqx.is_array(x) else x


@eqx.filter_jit(donate="all-except-first")
def _serve(inputs: tuple, state: ServeState) -> tuple:
    model, limit, *facts = inputs
    how = dict(zip(("budget", "minima", "speculation"), facts, strict=True))
    state, events, done = serve_many(model, state, _MOST_STEPS, limit, **how)
    return state, events, done, _figures(state.queue)


@eqx.filter_jit
def _figures(queue: Queue) -> tuple:
    return queue.counts, queue.pool.pages_in_use, pages_cached(queue)


@eqx.filter_jit(donate="all-except-first")
def _put(new: tuple, queue: Queue) -> Queue:
    return queue.replace(requests=queue.requests.put(*new))


@eqx.filter_jit(donate="all")
def _renewed(queue: Queue) -> Queue:
    return renewed(queue)


@eqx.filter_jit(donate="all-except-first")
def _cancel(rows: Any, queue: Queue) -> Queue:
    return cancel(queue, rows)
