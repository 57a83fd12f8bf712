"""A pipeline over a ring of buffers: some stages are being filled while others are on their way to the pages."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl


def pipeline(
    first: Any,
    end: Any,
    *,
    ahead: int,
    read: Callable[[Any], None],
    send: Callable[[Any], None],
    await_sent: Callable[[Any], None],
) -> None:
    """A pipeline over a ring of ``2 * ahead`` stages, for the items from ``first`` to ``end``.

    Item ``i`` is read ``ahead`` items before it is sent. Its send is awaited before its stage is read into again, or at
    the end.
    """

    def step(i, _):
        # Item i + ahead is read into the stage of item i - ahead, so that one must have left: else it would be
        # overwritten on its way.
        pl.when(i - ahead >= first)(lambda: await_sent(i - ahead))
        pl.when(i + ahead < end)(lambda: read(i + ahead))
        send(i)

    jax.lax.fori_loop(first, jnp.minimum(first + ahead, end), lambda i, _: read(i), None)
    jax.lax.fori_loop(first, end, step, None)
    # The sends of the last items that no step has awaited: a kernel must not end while a copy still counts.
    jax.lax.fori_loop(jnp.maximum(first, end - ahead), end, lambda i, _: await_sent(i), None)
