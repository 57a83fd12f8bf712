"""`Tree`: a row of a tree of drafted tokens sees its ancestors."""

import copy
import dataclasses
from typing import Any, ClassVar

from .coverage import PARTIAL, Coverage
from .mask import Mask


@dataclasses.dataclass(frozen=True)
class Tree(Mask):
    """Of the step's own tokens, a row sees its own and those of its ancestors; of the tokens before them, all.

    The batch says which rows are a row's ancestors, see ``ancestors`` of `RaggedBatch`. So a tree of drafted tokens is
    scored in one step (Miao et al., SpecInfer, arXiv:2305.09781). Give the rows' depths as ``positions`` too. Other
    terms then see a path of the tree as they would see it alone: ``Causal() & Window(128) & Tree()``. Where a batch
    brings no ancestors, rows follow one another and descend from all before them. So the same spec serves prompts.

    >>> print(Causal() & Tree())
    (j <= p) & (j is an ancestor of the row)
    """

    is_opaque, rank, has_ancestors = False, 3, True

    _is_ancestor: ClassVar[Any] = None  # of an instance, once it is given

    def given(self, given):
        new = copy.copy(self)
        object.__setattr__(new, "_is_ancestor", given.is_ancestor)
        return new

    def __call__(self, p, j):
        if self._is_ancestor is None:
            raise TypeError("Tree() is answered from the ancestors that a batch brings: RaggedBatch(..., ancestors=).")
        return self._is_ancestor & (p == p) & (j == j)

    def coverage(self, p0, p1, j0, j1):
        # Lowerings ask it of the tokens before the step's own, which are all visible.
        return Coverage(True, True) if self._is_ancestor is True else PARTIAL

    def __str__(self):
        return "j is an ancestor of the row"
