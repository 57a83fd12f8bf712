"""`check_mask` and `check_score_op` accept what is right, and name the smallest case of what is wrong."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings

from paged.spec import (
    ALiBi,
    Causal,
    Coverage,
    Mask,
    PerHead,
    Prefix,
    ScoreOp,
    SoftCap,
    Spans,
    Value,
    Window,
)
from paged.testing import CheckFailure, check_mask, check_score_op, parametrize_with_checks, strategies
from paged.testing.masks import check_rule


@dataclasses.dataclass(frozen=True)
class Behind(Mask):
    """``p - j <= reach``, with a coverage that is given."""

    reach: int
    some: str = "exact"
    full: str = "exact"

    def __call__(self, p, j):
        return p - j <= self.reach

    def coverage(self, p0, p1, j0, j1):
        some = {
            "exact": p0 - (j1 - 1) <= self.reach,
            "one key too few": p0 - (j1 - 2) <= self.reach,
            "the last query": p1 - 1 - (j1 - 1) <= self.reach,
        }[self.some]
        full = {"exact": (p1 - 1) - j0 <= self.reach, "the first query": p0 - j0 <= self.reach}[self.full]
        return Coverage(some, full)


class Loose(Behind):
    """A mask with a hash of its own for every object."""

    __hash__ = object.__hash__

    def __eq__(self, other):
        return self is other


class WrongImplies(Behind):
    """A mask that says that it implies any window."""

    __hash__ = Behind.__hash__

    def implies(self, other):
        return isinstance(other, Window)


class Short(Behind):
    """A mask that ignores query positions, and their axis too."""

    def __call__(self, p, j):
        return j <= self.reach


class Floats(Behind):
    """A mask of floats."""

    def __call__(self, p, j):
        return jnp.float32(0.5) * (p - j <= self.reach).astype(jnp.float32)


class Neighbours(Behind):
    """A mask whose value depends on the positions beside."""

    def __call__(self, p, j):
        return (p - j <= self.reach) & (j > jnp.min(j))


class ByPython(Behind):
    """A coverage that answers Python integers otherwise than arrays."""

    def coverage(self, p0, p1, j0, j1):
        if isinstance(p0, int):
            return Coverage(True, False)
        return super().coverage(p0, p1, j0, j1)


WRONG_MASKS = {
    "skips a page too many": (Behind(4, some="one key too few"), r"coverage: .*\) x .* is empty, but .* sees"),
    "asks the last query": (Behind(4, some="the last query"), "coverage: .* is empty, but"),
    "drops the mask": (
        Behind(4, full="the first query"), r"coverage: .*\[4, 6\) x \[0, 1\) is full, but .*p=5 does not see",
    ),
    "no equality": (Loose(4), "hashable: .*does not equal its copy"),
    "implies": (WrongImplies(4), r"implies: .*implies p - j < \d, but at p=\d"),
    "shape": (Short(4), r"values: .*must return the broadcast shape.*write `\(j < 4\) & \(p == p\)`"),
    "dtype": (Floats(4), "values: .*returns float.*a mask returns booleans"),
    "not elementwise": (Neighbours(4), "values: .*in a grid, but not alone"),
    "integers": (ByPython(4), "coverage: .*for Python integers, and some="),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_MASKS)
def test_wrong_masks_are_named(name):
    mask, text = WRONG_MASKS[name]
    with pytest.raises(CheckFailure, match=f"(?s){text}"):
        check_mask(mask)


def test_the_right_mask_passes():
    check_mask(Behind(4))
    check_mask(Causal() & (Behind(100) | ~Prefix(3)))


@given(strategies.masks(max_leaves=4))
@settings(max_examples=8)
def test_any_nest_of_built_in_masks_passes(mask):
    check_mask(mask)


@dataclasses.dataclass(frozen=True)
class Op(ScoreOp):
    """A score operation that is given by name."""

    kind: str

    def __call__(self, s, p, j, h):
        return {
            "narrow": lambda: s.astype(jnp.bfloat16),
            "mixes": lambda: s - jnp.max(s, keepdims=True),
            "nan": lambda: s + jnp.log((p - j).astype(s.dtype)),
            "steep": lambda: s + jnp.sqrt(jnp.abs(s)),
            "right": lambda: s - 0.5 * jnp.log1p(jnp.abs(p - j).astype(s.dtype)) * (h + 1).astype(s.dtype),
        }[self.kind]()


class Unbound(Op):
    """An operation that is another one each time that it is bound."""

    def bind(self, num_q_heads):
        return Unbound("steep" if self.kind == "right" else "right")


WRONG_OPS = {
    "narrow": (Op("narrow"), "values: .*must return float32 in the shape of the scores"),
    "mixes": (Op("mixes"), "values: .*differs in a tile and alone"),
    "nan": (Op("nan"), r"values: .*is -?nan at p=-?\d+, j=\d+, h=0, for a finite score"),
    "steep": (Op("steep"), "gradient: .*is inf at s=0.0"),
    "bind": (Unbound("right"), "bind: .*must be equal"),
}


@pytest.mark.parametrize("name", WRONG_OPS)
def test_wrong_operations_are_named(name):
    op, text = WRONG_OPS[name]
    with pytest.raises(CheckFailure, match=f"(?s){text}"):
        check_score_op(op)


EXPECTED = {f"{WrongImplies(4)}: implies": "it says yes to any window", f"{WrongImplies(4)}: normal form": "likewise"}


@parametrize_with_checks([Window(3), SoftCap(5.0), ALiBi(), Op("right"), WrongImplies(4)], expected_failures=EXPECTED)
def test_each_check_is_a_test(subject, check):
    check(subject)


def test_an_expected_failure_that_names_no_test_is_an_error():
    with pytest.raises(ValueError, match=r"expected_failures names \['nothing'\]; there are \['p - j < 3: hashable'"):
        parametrize_with_checks([Window(3)], expected_failures={"nothing": "no reason"})
    with pytest.raises(TypeError, match="subjects must be masks or score operations; got 3"):
        parametrize_with_checks([3])


def test_a_mask_and_an_operation_that_keep_every_promise_and_mean_something_else_are_named():
    with pytest.raises(CheckFailure, match=r"rule: p - j < 4 at p=-?\d+, j=\d+ is True, and the rule says False"):
        check_mask(Window(4), rule=lambda p, j: p - j < 3)
    with pytest.raises(CheckFailure, match=r"formula: .* at s=.* is .*, and the formula says"):
        check_score_op(SoftCap(5.0), formula=lambda s, p, j, h: s)


class OnlyTheFirst(PerHead):
    """Masks by head, with the coverage of the first head alone."""

    def coverage(self, p0, p1, j0, j1):
        return self.masks[0].coverage(p0, p1, j0, j1)


@dataclasses.dataclass(frozen=True)
class Unbounded(Behind):
    """A mask whose number has a least, which it forgets."""

    least: ClassVar = {"reach": 3}

    def given(self, given):
        return dataclasses.replace(self, reach=given.numbers["n"])


class StaticAlone(Behind):
    """A mask that ignores a traced number."""

    def __call__(self, p, j):
        return p - j <= (self.reach if isinstance(self.reach, int) else 4)


N = Value("n")
WRONG_MASKS_OF_BATCHES = {
    "drops the mask": (Behind(N, full="the first query"), r"coverage: .*n=-?\d+, says that .* is full, but"),
    "skips a page too many": (Behind(N, some="the last query"), r"coverage: .*n=-?\d+, says that .* is empty, but"),
    "the first head's coverage": (
        OnlyTheFirst((Window(2), Window(6))), r"coverage: .* is empty, but .* sees .*for any head",
    ),
    "the first head's full": (OnlyTheFirst((Window(6), Window(N))), r"coverage: .* is full, but .*for every head"),
    "no least": (Unbounded(N), r"values: .*differs for \{'n': 0\} and for \{'n': 3\}: a number below `least`"),
    "traced": (StaticAlone(N), r"values: .*n=\d+, at .* outside of jax.jit, but not inside"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_MASKS_OF_BATCHES)
def test_wrong_masks_that_name_numbers_or_differ_by_head_are_named(name):
    mask, text = WRONG_MASKS_OF_BATCHES[name]
    with pytest.raises(CheckFailure, match=f"(?s){text}"):
        check_mask(mask)


def test_masks_and_operations_of_batches_pass_and_mean_what_they_say():
    check_mask(Spans(Value("a", 2), Value("b", 2)))
    check_mask(PerHead((Window(2), Causal())))
    cap = SoftCap(Value("cap", dtype="float32"))
    check_score_op(cap, formula=lambda s, p, j, h, given: given.numbers["cap"] * np.tanh(s / given.numbers["cap"]))
    with pytest.raises(CheckFailure, match=r"rule: j < n, where n=\d, at p=-?\d, j=\d is True, and the rule says"):
        check_rule(Prefix(N), lambda p, j, given: j < given.numbers["n"] - 1)
    with pytest.raises(CheckFailure, match=r"rule: by head.*, where head 1, at"):
        check_rule(PerHead((Window(2), Window(3))), lambda p, j, given: p - j < 2 + (given.head > 0))
    with pytest.raises(CheckFailure, match=r"formula: .*cap=.* at s="):
        check_score_op(cap, formula=lambda s, p, j, h, given: s)
