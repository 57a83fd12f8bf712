"""`StackedState`: what like layers keep in the state, with the pages of all of them in one pool."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

from paged.spec import PageLayout, Pages

_STACKED = "stacked"  # of an array that has a leading axis of layers


class StackedState(eqx.Module):
    """What the layers of one run of a `LayerStack` keep behind one ``eqx.nn.StateIndex``.

    - `value`: for one layer it would be the `Pages` of that layer. Here the pages of all layers are one pool: page
      ``p`` of layer ``i`` is page ``i * num_pages + p``. Per-token scales lie as their pages do. Every other array has
      a leading axis of layers, per-tensor and per-head scales too.
    - `num_layers`: how many layers it is for, static.
    - `parts`: among how many shards of sequences, and devices of a context, the pages of a layer are divided, static.
      The pool has the first part of every layer, then the second part of every layer, and so on: each device has its
      part of all layers.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    >>> stacked = StackedState.of([layout.init(num_pages=3) for _ in range(5)])
    >>> stacked.value.num_pages, stacked.layer(4).num_pages
    (15, 3)
    """

    value: Any
    num_layers: int = eqx.field(static=True)
    parts: tuple[int, int] = eqx.field(static=True, default=(1, 1))

    @classmethod
    def of(cls, values: Sequence[Any], parts: tuple[int, int] = (1, 1)) -> "StackedState":
        """The values of several layers as one.

        **Arguments:**

        - `values`: what each layer keeps, at least one: pytrees of one structure, with `Pages` of one layout.
        - `parts`: see above.
        """

        def join(axis: Any, *leaves: Any) -> Any:
            if axis == _STACKED:
                return jnp.stack(leaves)
            cut = [jnp.split(x, math.prod(parts), axis) for x in leaves]
            return jnp.concatenate([x[part] for part in range(math.prod(parts)) for x in cut], axis)

        return cls(jax.tree.map(join, _page_axes(values[0]), *values), len(values), parts)

    def layer(self, i: int) -> Any:
        """What layer ``i`` keeps, on its own: its pages are a copy.

        **Arguments:**

        - `i`: the layer, an int.
        """

        def cut(axis: Any, x: Any) -> Any:
            if axis == _STACKED:
                return x[i]
            size = x.shape[axis] // self.num_layers // math.prod(self.parts)
            first = [(part * self.num_layers + i) * size for part in range(math.prod(self.parts))]
            cut = [jax.lax.slice_in_dim(x, begin, begin + size, axis=axis) for begin in first]
            return cut[0] if len(cut) == 1 else jnp.concatenate(cut, axis)

        return jax.tree.map(cut, _page_axes(self.value), self.value)

    def view(self, i: Any) -> Any:
        """What layer ``i`` sees while the layers run: the whole pool, and its own part of every other array."""

        def see(axis: Any, x: Any) -> Any:
            return jax.lax.dynamic_index_in_dim(x, i, keepdims=False) if axis == _STACKED else x

        return jax.tree.map(see, _page_axes(self.value), self.value)

    def put(self, i: Any, seen: Any, new: Any) -> "StackedState":
        """The state after layer ``i`` made ``new`` of its view ``seen``. What it did not change is not written."""

        def keep(axis: Any, x: Any, seen: Any, new: Any) -> Any:
            if axis != _STACKED:
                return new
            return x if new is seen else jax.lax.dynamic_update_index_in_dim(x, new, i, axis=0)

        value = jax.tree.map(keep, _page_axes(self.value), self.value, seen, new)
        return StackedState(value, self.num_layers, self.parts)


class Pool(NamedTuple):
    """The pages of a state that one layer uses: their layout, and how many there are of them for each layer."""

    layout: PageLayout
    num_pages: Any


def pools_of(state: Any) -> list[Pool]:
    """The pools of every layer, or run of stacked layers, of a state.

    **Arguments:**

    - `state`: an ``eqx.nn.State``, or any pytree with `Pages` and `StackedState`.

    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4)
    >>> [pool.num_pages for pool in pools_of([layout.init(3), StackedState.of([layout.init(4)] * 5)])]
    [3, 4]
    """
    pools = []
    for x in jax.tree.leaves(state, is_leaf=lambda x: isinstance(x, Pages | StackedState)):
        if isinstance(x, Pages):
            pools.append(Pool(x.layout, x.num_pages))
        elif isinstance(x, StackedState):
            pools += [Pool(pool.layout, pool.num_pages // x.num_layers) for pool in pools_of(x.value)]
    return pools


def without_pools(value: Any) -> Any:
    """A layer's value with the shape and dtype in place of every array of pages."""

    def shape_of(axis: Any, x: Any) -> Any:
        return x if axis == _STACKED else jax.ShapeDtypeStruct(x.shape, x.dtype)

    return jax.tree.map(shape_of, _page_axes(value), value)


def with_pools(value: Any, num_layers: int, parts: tuple[int, int]) -> StackedState:
    """The inverse of `without_pools`, of a value whose other arrays are stacked: pools of zeros for all layers."""

    def make(axis: Any, x: Any) -> Any:
        if axis == _STACKED:
            return x
        shape = list(x.shape)
        shape[axis] *= num_layers
        return jnp.zeros(shape, x.dtype)

    return StackedState(jax.tree.map(make, _page_axes(value), value), num_layers, parts)


def _page_axes(value: Any) -> Any:
    """For each array of a value, the axis that counts pages, or `_STACKED` where it has none."""

    def axes_of(x: Any) -> Any:
        if not isinstance(x, Pages):
            return _STACKED
        names = x.layout.scale_axes or ()
        of_scales = names.index("page") if "page" in names else _STACKED
        k_scale, v_scale = (None if scale is None else of_scales for scale in (x.k_scale, x.v_scale))
        return Pages((x.layout.page_axis,) * len(x.arrays), k_scale, v_scale, x.layout)

    return jax.tree.map(axes_of, value, is_leaf=lambda x: isinstance(x, Pages))
