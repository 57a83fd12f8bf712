"""`calibrate`: the fixed scales of quantised pages, measured on sample prompts."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from paged.lower import Attend, Plan, Sequences, ShardedAttend, check_values, lower
from paged.spec import Everything, PageLayout, Pages, RaggedBatch, Sinks, as_float

from .stacked_state import StackedState, pools_of


def calibrate(
    model: Callable[[Any, RaggedBatch, eqx.nn.State], tuple[Any, eqx.nn.State]],
    state: eqx.nn.State,
    prompts: Sequence[Any],
    *,
    margin: float = 1.0,
) -> eqx.nn.State:
    """Measure the per-tensor and per-head scales of a model's quantised pages on sample prompts.

    Every prompt runs through the model once, with float32 pages in place of the quantised ones. For each layer the
    largest magnitude of keys and of values is kept. That times ``margin`` becomes the largest magnitude that the pages
    hold. A greater key or value of a later prompt saturates. Call it before the first token is served: pages that hold
    tokens of other scales are not converted.

    **Arguments:**

    - `model`: a callable pytree, ``output, state = model(tokens, batch, state)``, that keeps its pages in the state,
      such as a `LayerStack`, or one `PagedAttention`. What `generate` serves fits.
    - `state`: the model's Equinox state. Its layers' pages have scales of kind ``"tensor"`` or ``"head"``, known or not
      known yet. Layers with other pages may stand beside them.
    - `prompts`: at least one: each is what the model calls its tokens, token ids int[tokens] or features
      float[tokens, ...]. Each is one step of the model, padded with zeros to a power of two.
    - `margin`: how many times the largest magnitude seen the pages hold. For int8, more room means a wider step between
      numbers. For float8 it costs no precision.

    **Returns:** the state with new scales in its pages, and otherwise as it was: float32 in the shapes of the layouts'
    scales. They are read as ``state.get(layer.cache.index).k_scale``.

    Raises ``ValueError`` or ``TypeError``: where no pages of the state have such scales, for a prompt that is empty, is
    no array of numbers, or does not fit the pages, for a margin that is not positive, and where keys or values are NaN,
    infinite, or all 0.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8, dtype=jnp.int8, scales="head")
    >>> layer, state = eqx.nn.make_with_state(PagedAttention)(
    ...     spec, layout, num_pages=8, embed_dim=32, key=jax.random.key(0))
    >>> x = jax.random.normal(jax.random.key(1), (5, 32))
    >>> state = calibrate(layer, state, [x])
    >>> y, state = layer(x, RaggedBatch.prefill(length=5, block_table=[3, 1], query_rows=5), state)
    >>> bool(jnp.allclose(y, layer.dense(x[None])[0], atol=0.02))
    True
    """
    if not as_float("margin", margin) > 0:
        raise ValueError(f"margin must be positive; got {margin}.")
    arrays = [_prompt(index, prompt) for index, prompt in enumerate(prompts)]
    if not arrays:
        raise ValueError("prompts is empty: scales are measured on at least one prompt.")
    page_size, num_pages = _pool_size(state)
    longest = max(len(array) for array in arrays)
    entries = -(-longest // page_size)
    if entries > num_pages:
        raise ValueError(
            f"A prompt of {longest} tokens needs {entries} pages of {page_size} tokens, and the state's pages are "
            f"{num_pages}. Cut the prompt, or make the pool larger."
        )
    measured = _measuring(state, entries)
    for array in arrays:
        width = 1 << (len(array) - 1).bit_length()
        batch = RaggedBatch([len(array)], np.arange(entries, dtype=np.int32)[None], [0, len(array)])
        sizes: dict[str, Any] = {"page_size": page_size, "num_pages": entries, "tokens": width}
        batch = check_values(batch, **sizes, mask=Everything(), minima=())
        padded = jnp.asarray(np.pad(array, [(0, width - len(array))] + [(0, 0)] * (array.ndim - 1)))
        measured = _step(model, padded, batch, measured)
    return _with_scales(state, measured, margin)


class CalibratingPages(eqx.Module):
    """What stands in the state for the pages of one layer while `calibrate` measures it.

    * ``pages``: float32 pages, or of a layer whose scales are not measured, pages of its own layout.
    * ``k_max``, ``v_max``: the largest magnitudes so far, float32 in the shape of the layout's scales.
    """

    pages: Pages
    k_max: Array
    v_max: Array

    def plan(self, attend: Attend | ShardedAttend, q: Any, batch: RaggedBatch) -> Plan:
        """The plan of a step for `update`."""
        return self._exact(attend).plan(q, self.pages, batch)

    def _exact(self, attend: Attend | ShardedAttend) -> Attend:
        return lower(attend.spec, self.pages.layout, "xla", check=attend.check)

    def update(
        self,
        attend: Attend | ShardedAttend,
        q: Array,
        k: Array,
        v: Array,
        batch: RaggedBatch | Plan,
        sinks: Sinks | None,
    ) -> tuple[Float[Array, "tokens q_heads value_dim"], "CalibratingPages"]:
        """``attend.update`` on these pages, with this step's keys and values in the maxima."""
        out, pages = self._exact(attend).update(q, k, v, self.pages, batch, sinks)
        tokens = k.shape[0]
        own = batch if isinstance(batch, RaggedBatch) else batch.batch
        _, _, is_row = Sequences.of(own, tokens, self.pages.layout.page_size).rows(tokens)

        def largest(x: Array, so_far: Array) -> Array:
            axes = (0, 2) if so_far.ndim else (0, 1, 2)
            seen = jnp.where(is_row[:, None, None], jnp.abs(x.astype(jnp.float32)), jnp.float32(0))
            return jnp.maximum(so_far, jnp.max(seen, axis=axes))

        return out, CalibratingPages(pages, largest(k, self.k_max), largest(v, self.v_max))


