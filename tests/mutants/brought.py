"""Planted bugs of what a batch brings: numbers of sequences, positions and ancestors of rows, masks by head."""

import copy

import jax.numpy as jnp

from .base import Mutant
from .planting import function, method


def _numbers_of_the_next_sequence(original):
    def visits_of(program, row_block, seqs, *sizes):
        following = (row_block.seq + 1) % seqs.starts.shape[0]
        return original(program, row_block._replace(numbers=seqs.numbers_of(following)), seqs, *sizes)

    return visits_of


def _bit_of_the_next_row(original):
    def is_ancestor(words, row, key):
        return (key < 0) | (key == row) | original(words, jnp.full_like(row, -1), key + 1)

    return is_ancestor


def _own_bit_alone(original):
    def is_ancestor(words, row, key):
        return original(words, jnp.full_like(row, -1), key)

    return is_ancestor


def _places_for_positions(original):
    def page_block(self, *args):
        block = original(self, *args)
        return block._replace(j=block.place)

    return page_block


def _head_of_the_neighbour(original):
    def visible(self, p, j, length, given):
        return original(self, p, j, length, given._replace(head=None if given.head is None else given.head ^ 1))

    return visible


def _no_least(original):
    def given(self, given):
        bare = copy.copy(self)
        object.__setattr__(bare, "least", {})
        return original(bare, given)

    return given


BROUGHT = (
    Mutant(
        "brought", "numbers of another sequence decide which pages are visited",
        function("lower.xla.lists.visits_of", _numbers_of_the_next_sequence),
        "xla, values", "equals the reference", in_every_run=False,
    ),
    Mutant(
        "brought", "a bit of the wrong row", function("lower.program.brought.is_ancestor", _bit_of_the_next_row),
        "xla, tree", "equals the reference", in_every_run=False,
    ),
    Mutant(
        "brought", "a row sees itself only by its bit", function("lower.program.brought.is_ancestor", _own_bit_alone),
        "xla, tree", "equals the reference", in_every_run=False,
    ),
    Mutant(
        "brought", "positions are ignored for keys", method("lower.xla.walk.Walk", "page_block", _places_for_positions),
        "xla, tree", "equals the reference", in_every_run=False,
    ),
    Mutant(
        "brought", "the mask of the head's neighbour",
        method("lower.program.Program", "visible", _head_of_the_neighbour),
        "xla, by head", "equals the reference", in_every_run=False,
    ),
    Mutant(
        "brought", "the coverage of the first head",
        method(
            "spec.per_head.PerHead", "coverage",
            lambda _: lambda self, *rectangle: self.masks[0].coverage(*rectangle),
        ),
        "PerHead((Window(2), Causal()))", "coverage", "for any head",
    ),
    Mutant(
        "brought", "a number below its least is used", method("spec.given.Term", "given", _no_least),
        "Window(n)", "values", "below `least`",
    ),
    Mutant(
        "brought", "a span of its queries alone is full",
        method(
            "spec.spans.Spans", "coverage",
            lambda coverage: lambda self, p0, p1, j0, j1: coverage(self, p0, p1, p0, p1),
        ),
        "Spans(a, b)", "coverage", in_every_run=False,
    ),
)  # fmt: skip
