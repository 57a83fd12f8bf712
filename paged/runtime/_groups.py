"""Groups of masks that keep the same pages, and how many pages a mask keeps."""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np

from paged.lower import normal_form
from paged.spec import AttentionSpec, Everything, Mask, Or, require_positive_int, values_of

from ._kept import kept_pages

Masks = tuple[Mask, ...]

# Where two masks are compared: at the first tokens, and up to far ones in steps of two percent.
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


def most_pages(mask: Mask, tokens: int, page_size: int, chunk_size: int) -> int:
    """The most pages that a sequence holds at once, if pages are freed as soon as the mask hides them.

    Before each step the pool is trimmed, see `PagePool.trim`; then it is extended by the step's tokens. So a sequence
    holds what the mask keeps for its next token, and the pages of one step's tokens.

    **Arguments:**

    - `mask`: ``spec.visibility``. With a number that a batch brings nothing is known, and every page counts.
    - `tokens`: the length of the sequence when it is done.
    - `page_size`: tokens per page.
    - `chunk_size`: the most rows that the sequence has in one step.

    **Returns:** the number of pages, at most those of all tokens. Raises ``TypeError`` or ``ValueError`` unless the
    numbers are positive integers.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4, window=1024)
    >>> most_pages(spec.visibility, tokens=32768, page_size=16, chunk_size=256), 32768 // 16
    (81, 2048)
    """
    for name, value in {"tokens": tokens, "page_size": page_size, "chunk_size": chunk_size}.items():
        require_positive_int(name, value)
    return _most_pages(mask, tokens, page_size, min(chunk_size, tokens))


@functools.lru_cache(maxsize=1024)
def _most_pages(mask: Mask, tokens: int, page_size: int, chunk_size: int) -> int:
    total = -(-tokens // page_size)
    if values_of(mask) or _pattern(mask) == _KEEPS_ALL:
        return total
    # Of the full pages fewest are freed at the first token of a page: later tokens see no more of them.
    rows, most = 2**20 // total + 1, 0
    for first in range(0, total, rows):
        page = np.arange(first, min(first + rows, total), dtype=np.int32)
        kept = kept_pages(mask, page * page_size, page_size, total)
        most = max(most, int(np.max(np.sum(kept & (np.arange(total) < page[:, None]), axis=1))))
    # A step may begin at the last token of a page.
    return min(total, most + -(-(page_size - 1 + chunk_size) // page_size))


@functools.lru_cache(maxsize=1024)
def _pattern(mask: Mask) -> bytes | None:
    """Which tokens a mask keeps, at a sample of positions: near the first ones, and far from them. None: not known."""
    if values_of(mask):
        return None
    near = np.arange(_NEAR, dtype=np.int32)
    patterns = [kept_pages(mask, near, 1, _NEAR) | (near[:, None] <= near), kept_pages(mask, _FAR, 1, 4)]
    return b"".join(np.packbits(pattern).tobytes() for pattern in patterns)


_KEEPS_ALL = _pattern(Everything())
