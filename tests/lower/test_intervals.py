"""Page intervals are the pages that coverage gives one by one, for every mask whose pages are proven to be one run."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from paged.lower import Program
from paged.spec import Causal, Chunk, Coverage, Everything, Mask, Nothing, Prefix, Where, Window
from tests.support.specs import PLAIN

WIDTH, MOST = 13, 2**31 - 1


class Own(Mask):
    """A mask of this file, of which only the coverage is asked."""

    def __call__(self, p, j):
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Slanted(Own):
    """Bounds with products, quotients, a minimum, and a difference that falls."""

    def coverage(self, p0, p1, j0, j1):
        def before(p, j):
            return j // 3 <= jnp.minimum(p // 2 + 3, 50)

        def after(p, j):
            return -3 * j + 2 * p < 40

        return Coverage(before(p1 - 1, j0) & after(p0, j1 - 1), before(p0, j1 - 1) & after(p1 - 1, j0))


@dataclasses.dataclass(frozen=True)
class Bent(Own):
    """A bound that rises in two slopes: only bisection finds its edge. And one that moves on both sides."""

    def coverage(self, p0, p1, j0, j1):
        def before(p, j):
            return (jnp.maximum(j, 2 * j - 20) <= p) & (j + 1 > 20 - j)

        return Coverage(before(p1 - 1, j0 + 8), before(p0, j1 - 1))


@dataclasses.dataclass(frozen=True)
class Joined(Own):
    """Conditions whose "or" and "not" change alike, or that are the same for all pages; sums of several numbers."""

    kind: str

    def coverage(self, p0, p1, j0, j1):
        some = {
            "begins": lambda: ((j0 >= p0) & (p0 > 30)) | (j0 >= 40),
            "ends": lambda: ((j0 <= p0) & (p0 > 30)) | (j0 <= 20),
            "still or end": lambda: (p0 > 30) | (j0 < 20),
            "still or begin": lambda: (j0 >= 20) | (p0 > 30),
            "still or both": lambda: (p0 > 30) | ((j0 < 20) & (p1 > 9)),
            "not still": lambda: ~(p0 < 20) & (j0 <= p1),
            "not once": lambda: ~((j0 < p0) & (p0 > 30)),
            "known": lambda: (j0 <= p1) & np.bool_(True) & (j0 // 3 <= 12),
            "two that rise": lambda: j0 + 2 * j0 <= p1 + 0 * p0,
            "two arguments": lambda: (j0 <= p0 + p1) & (j0 >= p0 - p1 + 9),
        }
        return Coverage(some[self.kind](), False)


JOINED = ("begins", "ends", "still or end", "still or begin", "still or both", "not still", "not once", "known")
JOINED += ("two that rise", "two arguments")


@dataclasses.dataclass(frozen=True)
class Apart(Own):
    """Pages that are no run, or that are not known to be one."""

    kind: str

    def coverage(self, p0, p1, j0, j1):
        some = {
            "inequality": lambda: j0 != 16,
            "remainder": lambda: j0 % 32 == 0,
            "square": lambda: j0 * j0 <= p1,
            "float": lambda: j0.astype(jnp.float32) < p1.astype(jnp.float32),
            "shift": lambda: j0 >> 1 < p1,
            "divisor": lambda: j0 // p1 < 3,
            "not both": lambda: ~((j0 >= 8) & (j0 < 40)),
            "fall and rise": lambda: j0 + -(j0 // 2) < p1,
            "least of both": lambda: jnp.minimum(j0, -j0) < p1,
            "both rise": lambda: j0 <= 2 * j0 - 20,
        }
        return Coverage(some[self.kind](), False)


APART = ("inequality", "remainder", "square", "float", "shift", "divisor", "not both", "fall and rise")
APART += ("least of both", "both rise")


def even(p, j):
    return j % 2 == 0


ONE_RUN = {
    "causal": Causal(),
    "window": Causal() & Window(9),
    "chunk": Causal() & Chunk(12),
    "chunk without causal": Chunk(20),
    "window and chunk": Causal() & Chunk(40) & Window(17),
    "widest": Causal() & Window(MOST) & Chunk(MOST),
    "older than a window": Causal() & ~Window(7),
    "prefix": Causal() | Prefix(30),
    "where": Causal() & Where(even),
    "everything": Everything(),
    "nothing": Nothing(),
    "slanted": Causal() & Slanted(),
    "bent": Bent(),
    **{kind: Joined(kind) for kind in JOINED},
}
NOT_ONE_RUN = {
    "window and prefix": Causal() & (Window(4) | Prefix(3)),
    "other chunks": Causal() & ~Chunk(8),
    **{kind: Apart(kind) for kind in APART},
}


def _program(mask):
    return Program.from_spec(PLAIN.replace(causal=False, mask=mask))


def _rows(page_size, with_most):
    """First positions, positions after the last, and numbers of stored keys, of sequences of 1 to 3 rows."""
    rng = np.random.default_rng(0)
    lengths = [*range(12), *rng.integers(0, WIDTH * page_size + 30, 150)]
    lengths += [MOST, *(MOST - rng.integers(0, 100, 20))] if with_most else []
    length, rows = np.array(lengths), rng.integers(1, 4, len(lengths))
    stored = np.minimum(length, WIDTH * page_size)
    return [jnp.asarray(x, jnp.int32) for x in (length - rows, length, stored)]


@pytest.mark.parametrize("page_size", [8, 24])
@pytest.mark.parametrize("name", ONE_RUN)
def test_intervals_are_the_pages_of_coverage(name, page_size):
    """And the intervals of full pages, also where positions are the greatest and sums would wrap."""
    program = _program(ONE_RUN[name])
    intervals = program.page_intervals(page_size)
    # With these the mask's own products wrap.
    p0, p1, length = _rows(page_size, with_most=name not in ("slanted", "bent", "two that rise", "two arguments"))

    def of_row(*row):
        first, end = intervals.visible(*row, WIDTH)
        full = intervals.visible_in_full(*row, WIDTH, first, end)
        return [jnp.asarray(x, jnp.int32) for x in (first, end, *full)]

    found = [np.asarray(x)[:, None] for x in jax.vmap(of_row)(p0, p1, length)]
    page = np.arange(WIDTH, dtype=np.int32)[None]
    j0 = jnp.asarray(page * page_size)
    want = program.coverage(p0[:, None], p1[:, None], j0, j0 + page_size, length[:, None])
    for (first, end), pages in zip((found[:2], found[2:]), (want.some, want.some & want.full), strict=True):
        np.testing.assert_array_equal((page >= first) & (page < end), np.broadcast_to(pages, (len(p0), WIDTH)))


@pytest.mark.parametrize("name", NOT_ONE_RUN)
def test_what_is_not_proven_to_be_one_run_has_no_intervals(name):
    assert _program(NOT_ONE_RUN[name]).page_intervals(8) is None


def test_a_full_interval_is_not_needed():
    """Where only the visible pages are proven, no page counts as seen in full."""

    @dataclasses.dataclass(frozen=True)
    class Half(Own):
        def coverage(self, p0, p1, j0, j1):
            return Coverage(j0 < p1, (j1 <= p0) & (j0 % 32 == 0))

    intervals = _program(Half()).page_intervals(8)
    assert [int(x) for x in intervals.visible(39, 40, 40, WIDTH)] == [0, 5]
    assert intervals.visible_in_full(39, 40, 40, WIDTH, 0, 5) == (0, 0)


def test_a_scalar_that_a_mask_closes_over_is_not_known_when_the_kernel_is_made():
    bound = jnp.int32(20)

    @dataclasses.dataclass(frozen=True)
    class Closed(Own):
        def coverage(self, p0, p1, j0, j1):
            return Coverage(j0 < bound, j1 <= bound)

    assert _program(Closed()).page_intervals(8) is None
