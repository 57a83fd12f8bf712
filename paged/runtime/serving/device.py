"""`Device`: the state of the serve loop, and what the host gives to the device in order."""

import collections
import contextlib
import dataclasses
import importlib
import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from ..sampling import Sampler
from . import programs
from .fresh import Fresh
from .packing import packed
from .placing import everywhere, placed
from .programs import AT_ONCE
from .record import StepEvents
from .records import pages_of_groups
from .requests import NewRequest, Requests, Sizes
from .shards import shards_of
from .state import Counts, Queue, ServeState

# A launch that has drawn the first token of a request ends with this part of its steps, or with that token.
_SOONER = 8


class Launch(NamedTuple):
    """What a launch gives back, and whose the rows were when it began."""

    events: StepEvents
    steps: Any
    figures: Any
    handles: Mapping[int, Any]


class Device:
    """The loop's state, which every program takes and gives back, and the launches that have not come back.

    * ``model``, ``state``: what runs. * ``facts``: the static ones of `serve_many`.
    * ``shards``: of sequences, see `Shards`; or None. * ``num_rows``: of the tables of requests of all of them.
    * ``pages``: of each group of layers.
    * ``is_lost``: whether an exception has cost the state: `begin_again` makes another one.

    **Arguments:**

    - `new_queue`: makes a queue without requests. - `states`: of the served model, and of a draft model or None.
    - `steps`: of one launch. - `key`: in which the numbers of requests are folded.
    """

    def __init__(
        self, model: Any, new_queue: Callable[[], Queue], states: tuple[Any, Any], facts: tuple, sizes: Sizes,
        steps: int, key: PRNGKeyArray,
    ):  # fmt: skip
        self.model, self.shards = everywhere(model), shards_of(model)
        self._new_queue, self._facts, self._sizes, self._key = new_queue, facts, sizes, key
        self.state: Any = self._new_state(states)
        self.num_rows, self.pages = self.state.queue.requests.status.size, pages_of_groups(self.state.queue)
        self._fresh = Fresh((self.state.model_state, self.state.draft_state))
        self._limits = jnp.asarray((max(steps // _SOONER, 1), steps), jnp.int32)
        self.in_flight: collections.deque[Launch] = collections.deque()
        self.launches = 0
        self._figures: Any = (Counts.zero(), np.zeros(3, int))
        self._before: Counts | None = None  # what was counted before the state was lost
        self.is_lost = False

    def _new_state(self, states: tuple[Any, Any]) -> ServeState:
        """Some states with a queue that has no requests, where the loop leaves them."""
        queue = self._new_queue()
        keys = jnp.broadcast_to(self._key, queue.requests.keys.shape)
        return placed(self.model, ServeState(eqx.tree_at(lambda queue: queue.requests.keys, queue, keys), *states))

    def begin_again(self, requests: Sequence[tuple[int, NewRequest]]) -> None:
        """Go on with new pages after an exception that has cost the state, from requests that are in rows."""
        self.in_flight.clear()
        self._before = self._figures[0]
        self.state = None  # what is left of it may be most of the memory
        self.state = self._new_state(self._fresh.make())
        for first in range(0, len(requests), AT_ONCE):
            rows, new = zip(*requests[first : first + AT_ONCE], strict=True)
            self.put(rows, new)
        self.is_lost = False

    def put(self, rows: Sequence[int], new: Sequence[NewRequest]) -> None:
        """Bring requests into some rows of the table: at most 8, by one transfer."""
        more = AT_ONCE - len(new)
        places = np.asarray([*rows, *[self.num_rows] * more], np.int32)
        new = [*new, *[new[-1]] * more]
        words = packed(places, np.asarray([one.folds for one in new], np.int32), Requests.columns(new, self._sizes))
        keys = tuple(self._key if one.key is None else one.key for one in new)
        self._change(lambda queue: programs.put((self.shards, jnp.asarray(words), keys), queue))

    def end(self, rows: Sequence[int]) -> None:
        """End the requests in some rows."""
        for first in range(0, len(rows), AT_ONCE):
            some = list(rows[first : first + AT_ONCE])
            numbers = jnp.asarray(some + [-1] * (AT_ONCE - len(some)), jnp.int32)
            self._change(lambda queue, numbers=numbers: programs.end((self.shards, numbers), queue))

    def renew(self, model: Any, draft_model: Any) -> None:
        """Run another model from now on, and another draft model unless that is None."""
        self.model = everywhere(model)
        if draft_model is not None:
            (*first, drafts), *last = self._facts[:3], *self._facts[3:]
            self._facts = (*first, dataclasses.replace(drafts, model=everywhere(draft_model)), *last)
        self._change(lambda queue: programs.renew(self.shards, queue))

    def launch(self, handles: Mapping[int, Any]) -> None:
        """Give the device steps to do: fewer where first tokens are drawn. It works on while the host goes on."""
        with self._keeping_state():
            state, *told = programs.serve((self.model, self._limits, *self._facts), self.state)
            self.state = state
        self.launches += 1
        self.in_flight.append(Launch(*told, handles=dict(handles)))

    @property
    def is_told_first(self) -> bool:
        """Whether what the oldest launch has drawn should be told before another launch.

        Other devices get their next launch first, so that they do not wait. On a CPU the host does the work itself, and
        returns from a launch when it is done.
        """
        told = jax.tree.leaves(self.in_flight[0][:-1]) if self.in_flight else []
        return bool(told) and all(x.is_ready() and next(iter(x.devices())).platform == "cpu" for x in told)

    def collect(self) -> tuple[StepEvents, int, Mapping[int, Any]]:
        """What the oldest launch has drawn: one read of the device. And whose the rows were."""
        launch = self.in_flight[0]
        try:
            events, steps, figures = jax.device_get(launch[:-1])
        except Exception:  # of the launch: what it gives back is none, and the state neither
            self.is_lost = True
            raise
        self.in_flight.popleft()
        self._figures = self._with_those_before(figures)
        return events, int(steps), launch.handles

    def figures(self) -> tuple[Counts, Any]:
        """Counts and pages: up to now, or while launches run up to the latest that has come back."""
        if not self.in_flight and not self.is_lost:
            self._figures = self._with_those_before(jax.device_get(programs.figures(self.shards, self.state.queue)))
        return self._figures

    def _with_those_before(self, figures: Any) -> Any:
        counts, pages = figures
        return (counts if self._before is None else jax.tree.map(np.add, counts, self._before)), pages

    def warm_up(self, handles: Mapping[int, Any], *, progress: bool) -> float:
        """Compile every program, and give each to the device once. The seconds that it took."""
        begin, queue = time.monotonic(), self.state.queue
        axes = queue.requests.status.ndim  # of rows, and of shards of sequences
        values = {name: np.zeros(x.shape[axes:], x.dtype) for name, x in queue.requests.values.items()}
        nobody = NewRequest((), 0, Sampler(), None, values=values)
        parts: dict[str, Callable[[], Any]] = {
            "uploads": lambda: self.put([self.num_rows], [nobody]),
            "steps": lambda: self.launch(handles),
            "cancellation": lambda: self.end([-1]),
            "other weights": lambda: programs.renew(self.shards, jax.tree.map(jnp.copy, self.state.queue)),
            "figures": lambda: programs.figures(self.shards, self.state.queue),
        }
        for part in _shown(parts, progress):
            parts[part]()
        return time.monotonic() - begin

    def _change(self, change: Callable[[Queue], Queue]) -> None:
        with self._keeping_state():
            self.state = dataclasses.replace(self.state, queue=change(self.state.queue))

    @contextlib.contextmanager
    def _keeping_state(self) -> Iterator[None]:
        """A program is about to get the state, whose memory it may use for what it gives back."""
        try:
            yield
        except BaseException:
            self.is_lost |= any(x.is_deleted() for x in jax.tree.leaves(self.state) if isinstance(x, jax.Array))
            raise


def _shown(parts: Iterable[str], progress: bool) -> Iterable[str]:
    """The parts, with a bar of progress where tqdm is installed."""
    if not progress or importlib.util.find_spec("tqdm") is None:
        return parts
    return importlib.import_module("tqdm").tqdm(list(parts), desc="compiling", leave=False)
