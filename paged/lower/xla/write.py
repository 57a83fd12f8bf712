"""Writing a step's keys and values into their slots: one scatter, in place where the pages are donated."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from paged.spec import Pages, RaggedBatch

from ..sequences import Sequences


def write(
    k: Float[Array, "tokens kv_heads head_dim"],
    v: Float[Array, "tokens kv_heads value_dim"],
    pages: Pages,
    batch: RaggedBatch,
) -> Pages:
    """The pages with each row's key and value at its position; rows of no sequence, and holes, are dropped."""
    page, slot = _slots(batch, k.shape[0], pages)
    layout, heads = pages.layout, jnp.arange(pages.layout.num_kv_heads)
    k, k_scale = _quantised(k, pages.k_scale, pages, page, slot)
    v, v_scale = _quantised(v, pages.v_scale, pages, page, slot)
    page, slot = page[:, None], slot[:, None]
    if layout.order == "packed":
        (pool,) = pages.arrays
        pools = (pool.at[page, 0, heads, slot].set(k, mode="drop").at[page, 1, heads, slot].set(v, mode="drop"),)
    elif layout.order == "split":
        pools = tuple(
            pool.at[heads, page, slot].set(x, mode="drop") for pool, x in zip(pages.arrays, (k, v), strict=True)
        )
    else:
        (pool,) = pages.arrays
        pairs = jnp.stack([k, v], axis=2).reshape(k.shape[0], 2 * layout.num_kv_heads, -1)
        pools = (pool.at[page[:, 0], slot[:, 0]].set(pairs, mode="drop"),)
    return Pages(pools, k_scale, v_scale, layout)


def _slots(batch: RaggedBatch, tokens: int, pages: Pages) -> tuple[Int[Array, " tokens"], Int[Array, " tokens"]]:
    """Each row's page and slot; the page is out of the pool, so that the write is dropped, where there is none."""
    size = pages.layout.page_size
    seqs = Sequences.of(batch, tokens, size)
    seq, position, is_live = seqs.positions(tokens)
    position = jnp.where(is_live, position, 0)
    page = seqs.tables[seq, position // size]
    is_mapped = is_live & (page >= 0) & (page < pages.num_pages)
    return jnp.where(is_mapped, page, pages.num_pages), position % size


def _quantised(x: Array, scale: Array | None, pages: Pages, page: Array, slot: Array) -> tuple[Array, Array | None]:
    """``x [tokens, kv_heads, dim]`` as the pages store it, and the scales after the write.

    Scales a token and head are computed here, the row's largest magnitude over the dtype's; the others are the
    caller's, and values beyond them saturate.
    """
    dtype = pages.layout.dtype
    if scale is None:
        return x.astype(dtype), None
    x = x.astype(jnp.float32)
    largest = float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)
    if scale.ndim == 3:
        row_scale = jnp.max(jnp.abs(x), axis=-1) / largest
        row_scale = jnp.where(row_scale == 0, 1.0, row_scale)  # a row of zeros is exact at any scale
        heads = jnp.arange(pages.layout.num_kv_heads)
        scale = scale.at[page[:, None], heads, slot[:, None]].set(row_scale, mode="drop")
    else:
        row_scale = jnp.broadcast_to(scale, (pages.layout.num_kv_heads,))
    scaled = jnp.clip(x / row_scale[..., None], -largest, largest)
    if jnp.issubdtype(dtype, jnp.integer):
        scaled = jnp.round(scaled)
    return scaled.astype(dtype), scale
