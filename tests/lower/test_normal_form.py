"""`normal_form` and `implies`: the meaning never changes, and equal meanings meet where the laws say so."""

import itertools

import numpy as np
import pytest
from hypothesis import given

from paged.lower import Program, normal_form
from paged.lower.program.simplify import implies
from paged.spec import (
    ALiBi,
    AttentionSpec,
    Bias,
    Causal,
    Chunk,
    Everything,
    Nothing,
    Prefix,
    SoftCap,
    Spans,
    Tree,
    Value,
    Where,
    Window,
)
from tests.support.masks import OPAQUE, grid, masks, rectangles, truth

N = Value("n")
EXAMPLES = [
    (Causal() & Window(8) & Window(4), Causal() & Window(4)),
    (Window(8) | Window(4), Window(8)),
    (Prefix(2) & Prefix(5), Prefix(2)),
    (Chunk(2) & Chunk(6), Chunk(2)),
    (Chunk(4) & Window(4), Chunk(4)),
    (Window(4) & ~Window(8), Nothing()),
    (~Window(4) | Window(8), Everything()),
    (Causal() & ~Causal(), Nothing()),
    (~~Causal(), Causal()),
    (Causal() & (Causal() | Prefix(3)), Causal()),
    (Causal() | (Causal() & Prefix(3)), Causal()),
    (~(~Causal() | ~Window(4)), Causal() & Window(4)),
    (Causal() & Everything(), Causal()),
    (Causal() | Everything(), Everything()),
    (~Nothing() & ~Everything(), Nothing()),
    # A number that a batch brings is itself, and may be any.
    (Causal() & Window(N) & Window(N), Causal() & Window(N)),
    (Window(N) & ~Window(N), Nothing()),
    (Window(N) & Window(8), Window(8) & Window(N)),
    (Prefix(N) | (Prefix(N) & Causal()), Prefix(N)),
]


@pytest.mark.parametrize(("mask", "expected"), EXAMPLES, ids=lambda m: str(m))
def test_examples(mask, expected):
    assert normal_form(mask) == normal_form(expected)
    assert str(normal_form(expected)) == str(expected)


@given(masks)
def test_the_meaning_never_changes(mask):
    np.testing.assert_array_equal(grid(normal_form(mask)), grid(mask), str(mask))


@given(masks, rectangles)
def test_coverage_stays_sound(mask, rectangle):
    form = normal_form(mask)
    assert str(form.coverage(*rectangle)) in ("partial", truth(grid(mask), rectangle)), (
        str(mask),
        str(form),
        rectangle,
    )


@given(masks)
def test_is_idempotent(mask):
    form = normal_form(mask)
    assert normal_form(form) == form


@given(masks, masks, masks)
def test_is_one_for_commuted_and_associated_operands(a, b, c):
    for op in (lambda x, y: x & y, lambda x, y: x | y):
        forms = {normal_form(op(op(x, y), z)) for x, y, z in itertools.permutations((a, b, c))}
        forms |= {normal_form(op(x, op(y, z))) for x, y, z in itertools.permutations((a, b, c))}
        assert len(forms) == 1, [str(form) for form in forms]


@given(masks, masks)
def test_implies_is_sound(a, b):
    a, b = normal_form(a), normal_form(b)
    if implies(a, b):
        assert (grid(b) | ~grid(a)).all(), f"{a} does not imply {b}"


def test_implies_knows_the_obvious():
    for a, b in ((Window(3), Window(4)), (Prefix(3), Prefix(4)), (Chunk(2), Chunk(4)), (Chunk(3), Window(3))):
        assert implies(a, b) and not implies(b, a)
        assert implies(normal_form(~b), normal_form(~a))
    assert implies(normal_form(Causal() & Window(3)), Causal())
    assert implies(Causal(), normal_form(Causal() | Prefix(3)))
    assert not implies(Chunk(2), Chunk(3)) and not implies(Causal(), Window(3))


