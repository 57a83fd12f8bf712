"""Page intervals: which pages a few query rows see, by arithmetic, where they are provably one run of pages.

`Program.coverage` of a page is traced as a function of the page's first key. A comparison that is monotone in it has
one *edge*: it is false before a page and true from there on, or the other way round. A conjunction of such comparisons
is true in one run of pages, so the first and the last visible page are known without looking at the pages between them.
The edge of a linear comparison is a quotient; that of another monotone one is found by bisection.

What is not proven to be one run has no intervals. Lowerings then list its pages, see `Visits`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from paged.spec import Coverage, Value

from .brought import by_name, dtypes_of
from .monotone import Condition, Point, conditions_of, greater, lesser


class PageIntervals(NamedTuple):
    """The pages that consecutive query rows of one sequence see, and those that they see in full, as two intervals.

    All arguments and results are int32 scalars, so that the scalar core of a TPU can compute them.
    """

    page_size: int
    some: Condition
    full: Condition | None

    @property
    def begin_at_0(self) -> bool:
        """Whether the rows that see a page, or see it in full, see all pages before it alike."""
        return self.some.begin is None and (self.full is None or self.full.begin is None)

    def visible(self, p0: Any, p1: Any, length: Any, width: int, numbers: tuple[Any, ...] = ()) -> tuple[Any, Any]:
        """The first page that the rows at ``[p0, p1)`` may see, and the page after the last one.

        ``length`` is the number of keys, and ``width`` the number of pages that there are. The two are equal where
        nothing is visible.
        """
        return _interval(self.some, Point(None, p0, p1, length, width, self.page_size, numbers), 0, width)

    def visible_in_full(
        self, p0: Any, p1: Any, length: Any, width: int, first: Any, end: Any, numbers: tuple[Any, ...] = ()
    ) -> tuple[Any, Any]:
        """Of the visible pages ``[first, end)``, the interval of those of which the rows see every key."""
        if self.full is None:
            return first, first
        return _interval(self.full, Point(None, p0, p1, length, width, self.page_size, numbers), first, end)


def page_intervals(
    coverage: Callable[..., Coverage], values: tuple[Value, ...], page_size: int
) -> PageIntervals | None:
    """The page intervals of a program's ``coverage(p0, p1, j0, j1, length, numbers)``, None where they are not proven.

    ``values`` are the numbers that a batch brings. Intervals are then asked for with these numbers in order, those of a
    value with a size one by one.
    """

    def of_page(j0: Any, p0: Any, p1: Any, length: Any, *numbers: Any) -> tuple[Any, Any]:
        return tuple(coverage(p0, p1, j0, j0 + page_size, length, by_name(values, numbers)))  # pyright: ignore

    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    numbers = [jax.ShapeDtypeStruct((), dtype) for dtype in dtypes_of(values)]
    some, full = conditions_of(jax.make_jaxpr(of_page)(*[scalar] * 4, *numbers), page_size)
    return None if some is None else PageIntervals(page_size, some, full)


def _interval(condition: Condition, at: Point, first: Any, end: Any) -> tuple[Any, Any]:
    """The pages of ``[first, end)`` where a condition holds."""
    begin = first if condition.begin is None else lesser(greater(condition.begin(at), first), end)
    last = end if condition.end is None else greater(lesser(condition.end(at), end), begin)
    return begin, last if condition.always is None else jnp.where(condition.always(at), last, begin)
