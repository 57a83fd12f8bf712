"""Arrays that a user's mask or bias closes over, made explicit, so that gradients and loops can carry them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
import jax.numpy as jnp
from jaxtyping import Array

from .program import Program


class TileTerms(NamedTuple):
    """A program's score and mask functions at one tile shape, with what they close over as arguments.

    ``scores(constants, s, p, j, h)`` and ``mask(constants, p, j)`` mean what the program's do.
    """

    scores: Callable[..., Array]
    mask: Callable[..., Array]


def hoist(program: Program, heads: int, rows: int, keys: int) -> tuple[TileTerms, tuple[Any, Any]]:
    """The program's terms for tiles ``s [heads, rows, keys]`` with ``p [1, rows, 1]``, ``j [1, 1, keys]`` and
    ``h [heads, rows, 1]``, and the constants to call them with.

    A built-in program closes over nothing, and its functions are called as they are.
    """
    if not _is_opaque(program):
        plain = TileTerms(lambda _, s, p, j, h: program.scores(s, p, j, h), lambda _, p, j: program.mask(p, j))
        return plain, ((), ())
    s = jax.ShapeDtypeStruct((heads, rows, keys), jnp.float32)
    p, j, h = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, rows, 1), (1, 1, keys), (heads, rows, 1)))
    scores, score_constants = _close(program.scores, s, p, j, h)
    mask, mask_constants = _close(program.mask, p, j)
    terms = TileTerms(lambda c, *args: scores(c[0], *args), lambda c, *args: mask(c[1], *args))
    return terms, (score_constants, mask_constants)


def _close(fn: Callable[..., Array], *examples: Any) -> tuple[Callable[..., Array], Any]:
    closed = jax.make_jaxpr(fn)(*examples)

    def explicit(constants: Any, *args: Any) -> Array:
        (value,) = jax.core.eval_jaxpr(closed.jaxpr, constants, *args)
        return value

    return explicit, tuple(jnp.asarray(constant) for constant in closed.consts)


def _is_opaque(program: Program) -> bool:
    """Whether any term is a user's, which may close over anything."""
    return program.mask.is_opaque or any(op.is_opaque for op in program.score_ops)
