"""What the engine gives its users: handles of requests, and events."""

import dataclasses
from typing import Literal

from .texts import AnswerText

FinishReason = Literal["eos", "stop", "length", "no_token", "cancelled", "deadline", "error"]


@dataclasses.dataclass(eq=False)
class Handle:
    """A request of an `Engine`, as far as its tokens have come back from the device.

    * ``prompt``: its token ids. * ``tokens``: those drawn so far.
    * ``sample``: its number among the samples of the prompt, from 0.
    * ``text``: of the tokens, where the engine has a tokenizer. It ends before a stop string; text that may begin one
      is not in it yet.
    * ``finish_reason``: ``"eos"``; ``"stop"`` for a stop sequence or string; ``"length"`` where ``max_new_tokens`` were
      drawn; ``"no_token"`` where the logits held NaN, or nothing but ``-inf``; ``"cancelled"``; ``"deadline"``;
      ``"error"`` where the tokenizer raised ``error`` for its tokens. None while the request goes on.
    * ``log_probs``: of the tokens, where they are asked for; ``top_log_probs``: those of the likeliest tokens by id, in
      the place of each. ``prompt_log_probs``: of the prompt's tokens given those before them; None for the first, and
      for what is not computed yet.
    * ``drafted``, ``accepted``: how many drafts of it were verified, and how many of its tokens were drafts.
    * ``submitted``, ``first_token``, ``finished``: seconds of ``time.monotonic``; None while they have not come.
    """

    prompt: tuple[int, ...]
    row: int = -1
    sample: int = 0
    tokens: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: FinishReason | None = None
    error: Exception | None = None
    deadline: float | None = None
    log_probs: list[float] = dataclasses.field(default_factory=list)
    top_log_probs: list[dict[int, float]] = dataclasses.field(default_factory=list)
    prompt_log_probs: list[float | None] | None = None
    num_log_probs: int = -1
    drafted: int = 0
    accepted: int = 0
    submitted: float = 0.0
    first_token: float | None = None
    finished: float | None = None
    reader: AnswerText | None = dataclasses.field(default=None, repr=False)

    @property
    def is_done(self) -> bool:
        """Whether no more tokens come."""
        return self.finish_reason is not None


@dataclasses.dataclass(frozen=True)
class Event:
    """Tokens of one request that came back in one launch.

    * ``request``: whose. * ``tokens``: the new ones, at least one unless the request is done with none.
    * ``finish_reason``: why the request is done; None while it goes on.
    * ``text``: what may be given out now, where the engine has a tokenizer: see ``Handle.text``.
    * ``log_probs``, ``top_log_probs``: of the tokens, where they are asked for: see `Handle`.
    """

    request: Handle
    tokens: tuple[int, ...]
    finish_reason: FinishReason | None
    text: str = ""
    log_probs: tuple[float, ...] = ()
    top_log_probs: tuple[dict[int, float], ...] = ()
