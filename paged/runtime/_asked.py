"""`Asked`: one answer that `generate` is to give, what it needs, and what has come back of it."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from ._groups import Masks, keeps_all, mask_of, most_pages


@dataclasses.dataclass
class Asked:
    """One sample of one prompt.

    * ``index``: the prompt's place among those of the call. ``place``: of the answer among all answers.
    * ``draw``: the number from which its draws follow, besides the number of each token.
    * ``prompt``: its token ids.
    * ``max_new_tokens``: the most tokens to draw.
    * ``values``: the prompt's numbers, by name, that the model's specs name by `Value`.
    * ``cuts`` bool[most_cached + 1]: where its tokens may be cut into steps; None for everywhere.
    * ``row``: of the table of requests, which the serve loop tells it by.
    * ``tokens``, ``finish_reason``, ``preemptions``: what has come back, see `Generation`.
    """

    index: int
    place: int
    draw: int
    prompt: tuple[int, ...]
    max_new_tokens: int
    values: Mapping[str, Any]
    cuts: np.ndarray | None = None
    row: int = -1
    tokens: list[int] = dataclasses.field(default_factory=list)
    finish_reason: Literal["eos", "length", "no_token"] | None = None
    preemptions: int = 0

    @property
    def most_cached(self) -> int:
        """The most tokens that the sequence will have in pages: all but the last one drawn."""
        return len(self.prompt) + self.max_new_tokens - 1

    def most_pages(self, masks: Masks, page_size: int, chunk_size: int) -> int:
        """The most pages of a group that the sequence holds at once."""
        if keeps_all(masks):
            return -(-self.most_cached // page_size)
        return most_pages(mask_of(masks), self.most_cached, page_size, chunk_size, self.values)
