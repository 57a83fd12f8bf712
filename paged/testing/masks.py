"""`check_mask`: what a mask must promise, so that every lowering may evaluate it and skip pages by it."""

import copy
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import normal_form
from paged.spec import Causal, Chunk, Everything, Mask, Nothing, Prefix, Window

from .failures import CheckFailure, require
from .positions import Rectangle, Region, all_rectangles, integers_in, regions_about, some_and_full


def check_mask(mask: Mask, *, rule: Callable[[int, int], bool] | None = None) -> None:
    """Check every promise of a mask, on small, large and negative positions.

    **Arguments:**

    - `mask`: a mask. Positions are tried about every integer that its fields hold.
    - `rule`: what the mask means: ``rule(p, j)`` of two Python integers is whether the query at ``p`` sees the key at
      ``j``. With None the promises alone are checked, which a mask may keep and mean something else.

    **Raises:** `CheckFailure` with the smallest counterexample, of the first of `MASK_CHECKS` that fails, or of the
    check ``"rule"``.

    >>> check_mask(Causal() & Window(4))
    >>> @dataclasses.dataclass(frozen=True)
    ... class Behind(Mask):
    ...     def __call__(self, p, j):
    ...         return j < p
    ...     def coverage(self, p0, p1, j0, j1):
    ...         return Coverage(some=j0 < p1, full=j1 <= p0)  # some: should be j0 < p1 - 1
    >>> check_mask(Behind())  # right: partial is always allowed, and full is exact
    """
    for check in MASK_CHECKS.values():
        check(mask)
    if rule is not None:
        check_rule(mask, rule)


def check_hashable(mask: Mask) -> None:
    """A mask has a hash, and equals its copy: JAX finds a compiled program by it."""
    name = "hashable"
    try:
        hash(mask)
    except TypeError as error:
        raise CheckFailure(
            name,
            f"{mask!r} has no hash ({error}). Make it a frozen dataclass whose fields are hashable: tuples, "
            "numbers and functions, and not lists or arrays.",
        ) from error
    again = copy.copy(mask)
    require(
        again == mask and hash(again) == hash(mask), name,
        f"{mask!r} does not equal its copy, so every new object would be compiled again. Make it a frozen dataclass.",
    )  # fmt: skip


def check_values(mask: Mask) -> None:
    """Values are booleans of the broadcast shape, elementwise, and the same under ``jax.jit``."""
    for region in regions_about(mask):
        _check_values_in(mask, region)


def _check_values_in(mask: Mask, region: Region) -> None:
    name, p, j = "values", region.p, region.j
    shape = (len(p), j.shape[1])
    got = jax.eval_shape(lambda p, j: jnp.asarray(mask(p, j)), p, j)
    require(
        got.dtype == bool, name, f"{mask} returns {got.dtype}, and a mask returns booleans: compare, as in `j <= p`."
    )
    require(
        got.shape == shape, name,
        f"{mask} of positions {p.shape} and {j.shape} returns shape {got.shape}, and must return the broadcast shape "
        f"{shape}. Where a mask ignores one position, write `(j < 4) & (p == p)`.",
    )  # fmt: skip
    values = grid(mask, region)
    jitted = np.asarray(_jitted(mask)(p, j))
    _require_equal(mask, region, values, jitted, "outside of jax.jit, but not inside")
    for at in (0, len(p) - 2):
        alone = np.asarray(mask(p[at : at + 2], j[:, at : at + 2]))
        part = Region(region.p0 + at, region.j0 + at)
        _require_equal(mask, part, values[at : at + 2, at : at + 2], alone, "in a grid, but not alone")
    one = bool(mask(int(p[-1, 0]), int(j[0, -1])))
    require(
        one == values[-1, -1], name,
        f"{mask} at p={int(p[-1, 0])}, j={int(j[0, -1])} is {one} for Python integers and {not one} for arrays.",
    )  # fmt: skip


@functools.lru_cache(maxsize=4)
def _jitted(mask: Mask) -> Callable[[np.ndarray, np.ndarray], jax.Array]:
    return jax.jit(lambda p, j: jnp.asarray(mask(p, j)))


def _require_equal(mask: Mask, region: Region, want: np.ndarray, got: np.ndarray, where: str) -> None:
    at = _first(want != got, region)
    if at is not None:
        value = bool(want[at.p - region.p0, at.j - region.j0])
        raise CheckFailure(
            "values",
            f"{mask} at {at} is {value} {where}. A mask is elementwise: its value depends on the pair alone.",
        )


class _Pair(NamedTuple):
    p: int
    j: int

    def __str__(self) -> str:
        return f"p={self.p}, j={self.j}"


def _first(is_wrong: np.ndarray, region: Region) -> _Pair | None:
    """The first pair of a region where something is wrong, if any."""
    wrong = np.argwhere(is_wrong)
    return _Pair(int(wrong[0, 0]) + region.p0, int(wrong[0, 1]) + region.j0) if len(wrong) else None