def test_two_functions_of_one_name_are_two_terms():
    def make(n):
        def seen(p, j):
            return (p + j) % n == 0

        return Where(seen)

    a, b = make(2), make(3)
    np.testing.assert_array_equal(grid(normal_form(a & b)), grid(a & b))
    assert normal_form(a & b) != normal_form(a)


PROGRAMS = {
    "plain": (
        {},
        "attention of 8 query heads over 2 KV heads (4 to each), head_dim 16\n"
        "  s[j] = 0.25 * <q, k[j]>\n"
        "  visible where (j <= p) & (j < length)\n"
        "  o = sum_j exp(s[j]) v[j] / sum_j exp(s[j])",
    ),
    "everything": (
        {"causal": False, "scale": 0.5},
        "attention of 8 query heads over 2 KV heads (4 to each), head_dim 16\n"
        "  s[j] = 0.5 * <q, k[j]>\n"
        "  visible where (j < length)\n"
        "  o = sum_j exp(s[j]) v[j] / sum_j exp(s[j])",
    ),
    "or": (
        {"causal": False, "mask": Prefix(4) | Chunk(8) | OPAQUE, "sinks": True, "soft_cap": 30.0},
        "attention of 8 query heads over 2 KV heads (4 to each), head_dim 16\n"
        "  s[j] = 0.25 * <q, k[j]>\n"
        "  s[j] = 30 * tanh(s / 30)\n"
        "  visible where ((j // 8 == p // 8) | (j < 4) | (is_odd_pair(p, j))) & (j < length)\n"
        "  o = sum_j exp(s[j]) v[j] / (sum_j exp(s[j]) + exp(sink[h]))",
    ),
    "what a batch brings": (
        {
            "window": N,
            "mask": (Tree() & Chunk(8)) | Spans(Value("starts", 2), Value("ends", 2)),
            "soft_cap": Value("cap", dtype="float32"),
        },
        "attention of 8 query heads over 2 KV heads (4 to each), head_dim 16\n"
        "  s[j] = 0.25 * <q, k[j]>\n"
        "  s[j] = cap * tanh(s / cap)\n"
        "  visible where (j <= p) & (p - j < n) & ((p and j in one of [starts, ends)) | "
        "((j // 8 == p // 8) & (j is an ancestor of the row))) & (j < length)\n"
        "  o = sum_j exp(s[j]) v[j] / sum_j exp(s[j])",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_print_their_mathematics(name):
    fields, text = PROGRAMS[name]
    assert str(Program.from_spec(AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=16, **fields))) == text


def test_specs_of_one_meaning_have_one_program():
    spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=16)
    same = [
        (spec, spec.replace(scale=0.25)),
        (spec.replace(window=4), spec.replace(mask=Window(9) & Window(4))),
        (spec, spec.replace(causal=False, mask=Causal())),
        (spec.replace(window=4, mask=Prefix(2)), spec.replace(mask=Prefix(2) & Window(4))),
    ]
    for a, b in same:
        assert a != b and Program.from_spec(a) == Program.from_spec(b)
        assert hash(Program.from_spec(a)) == hash(Program.from_spec(b))


def test_a_programs_coverage_ends_at_the_true_length():
    program = Program.from_spec(AttentionSpec(num_q_heads=1, num_kv_heads=1, head_dim=1, causal=False))
    answers = {length: str(program.coverage(0, 1, 4, 8, length)) for length in (0, 4, 5, 7, 8, 9)}
    assert answers == {0: "empty", 4: "empty", 5: "partial", 7: "partial", 8: "full", 9: "full"}


def test_only_a_users_terms_may_close_over_arrays():
    class Nearer(Window):
        pass

    built_in = Causal() & ~Window(4) | Prefix(2) & Chunk(8)
    assert not built_in.is_opaque and not SoftCap(30.0).is_opaque and not ALiBi().is_opaque
    assert (built_in | OPAQUE).is_opaque and (~OPAQUE).is_opaque
    assert Nearer(4).is_opaque and Bias(lambda p, j, h: p - j).is_opaque
