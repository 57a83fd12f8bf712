"""Helpers for the tests of both TPU lowerings: long lists of pages, and gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import paged
from paged.lower.tpu import CHIPS
from paged.lower.tpu.decode.launch import Tables

from .interpreter import interpreted, params, watched


def with_scalar_memory(case, smem_bytes, schedule):
    """The case's attention on a chip whose scalar memory holds only short lists of pages."""
    attend = interpreted(case, schedule)
    chip = dataclasses.replace(CHIPS["v4"], smem_bytes=int(smem_bytes))
    lowerings = tuple(dataclasses.replace(low, chip=chip, interpret=params("on_wait")) for low in attend.lowerings)
    return dataclasses.replace(attend, lowerings=lowerings)


def items_of_launches(monkeypatch, launch):
    """A list of numbers of items, one for each kernel that is traced from now on."""
    items, call = [], launch.__call__

    def counted(self, work, *args):
        items.append(len(work.given.position) if isinstance(work, Tables) else len(work.begin))
        return call(self, work, *args)

    monkeypatch.setattr(launch, "__call__", counted)
    return items


def assert_gradients_are_those_of_xla(attend, built):
    """Gradients of queries and pages, through the output and the log-sum-exp."""
    rng = np.random.default_rng(5)
    seen = np.array([row is not None and len(row) > 0 for row in built.visible])[:, None]
    weights = [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in (built.q.shape, built.q.shape[:2])]

    def gradients(attend):
        def loss(q, arrays):
            state = attend.state(q, built.pages.layout.wrap(*arrays), built.batch)
            lse = jnp.where(seen, state.lse, 0.0)
            return jnp.sum(state.out * weights[0]) + jnp.sum(lse * weights[1])

        return jax.jit(jax.grad(loss, argnums=(0, 1)))

    got = watched(gradients(attend), built.q, built.pages.arrays)
    want = gradients(paged.lower(built.case.spec, built.case.layout, "xla"))(built.q, built.pages.arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6)
        assert np.abs(np.asarray(a)).max() > 0.1
