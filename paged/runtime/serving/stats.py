"""`EngineStats`: figures of an engine, as an object and as text."""

import collections
import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from .state import Counts

_QUANTILES = (0.5, 0.9, 0.99)
# Figures that the device counts under the same name.
_COUNTED = (
    "steps", "decode_steps", "prompt_tokens", "reused_tokens", "new_tokens", "evicted_pages", "copied_pages",
    "freed_pages",
)  # fmt: skip


class Quantiles(NamedTuple):
    """The median, and what 90 and 99 of 100 do not exceed."""

    p50: float
    p90: float
    p99: float

    @classmethod
    def of(cls, seconds: Iterable[float]) -> "Quantiles | None":
        """Those of some numbers; None of none."""
        numbers = list(seconds)
        return cls(*(float(x) for x in np.quantile(numbers, _QUANTILES))) if numbers else None


@dataclasses.dataclass
class Times:
    """How long requests took, of the latest 4096.

    * ``first``: seconds to the first token. * ``after``: seconds for each token after it.
    """

    first: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=4096))
    after: collections.deque[float] = dataclasses.field(default_factory=lambda: collections.deque(maxlen=4096))


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Figures of an `Engine` since it was made.

    * ``steps``, ``decode_steps``: of the model; those in which every sequence had one row, and drafts.
    * ``launches``: programs given to the device, each of many steps.
    * ``prompt_tokens``, ``new_tokens``: rows that were prefilled, again after preemptions too; tokens drawn.
    * ``reused_tokens``: of prompts, found in the prefix cache or in the pages of another sample. ``hit_rate``: how many
      these are of all prompt tokens; None before there are any.
    * ``evicted_pages``: that the cache gave up. ``copied_pages``: that others held when a sequence went on to write in
      them. ``freed_pages``: that no query saw any more.
    * ``drafted_tokens``, ``accepted_tokens``: drafts that were verified, and new tokens that were drafts.
    * ``submitted``, ``running``, ``waiting``, ``done``: requests. ``preemptions``: how often one gave up its slot.
    * ``pages``, ``pages_in_use``, ``pages_shared``, ``pages_cached``: of the pool; those in use; of these the ones that
      several sequences hold, and those that only the prefix cache holds. Of all groups together.
    * ``seconds_to_first_token``, ``seconds_per_token``: `Quantiles` of the latest 4096 requests, from ``submit`` to the
      first token, and for each token after it; None before there are any.
    * ``compile_seconds``: what `Engine.warmup` took; None before it.
    """

    steps: int
    decode_steps: int
    launches: int
    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    drafted_tokens: int
    accepted_tokens: int
    evicted_pages: int
    copied_pages: int
    freed_pages: int
    submitted: int
    running: int
    waiting: int
    done: int
    preemptions: int
    pages: int
    pages_in_use: int
    pages_shared: int
    pages_cached: int
    hit_rate: float | None
    seconds_to_first_token: Quantiles | None
    seconds_per_token: Quantiles | None
    compile_seconds: float | None

    @classmethod
    def of(cls, counts: Counts, held: Any, times: Times, **host: Any) -> "EngineStats":
        """The figures of an engine.

        **Arguments:**

        - `counts`, `held`: of the device; pages that slots hold, that several hold, and that only the cache holds.
        - `times`: of requests. - `host`: every figure that the host counts, by name.
        """
        (in_use, shared, cached), reused, computed = held, int(counts.reused_tokens), int(counts.prompt_tokens)
        return cls(
            **{name: int(getattr(counts, name)) for name in _COUNTED},
            **host,
            preemptions=int(counts.preempted),
            pages_in_use=int(in_use + cached),
            pages_shared=int(shared),
            pages_cached=int(cached),
            hit_rate=reused / (reused + computed) if reused + computed else None,
            seconds_to_first_token=Quantiles.of(times.first),
            seconds_per_token=Quantiles.of(times.after),
        )

    def prometheus(self, prefix: str = "paged") -> str:
        """The figures in the text format of Prometheus: counters, gauges, and summaries of quantiles."""
        lines = []
        for field in dataclasses.fields(self):
            name, value = f"{prefix}_{field.name}", getattr(self, field.name)
            if isinstance(value, Quantiles):
                lines.append(f"# TYPE {name} summary")
                lines += [f'{name}{{quantile="{q}"}} {x}' for q, x in zip(_QUANTILES, value, strict=True)]
            elif value is not None:
                lines += [f"# TYPE {name} {'gauge' if field.name in _GAUGES else 'counter'}", f"{name} {value}"]
        return "\n".join([*lines, ""])


_GAUGES = ("running", "waiting", "pages", "pages_in_use", "pages_shared", "pages_cached", "hit_rate", "compile_seconds")