@eqx.filter_jit
def _step(model: Any, tokens: Array, batch: RaggedBatch, state: eqx.nn.State) -> eqx.nn.State:
    return model(tokens, batch, state)[1]


def _prompt(index: int, prompt: Any) -> np.ndarray:
    array = np.asarray(prompt)
    if not (jnp.issubdtype(array.dtype, jnp.integer) or jnp.issubdtype(array.dtype, jnp.floating)):
        raise TypeError(f"prompts[{index}] must be an array of token ids or of features; got {array.dtype.name}.")
    if array.ndim < 1 or not array.size:
        raise ValueError(f"prompts[{index}] must have at least one token; got shape {array.shape}.")
    if isinstance(prompt, jax.Array | np.ndarray):
        return array
    return array.astype(np.int32 if jnp.issubdtype(array.dtype, jnp.integer) else np.float32)


def _is_pages(x: Any) -> bool:
    return isinstance(x, Pages | CalibratingPages)


def _map_pages(change: Callable[..., Any], *states: Any) -> Any:
    """``change`` of all pages of a state, and the other leaves of the first state."""
    return jax.tree.map(lambda x, *y: change(x, *y) if _is_pages(x) else x, *states, is_leaf=_is_pages)


def _is_measured(layout: PageLayout) -> bool:
    return layout.scales in ("tensor", "head")


def _pool_size(state: eqx.nn.State) -> tuple[int, int]:
    """The page size, and the number of pages that the smallest pool of the state has."""
    pools = pools_of(state)
    if not any(_is_measured(pool.layout) for pool in pools):
        kinds = sorted({repr(pool.layout.scales) for pool in pools})
        raise ValueError(
            'calibrate measures pages with scales="tensor" or scales="head", and the state has none; it has pages with '
            f"scales {', '.join(kinds) or 'of no kind'}."
        )
    sizes = sorted({pool.layout.page_size for pool in pools})
    if len(sizes) > 1:
        raise ValueError(f"calibrate needs pages of one page_size in all layers; the state has {sizes}.")
    return sizes[0], min(pool.num_pages for pool in pools)


def _measuring(state: eqx.nn.State, num_pages: int) -> eqx.nn.State:
    """The state with small pools of ``num_pages`` for each layer: float32 where scales are to be measured."""

    def begin(x: Any) -> Any:
        if isinstance(x, StackedState):
            pools = functools.partial(_begin, num_pages=num_pages * x.num_layers, num_layers=(x.num_layers,))
            return StackedState(_map_pages(pools, x.value), x.num_layers, x.parts)
        return _begin(x, num_pages=num_pages) if isinstance(x, Pages) else x

    return jax.tree.map(begin, state, is_leaf=lambda x: isinstance(x, Pages | StackedState))


def _begin(pages: Pages, num_pages: int, num_layers: tuple[int, ...] = ()) -> Pages | CalibratingPages:
    """A small pool in place of another one: float32 where scales are to be measured, with as many maxima as scales.

    ``num_layers`` is the leading axis of the scales in a `StackedState`. Pages of layers that are scanned over have
    leading axes themselves.
    """
    layout = pages.layout
    lead = pages.arrays[0].shape[: pages.arrays[0].ndim - len(layout.array_axes[0])]
    exact = layout.replace(dtype=jnp.float32, scales=None) if _is_measured(layout) else layout
    small = jax.tree.map(lambda x: jnp.broadcast_to(x, (*lead, *x.shape)), exact.init(num_pages))
    if not _is_measured(layout):
        return small
    shape = (*num_layers, *lead, *(layout.scale_shape(num_pages) or ()))
    return CalibratingPages(small, jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.float32))


def _with_scales(state: eqx.nn.State, measured: eqx.nn.State, margin: float) -> eqx.nn.State:
    """``state`` with scales from the maxima in ``measured``."""

    def finish(pages: Pages, seen: Any) -> Pages:
        if not isinstance(seen, CalibratingPages):
            return pages
        k_max, v_max = np.asarray(seen.k_max), np.asarray(seen.v_max)
        if not (np.isfinite(k_max).all() and np.isfinite(v_max).all()):
            raise ValueError(f"A layer's keys or values are NaN or infinite, so they have no scale: {pages.layout}.")
        heads = -1 if pages.layout.scales == "head" else ()
        if not (k_max.any(axis=heads).all() and v_max.any(axis=heads).all()):
            raise ValueError(
                f"A layer's keys or values are all 0, so they have no scale: {pages.layout}. Does the model call it?"
            )
        k_scale, v_scale = (_scale(pages.layout, x, margin) for x in (k_max, v_max))
        return Pages(pages.arrays, k_scale, v_scale, pages.layout)

    return _map_pages(finish, state, measured)


def _scale(layout: PageLayout, seen: np.ndarray, margin: float) -> Float[Array, "..."]:
    # A head that was 0 in every sample gets the scale of its layer's largest head: all is known of it is that it may be
    # small.
    seen = np.where(seen == 0, seen.max(axis=-1, keepdims=True), seen) if layout.scales == "head" else seen
    is_integer = jnp.issubdtype(layout.dtype, jnp.integer)
    largest = float(jnp.iinfo(layout.dtype).max if is_integer else jnp.finfo(layout.dtype).max)
    return jnp.asarray(margin * seen / largest, jnp.float32)
