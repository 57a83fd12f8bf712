"""Groups of masks that keep the same pages, and how many pages a mask keeps."""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from paged.lower import normal_form
from paged.spec import AttentionSpec, Everything, Given, Mask, Or, require_positive_int, values_of

from ._kept import kept_pages, kept_tokens

Masks = tuple[Mask, ...]

# Where two masks are compared: at the first tokens, and from there to far ones in steps of two percent.
_NEAR = 192
_FAR = np.unique(np.geomspace(1, 2**24, 850).astype(np.int32))


def page_groups(specs: Iterable[AttentionSpec]) -> tuple[Masks, ...]:
    """The groups of attentions that can share a block table, because their masks keep the same pages.

    Masks that keep every page, such as `Causal` alone, are one group, which comes first. The other masks are in one
    group where they free the same pages, as far as a sample of positions tells. What a group frees, all of its masks
    hide, so that the sample decides about memory and never about a result. Masks that name numbers of the batch share a
    group only where they are the same.

    **Arguments:**

    - `specs`: of a model's attentions.

    **Returns:** for each group its masks, as `GroupedBatch` has them. `Everything` is among those of the first group,
    if that keeps every page.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)
    >>> for masks in page_groups([spec.replace(window=8), spec, spec.replace(window=8, causal=False)]):
    ...     print(*masks, sep="; ")
    j <= p; everything
    (j <= p) & (p - j < 8); p - j < 8
    """
    keeping: dict[Mask, None] = {}
    freeing: dict[object, dict[Mask, None]] = {}
    for mask in dict.fromkeys(spec.visibility for spec in specs):
        kept = _pattern(mask)
        if kept == _KEEPS_ALL:
            keeping[mask] = None
        else:
            freeing.setdefault(normal_form(mask) if kept is None else kept, {})[mask] = None
    if keeping:
        keeping[Everything()] = None
    return tuple(map(tuple, [keeping] * bool(keeping) + list(freeing.values())))


@dataclasses.dataclass(frozen=True)
class GroupUsage:
    """What the layers of a group hold in their pages.

    * ``masks``: of the group's attentions, as text.
    * ``num_pages``, ``pages_in_use``: pages of the group's pool, and those that are not free.
    * ``pages_trimmed``: how many pages more its sequences would hold if none had been freed by the masks.
    * ``bytes_per_page``: of a page in all layers of the group, with per-token scales; 0 where no layer's pages are
      known.

    >>> print(GroupUsage(("(j <= p) & (p - j < 1024)",), 256, pages_in_use=70, pages_trimmed=130, bytes_per_page=2**20))
    70 of 256 pages (70.00 of 256.00 MiB), 130.00 MiB less than without the masks: (j <= p) & (p - j < 1024)
    """

    masks: tuple[str, ...]
    num_pages: int
    pages_in_use: int
    pages_trimmed: int
    bytes_per_page: int

    @property
    def bytes_in_use(self) -> int:
        """Bytes of the pages in use, in all layers of the group."""
        return self.pages_in_use * self.bytes_per_page

    @property
    def bytes_saved(self) -> int:
        """Bytes of the pages that the masks have freed, in all layers of the group."""
        return self.pages_trimmed * self.bytes_per_page

    def __str__(self) -> str:
        used, all_of_them, saved = (
            f"{n * self.bytes_per_page / 2**20:.2f}" for n in (self.pages_in_use, self.num_pages, self.pages_trimmed)
        )
        counts = f"{self.pages_in_use} of {self.num_pages} pages ({used} of {all_of_them} MiB)"
        return f"{counts}, {saved} MiB less than without the masks: {'; '.join(self.masks)}"


def keeps_all(masks: Sequence[Mask]) -> bool:
    """Whether a group keeps every page."""
    return Everything() in masks


def names_of(masks: Sequence[Mask]) -> tuple[str, ...]:
    """The masks of a group's attentions as text."""
    return tuple(str(mask) for mask in masks if len(masks) == 1 or mask != Everything())


def mask_of(masks: Sequence[Mask]) -> Mask:
    """What any mask of a group shows."""
    return normal_form(Or(tuple(masks)))


