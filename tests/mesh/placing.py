"""Puts the arrays of cases on a mesh, and finds what devices exchange in a compiled program."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

import paged
from paged.lower import ShardedAttend
from paged.spec import AttentionState, Pages, RaggedBatch
from tests.support import Built, Case, build

SIZES = {"kv_heads": "model", "sequences": "data", "context": "pages"}
_COLLECTIVE = re.compile(r"= (.+?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")

needs_devices = pytest.mark.skipif(
    jax.local_device_count() < 8, reason="needs eight devices, which the root conftest simulates"
)


def mesh_of(sizes: dict[str, int], *, explicit: bool = False) -> tuple[jax.sharding.Mesh, paged.Axes]:
    """A mesh with the given number of devices for each field of `paged.Axes`, and the axes."""
    names = tuple(SIZES[field] for field in sizes)
    kind = AxisType.Explicit if explicit else AxisType.Auto
    count = int(np.prod(list(sizes.values())))
    mesh = jax.make_mesh(tuple(sizes.values()), names, (kind,) * len(names), devices=jax.devices()[:count])
    return mesh, paged.Axes(**{field: SIZES[field] for field in sizes})


def placed(
    attend: ShardedAttend, builts: list[Built]
) -> tuple[jax.Array, jax.Array, jax.Array, Pages, RaggedBatch, jax.Array | None]:
    """``(q, k, v, pages, batch, sinks)`` from one built case per shard of sequences, where the specs want them."""
    at = attend.shardings
    q, k, v = (jnp.concatenate([getattr(b, name) for b in builts]) for name in "qkv")
    pools = [widened(attend.adopt(b.pages), attend.shares.context) for b in builts]
    arrays = [jnp.concatenate(parts, attend.layout.page_axis) for parts in zip(*(p.arrays for p in pools), strict=True)]
    scales = {}
    if attend.layout.scales is not None:
        for name in ("k_scale", "v_scale"):
            parts = [getattr(p, name) for p in pools]
            scales[name] = jnp.concatenate(parts) if attend.layout.scales == "token" else parts[0]
    pages = attend.layout.wrap(*arrays, **scales)
    batches = [b.batch for b in builts]
    batch = batches[0] if attend.axes.sequences is None else RaggedBatch.stack(batches)
    sinks = builts[0].sinks
    if sinks is not None:
        sinks = jax.device_put(sinks, at.sinks)
    new = (jax.device_put(x, where) for x, where in ((q, at.q), (k, at.k), (v, at.v)))
    return *new, jax.device_put(pages, at.pages), jax.device_put(batch, at.batch), sinks  # pyright: ignore


def widened(pages: Pages, devices: int) -> Pages:
    """A pool with pages of poison added at its end, so that devices can share it evenly."""
    more = -pages.num_pages % devices

    def widen(x: jax.Array, axis: int) -> jax.Array:
        widths = [(0, more if i == axis else 0) for i in range(x.ndim)]
        return jnp.pad(x, widths, constant_values=-128 if x.dtype == jnp.int8 else jnp.nan)

    k_scale, v_scale = pages.k_scale, pages.v_scale
    if pages.layout.scales == "token":
        k_scale, v_scale = widen(k_scale, 0), widen(v_scale, 0)
    return Pages(tuple(widen(a, pages.layout.page_axis) for a in pages.arrays), k_scale, v_scale, pages.layout)


@functools.cache
def built(case: Case, shards: int, hold_new: bool = True) -> list[Built]:
    """One case per shard of sequences, which differ in lengths and in the order of pages."""
    corners = [case.corner, "exact pages", "one past a page"]
    return [build(case.replace(corner=corners[i % 3]), physical_seed=i, hold_new=hold_new) for i in range(shards)]


def rows_of(state: AttentionState, shard: int, shards: int) -> AttentionState:
    """The rows of one shard of sequences, on the host."""
    return AttentionState(*(jnp.asarray(np.split(np.asarray(x), shards)[shard]) for x in state))


def collectives(text: str) -> list[tuple[int, str, str]]:
    """``(elements, dtype, operation)`` of the largest result of each collective of a compiled program."""
    found = []
    for results, operation in _COLLECTIVE.findall(text):
        sizes = [(math.prod(int(n) for n in dims.split(",") if n), dtype) for dtype, dims in _SHAPE.findall(results)]
        found.append((*max(sizes), operation))
    return found
