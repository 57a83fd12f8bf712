"""One of two processes that share a mesh: compares every way of sharing with this process's own device.

Run by `test_processes`, with the port of the first process and its own number.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

import paged
from paged.spec import RaggedBatch

DEVICES = 2  # per process

SPEC = paged.AttentionSpec(
    num_q_heads=4, num_kv_heads=2, head_dim=8, window=9, soft_cap=20.0, sinks=True, scores=(paged.ALiBi(),)
)
LAYOUT = paged.PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.float32)
# The mesh axis "far" lies between the two processes, "near" between the devices of one process.
WAYS = {
    "contexts": paged.Axes(context="far", kv_heads="near"),
    "sequences": paged.Axes(sequences="far", context="near"),
}


def arrays(shard: int):
    """``(q, k, v, pages, batch)`` of a shard of sequences, NaN where no token is; equal in both processes."""
    rng = np.random.default_rng(shard)
    q, k, v = (rng.normal(0, 3, (3, heads, 8)).astype(np.float32) for heads in (4, 2, 2))
    pool = rng.normal(0, 3, LAYOUT.array_shapes(16)[0]).astype(np.float32)
    pool[15] = np.nan
    batch = RaggedBatch.decode([13, 0, 6 + shard], [[3, 11, 0, 8], [15, 15, 15, 15], [9, 2, -1, 15]])
    return q, k, v, LAYOUT.wrap(pool), batch


def run(axes: paged.Axes) -> float:
    """The largest difference between this process's outputs and what one device computes."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, DEVICES), ("far", "near"))
    attend = paged.lower(SPEC, LAYOUT, mesh=mesh, axes=axes)
    shards, sinks = [arrays(i) for i in range(attend.shares.sequences)], np.arange(4, dtype=np.float32)
    one = paged.lower(SPEC, LAYOUT)
    want = np.concatenate([one.update(*shard, sinks)[0] for shard in shards])
    want_pages = np.concatenate([one.update(*shard, sinks)[1].arrays[0] for shard in shards])

    q, k, v = (np.concatenate([shard[i] for shard in shards]) for i in range(3))
    pool = np.concatenate([shard[3].arrays[0] for shard in shards])
    repeats = attend.layout.num_kv_heads // 2
    pages = attend.layout.wrap(np.repeat(pool, repeats, axis=2))
    batches = [shard[4] for shard in shards]
    batch = batches[0] if axes.sequences is None else RaggedBatch.stack(batches)
    at = attend.shardings
    args = zip((q, k, v, pages, batch, sinks), (at.q, at.k, at.v, at.pages, at.batch, at.sinks), strict=True)
    placed = [_everywhere(tree, where) for tree, where in args]
    out, pages = jax.jit(attend.update, donate_argnums=3)(*placed)
    worst = max(float(np.abs(np.asarray(part.data) - want[part.index]).max()) for part in out.addressable_shards)
    for part in pages.arrays[0].addressable_shards:
        np.testing.assert_array_equal(part.data, np.repeat(want_pages, repeats, axis=2)[part.index])
    return worst


def _everywhere(tree, where):
    """Global arrays, of which each process holds its own part."""

    def place(x, sharding):
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    if isinstance(where, jax.sharding.Sharding):
        return jax.tree.map(lambda x: place(x, where), tree)
    return jax.tree.map(place, tree, where)


if __name__ == "__main__":
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"localhost:{sys.argv[1]}", num_processes=2, process_id=int(sys.argv[2]))
    assert jax.process_count() == 2 and len(jax.devices()) == 2 * DEVICES
    for name, axes in WAYS.items():
        print(f"{name}: {run(axes):.1e}", flush=True)
    jax.distributed.shutdown()
