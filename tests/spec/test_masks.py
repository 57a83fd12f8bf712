"""Masks: their values, the Boolean laws, and three-valued answers that are never wrong."""

import itertools

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paged.lower import normal_form
from paged.lower.program.simplify import implies
from paged.spec import (
    And,
    Causal,
    Chunk,
    Coverage,
    Everything,
    Given,
    Mask,
    Not,
    Nothing,
    Or,
    PerHead,
    Prefix,
    Segments,
    Spans,
    Tree,
    Value,
    Where,
    Window,
    values_of,
)
from paged.testing.strategies import numbers
from tests.support.masks import (
    KEYS,
    OPAQUE,
    POSITIONS,
    Asked,
    grid,
    masks,
    masks_of_batches,
    rectangles,
    rule_grid,
    truth,
)

_WITH_SIZE = (Window(1), Window(3), Prefix(4), Chunk(1), Chunk(4), Spans((2,), (6,)), Segments((3, 7)))
LEAVES = {str(m): m for m in (Causal(), *_WITH_SIZE, Everything(), Nothing())}
TABLE = {
    # Each definition at pairs (p, j), the boundary and its neighbours.
    Causal(): {(5, 5): True, (5, 6): False, (5, 4): True, (-1, 0): False},
    Window(3): {(5, 3): True, (5, 2): False, (5, 9): True},
    Window(1): {(5, 5): True, (5, 4): False},
    Prefix(4): {(0, 3): True, (0, 4): False, (-3, 0): True},
    Chunk(4): {(5, 4): True, (5, 3): False, (5, 7): True, (5, 8): False, (-1, 0): False},
    # Two spans that overlap, and an empty one: 2 to 5, and 4 to 8.
    Spans((2, 4, 9), (6, 9, 9)): {
        (2, 5): True,
        (2, 6): False,
        (5, 2): True,
        (6, 3): False,
        (8, 4): True,
        (9, 9): False,
    },
    Segments((7, 3)): {(2, 0): True, (2, 3): False, (3, 6): True, (6, 7): False, (9, 7): True, (-2, 0): True},
}


@pytest.mark.parametrize("mask", TABLE, ids=str)
def test_definitions_at_their_boundaries(mask):
    for (p, j), expected in TABLE[mask].items():
        assert bool(mask(p, j)) is expected, (p, j)


@given(masks)
def test_values_follow_the_rules_of_the_terms(mask):
    np.testing.assert_array_equal(grid(mask), rule_grid(mask))


@given(masks_of_batches, masks_of_batches, rectangles, st.data())
@settings(max_examples=30)
def test_masks_that_name_numbers_or_differ_by_head(mask, other, rectangle, data):
    """By the rules of the terms for each head, in normal form too; coverage is that of all heads; so is `implies`."""
    heads, said = 4, data.draw(numbers((mask, other)))
    bound, other = mask.bind(heads), other.bind(heads)
    own, others, forms = [], [], []
    for head in range(heads):
        given_to = Given(said, np.int32(head))
        own.append(grid(bound.given(given_to)))
        others.append(grid(other.given(given_to)))
        forms.append(grid(normal_form(bound).given(given_to)))
        np.testing.assert_array_equal(own[head], rule_grid(mask, Asked(said, head, heads)))
    np.testing.assert_array_equal(own, forms)
    assert {str(bound.given(Given(said)).coverage(*rectangle))} <= {"partial"} | _if_all_agree(own, rectangle)
    if implies(normal_form(bound), normal_form(other)):
        assert (np.array(others) | ~np.array(own)).all()


def _if_all_agree(grids, rectangle):
    truths = {truth(x, rectangle) for x in grids}
    return truths if len(truths) == 1 else set()


@given(masks, masks, masks)
def test_boolean_laws_hold_by_value(a, b, c):
    laws = [
        (~(a & b), ~a | ~b),
        (~(a | b), ~a & ~b),
        (~~a, a),
        (a & a, a),
        (a | a, a),
        (a & b, b & a),
        (a | b, b | a),
        (a & (a | b), a),
        (a | (a & b), a),
        (a & (b | c), (a & b) | (a & c)),
        (a | (b & c), (a | b) & (a | c)),
        ((a & b) & c, a & (b & c)),
        (a & Everything(), a),
        (a | Nothing(), a),
        (a & ~a, Nothing()),
        (a | ~a, Everything()),
    ]
    for left, right in laws:
        np.testing.assert_array_equal(grid(left), grid(right), f"{left}  versus  {right}")


