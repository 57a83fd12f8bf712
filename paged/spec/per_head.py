"""`PerHead`: another mask for each query head, or for each group of heads."""

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

from .coverage import Coverage
from .mask import Mask


@dataclasses.dataclass(frozen=True)
class PerHead(Mask):
    """Another mask for each query head, or for each run of consecutive heads.

    A page is skipped where no head sees it.

    **Arguments:**

    - `masks`: ``n`` masks. A spec of ``num_q_heads`` query heads, a multiple of ``n``, gives the first mask to its
      first ``num_q_heads // n`` heads, and so on. So ``num_q_heads`` masks are one for each head, and ``num_kv_heads``
      masks one for each group.
    - `num_q_heads`: filled in by the spec, see `bind`.

    **Raises:** ``TypeError`` unless they are masks; ``ValueError`` in a spec whose heads they do not divide.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8, mask=PerHead((Window(2), Everything())))
    >>> mask = spec.visibility.given(Given(head=jnp.array([0, 3])[:, None]))
    >>> mask(6, jnp.arange(7)[None]).astype(int).tolist()
    [[0, 0, 0, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
    """

    has_heads = True

    masks: tuple[Mask, ...] | Sequence[Mask]
    num_q_heads: int | None = None

    _head: ClassVar[Any] = None  # of an instance, once it is given

    def __post_init__(self):
        if not isinstance(self.masks, tuple | list) or not self.masks:
            raise TypeError(f"PerHead needs masks, such as PerHead((Window(128), Everything())); got {self.masks!r}.")
        if not all(isinstance(mask, Mask) for mask in self.masks):
            raise TypeError(f"PerHead needs masks, such as PerHead((Window(128), Everything())); got {self.masks!r}.")
        object.__setattr__(self, "masks", tuple(self.masks))

    @property
    def is_opaque(self) -> bool:
        return any(mask.is_opaque for mask in self.masks)

    def bind(self, num_q_heads):
        if self.num_q_heads not in (None, num_q_heads) or num_q_heads % len(self.masks):
            raise ValueError(
                f"PerHead has {len(self.masks)} masks, which must divide the spec's {num_q_heads} query heads evenly."
            )
        masks = tuple(mask.bind(num_q_heads) for mask in self.masks)
        return dataclasses.replace(self, masks=masks, num_q_heads=num_q_heads)

    def given(self, given):
        new = copy.copy(super().given(given))
        object.__setattr__(new, "_head", given.head)
        return new

    def __call__(self, p, j):
        if self._head is None or self.num_q_heads is None:
            raise TypeError(f"{self} differs by query head, and none is given: use it in a spec, whose heads it needs.")
        which, value = self._head // (self.num_q_heads // len(self.masks)), None
        for i, mask in enumerate(self.masks):
            of_heads = (which == i) & mask(p, j)
            value = of_heads if value is None else value | of_heads
        return value

    def coverage(self, p0, p1, j0, j1):
        coverage = self.masks[0].coverage(p0, p1, j0, j1)
        for mask in self.masks[1:]:
            some, full = mask.coverage(p0, p1, j0, j1)
            coverage = Coverage(coverage.some | some, coverage.full & full)
        return coverage

    def __str__(self):
        return f"by head: {'; '.join(map(str, self.masks))}"
