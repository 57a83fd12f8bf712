"""Kernels whose loops, instructions and transfers are known beforehand: what the modelling tool has to find in them.

Each function is a builder, ``(function, arguments)``: integers are concrete, arrays are shapes.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

TILE = (8, 128)
POOL_BYTES = 512 << 20  # a smaller array may be placed in VMEM by XLA
OUTER, INNER = 5, (3, 10, 1, 7, 20)  # trips of `dynamic_loops`


def _shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def additions(trips, each):
    """One loop of ``trips`` iterations, ``each`` loads and additions of a vector register in one."""

    def kernel(x, out):
        def body(i, total):
            for j in range(each):
                total = total + x[i * each + j]
            return total

        out[...] = lax.fori_loop(0, trips, body, jnp.zeros(TILE, jnp.float32))

    call = pl.pallas_call(kernel, out_shape=_shape(*TILE), name="additions")
    return call, (_shape(trips * each, *TILE),)


def dynamic_loops():
    """A loop in a loop, whose trips are an operand in SMEM: ``OUTER``, and ``INNER`` in its iterations.

    The inner one transfers a tile and waits for it.
    """

    def kernel(trips, pool, out, buffer, sem):
        def inner(j, total):
            copy = pltpu.make_async_copy(pool.at[j], buffer, sem)
            copy.start()
            copy.wait()
            return total + buffer[...]

        def outer(i, total):
            return lax.fori_loop(0, trips[1 + i], inner, total * 2.0)

        out[...] = lax.fori_loop(0, trips[0], outer, jnp.zeros(TILE, jnp.float32))

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[pltpu.VMEM(TILE, jnp.float32), pltpu.SemaphoreType.DMA(())],
    )
    call = pl.pallas_call(kernel, out_shape=_shape(*TILE), name="dynamic_loops", grid_spec=grid)
    return call, (np.array([OUTER, *INNER, 0, 0], np.int32), _shape(POOL_BYTES // 4096, *TILE))


def double_buffered(blocks, pages, rows, is_checked):
    """Sums ``blocks`` blocks of ``pages`` pages of ``rows`` rows, each page a transfer, one block ahead."""

    def kernel(table, pool, out, buffer, sems):
        def copy(block, stage, page):
            source = pool.at[table[block * pages + page]]
            return pltpu.make_async_copy(source, buffer.at[stage, page], sems.at[stage])

        def start(block, stage):
            for page in range(pages):
                copy(block, stage, page).start()

        def body(block, _):
            stage = lax.rem(block, 2)

            @pl.when(block + 1 < blocks)
            def _():
                start(block + 1, 1 - stage)

            for page in range(pages):
                copy(block, stage, page).wait()
            out[...] += jnp.sum(buffer[stage].reshape(-1, *TILE), axis=0)
            return 0

        start(0, 0)
        out[...] = jnp.zeros_like(out)
        lax.fori_loop(0, blocks, body, 0)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(),
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
        scratch_shapes=[pltpu.VMEM((2, pages, rows, 128), jnp.float32), pltpu.SemaphoreType.DMA((2,))],
    )
    params = pltpu.CompilerParams(disable_bounds_checks=not is_checked)
    call = pl.pallas_call(
        kernel, out_shape=_shape(*TILE), name="double_buffered", grid_spec=grid, compiler_params=params
    )
    table = np.arange(blocks * pages, dtype=np.int32)
    return call, (table, _shape(max(len(table), POOL_BYTES // (rows * 512)), rows, 128))


def unstarted():
    """Waits for a transfer that nobody starts."""

    def kernel(pool, out, sem):
        pltpu.make_async_copy(pool.at[0], out, sem).wait()

    call = pl.pallas_call(
        kernel,
        out_shape=_shape(*TILE),
        name="unstarted",
        in_specs=[pl.BlockSpec(memory_space=pl.ANY)],
        scratch_shapes=[pltpu.SemaphoreType.DMA(())],
    )
    return call, (_shape(POOL_BYTES // 4096, *TILE),)


def products(size, grid):
    """``grid`` bfloat16 products of ``size`` x ``size`` matrices."""

    def kernel(a, b, out):
        out[...] = jnp.dot(a[...], b[...], preferred_element_type=jnp.float32)

    call = pl.pallas_call(
        kernel,
        grid=(grid,),
        name="products",
        in_specs=[pl.BlockSpec((size, size), lambda i: (i, 0)), pl.BlockSpec((size, size), lambda i: (0, 0))],
        out_specs=pl.BlockSpec((size, size), lambda i: (i, 0)),
        out_shape=_shape(size * grid, size),
    )
    return call, (_shape(size * grid, size, dtype=jnp.bfloat16), _shape(size, size, dtype=jnp.bfloat16))


def trips_from_a_vector():
    """A loop whose trips are the sum of an array."""

    def kernel(x, out):
        trips = jnp.sum(x[...]).astype(jnp.int32)
        out[...] = lax.fori_loop(0, trips, lambda i, total: total * 2.0, jnp.zeros(TILE, jnp.float32))

    return pl.pallas_call(kernel, out_shape=_shape(*TILE), name="trips_from_a_vector"), (_shape(*TILE),)


def after_a_scan(turns):
    """A kernel whose scalar the caller computes by a loop of ``turns`` turns, one after the other."""

    def kernel(numbers, x, out):
        out[...] = x[...] + numbers[turns - 1].astype(jnp.float32)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=(),
        in_specs=[pl.BlockSpec(memory_space=pltpu.VMEM)],
        out_specs=pl.BlockSpec(memory_space=pltpu.VMEM),
    )
    call = pl.pallas_call(kernel, out_shape=_shape(*TILE), name="after_a_scan", grid_spec=grid)
    return lambda n, x: call(jnp.maximum.accumulate(n), x), (np.arange(turns, dtype=np.int32), _shape(*TILE))