@given(masks, rectangles)
def test_coverage_is_never_wrong(mask, rectangle):
    """Empty means empty and full means full, for Python integers."""
    answer, true = str(mask.coverage(*rectangle)), truth(grid(mask), rectangle)
    assert answer in ("partial", true), (str(mask), rectangle)


@given(masks)
def test_coverage_of_arrays_is_that_of_integers(mask):
    """Every rectangle at once, as arrays at run time; some and full broadcast, and full implies some."""
    every = np.array(list(itertools.product((-4, 0, 3), (1, 4), (0, 2, 7), (1, 5))), np.int32)
    p0, p1, j0, j1 = every[:, 0], every[:, 0] + every[:, 1], every[:, 2], every[:, 2] + every[:, 3]
    answer = mask.coverage(jnp.asarray(p0), jnp.asarray(p1), jnp.asarray(j0), jnp.asarray(j1))
    some, full = (np.broadcast_to(np.asarray(x), len(every)) for x in answer)
    for i in range(len(every)):
        one = mask.coverage(int(p0[i]), int(p1[i]), int(j0[i]), int(j1[i]))
        assert (bool(one.some), bool(one.full)) == (some[i], full[i])
        assert one.some or not one.full


@pytest.mark.parametrize("name", LEAVES)
def test_leaves_are_exact_on_every_rectangle(name):
    """A leaf never says partial where brute force knows better: else pages would be read for nothing."""
    mask = LEAVES[name]
    values = grid(mask)
    for p0, rows, j0, keys in itertools.product(range(-4, 12), (1, 2, 5), range(12), (1, 3, 4)):
        rectangle = (p0, min(p0 + rows, POSITIONS.stop), j0, min(j0 + keys, KEYS.stop))
        for flipped, inside in ((mask, values), (~mask, ~values)):
            assert str(flipped.coverage(*rectangle)) == truth(inside, rectangle), (str(flipped), rectangle)


def test_an_opaque_function_is_always_partial():
    for rectangle in ((0, 1, 0, 1), (0, 4, 0, 4)):
        assert str(OPAQUE.coverage(*rectangle)) == str((~OPAQUE).coverage(*rectangle)) == "partial"
    assert str((OPAQUE & Causal()).coverage(0, 1, 5, 9)) == "empty"
    assert str((OPAQUE | Causal()).coverage(5, 9, 0, 1)) == "full"


def test_kleene_tables():
    """The three-valued truth tables of and, or, not, on Python bools and on arrays."""
    empty, partial, full = Coverage(False, False), Coverage(True, False), Coverage(True, True)
    order = [empty, partial, full]
    for i, a in enumerate(order):
        assert ~a == order[2 - i]
        assert str(a) == ("empty", "partial", "full")[i]
        for k, b in enumerate(order):
            assert a & b == order[min(i, k)] and a | b == order[max(i, k)]
    arrays = Coverage(jnp.array([False, True, True]), jnp.array([False, False, True]))
    for got, want in ((~arrays, order[::-1]), (arrays & ~arrays, [empty, partial, empty])):
        assert [Coverage(*pair) for pair in zip(got.some.tolist(), got.full.tolist(), strict=True)] == want


@given(masks)
def test_masks_are_values(mask):
    """Equal and of one hash when built again; printed."""
    again = eval(repr(mask), {**globals(), "is_odd_pair": OPAQUE.fn}) if OPAQUE not in _leaves(mask) else mask
    assert again == mask and hash(again) == hash(mask) and str(again) == str(mask)


def _leaves(mask):
    if isinstance(mask, And | Or):
        return [leaf for term in mask.terms for leaf in _leaves(term)]
    return _leaves(mask.term) if isinstance(mask, Not) else [mask]


def test_a_user_mask_needs_two_methods_and_composes():
    class Even(Mask):
        def __call__(self, p, j):
            return (j % 2 == 0) & (p == p)

        def coverage(self, p0, p1, j0, j1):
            return Coverage(some=True, full=False)

    local = Causal() & ~Even()
    assert [j for j in range(6) if local(4, j)] == [1, 3]
    assert str(local.coverage(0, 2, 4, 8)) == "empty"
    with pytest.raises(TypeError, match="abstract"):
        type("Half", (Mask,), {"__call__": lambda self, p, j: True})()


