"""`PageLayout` and `Pages`: how a pool of pages of keys and values lies in memory."""

import dataclasses
import math
from typing import Any, assert_never

import equinox as eqx
import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

from .numbers import require_positive_int
from .orders import ARRAY_AXES, PAGE_ORDERS, SCALE_AXES, SCALE_KINDS, PageOrder, ScaleKind

# A `jax.ShapeDtypeStruct` stands for an array where only shape and dtype count.
AnyArray = Array | jax.ShapeDtypeStruct

_LANES = 128  # numbers in one row of a TPU's registers
FLOAT_DTYPES = tuple(jnp.dtype(d) for d in ("float16", "bfloat16", "float32"))
QUANTISED_DTYPES = tuple(jnp.dtype(d) for d in ("int8", "float8_e4m3fn", "float8_e5m2"))
_DTYPE_NAMES = ", ".join(d.name for d in FLOAT_DTYPES + QUANTISED_DTYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PageLayout:
    """How a pool of pages lies in memory: the page size, the heads, the dtype, and the order of the axes.

    A layout is hashable and static. `init` makes a pool, and `wrap` adopts arrays that there are already.

    **Arguments:**

    - `page_size` (``P``): tokens per page.
    - `num_kv_heads` (``Hkv``), `head_dim` (``D``): as in the `AttentionSpec`.
    - `dtype`: of the pages: float16, bfloat16, float32, int8, float8_e4m3fn or float8_e5m2.
    - `order`: the order of the axes, for a pool of ``N`` pages:
        - ``"packed"``, the default: one array ``[N, 2, Hkv, P, D]``, keys before values. One page of all heads is one
          contiguous transfer, and the keys of one head are one aligned tile.
        - ``"joined"``: one array ``[N, Hkv, P, lanes]`` with the key and the value of a token side by side. ``lanes``
          is the multiple of 128 that holds both; the value begins at ``lanes / 2``, and the rest is 0. This order is
          for TPUs and head dimensions that are no multiple of 128: there XLA stores the other orders in a way that no
          kernel can read, and copies the pool in every call.
        - ``"split"``: an array of keys ``[Hkv, N, P, D]`` and an array of values ``[Hkv, N, P, Dv]``.
        - ``"interleaved"``: one array ``[N, P, 2 * Hkv, D]``: keys at even heads, values at odd heads.
    - `value_dim` (``Dv``): the dimension of a value, ``head_dim`` by default. Another one needs ``"split"`` order.
    - `scales`: int8 and float8 pages hold ``k / scale``, with float32 scales for keys and others for values:
        - ``"tensor"``: one number, shape ``[]``, given to `init` or measured by `paged.runtime.calibrate`;
        - ``"head"``: per-head scales, ``[Hkv]``, given or measured too;
        - ``"token"``: a scale per token and head, ``[N, Hkv, P]``, computed when a token is written;
        - None, for float pages.

    **Raises:** ``TypeError`` or ``ValueError``, naming the field, for values that are not as above.

    >>> layout = PageLayout(page_size=16, num_kv_heads=8, head_dim=128, dtype=jnp.bfloat16)
    >>> layout.init(num_pages=4).arrays[0].shape
    (4, 2, 8, 16, 128)
    >>> layout.bytes_per_page
    65536
    """

    page_size: int
    num_kv_heads: int
    head_dim: int
    dtype: Any = jnp.bfloat16
    order: PageOrder = "packed"
    value_dim: Any = None  # an int after construction
    scales: ScaleKind | None = None

    def __post_init__(self):
        object.__setattr__(self, "dtype", _as_dtype(self.dtype))
        if self.value_dim is None:
            object.__setattr__(self, "value_dim", self.head_dim)
        for name in ("page_size", "num_kv_heads", "head_dim", "value_dim"):
            require_positive_int(name, getattr(self, name))
        if not isinstance(self.order, str) or self.order not in PAGE_ORDERS:
            raise ValueError(f"order must be one of {PAGE_ORDERS}; got {self.order!r}.")
        if self.value_dim != self.head_dim and "value_dim" not in self.array_axes[-1]:
            raise ValueError(
                f'order "{self.order}" holds keys and values in one array, so value_dim must equal head_dim; got '
                f'value_dim={self.value_dim}, head_dim={self.head_dim}. In order="split" they may differ.'
            )
        if self.dtype not in FLOAT_DTYPES + QUANTISED_DTYPES:
            raise TypeError(f"dtype of pages must be one of {_DTYPE_NAMES}; got {self.dtype.name}.")
        if self.scales is not None and not (isinstance(self.scales, str) and self.scales in SCALE_KINDS):
            raise ValueError(f"scales must be None or one of {SCALE_KINDS}; got {self.scales!r}.")
        if self.is_quantised != (self.scales is not None):
            raise ValueError(
                f"dtype {self.dtype.name} and scales={self.scales!r} do not go together: int8 and float8 pages need "
                f"scales, one of {SCALE_KINDS}; float pages have none."
            )

    def replace(self, **changes: Any) -> "PageLayout":
        """This layout with some fields changed, checked again.

        A ``value_dim`` that equals ``head_dim`` follows a new ``head_dim``, unless it is changed too.

        >>> layout = PageLayout(page_size=16, num_kv_heads=8, head_dim=128)
        >>> layout.replace(head_dim=64).value_dim
        64
        """
        if "head_dim" in changes and self.value_dim == self.head_dim:
            changes = {"value_dim": None, **changes}
        return dataclasses.replace(self, **changes)

    @property
    def is_quantised(self) -> bool:
        """Whether pages hold int8 or float8 values, which scales multiply."""
        return self.dtype in QUANTISED_DTYPES

    @property
    def value_lane(self) -> int:
        """In ``"joined"`` order, the lane at which a value begins: half of the lanes of one token and head."""
        return -(-2 * self.head_dim // _LANES) * _LANES // 2

    @property
    def bytes_per_page(self) -> int:
        """Bytes of the keys and values of one page, without scales."""
        return sum(math.prod(shape) for shape in self.array_shapes(1)) * self.dtype.itemsize

    @property
    def array_axes(self) -> tuple[tuple[str, ...], ...]:
        """The names of each array's axes, see `paged.spec.orders`."""
        return ARRAY_AXES[self.order]

    @property
    def scale_axes(self) -> tuple[str, ...] | None:
        """The names of the axes of ``k_scale`` and of ``v_scale``; None for float pages."""
        return None if self.scales is None else SCALE_AXES[self.scales]

    @property
    def page_axis(self) -> int:
        """The axis of every array that counts pages."""
        return self.array_axes[0].index("page")

    @property
    def offset_axis(self) -> int:
        """The axis of every array that counts the tokens of one page."""
        return self.array_axes[0].index("offset")

    @property
    def head_axis(self) -> int:
        """The axis of every array that counts KV heads; in ``"interleaved"`` order it has two entries for each head."""
        axes = self.array_axes[0]
        return axes.index("head" if "head" in axes else "kv_head")

    def array_shapes(self, num_pages: Any) -> tuple[tuple[Any, ...], ...]:
        """The shape of each array of a pool of ``num_pages`` pages, a number or a symbolic size of `jax.export`."""
        sizes = self._sizes(num_pages)
        return tuple(tuple(sizes[axis] for axis in axes) for axes in self.array_axes)

    def scale_shape(self, num_pages: Any) -> tuple[Any, ...] | None:
        """The shape of ``k_scale`` and of ``v_scale`` in a pool of ``num_pages`` pages; None for float pages."""
        sizes = self._sizes(num_pages)
        return None if self.scale_axes is None else tuple(sizes[axis] for axis in self.scale_axes)

    def _sizes(self, num_pages: Any) -> dict[str, Any]:
        return {
            "page": num_pages,
            "head": self.num_kv_heads,
            "offset": self.page_size,
            "kv": 2,
            "kv_head": 2 * self.num_kv_heads,
            "dim": self.head_dim,
            "value_dim": self.value_dim,
            "lanes": 2 * self.value_lane,
        }

    def stack(
        self, k: Shaped[Array, "*tokens kv_heads head_dim"], v: Shaped[Array, "*tokens kv_heads value_dim"]
    ) -> tuple[Array, ...]:
        """Keys and values of tokens, as the pool's arrays hold them: one part for each array.

        **Arguments:**

        - `k`, `v`: keys and values [*tokens, kv_heads, head_dim], in the dtype of the pages.

        **Returns:** for each array of a pool, the part of every token: the array's axes without pages and offsets.

        >>> layout = PageLayout(page_size=16, num_kv_heads=8, head_dim=128)
        >>> [rows.shape for rows in layout.stack(jnp.ones((5, 8, 128)), jnp.zeros((5, 8, 128)))]
        [(5, 2, 8, 128)]
        """
        match self.order:
            case "packed":
                return (jnp.stack([k, v], axis=-3),)
            case "joined":
                padding = [(0, 0)] * (k.ndim - 1) + [(0, self.value_lane - self.head_dim)]
                return (jnp.concatenate([jnp.pad(k, padding), jnp.pad(v, padding)], axis=-1),)
            case "split":
                return k, v
            case "interleaved":
                return (jnp.stack([k, v], axis=-2).reshape(*k.shape[:-2], 2 * self.num_kv_heads, self.head_dim),)
            case _:
                assert_never(self.order)

    def unstack(self, arrays: tuple[Array, ...]) -> tuple[Array, Array]:
        """The keys and the values that `stack` made ``arrays`` of.

        >>> layout = PageLayout(page_size=16, num_kv_heads=8, head_dim=128, order="interleaved")
        >>> [x.shape for x in layout.unstack((jnp.ones((5, 16, 128)),))]
        [(5, 8, 128), (5, 8, 128)]
        """
        axes = tuple(tuple(axis for axis in axes if axis not in ("page", "offset")) for axes in self.array_axes)
        return self._half(arrays, axes, 0), self._half(arrays, axes, 1)

    def _half(self, arrays: tuple[Array, ...], axes: tuple[tuple[str, ...], ...], which: int) -> Array:
        """The keys (0) or the values (1) of arrays whose last axes have these names."""
        match self.order:
            case "packed":
                after_kv = len(axes[0]) - axes[0].index("kv") - 1
                return arrays[0][(..., which, *[slice(None)] * after_kv)]
            case "joined":
                first = which * self.value_lane
                return arrays[0][..., first : first + self.head_dim]
            case "split":
                return arrays[which]
            case "interleaved":
                return arrays[0][..., which::2, :]
            case _:
                assert_never(self.order)

    def init(self, num_pages: int, *, k_scale: Any = None, v_scale: Any = None) -> "Pages":
        """A pool of ``num_pages`` pages of zeros.

        **Arguments:**

        - `num_pages`: how many pages the pool holds.
        - `k_scale`, `v_scale`: per-tensor or per-head scales of the keys and of the values, both or neither: positive
          numbers, or float arrays in the shape of the scales. The largest key that fits is ``k_scale`` times the
          largest number of the dtype; greater ones saturate. None for float8 pages: 1. None for int8 pages: the pool
          has no scales yet, and every use of it raises, because a scale of 1 would round keys and values to whole
          numbers. Per-token scales are computed when a token is written, and are not given.

        **Raises:** ``TypeError`` or ``ValueError`` unless ``num_pages`` is a positive Python int, and for scales that
        are not as above.

        >>> layout = PageLayout(page_size=16, num_kv_heads=8, head_dim=128, dtype=jnp.int8, scales="head")
        >>> layout.init(num_pages=4, k_scale=20 / 127, v_scale=jnp.full(8, 3 / 127)).k_scale.shape
        (8,)
        """
        require_positive_int("num_pages", num_pages)
        given = {"k_scale": k_scale, "v_scale": v_scale}
        names = [name for name, scale in given.items() if scale is not None]
        if names and self.scales not in ("tensor", "head"):
            raise ValueError(
                f"{names[0]} is for per-tensor and per-head scales; the layout has scales={self.scales!r}."
            )
        if len(names) == 1:
            raise ValueError(f"k_scale and v_scale are given together; got {names[0]} alone.")
        arrays = tuple(jnp.zeros(shape, self.dtype) for shape in self.array_shapes(num_pages))
        shape = self.scale_shape(num_pages)
        is_unknown = self.dtype == jnp.int8 and self.scales != "token" and not names
        if shape is None or is_unknown:
            return Pages(arrays, None, None, self)
        k_scale, v_scale = (_fixed_scale(name, scale, shape) for name, scale in given.items())
        return Pages(arrays, k_scale, v_scale, self)

    def wrap(self, *arrays: AnyArray, k_scale: AnyArray | None = None, v_scale: AnyArray | None = None) -> "Pages":
        """Make `Pages` of arrays that there are already, without a copy.

        **Arguments:**

        - `arrays`: ``wrap(kv)``, or in ``"split"`` order ``wrap(k, v)``. Their shapes say how many pages there are.
        - `k_scale`, `v_scale`: the scales of quantised pages.

        **Raises:** ``ValueError`` or ``TypeError`` that names the array whose shape or dtype does not fit this layout.

        >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
        >>> layout.wrap(jnp.zeros((3, 2, 1, 2, 4))).num_pages
        3
        """
        names = ("kv",) if len(self.array_axes) == 1 else ("k", "v")
        if len(arrays) != len(names):
            raise TypeError(f'order "{self.order}" wraps {" and ".join(names)}; got {len(arrays)} arrays.')
        first = np.shape(arrays[0])
        num_pages = first[self.page_axis] if len(first) > self.page_axis else 1
        for name, array, shape in zip(names, arrays, self.array_shapes(num_pages), strict=True):
            _require_array(name, array, shape, self.dtype, f'order "{self.order}" with {num_pages} pages')
        shape = self.scale_shape(num_pages)
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            if (scale is None) != (shape is None):
                needs = "none" if shape is None else f"float32 of shape {shape}"
                raise ValueError(f"{name} does not fit: scales={self.scales!r} needs {needs}; got {_describe(scale)}.")
            if scale is not None and shape is not None:
                _require_array(name, scale, shape, jnp.dtype("float32"), f"scales={self.scales!r}")
        return Pages(tuple(arrays), k_scale, v_scale, self)

    def __str__(self) -> str:
        parts = [f"order={self.order}", f"page_size={self.page_size}", f"kv_heads={self.num_kv_heads}"]
        parts += [f"head_dim={self.head_dim}"]
        parts += [f"value_dim={self.value_dim}"] if self.value_dim != self.head_dim else []
        parts += [f"dtype={self.dtype.name}"] + ([f"scales={self.scales}"] if self.scales else [])
        return f"PageLayout({', '.join(parts)})"


class Pages(eqx.Module):
    """A pool of pages: the arrays and their layout, as a pytree. `PageLayout.init` and `PageLayout.wrap` make it.

    - `arrays`: the keys and values, one array or two, see `PageLayout`.
    - `k_scale`, `v_scale`: float32 scales of quantised pages. None for float pages, and for int8 pages whose scales are
      not known yet.
    - `layout`: the `PageLayout`, static.
    """

    # Arrays. A tree that says how pages lie on a mesh holds a `PartitionSpec` or a sharding for each array instead.
    arrays: tuple[Any, ...]
    k_scale: Any
    v_scale: Any
    layout: PageLayout = eqx.field(static=True)

    @property
    def num_pages(self) -> Any:
        """The number of pages in the pool: an int, or a symbolic size of `jax.export`.

        Where the pools of layers are stacked on leading axes, it is the number of pages of one layer.
        """
        return self.arrays[0].shape[self.layout.page_axis - len(self.layout.array_axes[0])]

    def keys(self) -> Float[Array, "pages kv_heads page_size head_dim"]:
        """All keys in float32, multiplied by their scales. This copies the pool: it is for inspection and tests."""
        return self._dequantised(0, self.k_scale)

    def values(self) -> Float[Array, "pages kv_heads page_size value_dim"]:
        """All values in float32, multiplied by their scales. This copies the pool: it is for inspection and tests."""
        return self._dequantised(1, self.v_scale)

    def _dequantised(self, which: int, scale: Array | None) -> Array:
        require_scales(self)
        layout = self.layout
        axes = ["head" if axis == "kv_head" else axis for axis in layout.array_axes[0] if axis != "kv"]
        raw = layout._half(self.arrays, layout.array_axes, which)
        raw = jnp.transpose(raw, [*map(axes.index, ("page", "head", "offset")), 3]).astype(jnp.float32)
        if scale is None:
            return raw
        return raw * (scale[..., None] if scale.ndim == 3 else scale.reshape(1, -1, 1, 1))


def _as_dtype(dtype: Any) -> Any:
    try:
        return jnp.dtype("none" if dtype is None else dtype)  # NumPy takes None for float64
    except TypeError:
        raise TypeError(f"dtype of pages must be one of {_DTYPE_NAMES}; got {dtype!r}.") from None


def require_scales(pages: Pages) -> None:
    """Raise ``ValueError`` where pages need scales that nobody has given or measured."""
    if pages.k_scale is None and pages.layout.scales is not None:
        raise ValueError(
            f"These pages have no scales yet, {pages.layout}: with a scale of 1 they would hold whole numbers. Give "
            "them: layout.init(num_pages, k_scale=..., v_scale=...), or k_scale= and v_scale= of PagedCache and "
            "PagedAttention. Or measure them: state = paged.runtime.calibrate(model, state, prompts). Or use "
            'scales="token", which are computed when a token is written.'
        )


def _require_array(name: str, array: Any, shape: tuple[Any, ...], dtype: Any, why: str) -> None:
    if not isinstance(array, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        raise TypeError(f"{name} must be an array; got {type(array).__name__}.")
    if tuple(array.shape) != shape:
        raise ValueError(f"{name} must have shape {shape} ({why}); got {tuple(array.shape)}.")
    if array.dtype != dtype:
        raise TypeError(f"{name} must be {dtype.name} ({why}); got {array.dtype.name}.")


def _fixed_scale(name: str, scale: Any, shape: tuple[int, ...]) -> Array:
    """A per-tensor or per-head scale of a new pool: what was given, or 1."""
    if np.shape(scale) not in ((), shape):
        raise ValueError(f"{name} must be a number, or an array of shape {shape}; got shape {np.shape(scale)}.")
    scale = jnp.asarray(1.0 if scale is None else scale, jnp.float32)
    if not isinstance(scale, jax.core.Tracer) and not bool(((scale > 0) & jnp.isfinite(scale)).all()):
        raise ValueError(f"{name} must be positive and finite; got {np.asarray(scale).tolist()}.")
    return jnp.broadcast_to(scale, shape)


def _describe(array: Any) -> str:
    if not isinstance(array, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return repr(array)
    return f"{array.dtype.name} of shape {tuple(array.shape)}"