def most_pages(
    mask: Mask, tokens: int, page_size: int, chunk_size: int, values: Mapping[str, Any] | None = None
) -> int:
    """The most pages that a sequence holds at once, if pages are freed as soon as the mask hides them.

    Before each step the pool is trimmed, see `PagePool.trim`; then it is extended by the step's tokens. So a sequence
    holds what the mask keeps for its next token, and the pages of one step's tokens.

    **Arguments:**

    - `mask`: ``spec.visibility``.
    - `tokens`: the length of the sequence when it is done.
    - `page_size`: tokens per page.
    - `chunk_size`: the most rows that the sequence has in one step.
    - `values`: the sequence's numbers, by name, that the mask names by `Value`. Where they are not given nothing is
      known of such a mask, and every page counts.

    **Returns:** the number of pages, at most those of all tokens. Of more than 6000 pages some are asked for many, and
    the number may be a few pages larger. Raises ``TypeError`` or ``ValueError`` unless the numbers are positive
    integers.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4, window=1024)
    >>> most_pages(spec.visibility, tokens=32768, page_size=16, chunk_size=256), 32768 // 16
    (81, 2048)
    """
    for name, value in {"tokens": tokens, "page_size": page_size, "chunk_size": chunk_size}.items():
        require_positive_int(name, value)
    own: Any = mask
    if values is not None and values_of(mask):
        numbers = {name: tuple(x.tolist()) if np.ndim(x) else x.item() for name, x in values.items()}
        own = mask.given(Given(numbers))
    total = -(-tokens // page_size)
    if values_of(own) or _pattern(own) == _KEEPS_ALL:
        return total
    # For every length up to a power of two, so that few are computed; and roughly for numbers of single sequences.
    kept = _kept_at_most(own, page_size, 1 << (total - 1).bit_length(), 2**25 if own is mask else 2**20)
    # A step may begin at the last token of a page.
    return min(total, int(kept[total - 1]) - (-(page_size - 1 + min(chunk_size, tokens)) // page_size))


def pages_for(
    mask: Mask, *, num_pages: int, num_slots: int, pages_per_seq: int, page_size: int, chunk_size: int = 64
) -> int:
    """How many pages the layers of a mask need, so that they never are what sequences wait for.

    **Arguments:**

    - `mask`: ``spec.visibility``.
    - `num_pages`: pages of layers that keep every page: the most that any layer needs.
    - `num_slots`, `pages_per_seq`, `page_size`: sequences at once, the most pages of one, and tokens per page.
    - `chunk_size`: the most rows that a sequence has in one step.

    **Returns:** the number of pages: `most_pages` for each slot, or ``num_pages`` if that is less.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4, window=1024)
    >>> pages_for(spec.visibility, num_pages=2048, num_slots=4, pages_per_seq=2048, page_size=16)
    276
    """
    return min(num_pages, num_slots * most_pages(mask, pages_per_seq * page_size, page_size, chunk_size))


@functools.lru_cache(maxsize=1024)
def _kept_at_most(mask: Mask, page_size: int, total: int, budget: int) -> np.ndarray:
    """For each number of pages, the most of the pages before it that the mask keeps for a query that begins there.

    At later tokens of a page no more are kept, because a mask that hides a page from all later queries hides it from
    fewer of them. ``budget`` is how many pairs of a query and a page are asked about.
    """
    step = max(1, total * total // budget)
    page = np.arange(0, total, step, dtype=np.int32)
    counts = np.zeros(len(page), np.int32)
    rows = 2**20 // total + 1
    for first in range(0, len(page), rows):
        some = page[first : first + rows]
        kept = kept_pages(mask, some * page_size, page_size, total) & (np.arange(total) < some[:, None])
        counts[first : first + rows] = np.sum(kept, axis=1)
    # Between two that are asked, as many pages more at most as there are between them.
    return np.maximum.accumulate(np.repeat(counts, step)[:total] + np.tile(np.arange(step), len(page))[:total])


@functools.lru_cache(maxsize=1024)
def _pattern(mask: Mask) -> bytes | None:
    """Which tokens a mask keeps, at a sample of positions: near the first ones, and far from them. None: not known."""
    if values_of(mask):
        return None
    near = np.arange(_NEAR, dtype=np.int32)
    patterns = []
    for positions, keys in ((near, near), (_FAR, np.concatenate([near[:8], _FAR[::5]])), (_FAR, _FAR - 1)):
        patterns.append(kept_tokens(mask, positions, keys) | (positions[:, None] <= keys))
    return b"".join(np.packbits(pattern).tobytes() for pattern in patterns)


_KEEPS_ALL = _pattern(Everything())
