"""`Fresh`: how the state of a model is made anew, when an exception has cost it."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from paged.spec import Pages


class Fresh:
    """Makes states like some that were there: with pages of zeros, and all other arrays as they were at first.

    Of pages it keeps shapes and places alone, and of the other arrays copies: scales of tensors and heads among them.

    **Arguments:**

    - `states`: any tree of states, whose arrays lie where they stay.
    """

    def __init__(self, states: Any):
        self._kept = jax.tree.map(_kept, states, is_leaf=_is_pages)

    def make(self) -> Any:
        """New states."""
        return jax.tree.map(_made, self._kept)


def _kept(x: Any) -> Any:
    """Shapes and places of what a step writes, and a copy of the rest."""
    if not _is_pages(x):
        return jnp.copy(x)
    shape = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
    keep = shape if x.layout.scales == "token" else jnp.copy
    scales = [None if scale is None else keep(scale) for scale in (x.k_scale, x.v_scale)]
    arrays = tuple(map(shape, x.arrays))
    return dataclasses.replace(x, arrays=arrays, k_scale=scales[0], v_scale=scales[1])


def _made(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
        return jnp.zeros(x.shape, x.dtype, device=x.sharding)
    return jnp.copy(x)


def _is_pages(x: Any) -> bool:
    return isinstance(x, Pages)
