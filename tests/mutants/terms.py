"""Planted bugs of masks, of their coverage, of score operations and of the normal form."""

import jax.numpy as jnp

from paged.spec import Causal, Coverage

from .base import Mutant
from .planting import all_of, function, method

_WIDER = method("spec.masks.Window", "__call__", lambda _: lambda self, p, j: p - j <= self.width)


def _coverage(cls: str, some, full):
    return method(
        f"spec.masks.{cls}", "coverage",
        lambda _: lambda self, p0, p1, j0, j1: Coverage(some(self, p0, p1, j0, j1), full(self, p0, p1, j0, j1)),
    )  # fmt: skip


def _overflowing_tanh(original):
    def cap(self, s, p, j, h):
        power = jnp.exp(2 * s / self.cap)
        return self.cap * (power - 1) / (power + 1)

    return cap


MASKS = (
    Mutant(
        "masks", "j < p", method("spec.masks.Causal", "__call__", lambda _: lambda self, p, j: j < p),
        "Causal()", "coverage",
    ),
    Mutant("masks", "a window of one more", _WIDER, "Window(4)", "coverage"),
    Mutant(
        "masks", "a window of one more, and its coverage too",
        all_of(
            _WIDER,
            _coverage(
                "Window",
                lambda self, p0, p1, j0, j1: p0 - (j1 - 1) <= self.width,
                lambda self, p0, p1, j0, j1: (p1 - 1) - j0 <= self.width,
            ),
        ),
        "Window(4)", "rule",
    ),
    Mutant(
        "masks", "windows differ by identity",
        method("spec.masks.Window", "__eq__", lambda _: lambda self, other: self is other), "Window(4)", "hashable",
    ),
    Mutant(
        "masks", "a window has no hash", method("spec.masks.Window", "__hash__", lambda _: None),
        "Window(4)", "hashable",
    ),
    Mutant(
        "masks", "numbers for booleans",
        method("spec.masks.Causal", "__call__", lambda _: lambda self, p, j: jnp.asarray(j <= p).astype(jnp.int32)),
        "Causal()", "values", "returns int32",
    ),
    Mutant(
        "masks", "a prefix without the shape of p",
        method("spec.masks.Prefix", "__call__", lambda _: lambda self, p, j: j < self.size),
        "Prefix(3)", "values", "broadcast shape",
    ),
    Mutant(
        "masks", "a chunk's division rounds towards zero",
        method(
            "spec.masks.Chunk", "__call__",
            lambda _: lambda self, p, j: (abs(j) // self.size == abs(p) // self.size) & (j == j),
        ),
        "Chunk(5)", "coverage",
    ),
    Mutant(
        "masks", "an or of fewer terms",
        method("spec.mask.Or", "__call__", lambda _: lambda self, p, j: self.terms[0](p, j)),
        "Causal() & (Window(4) | Prefix(3))", "coverage",
    ),
    Mutant(
        "masks", "a larger window is kept",
        method("spec.masks.Window", "implies", lambda _: lambda self, other: isinstance(other, Causal)),
        "Window(4)", "implies",
    ),
    Mutant(
        "masks", "of two terms the wider one is kept",
        function(
            "lower.program.simplify._is_redundant",
            lambda redundant: lambda kind, term, other: redundant(kind, other, term),
        ),
        "Window(4)", "normal form",
    ),
)  # fmt: skip

COVERAGE = (
    Mutant(
        "coverage", "causal: full is off by one",
        _coverage("Causal", lambda self, p0, p1, j0, j1: j0 <= p1 - 1, lambda self, p0, p1, j0, j1: j1 - 1 <= p0 + 1),
        "Causal()", "coverage", "is full, but",
    ),
    Mutant(
        "coverage", "causal: overflow at the end of int32",
        _coverage("Causal", lambda self, p0, p1, j0, j1: j0 + 1 < p1 + 1, lambda self, p0, p1, j0, j1: j1 - 1 <= p0),
        "Causal()", "coverage", "[21474836",
    ),
    Mutant(
        "coverage", "window: a key too many is skipped",
        _coverage(
            "Window",
            lambda self, p0, p1, j0, j1: p0 - j1 + 2 < self.width,
            lambda self, p0, p1, j0, j1: p1 - 1 - j0 < self.width,
        ),
        "Window(4)", "coverage", "is empty, but",
    ),
    Mutant(
        "coverage", "chunk: full without the same chunk of keys",
        _coverage(
            "Chunk",
            lambda self, p0, p1, j0, j1: (j0 // self.size <= (p1 - 1) // self.size)
            & (p0 // self.size <= (j1 - 1) // self.size),
            lambda self, p0, p1, j0, j1: (p0 // self.size == (p1 - 1) // self.size)
            & (p0 // self.size == j0 // self.size),
        ),
        "Chunk(5)", "coverage", "is full, but",
    ),
    Mutant(
        "coverage", "not: some and full stay in place",
        method(
            "spec.coverage.Coverage", "__invert__",
            lambda _: lambda self: Coverage(jnp.logical_not(self.some), jnp.logical_not(self.full)),
        ),
        "~Window(4)", "coverage",
    ),
    Mutant(
        "coverage", "and: full where one term is",
        method(
            "spec.coverage.Coverage", "__and__",
            lambda _: lambda self, other: Coverage(self.some & other.some, self.full | other.full),
        ),
        "Causal() & (Window(4) | Prefix(3))", "coverage", "is full, but",
    ),
)  # fmt: skip

SCORES = (
    Mutant(
        "scores", "no cap", method("spec.scores.SoftCap", "__call__", lambda _: lambda self, s, p, j, h: s),
        "SoftCap(5)", "formula",
    ),
    Mutant(
        "scores", "a tanh that does not saturate", method("spec.scores.SoftCap", "__call__", _overflowing_tanh),
        "SoftCap(5)", "values", "nan",
    ),
    Mutant(
        "scores", "a cap in bfloat16",
        method("spec.scores.SoftCap", "__call__", lambda cap: lambda self, *at: cap(self, *at).astype(jnp.bfloat16)),
        "SoftCap(5)", "values", "must return float32",
    ),
    Mutant(
        "scores", "a cap by its own sign",
        method("spec.scores.SoftCap", "__call__", lambda cap: lambda self, s, *at: cap(self, jnp.sqrt(s * s), *at)),
        "SoftCap(5)", "gradient",
    ),
    Mutant(
        "scores", "slopes for j - p from p - j",
        method("spec.scores.ALiBi", "__call__", lambda alibi: lambda self, s, p, j, h: alibi(self, s, j, p, h)),
        "ALiBi(slopes)", "formula",
    ),
    Mutant(
        "scores", "slopes of the head's neighbour",
        method("spec.scores.ALiBi", "__call__", lambda alibi: lambda self, s, p, j, h: alibi(self, s, p, j, h ^ 1)),
        "ALiBi(slopes)", "formula",
    ),
)  # fmt: skip
