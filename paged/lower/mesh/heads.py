"""One device's share of the heads: a spec of fewer heads, whose score operations still see whose head it is."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from paged.spec import AttentionSpec, PageLayout, Pages, ScoreOp, SoftCap

from .axes import Names


@dataclasses.dataclass(frozen=True)
class OfShare(ScoreOp):
    """A score operation on a device that has ``heads`` of the query heads: it sees their numbers among all.

    ``names`` are the mesh axes that share heads, to be read under ``jax.shard_map``; None stands for the first share.
    """

    op: ScoreOp
    heads: int
    names: Names

    def __call__(self, s: Any, p: Any, j: Any, h: Any) -> Any:
        first = 0 if self.names is None else jax.lax.axis_index(self.names) * self.heads
        return self.op(s, p, j, h + first)

    def __str__(self) -> str:
        return str(self.op)


def repeats_of(spec: AttentionSpec, shares: int) -> int:
    """How often each KV head is in the cache, so that every share has some, and the same number.

    Raises ``ValueError`` for a number of shares that heads cannot be cut into.
    """
    repeats = 1 if spec.num_kv_heads % shares == 0 else shares // spec.num_kv_heads
    if spec.num_kv_heads * repeats % shares or spec.group % repeats:
        raise ValueError(
            f"{shares} devices cannot share {spec.num_q_heads} query heads over {spec.num_kv_heads} KV heads: the KV "
            "heads must be a multiple of the devices, or the devices a multiple of the KV heads that divides the query "
            "heads. Choose a mesh axis of such a size for axes.kv_heads."
        )
    return repeats


def share_of(spec: AttentionSpec, layout: PageLayout, shares: int, names: Names) -> tuple[AttentionSpec, PageLayout]:
    """The spec and the layout of one device's heads; of the first device's where ``names`` is None.

    ``layout`` is that of the whole cache, with KV heads repeated.
    """
    kv_heads, heads = layout.num_kv_heads // shares, spec.num_q_heads // shares
    scores = spec.scores
    if shares > 1:
        ops = [op.bind(spec.num_q_heads) for op in spec.scores]
        scores = tuple(op if isinstance(op, SoftCap) else OfShare(op, heads, names) for op in ops)
    return (
        spec.replace(num_q_heads=heads, num_kv_heads=kv_heads, scores=scores),
        dataclasses.replace(layout, num_kv_heads=kv_heads),
    )


def repeated(pages: Pages, layout: PageLayout) -> Pages:
    """A pool with each KV head as often as the layout has it, side by side."""
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


def own_new_heads(x: Array, kv_heads: int, repeats: int, names: Names) -> Array:
    """This device's ``kv_heads`` of new keys or values [tokens, heads, dim], of which each device has all, where each
    is repeated."""
    if repeats == 1:
        return x
    first = jax.lax.axis_index(names) * kv_heads
    return jnp.take(x, (first + jnp.arange(kv_heads)) // repeats, axis=1)
