"""`check_mask`: what a mask must promise, so that every lowering may evaluate it and skip pages by it."""

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from paged.lower import normal_form
from paged.spec import Causal, Chunk, Everything, Given, Mask, Nothing, Prefix, Window, values_of

from .failures import CheckFailure, require
from .positions import Rectangle, Region, all_rectangles, integers_in, regions_about, some_and_full
from .variants import Variant, heads_of, least_of, numbers_for, variants


def check_mask(mask: Mask, *, rule: Callable[..., bool] | None = None) -> None:
    """Check every promise of a mask, on small, large and negative positions.

    **Arguments:**

    - `mask`: a mask. Positions are tried about every integer that its fields hold. A mask that names a `Value` is tried
      with a few numbers, static and traced, and one that differs by head with every head. A `Tree` is asked about
      tokens before the step's own.
    - `rule`: what the mask means: ``rule(p, j)`` of two Python integers is whether the query at ``p`` sees the key at
      ``j``. For a mask that names values or differs by head it is ``rule(p, j, given)``, with a `Given`. With None the
      promises alone are checked, which a mask may keep and mean something else.

    **Raises:** `CheckFailure` with the smallest counterexample, of the first of `MASK_CHECKS` that fails, or of the
    check ``"rule"``.

    >>> check_mask(Causal() & Window(4))
    >>> check_mask(Prefix(Value("prefix")), rule=lambda p, j, given: j < given.numbers["prefix"])
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
    """Values are booleans of the broadcast shape, elementwise, and the same under ``jax.jit``, with traced numbers.

    A number of a batch that is less than the least that it may be counts as the least.
    """
    for variant in variants(mask):
        for region in _regions(variant):
            _check_values_in(variant, region)
        _check_least(variant)


def _check_values_in(variant: Variant, region: Region) -> None:
    name, mask, p, j = "values", variant.of_positions, region.p, region.j
    shape = (len(p), j.shape[1])
    got = jax.eval_shape(lambda p, j: jnp.asarray(mask(p, j)), p, j)
    require(
        got.dtype == bool, name,
        f"{variant} returns {got.dtype}, and a mask returns booleans: compare, as in `j <= p`.",
    )  # fmt: skip
    require(
        got.shape == shape, name,
        f"{variant} of positions {p.shape} and {j.shape} returns shape {got.shape}, and must return the broadcast "
        f"shape {shape}. Where a mask ignores one position, write `(j < 4) & (p == p)`.",
    )  # fmt: skip
    values = grid(variant, region)
    jitted = np.asarray(_jitted(variant.mask)(variant.given[:2], p, j))
    _require_equal(variant, region, values, jitted, "outside of jax.jit, but not inside")
    for at in (0, len(p) - 2):
        alone = np.asarray(mask(p[at : at + 2], j[:, at : at + 2]))
        part = Region(region.p0 + at, region.j0 + at)
        _require_equal(variant, part, values[at : at + 2, at : at + 2], alone, "in a grid, but not alone")
    one = bool(mask(int(p[-1, 0]), int(j[0, -1])))
    require(
        one == values[-1, -1], name,
        f"{variant} at p={int(p[-1, 0])}, j={int(j[0, -1])} is {one} for Python integers and {not one} for arrays.",
    )  # fmt: skip


def _check_least(variant: Variant) -> None:
    """Numbers below the least of each value give what the least gives."""
    least = least_of(variant.mask)
    if not least:
        return
    at_least = {**variant.numbers, **{name: int(number) for name, number in least.items()}}
    below = {name: number - 3 if name in least else number for name, number in at_least.items()}
    region = _regions(variant)[0]
    want, got = (grid(dataclasses.replace(variant, numbers=numbers), region) for numbers in (at_least, below))
    at = _first(want != got, region)
    if at is not None:
        raise CheckFailure(
            "values",
            f"{variant.mask} at {at} differs for {below} and for {at_least}: a number below `least` counts as it. "
            "`Term.given` sees to that.",
        )


@functools.lru_cache(maxsize=4)
def _jitted(mask: Mask) -> Callable[..., jax.Array]:
    """The mask of numbers, a head and positions, all traced."""
    return jax.jit(lambda given, p, j: jnp.asarray(_with(mask, *given)(p, j)))


def _with(mask: Mask, numbers: Any, head: Any) -> Any:
    return mask.given(Given(numbers, head, True))


def _regions(variant: Variant) -> list[Region]:
    return regions_about((variant.mask, *variant.numbers.values()))


def _require_equal(variant: Variant, region: Region, want: np.ndarray, got: np.ndarray, where: str) -> None:
    at = _first(want != got, region)
    if at is not None:
        value = bool(want[at.p - region.p0, at.j - region.j0])
        raise CheckFailure(
            "values",
            f"{variant} at {at} is {value} {where}. A mask is elementwise: its value depends on the pair alone.",
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
    """Coverage is never wrong: where it says *empty* no pair is visible, and where it says *full* every pair is.

    Of a mask that differs by head it is the coverage of all heads together. Numbers of a batch are traced.
    """
    heads = heads_of(mask)
    own = mask if heads is None else mask.bind(heads)
    answer_at = jax.jit(lambda numbers, *at: tuple(jnp.asarray(x) for x in _with(own, numbers, None).coverage(*at)))
    worst: tuple[Rectangle, str, Variant] | None = None
    for numbers in numbers_for(own):
        variant = Variant(own, numbers)
        for region in _regions(variant):
            any_head, all_heads = _of_all_heads(variant, heads, region)
            some, full = some_and_full(any_head)[0], some_and_full(all_heads)[1]
            first = np.array([region.p0, region.p0, region.j0, region.j0], np.int64)
            every = (all_rectangles() + first).astype(np.int32)
            got_some, got_full = (np.broadcast_to(np.asarray(x), len(every)) for x in answer_at(numbers, *every.T))
            for is_wrong, said in (
                (some & ~got_some, "empty"),
                (got_full & ~full, "full"),
                (got_full & ~got_some, "full and not some"),
            ):
                if is_wrong.any():
                    rectangle = Rectangle(*(int(x) for x in every[np.argmax(is_wrong)]))
                    if worst is None or _area(rectangle) < _area(worst[0]):
                        worst = rectangle, said, variant
            _check_integers(variant, region, every, got_some, got_full)
    if worst is not None:
        raise CheckFailure("coverage", _wrong_coverage(*worst, heads))


def _of_all_heads(variant: Variant, heads: int | None, region: Region) -> tuple[np.ndarray, np.ndarray]:
    """Whether any head, and whether every head, sees each pair of a region."""
    each = [None] if heads is None else range(heads)
    grids = np.stack([grid(dataclasses.replace(variant, head=head), region) for head in each])
    return np.asarray(grids.any(axis=0)), np.asarray(grids.all(axis=0))


def _check_integers(variant: Variant, region: Region, every: np.ndarray, some: np.ndarray, full: np.ndarray) -> None:
    """Python integers, which tell pages apart while JAX traces, get the answers that arrays get."""
    mask = variant.of_positions
    for i in range(0, len(every), len(every) // 7):
        rectangle = Rectangle(*(int(x) for x in every[i]))
        answer = mask.coverage(*rectangle)
        require(
            (bool(answer.some), bool(answer.full)) == (some[i], full[i]), "coverage",
            f"{variant} says {answer} of {rectangle} for Python integers, and some={some[i]}, full={full[i]} for "
            "arrays.",
        )  # fmt: skip


def _area(r: Rectangle) -> int:
    return (r.p1 - r.p0) * (r.j1 - r.j0)


def _wrong_coverage(r: Rectangle, said: str, variant: Variant, heads: int | None) -> str:
    """The counterexample in words."""
    if said == "full and not some":
        return f"{variant} says full=True and some=False of {r}: where every pair is visible, some pair is."
    values = _of_all_heads(variant, heads, Region(r.p0, r.j0))[said == "full"][: r.p1 - r.p0, : r.j1 - r.j0]
    p, j = np.argwhere(values == (said == "empty"))[0]
    sees = "sees" if said == "empty" else "does not see"
    remedy = (
        "some must be True wherever one pair may be visible"
        if said == "empty"
        else "full must be True only where every pair is visible"
    )
    of_heads = "" if heads is None else ", for any head" if said == "empty" else ", for every head"
    return (
        f"{variant} says that {r} is {said}, but the query at p={r.p0 + p} {sees} the key at j={r.j0 + j}. {remedy}"
        f"{of_heads}; the last query is p1 - 1 and the last key is j1 - 1. Coverage(some=True, full=False) is always "
        "allowed."
    )


def check_implies(mask: Mask) -> None:
    """``implies`` is never wrong: what this mask shows, a mask that it implies shows too."""
    for variant in variants(mask):
        implied = [other for other in related(variant) if variant.mask.implies(other)]
        for region in _regions(variant) if implied else ():
            own = grid(variant, region)
            for other in implied:
                at = _first(own & ~grid(variant.of(other), region), region)
                if at is not None:
                    raise CheckFailure(
                        "implies",
                        f"{variant} says that it implies {other}, but at {at} the first is visible and the second is "
                        "not. False is always allowed.",
                    )


def check_normal_form(mask: Mask) -> None:
    """Programs keep the meaning: the normal form of the mask, alone and in combinations, has the mask's values."""
    for variant in variants(mask):
        own = variant.mask
        combined = [own, ~own]
        for other in related(variant):
            combined += [own & other, own | ~other]
        for whole, form in [(whole, normal_form(whole)) for whole in combined]:
            for region in _regions(variant)[:4]:
                at = _first(grid(variant.of(whole), region) != grid(variant.of(form), region), region)
                if at is not None:
                    raise CheckFailure(
                        "normal form",
                        f"{variant.of(whole)} becomes {form} in a program, which differs at {at}. Look at __eq__, "
                        "__hash__ and implies of the terms: equal masks must have equal values.",
                    )