def check_coverage(mask: Mask) -> None:
    """Coverage is never wrong: where it says *empty* no pair is visible, and where it says *full* every pair is."""
    answer_at = jax.jit(lambda p0, p1, j0, j1: tuple(jnp.asarray(x) for x in mask.coverage(p0, p1, j0, j1)))
    worst: tuple[Rectangle, str] | None = None
    for region in regions_about(mask):
        some, full = some_and_full(grid(mask, region))
        first = np.array([region.p0, region.p0, region.j0, region.j0], np.int64)
        every = (all_rectangles() + first).astype(np.int32)
        got_some, got_full = (np.broadcast_to(np.asarray(x), len(every)) for x in answer_at(*every.T))
        for is_wrong, said in (
            (some & ~got_some, "empty"),
            (got_full & ~full, "full"),
            (got_full & ~got_some, "full and not some"),
        ):
            if is_wrong.any():
                rectangle = Rectangle(*(int(x) for x in every[np.argmax(is_wrong)]))
                if worst is None or _area(rectangle) < _area(worst[0]):
                    worst = rectangle, said
        _check_integers(mask, region, every, got_some, got_full)
    if worst is not None:
        raise CheckFailure("coverage", _wrong_coverage(mask, *worst))


def _check_integers(mask: Mask, region: Region, every: np.ndarray, some: np.ndarray, full: np.ndarray) -> None:
    """Python integers, which tell pages apart while JAX traces, get the answers that arrays get."""
    for i in range(0, len(every), len(every) // 7):
        rectangle = Rectangle(*(int(x) for x in every[i]))
        answer = mask.coverage(*rectangle)
        require(
            (bool(answer.some), bool(answer.full)) == (some[i], full[i]), "coverage",
            f"{mask} says {answer} of {rectangle} for Python integers, and some={some[i]}, full={full[i]} for arrays.",
        )  # fmt: skip


def _area(r: Rectangle) -> int:
    return (r.p1 - r.p0) * (r.j1 - r.j0)


def _wrong_coverage(mask: Mask, r: Rectangle, said: str) -> str:
    """The counterexample in words."""
    if said == "full and not some":
        return f"{mask} says full=True and some=False of {r}: where every pair is visible, some pair is."
    values = np.asarray(mask(np.arange(r.p0, r.p1)[:, None], np.arange(r.j0, r.j1)[None, :]))
    p, j = np.argwhere(values == (said == "empty"))[0]
    sees = "sees" if said == "empty" else "does not see"
    remedy = (
        "some must be True wherever one pair may be visible"
        if said == "empty"
        else "full must be True only where every pair is visible"
    )
    return (
        f"{mask} says that {r} is {said}, but the query at p={r.p0 + p} {sees} the key at j={r.j0 + j}. {remedy}; the "
        "last query is p1 - 1 and the last key is j1 - 1. Coverage(some=True, full=False) is always allowed."
    )


def check_implies(mask: Mask) -> None:
    """``implies`` is never wrong: what this mask shows, a mask that it implies shows too."""
    others = related(mask)
    for region in regions_about(mask):
        own = grid(mask, region)
        for other in others:
            if not mask.implies(other):
                continue
            at = _first(own & ~grid(other, region), region)
            if at is not None:
                raise CheckFailure(
                    "implies",
                    f"{mask} says that it implies {other}, but at {at} the first is visible and the second is not. "
                    "False is always allowed.",
                )


def check_normal_form(mask: Mask) -> None:
    """Programs keep the meaning: the normal form of the mask, alone and in combinations, has the mask's values."""
    combined = [mask, ~mask]
    for other in related(mask):
        combined += [mask & other, mask | ~other]
    for region in regions_about(mask)[:4]:
        for whole in combined:
            at = _first(grid(whole, region) != grid(normal_form(whole), region), region)
            if at is not None:
                raise CheckFailure(
                    "normal form",
                    f"{whole} becomes {normal_form(whole)} in a program, which differs at {at}. Look at __eq__, "
                    "__hash__ and implies of the terms: equal masks must have equal values.",
                )


def check_rule(mask: Mask, rule: Callable[[int, int], bool]) -> None:
    """The mask has the rule's value at every pair."""
    for region in regions_about(mask):
        want = np.array([[bool(rule(int(p), int(j))) for j in region.j[0]] for p in region.p[:, 0]])
        at = _first(grid(mask, region) != want, region)
        if at is not None:
            value = bool(want[at.p - region.p0, at.j - region.j0])
            raise CheckFailure("rule", f"{mask} at {at} is {not value}, and the rule says {value}.")


MASK_CHECKS: dict[str, Callable[[Mask], None]] = {
    "hashable": check_hashable,
    "values": check_values,
    "coverage": check_coverage,
    "implies": check_implies,
    "normal form": check_normal_form,
}


def related(mask: Mask) -> Sequence[Mask]:
    """Masks that programs may compare with this one: built-in masks about its own numbers, and its own type."""
    sizes = sorted({n for m in integers_in(mask) for n in (m - 1, m, m + 1) if 0 < n < 2**31})[:6] or [4]
    kinds = [Causal(), Everything(), Nothing(), *(kind(n) for kind in (Window, Prefix, Chunk) for n in sizes)]
    return [*kinds, *(~kind for kind in kinds[3:])]


def grid(mask: Mask, region: Region) -> np.ndarray:
    """The mask's values in a region, bool[side, side]."""
    p, j = region.p, region.j
    return np.broadcast_to(np.asarray(mask(p, j)), (len(p), j.shape[1]))
