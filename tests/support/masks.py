"""Random masks, and their values and coverage by brute force."""

import hypothesis.strategies as st
import numpy as np

from paged.spec import Mask
from paged.testing.strategies import OPAQUE as OPAQUE
from paged.testing.strategies import leaf_masks, leaf_masks_of_batches
from paged.testing.strategies import masks as nested_masks

from .oracle import NOTHING_ASKED as NOTHING_ASKED
from .oracle import Asked as Asked
from .oracle import mask_by_rule

POSITIONS = range(-4, 13)
KEYS = range(13)


leaves = leaf_masks()
masks = nested_masks()
masks_of_batches = nested_masks(leaf_masks_of_batches() | leaves, max_leaves=4)
rectangles = st.tuples(
    st.integers(-4, 11), st.integers(1, 5), st.integers(0, 11), st.integers(1, 5)
).map(lambda r: (r[0], min(r[0] + r[1], 13), r[2], min(r[2] + r[3], 13)))  # fmt: skip


def grid(mask: Mask) -> np.ndarray:
    """The mask's value at every pair of ``POSITIONS x KEYS``, by the library."""
    p, j = np.array(POSITIONS, np.int32)[:, None], np.array(KEYS, np.int32)[None, :]
    return np.broadcast_to(np.asarray(mask(p, j)), (len(POSITIONS), len(KEYS)))


def rule_grid(mask: Mask, asked: Asked = NOTHING_ASKED) -> np.ndarray:
    """The same, by the rules of the terms, one pair at a time."""
    return np.array([[mask_by_rule(mask, p, j, asked) for j in KEYS] for p in POSITIONS])


def truth(values: np.ndarray, rectangle: tuple[int, int, int, int]) -> str:
    """What a rectangle ``[p0, p1) x [j0, j1)`` of a grid is: empty, partial or full."""
    p0, p1, j0, j1 = rectangle
    inside = values[p0 - POSITIONS[0] : p1 - POSITIONS[0], j0:j1]
    return "full" if inside.all() else "partial" if inside.any() else "empty"
