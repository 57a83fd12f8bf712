"""`Requests`: what the serve loop knows of every request, as arrays of fixed shapes."""

import dataclasses
import enum
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Key

from ..sampling import Sampler, Samplers


class Status(enum.IntEnum):
    """Where a request is: its row is free, it waits for a slot, it has one, or it is done."""

    FREE = 0
    WAITING = 1
    RUNNING = 2
    DONE = 3


class Reason(enum.IntEnum):
    """Why a request is done: see `Generation`. NONE while it is not."""

    NONE = 0
    EOS = 1
    STOP = 2
    LENGTH = 3
    NO_TOKEN = 4
    CANCELLED = 5


@dataclasses.dataclass(frozen=True)
class NewRequest:
    """One checked request on the host, from which a row of `Requests` is made.

    * ``prompt``: its token ids.
    * ``most_tokens``: of the prompt and the answer together.
    * ``drawn``: tokens of the answer that it has already.
    * ``sampler``, ``key``: how its tokens are drawn; a typed PRNG key, or None for the engine's.
    * ``log_probs``: how many of the likeliest tokens' log-probabilities are told with each token's own; -1 for none.
    * ``prompt_log_probs``: whether those of the prompt's tokens are told.
    * ``folds``: numbers that are folded into the key, one after the other; -1 for none.
    * ``ends``: token ids that end the answer. ``stops``: sequences of token ids that do.
    * ``priority``: larger ones are admitted first. ``arrival``: among equal ones the smaller.
    * ``salt``: requests share pages of equal tokens only where it is the same.
    * ``values``: the numbers that the model's specs name.
    * ``cuts`` bool[tokens + 1]: where its tokens may be cut into steps; None for everywhere.
    * ``family``: a number that the samples of one prompt have in common; -1 for the only one.
    """

    prompt: tuple[int, ...]
    most_tokens: int
    sampler: Sampler
    key: Any
    ends: tuple[int, ...] = ()
    stops: tuple[tuple[int, ...], ...] = ()
    priority: int = 0
    arrival: int = 0
    salt: int = 0
    values: Any = dataclasses.field(default_factory=dict)
    cuts: np.ndarray | None = None
    family: int = -1
    folds: tuple[int, int] = (-1, -1)
    log_probs: int = -1
    prompt_log_probs: bool = False
    drawn: tuple[int, ...] = ()


class Sizes(eqx.Module):
    """The static sizes of `Requests`.

    * ``requests``: rows.
    * ``tokens``: the most of a request, prompt and answer.
    * ``ends``, ``stops``, ``stop_tokens``, ``biases``: how many each request may have, and tokens of one stop.
    * ``has_cuts``: whether a request may say where its tokens may be cut into steps.
    * ``has_log_probs``: whether a request may ask for log-probabilities.
    * ``has_samples``: whether a prompt may have several samples.
    """

    requests: int = eqx.field(static=True)
    tokens: int = eqx.field(static=True)
    ends: int = eqx.field(static=True, default=4)
    stops: int = eqx.field(static=True, default=4)
    stop_tokens: int = eqx.field(static=True, default=8)
    biases: int = eqx.field(static=True, default=16)
    has_cuts: bool = eqx.field(static=True, default=False)
    has_log_probs: bool = eqx.field(static=True, default=False)
    has_samples: bool = eqx.field(static=True, default=True)


