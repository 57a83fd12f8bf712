"""Where a sequence may be cut into steps: where no row before the cut sees a key after it."""

import numpy as np

from paged.spec import Mask

_TILE = 512  # positions on a side of the squares in which a mask is evaluated


def first_rows(mask: Mask, tokens: int) -> np.ndarray:
    """For each key of a sequence, the first query position that sees it before its own.

    **Arguments:**

    - `mask`: the whole mask of an attention. It is evaluated on the host where its coverage does not suffice.
    - `tokens`: how many tokens the sequence has.

    **Returns:** int64[tokens]: the least position ``p < j`` that sees key ``j``, or ``j`` where there is none.

    >>> first_rows(Causal() | Prefix(3), 5).tolist()
    [0, 0, 0, 3, 4]
    """
    first = np.arange(tokens)
    cuts = np.arange(1, tokens)
    if not np.any(mask.coverage(0, cuts, cuts, tokens).some):
        return first
    for p0 in range(0, tokens, _TILE):
        for j0 in range(p0, tokens, _TILE):
            rows, keys = (np.arange(start, min(start + _TILE, tokens), dtype=np.int32) for start in (p0, j0))
            if np.any(first[keys] > p0):  # else an earlier row sees all of them
                seen = _visible(mask, rows[:, None], keys[None]) & (rows[:, None] < keys[None])
                found = np.where(np.any(seen, axis=0), p0 + np.argmax(seen, axis=0), keys)
                first[keys] = np.minimum(first[keys], found)
    return first


def may_cut(first: np.ndarray) -> np.ndarray:
    """Where a sequence may be cut, so that its tokens can be written and attended to in several steps.

    **Arguments:**

    - `first`: what `first_rows` says of the sequence's keys.

    **Returns:** bool[tokens + 1]: whether no row before position ``e`` sees a key at ``e`` or later. A step that ends
    elsewhere computes rows whose keys are not written yet.

    >>> may_cut(first_rows(Causal() | Prefix(3), 5)).tolist()
    [True, False, False, True, True, True]
    """
    keys = np.arange(len(first))
    is_ahead = first < keys
    # Key j forbids the cuts after first[j], up to j itself.
    opened = np.bincount(first[is_ahead] + 1, minlength=len(first) + 2)
    closed = np.bincount(keys[is_ahead] + 1, minlength=len(first) + 2)
    return np.cumsum(opened - closed)[: len(first) + 1] == 0


def seen_ahead(first: np.ndarray, cut: int) -> tuple[int, int]:
    """A row before a cut that may not be made, and a key after it that the row sees."""
    key = cut + int(np.argmax(first[cut:] < cut))
    return int(first[key]), key


def _visible(mask: Mask, rows: np.ndarray, keys: np.ndarray) -> np.ndarray:
    shape = (rows.shape[0], keys.shape[1])
    some, full = mask.coverage(rows[0, 0], rows[-1, 0] + 1, keys[0, 0], keys[0, -1] + 1)
    if not some or full:
        return np.full(shape, bool(some))
    return np.broadcast_to(np.asarray(mask(rows, keys)), shape)
