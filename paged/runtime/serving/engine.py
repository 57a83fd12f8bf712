"""`Engine`: the host's face of the serve loop. Requests go in at any time, tokens come out as events."""

import asyncio
import collections
import dataclasses
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any, overload

import equinox as eqx
import jax
from jaxtyping import PRNGKeyArray

from .._arguments import integer
from ..sampling import Sampler
from .answers import Answer, answers_of, rest, take, tell_prompts
from .device import Device
from .drafting import ModelDraft
from .handles import Event, FinishReason, Handle
from .intake import is_alike, keys_of_samples, require_key
from .programs import AT_ONCE, MOST_STEPS
from .records import Recorder, StepRecord
from .requests import NewRequest
from .rows import Rows
from .samples import samples_of
from .setup import Setup
from .speculation import Speculation
from .stats import EngineStats, Times
from .texts import decoder_of


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
        steps: int = 32,
        speculation: Speculation | None = None,
        tokenizer: Any = None,
        record: bool = False,
        log_probs: int | None = None,
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
        - `steps`: of one launch, at most 64. Tokens come back when it ends, and requests that come later wait for it. A
          launch that draws the first token of a request ends with it, or if that is later, after an eighth of the
          steps.
        - `speculation`: where drafts come from, `NGramDraft` or `ModelDraft`; None for none. A step verifies the drafts
          of a sequence at once, and draws the same tokens in fewer steps. ``ValueError`` for models whose state holds
          more than pages, and for a draft model of other tokens or fewer pages.
        - `tokenizer`: the model's, with ``encode(text)`` and ``decode(ids)``, such as a `Tokenizer`. With one, prompts
          and stops may be strings, events bring text, and its ``eos_ids``, if it has such, end answers.
        - `record`: whether `records` keeps what each step did, for `paged.pictures`. Each step then counts pages too.
        - `log_probs`: of how many of the likeliest tokens requests may ask for log-probabilities, from 0. None: they
          may ask for none, and a step does nothing for it.
        - `key`: a typed PRNG key. A request without a key of its own draws by this one and its number.

        Raises ``ValueError`` or ``TypeError`` that names the argument.
        """
        sizes = {"tokens": max_tokens, "requests": max_requests, "ends": max_ends, "stops": max_stops}
        sizes |= {"stop_tokens": max_stop_tokens, "biases": max_biases}
        steps, own_key = integer("steps", steps, 1), require_key(jax.random.key(0) if key is None else key)
        if steps > MOST_STEPS:
            raise ValueError(f"steps must be at most {MOST_STEPS}; got {steps}.")
        self._decode = None if tokenizer is None else decoder_of(tokenizer)
        intake, new_queue, *facts = Setup.of(
            model, state, {name: integer(f"max_{name}", n, 1) for name, n in sizes.items()},
            num_slots=num_slots, chunk_size=chunk_size, num_pages=num_pages, page_size=page_size,
            prefix_cache=prefix_cache, speculation=speculation, log_probs=log_probs,
        )  # fmt: skip
        if log_probs is not None and integer("log_probs", log_probs, 0) > intake.vocab:
            raise ValueError(f"log_probs must be at most {intake.vocab}, the tokens of the model; got {log_probs}.")
        self._intake = dataclasses.replace(intake, tokenizer=tokenizer, log_probs=log_probs)
        states = state, None
        if isinstance(speculation, ModelDraft):
            states, speculation = (state, speculation.state), speculation.without_state
        self._key, facts = own_key, (*facts, speculation, record, log_probs)
        self._device = Device(model, new_queue, states, facts, intake.sizes, steps, own_key)
        self._recorder = Recorder(self._device.pages) if record else None
        self._new_models, self._speculation = None, speculation
        self._handles: dict[int, Handle] = {}  # by row
        self._requests: dict[int, NewRequest] = {}  # those of the handles
        shards = self._device.num_rows // intake.sizes.requests
        self._rows = Rows(intake.sizes.requests, integer("num_slots", num_slots) // shards, shards)
        self._pending: collections.deque[tuple[Handle, NewRequest]] = collections.deque()
        self._ended: collections.deque[Handle] = collections.deque()  # by the host, and not told yet
        self._stopped: list[int] = []  # rows with which the host is done, and the device is not
        self._outbox: collections.deque[Event] = collections.deque()
        self._submitted = self._done = self._drafted = self._accepted = 0
        self._times, self._compile_seconds = Times(), None
        self._lock = threading.Lock()

    @property
    def records(self) -> list[StepRecord]:
        """A record of each step that has come back, for `paged.pictures`. ``ValueError`` unless ``record=True``."""
        if self._recorder is None:
            raise ValueError("The engine keeps no records: make it with Engine(..., record=True).")
        return self._recorder.records

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs, and every event has been given out."""
        return not (self._handles or self._pending or self._device.in_flight or self._ended or self._outbox)

    # fmt: off
    @overload
    def submit(
        self, prompt: Any, max_new_tokens: Any = 64, *, n: None = None, sampler: Sampler | None = None, key: Any = None,
        eos: Any = None, stop: Sequence[Any] = (), priority: int = 0, salt: int = 0,
        deadline: float | None = None, values: Any = None, log_probs: int | None = None,
        prompt_log_probs: bool = False,
    ) -> Handle: ...
    @overload
    def submit(
        self, prompt: Any, max_new_tokens: Any = 64, *, n: int, sampler: Sampler | None = None, key: Any = None,
        eos: Any = None, stop: Sequence[Any] = (), priority: int = 0, salt: int = 0,
        deadline: float | None = None, values: Any = None, log_probs: int | None = None,
        prompt_log_probs: bool = False,
    ) -> list[Handle]: ...
    # fmt: on
    def submit(
        self, prompt: Any, max_new_tokens: Any = 64, *, n: int | None = None, sampler: Sampler | None = None,
        key: Any = None, eos: Any = None, stop: Sequence[Any] = (), priority: int = 0, salt: int = 0,
        deadline: float | None = None, values: Any = None, log_probs: int | None = None,
        prompt_log_probs: bool = False,
    ) -> Handle | list[Handle]:  # fmt: skip
        """Take a request, at any time. It runs while events are asked for.

        **Arguments:**

        - `prompt`: its token ids, or text where the engine has a tokenizer.
        - `max_new_tokens`: the most tokens to draw.
        - `n`: how many samples of the prompt. It is computed once: they share its pages. Each sample is a request,
          with a handle of its own.
        - `sampler`: how they are drawn. None: the likeliest.
        - `key`: a typed PRNG key. Draws depend on it and on the token's number only. None: the engine's key and the
          number of the request. With `n`, sample ``i`` draws by ``fold_in(key, i)``; or `key` is ``n`` keys, one each.
        - `eos`: the token id, or a list or set of several, that ends the answer. None: the tokenizer's, if any.
        - `stop`: what ends it: sequences of token ids, which are part of it, and strings, before which its text ends.
          Both must lie in the answer.
        - `priority`: requests of larger ones are admitted first.
        - `salt`: pages of equal tokens are shared only between requests of one salt, such as a tenant's number.
        - `deadline`: seconds from now, after which the request is ended.
        - `values`: the numbers that the model's specs name by `Value`, one for each name, or [size].
        - `log_probs`: of how many of the likeliest tokens log-probabilities come with each token's own; None for none.
          They are the model's, before the sampler changes logits.
        - `prompt_log_probs`: whether the handle gets those of the prompt's tokens. All of the prompt is computed then:
          nothing of it is looked for in the prefix cache. With `n` all handles have the list of the first sample.

        **Returns:** the handle; with `n` a list of ``n`` handles. Raises ``ValueError`` or ``TypeError`` that names the
        argument, for a request that could never fit too; other requests go on.
        """
        keys = keys_of_samples(key, n, self._key)
        how: dict[str, Any] = {"sampler": sampler, "eos": eos, "stop": stop, "priority": priority, "salt": salt}
        how |= {"log_probs": log_probs, "prompt_log_probs": prompt_log_probs}
        new, strings = self._intake.checked(prompt, max_new_tokens, **how, values=values)
        now, folds_samples = time.monotonic(), n is not None and getattr(key, "ndim", 0) == 0
        times = {"submitted": now, "deadline": None if deadline is None else now + deadline}
        pairs = samples_of(new, strings, keys, folds_samples, prompt_log_probs, self._submitted, self._decode, **times)
        self._pending.extend(pairs)
        self._submitted += len(pairs)
        return pairs[0][0] if n is None else [handle for handle, _ in pairs]

    def cancel(self, handle: Handle) -> None:
        """End a request, wherever it is. Its last event says so."""
        self._end(handle, "cancelled")

    def update_model(self, model: Any, draft_model: Any = None) -> None:
        """Serve with other weights from the next launch on: of the same structure, shapes and dtypes.

        Pages of the weights before are not used again: sequences that run are prefilled again, with their tokens.

        **Arguments:**

        - `model`: the served model.
        - `draft_model`: of a `ModelDraft`; None for the one that there is.

        Raises ``ValueError`` for models of another structure, and for a draft model where there is none.
        """
        pairs = {"model": (self._device.model, model)}
        if draft_model is not None:
            if not isinstance(self._speculation, ModelDraft):
                raise ValueError("draft_model is for an engine whose speculation is a ModelDraft.")
            pairs["draft_model"] = (self._speculation.model, draft_model)
        for name, both in pairs.items():
            if not is_alike(*both):
                raise ValueError(f"update_model needs a {name} of the same structure, shapes and dtypes as before.")
        self._new_models = model, draft_model

    def warmup(self, *, progress: bool = True) -> float:
        """Compile all that the engine runs, so that the first request does not wait for it.

        **Arguments:**

        - `progress`: whether a bar shows how far it is, where tqdm is installed.

        **Returns:** the seconds that it took. ``stats`` tells them too.
        """
        with self._lock:
            self._restore()
            self._compile_seconds = self._device.warm_up(self._handles, progress=progress)
            while self._device.in_flight:
                self._collect()
        return self._compile_seconds

    def stats(self) -> EngineStats:
        """Figures up to now, or while a launch runs, up to the latest one that has come back."""
        device, running = self._device, sum(handle.first_token is not None for handle in [*self._handles.values()])
        return EngineStats.of(
            *device.figures(),
            self._times,
            drafted_tokens=self._drafted,
            accepted_tokens=self._accepted,
            launches=device.launches,
            submitted=self._submitted,
            running=running,
            waiting=len(self._pending) + len(self._handles) - running,
            done=self._done,
            pages=sum(device.pages),
            compile_seconds=self._compile_seconds,
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
        with self._lock:
            self._restore()
            if self._device.is_told_first:
                return self._collect()
            if self._new_models is not None:
                self._device.renew(*self._new_models)
                self._new_models = None
            self._end_late()
            self._tell_ended()
            is_working = bool(self._handles or self._pending)
            if is_working:
                self._upload()
                self._device.launch(self._handles)
            if self._device.in_flight and (len(self._device.in_flight) > 1 or not is_working):
                self._collect()

    def _restore(self) -> None:
        """Go on with new pages, if an exception has cost the state: the host knows the tokens of what runs."""
        if not self._device.is_lost:
            return
        while self._device.in_flight:  # launches before the one that failed
            try:
                self._collect()
            except Exception:  # was raised once
                break
        new = [(row, self._requests[row]) for row, handle in self._handles.items() if not handle.is_done]
        self._device.begin_again(
            [(row, dataclasses.replace(one, drawn=tuple(self._handles[row].tokens))) for row, one in new]
        )

    def _upload(self) -> None:
        while some := [self._pending[i] for i in range(min(len(self._pending), AT_ONCE))]:
            rows = self._rows.take(new.family for _, new in some)
            if not rows:
                break
            try:
                self._device.put(rows, [new for _, new in some[: len(rows)]])
            except BaseException:
                self._rows.give_back(rows)
                raise
            for (handle, new), row in zip(some, rows, strict=False):
                self._pending.popleft()
                handle.row = row
                self._handles[row], self._requests[row] = handle, new

    def _end(self, handle: Handle, reason: FinishReason) -> None:
        if not handle.is_done:
            handle.finish_reason, handle.finished = reason, time.monotonic()
            self._ended.append(handle)

    def _end_late(self) -> None:
        now = time.monotonic()
        for handle in [*self._handles.values(), *(handle for handle, _ in list(self._pending))]:
            if handle.deadline is not None and handle.deadline < now:
                self._end(handle, "deadline")

    def _tell_ended(self) -> None:
        """Tell of requests that the host has ended, and let the device know of those that it still has."""
        for _ in range(len(self._pending)):  # others may submit meanwhile
            handle, new = self._pending.popleft()
            if not handle.is_done:
                self._pending.append((handle, new))
        while self._ended:
            handle = self._ended.popleft()
            self._stopped += [handle.row] if handle.row >= 0 else []
            text = rest(handle.reader)
            handle.text += text
            self._done += 1
            self._outbox.append(Event(handle, (), handle.finish_reason, text))
        if self._stopped:
            self._device.end(self._stopped)
            for row in self._stopped:
                self._let_go(row)
            self._stopped.clear()

    def _let_go(self, row: int) -> None:
        del self._handles[row], self._requests[row]
        self._rows.give_back([row])

    def _collect(self) -> None:
        """The events of the oldest launch."""
        events, steps, handles = self._device.collect()
        if self._recorder is not None:
            self._recorder.add(events, steps, {row: (one, row) for row, one in handles.items()})
        now = time.monotonic()
        tell_prompts(events, steps, handles)
        for row, answer in answers_of(events, steps).items():
            if not handles[row].is_done:  # else ended by the host meanwhile
                self._take(handles[row], answer, now)

    def _take(self, handle: Handle, answer: Answer, now: float) -> None:
        is_first, event = handle.first_token is None, take(handle, answer, now)
        self._drafted, self._accepted = self._drafted + answer.drafted, self._accepted + answer.accepted
        if is_first and handle.first_token is not None:
            self._times.first.append(now - handle.submitted)
        if handle.is_done:
            if len(handle.tokens) > 1 and handle.first_token is not None:
                self._times.after.append((now - handle.first_token) / (len(handle.tokens) - 1))
            self._done += 1
            if answer.reason is None:
                self._stopped.append(handle.row)
            else:
                self._let_go(handle.row)
        self._outbox.append(event)
