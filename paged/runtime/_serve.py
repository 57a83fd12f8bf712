"""The loop of one `generate`: the scheduler decides, the device computes, drawn tokens go back."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PRNGKeyArray

from paged.lower import check_values
from paged.spec import Everything, GroupedBatch, Minimum

from ._groups import GroupUsage, Masks, mask_of, names_of
from ._model_call import Model, apply, logits_of_rows, vocabulary_of
from ._pool_steps import counts_of
from ._scheduler import Batch, Request, Scheduler
from .grouped_pool import GroupedPool, pages_trimmed
from .sampling import Sampler, sample, tokens_from


@dataclasses.dataclass(frozen=True)
class StepReport:
    """One step of the model, as ``on_step`` sees it.

    * ``kind``: ``"prefill"``, a chunk of one sequence, or ``"decode"``, one row for each decoding sequence.
    * ``tokens``: how many tokens the step put into pages.
    * ``new_tokens``: how many generated tokens it added to sequences.
    * ``pages_in_use``: the pages of sequences while it ran, in the group of layers that has most of them.
    * ``running``, ``waiting``: running sequences and waiting ones while it ran.
    * ``drawn``: the tokens that it added to sequences, by the place of their result: the index of their prompt, where
      each has one sample. So text can be shown as it comes.
    * ``ended``: the places of the results whose sequences it ended.
    * ``pages_freed``: pages that masks hide from every later query of their sequence, which gave them up before it, in
      all groups. The prefix cache may keep them.
    * ``groups``: what each group of layers holds, see `GroupUsage`.
    * ``tokens_reused``: tokens of sequences that were found in the prefix cache since the last report, and that no step
      computes.
    * ``pages_shared``: pages that several sequences held while it ran, in all groups.
    * ``pages_copied``: pages that it copied because several held them.
    * ``pages_cached``, ``pages_evicted``: pages that only the prefix cache held while it ran, and those that the cache
      gave up since the last report, in all groups.
    """

    kind: Literal["prefill", "decode"]
    tokens: int
    new_tokens: int
    pages_in_use: int
    running: int
    waiting: int
    drawn: Mapping[int, tuple[int, ...]]
    ended: tuple[int, ...]
    pages_freed: int = 0
    groups: tuple[GroupUsage, ...] = ()
    tokens_reused: int = 0
    pages_shared: int = 0
    pages_copied: int = 0
    pages_cached: int = 0
    pages_evicted: int = 0


@dataclasses.dataclass
class Serve:
    """What the loop holds. ``run`` ends when every request has a finish reason."""

    model: Model
    state: eqx.nn.State
    scheduler: Scheduler
    sampler: Sampler
    key: PRNGKeyArray
    ends: frozenset[int]
    chunk_size: int
    minima: tuple[Minimum, ...]
    longest: int  # tokens of a sequence
    groups: tuple[Masks, ...]
    bytes_per_page: tuple[int, ...]
    on_step: Callable[[StepReport], None] | None
    num_samples: int = 1  # of each prompt

    def vocabulary_size(self) -> int:
        """How many columns the logits have. The model is traced for it, for the prefill step, and nothing runs."""
        tokens = np.zeros(self.chunk_size, np.int32)
        batch = self._checked(self.scheduler.prefill_batch(0, 1), tokens)
        return vocabulary_of(self.model, jnp.asarray(tokens), batch, self.state)

    def run(self) -> None:
        scheduler = self.scheduler
        while scheduler.waiting or scheduler.running:
            scheduler.admit()
            slot = scheduler.next_prefill()
            if slot is not None:
                self._prefill(slot)
            self._decode()

    def _prefill(self, slot: int) -> None:
        """One chunk of one sequence, padded to the chunk size. After the last one all samples of the prompt begin."""
        scheduler, request = self.scheduler, self.scheduler.running[slot]
        scheduler.begin_prefill(slot)
        start = request.cached
        chunk = request.known[start : start + request.chunk_after_cached(self.chunk_size)]
        if not scheduler.extend_prefill(slot, len(chunk)):
            return
        tokens = np.zeros(self.chunk_size, np.int32)
        tokens[: len(chunk)] = chunk
        requests = [request, *request.followers, *[None] * (self.num_samples - 1 - len(request.followers))]
        batch = scheduler.prefill_batch(slot, len(chunk))
        drawn = self._step(batch, tokens, [len(chunk) - 1] * self.num_samples, requests)
        # Only the last chunk's row has seen the whole prompt: what the others draw is dropped.
        finished, followers = ([slot], request.followers) if request.cached == len(request.known) else ([], [])
        request.followers = [] if finished else request.followers
        scheduler.keep(slot)
        self._finish("prefill", len(chunk), finished, drawn, batch, followers)

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
        batch = scheduler.decode_batch(slots)
        drawn = self._step(batch, tokens, range(len(requests)), requests)
        self._finish("decode", len(slots), slots, drawn[slots], batch)

    def _step(self, batch: Batch, tokens: np.ndarray, rows: Any, requests: Sequence[Request | None]) -> Any:
        """Run the model, and draw one token for each of ``requests`` from the logits of its row."""
        batch = self._checked(batch, tokens)
        draws = np.asarray([(r.draw, r.num_generated) if r else (0, 0) for r in requests], np.int32)
        arrays = jnp.asarray(tokens), batch, jnp.asarray(rows, jnp.int32), jnp.asarray(draws), self._history(requests)
        drawn, self.state = _model_step((self.model, *arrays, self.key, self.sampler), self.state)
        return np.asarray(drawn)

    def _history(self, requests: Sequence[Request | None]) -> tuple[np.ndarray, np.ndarray] | None:
        """For penalties: the known tokens of each request, -1 past them, and how many are of its prompt."""
        if not self.sampler.needs_history:
            return None
        known, of_prompt = np.full((len(requests), self.longest), -1, np.int32), np.zeros(len(requests), np.int32)
        for row, request in enumerate(requests):
            if request is not None:
                known[row, : len(request.known)], of_prompt[row] = request.known, len(request.prompt)
        return known, of_prompt

    def _checked(self, batch: Batch, tokens: np.ndarray) -> Batch:
        """A batch that is sound for all that a group's masks show is sound for its layers, with the layers' numbers."""
        pool, sizes = self.scheduler.pool, {"tokens": len(tokens), "minima": self.minima}
        if not isinstance(pool, GroupedPool) or not isinstance(batch, GroupedBatch):
            facts: Any = {"page_size": pool.page_size, "num_pages": pool.num_pages, "mask": Everything()}
            return check_values(batch, **facts, **sizes)  # pyright: ignore
        checked = [
            check_values(own, page_size=pool.page_size, num_pages=num_pages, mask=mask_of(masks), **sizes)
            for own, num_pages, masks in zip(batch.batches, pool.num_pages, batch.masks, strict=True)
        ]
        return GroupedBatch(checked, batch.masks)

    def _finish(
        self,
        kind: Literal["prefill", "decode"],
        tokens: int,
        slots: Sequence[int],
        drawn: np.ndarray,
        batch: Batch,
        followers: Sequence[Request] = (),
    ) -> None:
        """Add the drawn tokens to the sequences in ``slots``, release those that are done, and report the step.

        ``followers`` are other samples of the one sequence, with the tokens that were drawn after its own.
        """
        scheduler = self.scheduler
        report = None if self.on_step is None else self._report(kind, tokens, batch)
        new: dict[int, tuple[int, ...]] = {}
        requests = [*(scheduler.running[slot] for slot in slots), *followers]
        for request, token in zip(requests, drawn[: len(requests)].tolist(), strict=True):
            if token < 0:
                request.finish_reason = "no_token"
            else:
                request.known.append(token)
                new[request.place] = (token,)
                is_last = request.num_generated == request.max_new_tokens
                request.finish_reason = "eos" if token in self.ends else "length" if is_last else None
        # Before its slot is released: samples that go on have the tokens of their prompt from there.
        going_on = [request for request in followers if request.finish_reason is None]
        if going_on:
            scheduler.fork(slots[0], going_on)
        done = [slot for slot in slots if scheduler.running[slot].finish_reason is not None]
        if done:
            scheduler.release(done)
        if self.on_step is not None and report is not None:
            ended = tuple(request.place for request in requests if request.finish_reason is not None)
            self.on_step(dataclasses.replace(report, new_tokens=len(new), drawn=new, ended=ended))

    def _report(self, kind: Literal["prefill", "decode"], tokens: int, batch: Batch) -> StepReport:
        """The report of a step, without what was drawn. Pages are counted as they were while it ran."""
        scheduler = self.scheduler
        pool = scheduler.pool
        pools = pool.pools if isinstance(pool, GroupedPool) else (pool,)
        held, shared, cached, trimmed = np.asarray(_counts(pool, scheduler.cache))
        pairs = zip(pools, self.groups, held, trimmed, self.bytes_per_page, strict=True)
        groups = tuple(
            GroupUsage(names_of(masks), own.num_pages, int(used), int(freed), size)
            for own, masks, used, freed, size in pairs
        )
        copies = [own.copy_from for own in (batch.batches if isinstance(batch, GroupedBatch) else (batch,))]
        report = StepReport(
            kind=kind,
            tokens=tokens,
            new_tokens=0,
            pages_in_use=int(max(held)),
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            drawn={},
            ended=(),
            pages_freed=int(np.sum(scheduler.freed)),
            groups=groups,
            tokens_reused=scheduler.reused,
            pages_shared=int(shared.sum()),
            pages_copied=sum(int(np.sum(np.asarray(x) >= 0)) for x in copies if x is not None),
            pages_cached=int(cached.sum()),
            pages_evicted=scheduler.evicted,
        )
        scheduler.reused = scheduler.evicted = 0
        return report


@eqx.filter_jit
def _counts(pool: Any, cache: Any) -> Int[Array, "counts groups"]:
    """For each group of layers the pages held, shared, only cached, and trimmed."""
    pools = pool.pools if isinstance(pool, GroupedPool) else (pool,)
    return jnp.stack([*counts_of(pool, cache), jnp.stack([pages_trimmed(own) for own in pools])])


# All but the state are one argument, because Equinox donates either every argument or all but the first: the state is
# donated, so that pages are updated in place, and the parameters are not.
@eqx.filter_jit(donate="all-except-first")
def _model_step(inputs: tuple, state: eqx.nn.State) -> tuple[Int[Array, " requests"], eqx.nn.State]:
    """The one step on the device: run the model, and draw a token from the logits of each of ``rows``."""
    model, tokens, batch, rows, draws, history, key, sampler = inputs
    x, state = apply(model, tokens, batch, state)
    logits = logits_of_rows(model, x, rows)
    past: dict[str, Any] = {}
    if history is not None:
        known, of_prompt = history
        firsts = {"seen": jnp.zeros_like(of_prompt), "drawn": of_prompt}
        past = {name: tokens_from(known, first, logits.shape[1]) for name, first in firsts.items()}
    keys = jax.vmap(lambda draw: jax.random.fold_in(jax.random.fold_in(key, draw[0]), draw[1]))(draws)
    return sample(logits, sampler, keys, **past), state
