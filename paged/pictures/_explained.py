"""`explained`: the pictures of an explanation, on one page."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from paged.lower import Explanation, Program, Sequences
from paged.spec import fields_of, terms_in

from ._answers import Step
from ._heads import heads
from ._mask import mask
from ._pages import draw
from ._picture import Page, Picture
from ._schedule import drawn

_MOST_KEYS, _FEWEST_KEYS, _MOST_PAIRS = 2**14, 32, 2**24


def explained(explanation: Explanation) -> Page:
    """The pictures of an explanation: what `Explanation.show` gives.

    **Arguments:**

    - `explanation`: what ``attend.explain`` gave.

    **Returns:** a page with the explanation's words, its heads and its mask; with a call also the pages of all
    sequences, those of the longest one, and the schedule where the lowering tells how it divides its work. The mask is
    that of the longest sequence, of at most 2**14 keys; of more than 4096 keys it shows the last rows.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, window=4)
    >>> attend = paged.lower(spec, PageLayout(page_size=2, num_kv_heads=2, head_dim=8))
    >>> [picture.title for picture in paged.pictures.explained(attend.explain()).pictures]
    ['4 query heads over 2 KV heads', 'What a query sees, where (j <= p) & (p - j < 4)']
    """
    program = explanation.program
    pictures = [heads(program)]
    if explanation.batch is None or explanation.call is None or explanation.lowering is None:
        return _page(explanation, [*pictures, _masked(program, _natural_length(program), program.any_numbers())])
    call, batch, layout = explanation.call, explanation.batch, explanation.layout
    seqs = Sequences.of(batch, call.tokens, layout.page_size)
    longest = int(np.argmax(np.where(np.asarray(seqs.counts) > 0, np.asarray(seqs.lengths), -1)))
    length = max(1, int(seqs.lengths[longest]))
    pictures.append(_masked(program, length, seqs.numbers_of(longest)))
    step = Step.of(program, batch, layout.page_size, call.num_pages)
    pictures.append(draw(step))
    if np.sum(np.any(step.states() != "", axis=1)) > 1:
        pictures.append(draw(step, longest))
    works = explanation.lowering.work(program, explanation.schedule, call, layout, seqs)
    if works:
        pictures.append(drawn(works, seqs, f"{explanation.schedule}", explanation.source, layout))
    return _page(explanation, pictures)


def _page(explanation: Explanation, pictures: list[Picture]) -> Page:
    program = explanation.program
    title = f"Attention of {program.num_q_heads} query heads over {program.num_kv_heads} KV heads"
    return Page(title, str(explanation), tuple(pictures))


def _masked(program: Program, length: int, numbers: Mapping[str, Any]) -> Picture:
    shown = min(length, _MOST_KEYS)
    values = {name: tuple(map(int, x)) if isinstance(x, tuple) else _number(x) for name, x in numbers.items()}
    return mask(program, min(shown, _MOST_PAIRS // shown), shown, values=values)


def _number(x: Any) -> int | float:
    return np.asarray(x).item()


def _natural_length(program: Program) -> int:
    """Keys enough to see what the numbers of the mask do."""
    numbers = [field for term in terms_in(program.visibility) for _, field in fields_of(term) if type(field) is int]
    return min(4096, max(_FEWEST_KEYS, 2 * max(numbers, default=0)))
