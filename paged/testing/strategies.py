"""Hypothesis strategies: masks, score operations, specs, layouts, cases of batches, and operations of a pool.

They draw few and small shapes, so that compiled programs are used again, and values at the edges.
"""

from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import jax.numpy as jnp

from paged.spec import (
    PAGE_ORDERS,
    ALiBi,
    AttentionSpec,
    Bias,
    Causal,
    Chunk,
    Everything,
    Mask,
    Nothing,
    PageLayout,
    PerHead,
    Prefix,
    ScoreOp,
    Segments,
    SoftCap,
    Spans,
    Value,
    Where,
    Window,
    values_of,
)

from .cases import CORNERS, Case
from .specs import real

_SIZES = st.integers(1, 9)
_POSITIONS = st.integers(0, 12) | st.just(-2) | st.just(2**31 - 1)


def is_odd_pair(p: Any, j: Any) -> Any:
    """The function of `OPAQUE`."""
    return (p + j) % 2 == 1


def _of_own_head(p: Any, j: Any, h: Any) -> Any:
    return (p - j) % 4 != h


def _tilted(p: Any, j: Any, h: Any) -> Any:
    return 0.25 * real(h + 1) * jnp.cos(0.5 * real(p - j))


OPAQUE = Where(is_odd_pair)
"""A mask of which nothing is known before it is evaluated."""


def leaf_masks() -> st.SearchStrategy[Mask]:
    """A built-in mask without others inside.

    >>> hypothesis.find(strategies.leaf_masks(), lambda mask: mask != Causal())
    Everything()
    """
    fixed = [st.just(mask) for mask in (Causal(), Everything(), Nothing(), OPAQUE)]
    ends = st.tuples(_POSITIONS, _POSITIONS)
    pieces = (ends.map(Segments), st.builds(Spans, ends, ends))
    return st.one_of(*fixed, *(_SIZES.map(kind) for kind in (Window, Prefix, Chunk)), *pieces)


def leaf_masks_of_batches() -> st.SearchStrategy[Mask]:
    """A built-in mask that names a number which the batch brings, or that differs by query head.

    Names are ``"n"`` for one number, and ``"starts"`` and ``"ends"`` for two. Heads are a multiple of 2.

    >>> print(hypothesis.find(strategies.leaf_masks_of_batches(), lambda mask: True))
    p - j < n
    """
    one, starts, ends = Value("n"), Value("starts", 2), Value("ends", 2)
    named = [Window(one), Prefix(one), Chunk(one), Spans(starts, ends), Segments(starts)]
    by_head = [PerHead((Window(2), Prefix(one))), PerHead((Segments((3,)), Everything())), Where(_of_own_head)]
    return st.sampled_from([*named, *by_head])


def numbers(term: Any) -> st.SearchStrategy[dict[str, Any]]:
    """Numbers for all values that a mask, a score operation or a tuple of terms names, by name.

    **Arguments:**

    - `term`: what names them.

    >>> hypothesis.find(strategies.numbers(Prefix(Value("n"))), lambda numbers: 4 < numbers["n"] < 99)
    {'n': 5}
    """
    one = {"int32": _POSITIONS, "float32": st.sampled_from([0.5, 0.0, -1.0, 30.0])}
    many = {v.name: one[v.dtype] if v.size is None else st.tuples(*[one[v.dtype]] * v.size) for v in values_of(term)}
    return st.fixed_dictionaries(many)


def masks(leaves: st.SearchStrategy[Mask] | None = None, max_leaves: int = 6) -> st.SearchStrategy[Mask]:
    """Masks nested by ``&``, ``|`` and ``~``.

    **Arguments:**

    - `leaves`: what is nested, by default `leaf_masks`; add a mask of yours with ``leaf_masks() | st.just(mine)``.
    - `max_leaves`: the most leaves of one mask.

    >>> print(hypothesis.find(strategies.masks(), lambda mask: mask(3, 3) and not mask(3, 1)))  # the simplest such mask
    p - j < 1
    """

    def deeper(inner: st.SearchStrategy[Mask]) -> st.SearchStrategy[Mask]:
        pairs = st.tuples(inner, inner)
        both, either = pairs.map(lambda ab: ab[0] & ab[1]), pairs.map(lambda ab: ab[0] | ab[1])
        return st.one_of(inner.map(lambda a: ~a), both, either)

    return st.recursive(leaf_masks() if leaves is None else leaves, deeper, max_leaves=max_leaves)