def test_where_broadcasts_what_its_function_leaves_out():
    mask = Where(lambda p, j: j > 2)
    assert mask(jnp.zeros((3, 1), int), jnp.arange(5)).shape == (3, 5)


ERRORS = {
    "window of 0": (lambda: Window(0), ValueError, r"Window\(0\) would hide every position.*smallest is Window\(1\)"),
    "window of a float": (lambda: Window(2.0), TypeError, r"Window's width must be a Python int.*got 2\.0"),
    "window of a bool": (lambda: Window(True), TypeError, r"Window's width must be a Python int.*got True"),
    "prefix of 0": (lambda: Prefix(0), ValueError, r"Prefix\(0\) has no tokens: the smallest is Prefix\(1\)"),
    "prefix of an array": (lambda: Prefix(jnp.int32(3)), TypeError, "Prefix's size must be a Python int"),
    "chunk of -1": (lambda: Chunk(-1), ValueError, r"Chunk\(-1\) has no tokens"),
    "where of no function": (lambda: Where(3), TypeError, r"Where needs a function fn\(p, j\) -> bool; got 3"),
    "and": (lambda: Causal() and Window(2), TypeError, "no truth value.*right: Causal"),
    "not": (lambda: not Causal(), TypeError, "no truth value"),
    "& with a function": (lambda: Causal() & (lambda p, j: True), TypeError, "unsupported operand"),
    "window of floats of a batch": (
        lambda: Window(Value("w", dtype="float32")), TypeError, r'Window\'s width needs Value\(\'w\', dtype="int32"\)',
    ),
    "window of many": (lambda: Window(Value("w", 2)), TypeError, "Window's width needs a Value with no size"),
    "spans of one number": (lambda: Spans(Value("a"), Value("b")), TypeError, "starts needs a Value with a size"),
    "spans that do not match": (lambda: Spans((1, 2), (3,)), ValueError, "as many starts as ends; got 2 and 1"),
    "segments of a list": (lambda: Segments([3]), TypeError, r"must be a tuple of ints, or a Value.*got \[3\]"),
    "spans before their numbers": (
        lambda: Spans(Value("a", 1), Value("b", 1))(1, 2), TypeError, "needs what a batch brings: mask.given",
    ),
    "by head of no masks": (lambda: PerHead(()), TypeError, r"PerHead needs masks, such as .*got \(\)"),
    "by head of other heads": (lambda: PerHead((Window(1),) * 3).bind(4), ValueError, "3 masks, which must"),
    "by head without a head": (lambda: PerHead((Causal(),))(1, 2), TypeError, "and none is given: use it in a spec"),
    "a tree alone": (lambda: Tree()(1, 2), TypeError, r"RaggedBatch\(\.\.\., ancestors=\)"),
    "a name of two words": (lambda: Value("my window"), TypeError, "must be a word"),
    "one name of two sizes": (
        lambda: values_of(Window(Value("n")) & Segments(Value("n", 2))), ValueError, "One name is one array",
    ),
    "where of floats": (lambda: Where(lambda p, j: p * 1.0)(1, 2), TypeError, "return booleans.*returned float"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_errors_say_what_is_wrong(name):
    act, kind, text = ERRORS[name]
    with pytest.raises(kind, match=f"(?s){text}"):
        act()


def test_an_unhashable_function_is_refused_with_the_remedy():
    class Unhashable:
        __hash__ = None

        def __call__(self, p, j):
            return p == j

    with pytest.raises(TypeError, match=r"Where needs a hashable function.*Unhashable has no hash.*Wrap it once"):
        Where(Unhashable())


@pytest.mark.parametrize("kind", [Window, Prefix, Chunk])
def test_sizes_reach_as_far_as_int32_positions_do(kind):
    """The largest hides nothing; one more would overflow in the middle of a trace, so it is refused when built."""
    p, j = jnp.arange(4)[:, None], jnp.arange(4)[None, :]
    assert np.asarray(kind(2**31 - 1)(p, j)).all()
    assert np.asarray(kind(2**31 - 1).coverage(p, p + 1, j, j + 1).full).all()
    with pytest.raises(ValueError, match=rf"{kind.__name__}'s .* at most 2\*\*31 - 1.*got 2147483648"):
        kind(2**31)