def check_rule(mask: Mask, rule: Callable[..., bool]) -> None:
    """The mask has the rule's value at every pair."""
    for variant in variants(mask):
        is_asking = variant.numbers or variant.head is not None
        given = (Given(variant.numbers, variant.head),) if is_asking else ()
        for region in _regions(variant):
            want = np.array([[bool(rule(int(p), int(j), *given)) for j in region.j[0]] for p in region.p[:, 0]])
            at = _first(grid(variant, region) != want, region)
            if at is not None:
                value = bool(want[at.p - region.p0, at.j - region.j0])
                raise CheckFailure("rule", f"{variant} at {at} is {not value}, and the rule says {value}.")


MASK_CHECKS: dict[str, Callable[[Mask], None]] = {
    "hashable": check_hashable,
    "values": check_values,
    "coverage": check_coverage,
    "implies": check_implies,
    "normal form": check_normal_form,
}
"""What `check_mask` checks, by name: each is a function of a mask, which raises `CheckFailure`."""


def related(variant: Variant) -> Sequence[Mask]:
    """Masks that programs may compare with this one: built-in masks about its own numbers, and of its own values."""
    mask = variant.mask
    numbers = integers_in((mask, *variant.numbers.values()))
    sizes: list[Any] = sorted({n for m in numbers for n in (m - 1, m, m + 1) if 0 < n < 2**31})[:6] or [4]
    sizes += [value for value in values_of(mask) if value.size is None and value.dtype == "int32"]
    kinds = [Causal(), Everything(), Nothing(), *(kind(n) for kind in (Window, Prefix, Chunk) for n in sizes)]
    return [*kinds, *(~kind for kind in kinds[3:])]


def grid(variant: Variant, region: Region) -> np.ndarray:
    """The mask's values in a region, bool[side, side]."""
    p, j = region.p, region.j
    return np.broadcast_to(np.asarray(variant.of_positions(p, j)), (len(p), j.shape[1]))