def score_ops() -> st.SearchStrategy[ScoreOp]:
    """A score operation.

    >>> hypothesis.find(strategies.score_ops(), lambda op: not op.is_opaque)
    ALiBi(slopes=None)
    """
    return st.sampled_from([ALiBi(), SoftCap(3.0), SoftCap(30.0), Bias(_tilted)])


def specs(mask: st.SearchStrategy[Mask | None] | None = None) -> st.SearchStrategy[AttentionSpec]:
    """Specs of few shapes: one, two and three KV heads, groups of 1, 2 and 5, head dimension 8.

    **Arguments:**

    - `mask`: what the spec's mask is drawn from; by default `masks` or none.

    >>> hypothesis.find(strategies.specs(), lambda spec: spec.num_kv_heads == 1).num_q_heads
    5
    """
    mask = st.none() | masks() if mask is None else mask
    return st.builds(
        lambda heads, causal, mask, cap, sinks, scores: AttentionSpec(
            num_q_heads=heads[0], num_kv_heads=heads[1], head_dim=8, causal=causal, mask=mask, soft_cap=cap,
            sinks=sinks, scores=scores,
        ),
        st.sampled_from([(4, 2), (3, 3), (5, 1)]),
        st.booleans(),
        mask,
        st.sampled_from([None, 7.0]),
        st.booleans(),
        st.lists(score_ops(), max_size=2).map(tuple),
    )  # fmt: skip


def layouts(num_kv_heads: int = 2, head_dim: int = 8) -> st.SearchStrategy[PageLayout]:
    """Layouts for a spec's heads: page sizes 1 to 16, every order, float and quantised pages.

    **Arguments:**

    - `num_kv_heads`, `head_dim`: the spec's.

    >>> hypothesis.find(strategies.layouts(), lambda layout: layout.is_quantised).scales
    'token'
    """
    pools = [("float32", None), ("bfloat16", None), ("int8", "token"), ("int8", "head"), ("float8_e4m3fn", "tensor")]
    return st.builds(
        lambda size, order, pool: PageLayout(
            page_size=size, num_kv_heads=num_kv_heads, head_dim=head_dim, order=order, dtype=jnp.dtype(pool[0]),
            scales=pool[1],
        ),
        st.sampled_from([1, 3, 4, 16]),
        st.sampled_from(PAGE_ORDERS),
        st.sampled_from(pools),
    )  # fmt: skip


def cases(spec: AttentionSpec, layout: PageLayout) -> st.SearchStrategy[Case]:
    """Cases of batches, for `build`: every phase and every corner of `CORNERS`.

    **Arguments:**

    - `spec`, `layout`: of the attention.

    >>> spec = AttentionSpec(num_q_heads=4, num_kv_heads=2, head_dim=8)
    >>> layout = PageLayout(page_size=4, num_kv_heads=2, head_dim=8)
    >>> hypothesis.find(strategies.cases(spec, layout), lambda case: case.phase == "prefill").rows
    6
    """
    is_float = not layout.is_quantised
    return st.builds(
        lambda phase, corner, seed: Case(
            spec=spec, page_size=layout.page_size, order=layout.order, dtype=layout.dtype.name, scales=layout.scales,
            value_dim=layout.value_dim if layout.value_dim != layout.head_dim else None,
            q_dtype=layout.dtype.name if is_float else "float32", phase=phase,
            rows=6 if phase == "prefill" else 1, corner=corner, seed=seed,
            sink_shape=(spec.num_q_heads,) if spec.sinks else None,
        ),
        st.sampled_from(["decode", "ragged", "prefill"]),
        st.sampled_from(sorted(CORNERS)),
        st.integers(0, 3),
    )  # fmt: skip


def pool_tokens(capacity: int) -> st.SearchStrategy[int]:
    """How many tokens to ask a pool for: none, one, an exact page, all, one too many, far too many, a negative number.

    **Arguments:**

    - `capacity`: the most tokens of one slot.

    >>> hypothesis.find(strategies.pool_tokens(8), lambda tokens: tokens > 8)
    9
    """
    return st.sampled_from([0, 0, 1, 2, 3, 4, 5, capacity - 1, capacity, capacity + 1, 2**31 - 1, -1])


def with_leaf(make: Callable[[int], Mask]) -> st.SearchStrategy[Mask]:
    """Masks nested from the built-in ones and from a mask of yours with one size.

    **Arguments:**

    - `make`: makes your mask from a size of 1 to 9.

    >>> hypothesis.find(strategies.with_leaf(Window), lambda mask: isinstance(mask, Window))
    Window(width=1)
    """
    return masks(leaf_masks() | _SIZES.map(make))
