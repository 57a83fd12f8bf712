"""One device's share of the heads: a spec of fewer heads, whose score operations see the heads' numbers among all."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array

from paged.spec import AttentionSpec, Coverage, Given, Mask, PageLayout, Pages, ScoreOp, SoftCap, terms_in

from ..jax_version import on_devices
from .axes import Axes, Names
from .specs import ArraySpecs


@dataclasses.dataclass(frozen=True)
class WithGlobalHeads(ScoreOp):
    """A score operation for a device that has ``heads`` of the query heads: it sees the heads' numbers among all.

    ``axes`` are the mesh axes that divide the heads, by which a device finds its place under ``jax.shard_map``. None is
    for the first device.
    """

    op: ScoreOp
    heads: int
    axes: Names

    def __call__(self, s: Any, p: Any, j: Any, h: Any) -> Any:
        first = 0 if self.axes is None else jax.lax.axis_index(self.axes) * self.heads
        return self.op(s, p, j, h + first)

    def __str__(self) -> str:
        return str(self.op)


@dataclasses.dataclass(frozen=True)
class MaskOfGlobalHeads(Mask):
    """A mask that differs by head, for a device that has ``heads`` of the query heads: see `WithGlobalHeads`."""

    has_heads = True

    mask: Mask
    heads: int
    axes: Names

    @property
    def is_opaque(self) -> bool:
        return self.mask.is_opaque

    def given(self, given: Given) -> Any:
        first = 0 if self.axes is None else jax.lax.axis_index(self.axes) * self.heads
        return self.mask.given(given if given.head is None else given._replace(head=given.head + first))

    def __call__(self, p: Any, j: Any) -> Any:
        return self.mask(p, j)

    def coverage(self, p0: Any, p1: Any, j0: Any, j1: Any) -> Coverage:
        return self.mask.coverage(p0, p1, j0, j1)

    def __str__(self) -> str:
        return str(self.mask)


def repeats_of(spec: AttentionSpec, shares: int) -> int:
    """How many copies of each KV head the cache needs, so that every device holds the same number, at least one.

    Raises ``ValueError`` for a number of devices that the heads cannot be divided among.
    """
    repeats = 1 if spec.num_kv_heads % shares == 0 else shares // spec.num_kv_heads
    if spec.num_kv_heads * repeats % shares or spec.group % repeats:
        raise ValueError(
            f"{shares} devices cannot share {spec.num_q_heads} query heads over {spec.num_kv_heads} KV heads: the KV "
            "heads must be a multiple of the devices, or the devices a multiple of the KV heads that divides the query "
            "heads. Choose a mesh axis of such a size for axes.kv_heads."
        )
    return repeats


def share_of(spec: AttentionSpec, layout: PageLayout, shares: int, axes: Names) -> tuple[AttentionSpec, PageLayout]:
    """The spec and the page layout of one device, whose heads are found by ``axes``; None is for the first device.

    ``layout`` is the whole cache's, with KV heads repeated.
    """
    kv_heads, heads = layout.num_kv_heads // shares, spec.num_q_heads // shares
    scores, mask = spec.scores, spec.mask
    if shares > 1 and mask is not None and any(term.has_heads for term in terms_in(mask)):
        mask = MaskOfGlobalHeads(mask.bind(spec.num_q_heads), heads, axes)
    if shares > 1:
        ops = [op.bind(spec.num_q_heads) for op in spec.scores]
        scores = tuple(op if isinstance(op, SoftCap) else WithGlobalHeads(op, heads, axes) for op in ops)
    return (
        spec.replace(num_q_heads=heads, num_kv_heads=kv_heads, mask=mask, scores=scores),
        layout.replace(num_kv_heads=kv_heads),
    )


def repeated(pages: Pages, layout: PageLayout) -> Pages:
    """A copy of a pool with each KV head as often as the layout has it, copies next to each other."""
    repeats = layout.num_kv_heads // pages.layout.num_kv_heads
    if repeats == 1:
        return pages

    def of_array(x: Array) -> Array:
        axis = layout.head_axis
        entries = x.shape[axis] // pages.layout.num_kv_heads
        if entries == 1:
            return jnp.repeat(x, repeats, axis)
        # The entries of one head, its key and its value, stay next to each other.
        by_head = x.reshape(*x.shape[:axis], -1, entries, *x.shape[axis + 1 :])
        return jnp.repeat(by_head, repeats, axis).reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])

    def of_scale(x: Array | None) -> Array | None:
        axes = layout.scale_axes or ()
        return jnp.repeat(x, repeats, axes.index("head")) if x is not None and "head" in axes else x

    return Pages(tuple(map(of_array, pages.arrays)), of_scale(pages.k_scale), of_scale(pages.v_scale), layout)


def with_own_head(pages: Pages, mesh: Mesh, axes: Axes, layout: PageLayout) -> Pages:
    """A pool of one KV head, whole on every device, as a pool in which each device has a copy of its own: no copy."""
    return _relaid(pages, mesh, _whole(axes, layout), ArraySpecs.of(axes, layout).pages, layout)


def with_one_head(pages: Pages, mesh: Mesh, axes: Axes) -> Pages:
    """The reverse of `with_own_head`, for copies that are equal."""
    layout = pages.layout
    return _relaid(pages, mesh, ArraySpecs.of(axes, layout).pages, _whole(axes, layout), layout.replace(num_kv_heads=1))


def _whole(axes: Axes, layout: PageLayout) -> Pages:
    """The specs of pages whose heads are not divided."""
    return ArraySpecs.of(dataclasses.replace(axes, kv_heads=None), layout).pages


def _relaid(pages: Pages, mesh: Mesh, now: Pages, then: Pages, layout: PageLayout) -> Pages:
    """The same bytes on each device, read as arrays that lie by other specs."""
    parts = [(p.arrays, p.k_scale, p.v_scale) for p in (pages, now, then)]
    arrays, k_scale, v_scale = on_devices(lambda *own: own, mesh, parts[1], parts[2])(*parts[0])
    return Pages(arrays, k_scale, v_scale, layout)


def select_own_heads(x: Array, kv_heads: int, repeats: int, axes: Names) -> Array:
    """Select this device's heads from new keys or values [tokens, heads, dim].

    Where KV heads are repeated every device receives all of them; where not, it receives its own alone.
    """
    if repeats == 1:
        return x
    first = jax.lax.axis_index(axes) * kv_heads
    return jnp.take(x, (first + jnp.arange(kv_heads, dtype=jnp.int32)) // repeats, axis=1)
