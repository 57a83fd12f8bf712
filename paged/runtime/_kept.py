"""Which pages a mask still needs: those that a query to come may see."""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from paged.spec import Given, Mask, values_of

# Past every position: a mask may add to it without leaving int32.
_END = 2**30


def kept_pages(
    mask: Mask, positions: Any, page_size: int, pages_per_seq: int, values: Mapping[str, Any] | None = None
) -> Bool[Array | np.ndarray, "seqs pages_per_seq"]:
    """For each sequence, the pages of which the mask may show a key to a query at ``positions[s]`` or later.

    A page is not kept where the mask's coverage of ``[positions[s], infinity) x page`` is certainly empty.

    **Arguments:**

    - `mask`: the whole mask of an attention.
    - `positions` i32[seqs]: the next position of each sequence. NumPy's are answered on the host.
    - `page_size`, `pages_per_seq`: tokens per page, and pages of the table.
    - `values`: the numbers that the mask names, for each sequence: [seqs] or [seqs, size].

    **Returns:** bool[seqs, pages_per_seq], for full pages: keys that are not written yet count as well.
    """
    xp: Any = np if isinstance(positions, np.ndarray) else jnp
    first = xp.arange(pages_per_seq, dtype=xp.int32) * page_size
    numbers = _numbers(mask, values, positions.shape[0])
    return _kept(xp, mask, positions, first, page_size, max(_END, pages_per_seq * page_size), numbers)


def kept_tokens(mask: Mask, positions: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Whether the mask may show each of some keys to a query at ``positions[s]`` or later: bool[positions, keys]."""
    return _kept(np, mask, positions, keys, 1, _END, {})


def _kept(xp: Any, mask: Mask, positions: Any, first: Any, size: int, end: int, numbers: dict[str, Any]) -> Any:
    own: Any = mask.given(Given(numbers, is_ancestor=True))
    some = own.coverage(positions[:, None], end, first[None], first[None] + size).some
    return xp.broadcast_to(xp.asarray(some, bool), (positions.shape[0], first.shape[0]))


def _numbers(mask: Mask, values: Mapping[str, Any] | None, num_slots: int) -> dict[str, Any]:
    """Each number that the mask names, as a column of sequences."""
    numbers, given = {}, {} if values is None else values
    for value in values_of(mask):
        if value.name not in given:
            raise ValueError(f"values must have {value.name!r}, which the mask {mask} names; got {sorted(given)}.")
        x, shape = given[value.name], (num_slots,) if value.size is None else (num_slots, value.size)
        if x.shape != shape:
            raise ValueError(f"values[{value.name!r}] must be {value.dtype}{list(shape)}; got shape {x.shape}.")
        numbers[value.name] = x[:, None] if value.size is None else tuple(x[:, i, None] for i in range(value.size))
    return numbers
