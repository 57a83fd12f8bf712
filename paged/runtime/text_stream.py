"""Text of tokens as they come, in whole characters."""

from collections.abc import Callable, Sequence

_BROKEN = "\ufffd"  # what a decoder puts for bytes that are no character, or none yet


class TextStream:
    """Tokens in, text out. No half of a character ever comes out.

    A character may take several tokens, of which each is a few bytes of it. Text that ends in such bytes is kept back
    until the next tokens complete it. The pieces, put together, are the text of all tokens. Only where bytes make no
    character may a piece hold more: a character that was whole stays, and a decoder of all tokens may break it.

    **Arguments:**

    - `decode`: the text of some tokens, such as `Tokenizer.decode`.

    >>> stream = TextStream(lambda ids: bytes(ids).decode("utf-8", "replace"))
    >>> [stream.push([byte]) for byte in "aé".encode()], stream.finish()
    (['a', '', 'é'], '')
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]):
        self._decode = decode
        # The tokens since the last place where text could be cut, and how much of their text has come out. One token
        # before that place is kept: a decoder may treat the first token of a text in another way.
        self._ids: list[int] = []
        self._out = 0

    def push(self, ids: Sequence[int]) -> str:
        """Add tokens. Returns the text that they complete, which may be none."""
        self._ids += ids
        text = self._decode(self._ids)
        whole = text.rstrip(_BROKEN)
        new, self._out = whole[self._out :], max(self._out, len(whole))
        if len(whole) == len(text):
            last = self._decode(self._ids[-1:])
            if last and not last.endswith(_BROKEN) and text.endswith(last):
                self._ids, self._out = self._ids[-1:], len(last)
        return new

    def finish(self) -> str:
        """The text that was kept back: of bytes that no token completed, each as the sign for a broken character."""
        text = self._decode(self._ids)
        new, self._ids, self._out = text[self._out :], [], 0
        return new
