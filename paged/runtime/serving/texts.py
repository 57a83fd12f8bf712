"""`AnswerText`: the text of an answer as its tokens come, up to the first stop string."""

from collections.abc import Callable, Sequence
from typing import Any

from ..text_stream import TextStream


class AnswerText:
    """Tokens in, text out, until a stop string is complete. What may begin a stop string is held back.

    **Arguments:**

    - `decode`: the text of some tokens.
    - `stops`: strings. The first that is complete ends the text, before it begins; of two that are complete with the
      same character, the longer one.

    >>> text = AnswerText(lambda ids: bytes(ids).decode(), ["\\n\\n"])
    >>> [text.push(token) for token in b"a\\nb\\n\\nc"[:5]], text.is_stopped
    (['a', '', '\\nb', '', ''], True)
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], stops: Sequence[str] = ()):
        self._stream, self._stops = TextStream(decode), tuple(stops)
        self._held = ""
        self.is_stopped = False

    def push(self, token: int) -> str:
        """Add a token. Returns the text that may be given out now."""
        return self._given(self._stream.push([token]))

    def finish(self) -> str:
        """The text that was held back, when no more tokens come."""
        new = self._given(self._stream.finish())
        rest, self._held = self._held, ""
        return new + rest

    def _given(self, new: str) -> str:
        if self.is_stopped:
            return ""
        self._held += new
        found = [(begin + len(stop), begin) for stop in self._stops if (begin := self._held.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            out, self._held = self._held[: min(found)[1]], ""
            return out
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        kept = next(
            (n for n in range(min(longest, len(self._held)), 0, -1) if self._may_begin_a_stop(self._held[-n:])), 0
        )
        out, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return out

    def _may_begin_a_stop(self, end: str) -> bool:
        return any(stop.startswith(end) for stop in self._stops)


def decoder_of(tokenizer: Any) -> Callable[[Sequence[int]], str]:
    """What gives the text of tokens, or ``TypeError`` for what is no tokenizer."""
    for name in ("encode", "decode"):
        if not callable(getattr(tokenizer, name, None)):
            raise TypeError(
                f"tokenizer must have the methods encode(text) and decode(ids), as a `Tokenizer` has; got "
                f"{type(tokenizer).__name__}, which has no {name}."
            )
    return tokenizer.decode
