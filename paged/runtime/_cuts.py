"""Where a sequence may be cut into steps, so that no row sees what a later step writes."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from paged.lower import first_rows, implies, may_cut, seen_ahead
from paged.spec import Causal, Given, Mask, values_of


class AheadMasks(NamedTuple):
    """The masks of a model that may show tokens to others before them.

    * ``masks``: these masks. * ``firsts``: for each what `first_rows` says of the longest sequence; None for a mask
      with numbers that a request brings.
    """

    masks: tuple[Mask, ...]
    firsts: tuple[np.ndarray | None, ...]

    @classmethod
    def of(cls, masks: Sequence[Mask], tokens: int) -> "AheadMasks":
        """Those of some masks that may see ahead in a sequence of so many tokens."""
        found: list[tuple[Mask, np.ndarray | None]] = []
        for mask in dict.fromkeys(masks):
            first = None if values_of(mask) else first_rows(mask, tokens)
            # Of numbers that requests bring nothing is known yet: such a mask must hide what comes later by a term.
            if not implies(mask, Causal()) if first is None else np.any(first < np.arange(tokens)):
                found.append((mask, first))
        return cls(tuple(mask for mask, _ in found), tuple(first for _, first in found))

    def cuts(self, name: str, prompt: int, tokens: int, values: Mapping[str, Any]) -> "Cuts":
        """Where one sequence may be cut into steps.

        **Arguments:**

        - `name`: the argument that its prompt is.
        - `prompt`: how many tokens its prompt has.
        - `tokens`: how many it has at most in pages.
        - `values`: its numbers, by the names in the masks.

        **Returns:** its `Cuts`. Raises ``ValueError`` where a mask sees from before a token that is generated.
        """
        pairs = zip(self.masks, self.firsts, strict=True)
        firsts = [first_rows(given(m, values), tokens) if first is None else first[:tokens] for m, first in pairs]
        for mask, first in zip(self.masks, firsts, strict=True):
            require_decoding(name, mask, prompt, first)
        may = np.all([may_cut(first) for first in firsts], axis=0) if firsts else np.ones(tokens + 1, bool)
        ends = np.append(np.flatnonzero(may[:prompt]), prompt)
        longest = int(np.argmax(np.diff(ends)))
        return Cuts(name, self.masks, tuple(firsts), may, int(ends[longest]), int(np.diff(ends)[longest]))


class Cuts(NamedTuple):
    """Where one sequence may be cut into steps.

    * ``name``: the argument that its prompt is. * ``masks``, ``firsts``: see `AheadMasks`, with its own numbers.
    * ``may`` bool[tokens + 1]: whether it may be cut after so many tokens.
    * ``start``, ``longest``: the longest piece of the prompt that may not be cut: where it starts, and its tokens.
    """

    name: str
    masks: tuple[Mask, ...]
    firsts: tuple[np.ndarray, ...]
    may: np.ndarray
    start: int
    longest: int

    def within(self, chunk_size: int, advice: str) -> np.ndarray | None:
        """``may``, or None where every cut may be made.

        Raises ``ValueError``, with the advice at the end of its message, where the longest piece exceeds a chunk.
        """
        if self.longest <= chunk_size:
            return None if self.may.all() else self.may
        cut = self.start + chunk_size
        mask, first = next(pair for pair in zip(self.masks, self.firsts, strict=True) if not may_cut(pair[1])[cut])
        row, key = seen_ahead(first, cut)
        raise ValueError(
            f"chunk_size={chunk_size} cuts {self.name} after {cut} tokens, and the mask {mask} of a layer sees ahead: "
            f"token {row} sees token {key}, which a later chunk writes. {advice}"
        )


def given(mask: Mask, values: Mapping[str, Any]) -> Any:
    """A mask with one request's numbers in the place of their names."""
    if not values_of(mask):
        return mask
    numbers = {name: tuple(x.tolist()) if np.ndim(x) else x.item() for name, x in values.items()}
    return mask.given(Given(numbers))


def require_decoding(name: str, mask: Mask, prompt: int, first: np.ndarray) -> None:
    """Every generated token is a step of its own, so that no row before it may see it."""
    may = may_cut(first)
    cut = next((step for step in range(prompt, len(first)) if not may[step]), None)
    if cut is not None:
        row, key = seen_ahead(first, cut)
        raise ValueError(
            f"{name} has {prompt} tokens, and the mask {mask} of a layer sees ahead: token {row} sees token {key}, "
            f"which is generated when token {row} has been computed already. Let the mask hide generated tokens from "
            "those before them, shorten a prefix to the prompt, or pass max_new_tokens=1."
        )
