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

    def cuts(self, prompt: int, tokens: int, values: Mapping[str, Any], chunk_size: int) -> np.ndarray | None:
        """Where one sequence may be cut into steps.

        **Arguments:**

        - `prompt`: how many tokens its prompt has.
        - `tokens`: how many it has at most in pages.
        - `values`: its numbers, by the names in the masks.
        - `chunk_size`: the most rows of its prompt in one step.

        **Returns:** bool[tokens + 1], or None for everywhere. Raises ``ValueError`` where a mask needs a larger chunk,
        or sees from before a token that is generated.
        """
        pairs = zip(self.masks, self.firsts, strict=True)
        firsts = [first_rows(given(m, values), tokens) if first is None else first[:tokens] for m, first in pairs]
        for mask, first in zip(self.masks, firsts, strict=True):
            require_decoding("prompt", mask, prompt, first)
        may = [may_cut(first) for first in firsts]
        cuts = np.all(may, axis=0) if may else np.ones(tokens + 1, bool)
        start, needed = longest_piece(cuts, prompt)
        if needed > chunk_size:
            cut = start + chunk_size
            index = next(i for i, own in enumerate(may) if not own[cut])
            text = cut_through("prompt", self.masks[index], firsts[index], cut, chunk_size)
            raise ValueError(f"{text} Make the engine with chunk_size={needed}.")
        return None if cuts.all() else cuts


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


def longest_piece(cuts: np.ndarray, prompt: int) -> tuple[int, int]:
    """The longest piece of a prompt that may not be cut: where it starts, and its tokens."""
    ends = np.append(np.flatnonzero(cuts[:prompt]), prompt)
    longest = int(np.argmax(np.diff(ends)))
    return int(ends[longest]), int(ends[longest + 1] - ends[longest])


def cut_through(name: str, mask: Mask, first: np.ndarray, cut: int, chunk_size: int) -> str:
    """What is wrong with a chunk that ends at a cut that may not be made."""
    row, key = seen_ahead(first, cut)
    return (
        f"chunk_size={chunk_size} cuts {name} after {cut} tokens, and the mask {mask} of a layer sees ahead: token "
        f"{row} sees token {key}, which a later chunk writes."
    )
