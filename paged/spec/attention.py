"""`AttentionSpec`: the meaning of an attention, whatever the target, the page order and the shape of a batch."""

import dataclasses
import functools
import math
from typing import Any

from .given import Minimum, Term, Value, minima_of, terms_in, values_of
from .mask import And, Mask
from .masks import Causal, Everything, Window
from .numbers import Flag, Real, as_bool, as_float, require_positive_int
from .scores import ScoreOp, SoftCap

_DEFAULT_SCALE = " For 1/sqrt(head_dim), leave it out."


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """A declaration of attention. It is hashable, can be compared and printed, and `replace` makes variants of it.

    For a query of head ``h`` at position ``p`` and keys at positions ``j``: ``s_j = scale * <q, k_j>``; then the score
    operations in order, the soft cap first; then the mask; then a softmax in float32, with sinks in its denominator
    only.

    **Arguments:**

    - `num_q_heads`: query heads, a multiple of ``num_kv_heads``.
    - `num_kv_heads`: KV heads. Query head ``h`` reads KV head ``h // (num_q_heads // num_kv_heads)``.
    - `head_dim`: the dimension of queries and keys.
    - `causal`: whether a query sees no later position. True by default.
    - `window`: how many tokens of the past a query sees, its own included. None for all of them.
    - `soft_cap`: a bound of scores, ``cap * tanh(s / cap)``. None for no bound.
    - `sinks`: whether every call comes with sinks, learnt logits of each query head.
    - `scale`: the factor of ``<q, k>``, ``1 / sqrt(head_dim)`` by default. It may be 0 or negative.
    - `mask`: any `Mask`. A query sees what ``causal``, ``window`` and ``mask`` all allow.
    - `scores`: score operations, in order.

    Any number of a mask or a score operation, ``window`` and ``soft_cap`` too, may be a `Value` that the batch brings.
    Flags may be NumPy bools, and ``soft_cap`` and ``scale`` any real numbers of Python or NumPy; they become Python's.

    **Raises:** ``ValueError`` or ``TypeError``, naming the field, for a declaration that has no meaning.

    >>> spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, window=128)
    >>> spec.group, spec == spec.replace(window=256).replace(window=128)
    (4, True)
    >>> print(spec.visibility)
    (j <= p) & (p - j < 128)
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    causal: Flag = True  # flags are bool after construction, and numbers float
    window: int | Value | None = None
    soft_cap: Real | Value | None = None
    sinks: Flag = False
    scale: Real | None = None
    mask: Mask | None = None
    scores: tuple[ScoreOp, ...] | list[ScoreOp] = ()

    def __post_init__(self):
        for name in ("num_q_heads", "num_kv_heads", "head_dim"):
            require_positive_int(name, getattr(self, name))
        if self.num_q_heads % self.num_kv_heads:
            raise ValueError(
                f"num_q_heads must be a multiple of num_kv_heads, so that every KV head serves a whole group of query "
                f"heads; got num_q_heads={self.num_q_heads}, num_kv_heads={self.num_kv_heads}."
            )
        for name in ("causal", "sinks"):
            object.__setattr__(self, name, as_bool(name, getattr(self, name)))
        if self.window is not None:
            Window(self.window)
        if self.soft_cap is not None:
            object.__setattr__(self, "soft_cap", SoftCap(self.soft_cap).cap)
        if self.scale is not None:
            object.__setattr__(self, "scale", as_float("scale", self.scale, _DEFAULT_SCALE))
        if self.mask is not None and not isinstance(self.mask, Mask):
            raise TypeError(
                f"mask must be a Mask, such as Prefix(64) | Chunk(256), or Where(lambda p, j: ...) around a function; "
                f"got {self.mask!r}."
            )
        if not isinstance(self.scores, tuple | list) or not all(isinstance(op, ScoreOp) for op in self.scores):
            raise TypeError(
                f"scores must be a tuple of score operations, such as (ALiBi(),) or (ALiBi(), Bias(fn)); got "
                f"{self.scores!r}."
            )
        object.__setattr__(self, "scores", tuple(self.scores))
        for op in self.scores:
            op.bind(self.num_q_heads)
        _ = self.visibility, self.values

    @property
    def group(self) -> int:
        """The number of query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @property
    def visibility(self) -> Mask:
        """The whole mask: ``causal & window & mask``, of those that the spec has."""
        terms: list[Mask] = [Causal()] if self.causal else []
        if self.window is not None:
            terms.append(Window(self.window))
        if self.mask is not None:
            terms.append(self.mask)
        whole = And(tuple(terms)) if len(terms) > 1 else terms[0] if terms else Everything()
        return whole.bind(self.num_q_heads) if any(term.has_heads for term in terms_in(whole)) else whole

    @property
    def terms(self) -> tuple[Term, ...]:
        """Everything that may name what a batch brings: the whole mask, and the score operations."""
        return self.visibility, *self.score_ops

    @functools.cached_property
    def minima(self) -> tuple[Minimum, ...]:
        """The least of each number that calls bring, where a term has one."""
        return minima_of(self.terms)

    @functools.cached_property
    def values(self) -> tuple[Value, ...]:
        """The values that calls must bring, by name: those that the mask and the score operations name."""
        return values_of(self.terms)

    @functools.cached_property
    def has_ancestors(self) -> bool:
        """Whether calls must bring ancestors: the mask has a `Tree`."""
        return any(term.has_ancestors for term in terms_in(self.visibility))

    @property
    def score_ops(self) -> tuple[ScoreOp, ...]:
        """All score operations in order, the soft cap first, bound to this spec's query heads."""
        cap = () if self.soft_cap is None else (SoftCap(self.soft_cap),)
        return tuple(op.bind(self.num_q_heads) for op in (*cap, *self.scores))

    @property
    def softmax_scale(self) -> float:
        """The factor of ``<q, k>``, a number also where ``scale`` is None."""
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else float(self.scale)

    def replace(self, **changes: Any) -> "AttentionSpec":
        """This spec with some fields changed, checked again."""
        return dataclasses.replace(self, **changes)

    def __str__(self) -> str:
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        shown = [f"{k}={getattr(self, k)!r}" for k, d in defaults.items() if getattr(self, k) != d]
        return f"AttentionSpec({', '.join(shown)})"
