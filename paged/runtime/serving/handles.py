"""What the engine gives its users: handles of requests, events, and figures."""

import dataclasses
from typing import Literal

FinishReason = Literal["eos", "stop", "length", "no_token", "cancelled", "deadline"]


@dataclasses.dataclass(eq=False)
class Handle:
    """A request of an `Engine`, as far as its tokens have come back from the device.

    * ``prompt``: its token ids. * ``tokens``: those drawn so far.
    * ``sample``: its number among the samples of the prompt, from 0.
    * ``finish_reason``: ``"eos"``; ``"stop"`` for a stop sequence; ``"length"`` where ``max_new_tokens`` were drawn;
      ``"no_token"`` where the logits held NaN, or nothing but ``-inf``; ``"cancelled"``; ``"deadline"``. None while
      the request goes on.
    * ``drafted``, ``accepted``: how many drafts of it were verified, and how many of its tokens were drafts.
    * ``submitted``, ``first_token``, ``finished``: seconds of ``time.monotonic``; None while they have not come.
    """

    prompt: tuple[int, ...]
    row: int = -1
    sample: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: FinishReason | None = None
    deadline: float | None = None
    drafted: int = 0
    accepted: int = 0
    submitted: float = 0.0
    first_token: float | None = None
    finished: float | None = None

    @property
    def is_done(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None


@dataclasses.dataclass(frozen=True)
class Event:
    """Tokens of one request that came back in one launch.

    * ``request``: whose. * ``tokens``: the new ones, at least one unless the request is done with none.
    * ``finish_reason``: why the request is done; None while it goes on.
    """

    request: Handle
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None


@dataclasses.dataclass(frozen=True)
class EngineStats:
    """Figures of an `Engine` since it was made.

    * ``steps``, ``decode_steps``: of the model; those in which every sequence had one row, and drafts.
    * ``launches``: programs given to the device, each of many steps.
    * ``prompt_tokens``, ``new_tokens``: rows that were prefilled, again after preemptions too; tokens drawn.
    * ``reused_tokens``: of prompts, found in the prefix cache or in the pages of another sample. ``evicted_pages``:
      that the cache gave up. ``copied_pages``: that others held when a sequence went on to write in them.
    * ``drafted_tokens``, ``accepted_tokens``: drafts that were verified, and new tokens that were drafts.
    * ``submitted``, ``running``, ``waiting``, ``done``: requests. ``preemptions``: how often one gave up its slot.
    * ``pages``, ``pages_in_use``, ``pages_cached``: of the pool, and those in use that only the prefix cache holds; of
      all groups together.
    * ``seconds_to_first_token``, ``seconds_per_token``: means over requests that have a first token, and over the
      tokens after it; None before there are any.
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
    submitted: int
    running: int
    waiting: int
    done: int
    preemptions: int
    pages: int
    pages_in_use: int
    pages_cached: int
    seconds_to_first_token: float | None
    seconds_per_token: float | None

    def prometheus(self, prefix: str = "paged") -> str:
        """The figures in the text format of Prometheus, one gauge or counter each."""
        lines = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                kind = "gauge" if field.name in _GAUGES else "counter"
                lines += [f"# TYPE {prefix}_{field.name} {kind}", f"{prefix}_{field.name} {value}"]
        return "\n".join([*lines, ""])


_GAUGES = ("running", "waiting", "pages", "pages_in_use", "pages_cached", "seconds_to_first_token", "seconds_per_token")