class Requests(eqx.Module):
    """The table of requests, one row each.

    * ``tokens`` i32[requests, tokens]: of the prompt, then of the answer; -1 past them.
    * ``prompt``, ``known``, ``most`` i32[requests]: how many tokens the prompt has, how many are known, and may be.
    * ``samplers``, ``keys``: how tokens are drawn.
    * ``ends`` i32[requests, ends]: ids that end an answer; ``stops`` i32[requests, stops, tokens]: sequences that do,
      each at the right, -1 before it.
    * ``priority``, ``arrival`` i32[requests]: in which order they are admitted.
    * ``salt`` i32[requests]: requests share pages of equal tokens only where it is the same.
    * ``status``, ``reason`` i32[requests]: see `Status` and `Reason`.
    * ``preemptions`` i32[requests]: how often each gave up its slot.
    * ``values``: the numbers that the model's specs name, [requests, ...] each.
    * ``cuts`` i32[requests, tokens + 1]: for each number of tokens the largest, at most that, after which they may be
      cut into steps. None where that is everywhere, for all requests.
    * ``log_probs``, ``prompt_log_probs`` i32[requests]: see `NewRequest`. None where no request may ask for them.
    * ``family`` i32[requests]: a number that the samples of one prompt have in common; -1 for the only one. None where
      every prompt has one.
    """

    tokens: Int[Array, "requests tokens"]
    prompt: Int[Array, " requests"]
    known: Int[Array, " requests"]
    most: Int[Array, " requests"]
    samplers: Samplers
    keys: Key[Array, " requests"]
    ends: Int[Array, "requests ends"]
    stops: Int[Array, "requests stops stop_tokens"]
    priority: Int[Array, " requests"]
    arrival: Int[Array, " requests"]
    salt: Int[Array, " requests"]
    status: Int[Array, " requests"]
    reason: Int[Array, " requests"]
    preemptions: Int[Array, " requests"]
    values: dict[str, Array]
    cuts: Int[Array, "requests places"] | None
    family: Int[Array, " requests"] | None
    log_probs: Int[Array, " requests"] | None = None
    prompt_log_probs: Int[Array, " requests"] | None = None

    @classmethod
    def init(cls, sizes: Sizes, values: dict[str, Array] | None = None) -> "Requests":
        """A table whose rows are all free. Of ``values``, one of each number of a request, shape and dtype are read."""
        numbers = {name: np.ones(x.shape, x.dtype) for name, x in (values or {}).items()}
        nobody = NewRequest((), 0, Sampler(), jax.random.key(0), values=numbers)
        rows = jax.tree.map(lambda x: jnp.broadcast_to(x, (sizes.requests, *x.shape[1:])), cls.of([nobody], sizes))
        return dataclasses.replace(rows, status=jnp.full(sizes.requests, int(Status.FREE), jnp.int32))

    @classmethod
    def of(cls, new: Sequence[NewRequest], sizes: Sizes, keys: Any = None) -> "Requests":
        """Rows of waiting requests, which `put` puts into a table of these sizes. ``keys`` are theirs, if given."""
        columns = jax.tree.map(jnp.asarray, cls.columns(new, sizes))
        samplers = Samplers(**columns.pop("samplers"))
        keys = jnp.stack([request.key for request in new]) if keys is None else keys
        return cls(**columns, samplers=samplers, keys=keys)

    @classmethod
    def columns(cls, new: Sequence[NewRequest], sizes: Sizes) -> dict[str, Any]:
        """The columns of waiting requests but their keys, on the host: an array or a dict of arrays by name."""
        padded = lambda rows, width: _padded(rows, (len(new), width))
        stops = np.full((len(new), sizes.stops, sizes.stop_tokens), -1, np.int32)
        for row, request in enumerate(new):
            for place, stop in enumerate(request.stops):
                stops[row, place, sizes.stop_tokens - len(stop) :] = stop
        ints = lambda numbers: np.asarray(list(numbers), np.int32)
        lengths = ints(len(request.prompt) for request in new)
        return dict(
            tokens=padded([request.prompt + request.drawn for request in new], sizes.tokens),
            prompt=lengths,
            known=lengths + ints(len(request.drawn) for request in new),
            most=ints(request.most_tokens for request in new),
            samplers=Samplers.columns([request.sampler for request in new], sizes.biases),
            ends=padded([request.ends for request in new], sizes.ends),
            stops=stops,
            priority=ints(request.priority for request in new),
            arrival=ints(request.arrival for request in new),
            salt=ints(request.salt for request in new),
            status=np.full(len(new), Status.WAITING, np.int32),
            reason=np.full(len(new), Reason.NONE, np.int32),
            preemptions=np.zeros(len(new), np.int32),
            values={name: np.stack([np.asarray(r.values[name]) for r in new]) for name in new[0].values},
            cuts=_cuts([request.cuts for request in new], sizes.tokens) if sizes.has_cuts else None,
            log_probs=ints(request.log_probs for request in new) if sizes.has_log_probs else None,
            prompt_log_probs=ints(request.prompt_log_probs for request in new) if sizes.has_log_probs else None,
            family=ints(request.family for request in new) if sizes.has_samples else None,
        )

    def put(self, rows: Int[Array, " new"], new: "Requests") -> "Requests":
        """The table with new requests in some rows. A row past the table's drops its request."""
        return jax.tree.map(lambda old, own: old.at[rows].set(own, mode="drop"), self, new)

    def at(self, rows: Int[Array, " slots"]) -> "Requests":
        """The requests in some rows. A negative number gives any row."""
        return jax.tree.map(lambda x: x[jnp.maximum(rows, 0)], self)

    @property
    def drawn(self) -> Int[Array, " requests"]:
        """How many tokens have been drawn for each."""
        return self.known - self.prompt


def _padded(rows: Sequence[Sequence[int]], shape: tuple[int, int]) -> np.ndarray:
    table = np.full(shape, -1, np.int32)
    for row, numbers in enumerate(rows):
        table[row, : len(numbers)] = numbers
    return table


def _cuts(rows: Sequence[np.ndarray | None], tokens: int) -> np.ndarray:
    places = np.arange(tokens + 1, dtype=np.int32)
    table = np.broadcast_to(places, (len(rows), tokens + 1)).copy()
    for row, cuts in zip(table, rows, strict=True):
        if cuts is not None:
            row[: len(cuts)] = np.maximum.accumulate(np.where(cuts, places[: len(cuts)], 0))
    return table
