"""`Program`: the normal form of a spec. Every lowering reads it, on every target."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

from paged.spec import (
    NOTHING_GIVEN,
    And,
    AttentionSpec,
    Coverage,
    Everything,
    Given,
    Mask,
    PerHead,
    RaggedBatch,
    ScoreOp,
    Tree,
    Value,
    fields_of,
    terms_in,
    values_of,
)

from .intervals import PageIntervals, page_intervals
from .simplify import normal_form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """An attention in normal form. `Program.from_spec` makes it, lowerings read it, and people print it.

    Scores and visibility are defined here, once, as functions of positions that work on plain arrays. A lowering owns
    data movement only. It asks `coverage` which rectangles of positions to skip, and which need no mask.

    * ``num_q_heads``, ``num_kv_heads``, ``head_dim``: as in the spec.
    * ``scale``: the factor of the products of queries and keys.
    * ``score_ops``: the score operations in order, the soft cap first, each with the numbers of this spec's heads.
    * ``visibility``: the whole mask in normal form: ``causal``, ``window`` and ``mask`` of the spec.
    * ``sinks``: whether calls bring sinks.

    >>> spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, window=128, soft_cap=50.0, sinks=True)
    >>> print(Program.from_spec(spec))
    attention of 8 query heads over 2 KV heads (4 to each), head_dim 64
      s[j] = 0.125 * <q, k[j]>
      s[j] = 50 * tanh(s / 50)
      visible where (j <= p) & (p - j < 128) & (j < length)
      o = sum_j exp(s[j]) v[j] / (sum_j exp(s[j]) + exp(sink[h]))
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    score_ops: tuple[ScoreOp, ...]
    visibility: Mask
    sinks: bool

    @classmethod
    def from_spec(cls, spec: AttentionSpec) -> "Program":
        """The program of a spec. Two specs of one meaning have equal programs, as far as `normal_form` knows."""
        return cls(
            num_q_heads=spec.num_q_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.softmax_scale,
            score_ops=spec.score_ops,
            visibility=normal_form(spec.visibility),
            sinks=bool(spec.sinks),
        )

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    @functools.cached_property
    def values(self) -> tuple[Value, ...]:
        """The values that a batch must bring, by name."""
        return values_of(self.visibility, self.score_ops)

    @functools.cached_property
    def has_heads(self) -> bool:
        """Whether visibility differs by query head."""
        return any(term.has_heads for term in terms_in(self.visibility))

    @functools.cached_property
    def heads_alike(self) -> int:
        """How many query heads have the same mask: each run of so many, from head 0 on, is known to."""
        alike = self.num_q_heads
        for term in terms_in(self.visibility):
            if term.has_heads:
                alike = math.gcd(alike, self.num_q_heads // len(term.masks) if isinstance(term, PerHead) else 1)
        return alike

    @functools.cached_property
    def has_ancestors(self) -> bool:
        """Whether visibility asks which rows are a row's ancestors."""
        return any(term.has_ancestors for term in terms_in(self.visibility))

    @functools.cached_property
    def of_chains(self) -> "Program":
        """The program of a step whose rows follow one another: a row descends from every row before it.

        Where a batch brings no ancestors that is so, and a mask with a `Tree` is what its other terms are.
        """
        if not self.has_ancestors:
            return self
        return dataclasses.replace(self, visibility=normal_form(_without_trees(self.visibility)))

    def for_batch(self, batch: RaggedBatch) -> "Program":
        """The program of a step with this batch."""
        return self if batch.ancestors is not None else self.of_chains

    def _visibility(self, given: Given) -> Any:
        """The mask with what is given in place of names. Most masks name nothing, and stay as they are."""
        is_asking = self.values or self.has_heads or self.has_ancestors
        return self.visibility.given(given) if is_asking else self.visibility

    def apply_scores(self, s: Any, p: Any, j: Any, h: Any, given: Given = NOTHING_GIVEN) -> Any:
        """Apply every score operation, in order.

        **Arguments:**

        - `s`: scaled products of queries and keys, float32.
        - `p`, `j`, `h`: query positions, key positions and query heads; they broadcast against ``s``.
        - `given`: what the batch brings for these pairs.

        **Returns:** scores in the shape of ``s``, before the mask.
        """
        for op in self.score_ops:
            own: Any = op.given(given) if self.values else op
            s = own(s, p, j, h).astype(s.dtype)
        return s

    def visible(self, p: Any, j: Any, length: Any, given: Given = NOTHING_GIVEN) -> Any:
        """Tell which pairs of a query and a key are visible: ``visibility``, and ``j < length``.

        **Arguments:**

        - `p`, `j`: query positions and key positions, which broadcast against each other.
        - `length`: the number of keys of the sequence.
        - `given`: what the batch brings for these pairs, and their heads if visibility differs by head.

        **Returns:** booleans in the broadcast shape.
        """
        return self._visibility(given)(p, j) & (j < length)

    def coverage(
        self, p0: Any, p1: Any, j0: Any, j1: Any, length: Any, numbers: Mapping[str, Any] = NOTHING_GIVEN.numbers
    ) -> Coverage:
        """Tell what is certain about visibility in the rectangle ``[p0, p1) x [j0, j1)``.

        **Arguments:**

        - `p0`, `p1`: the range of query positions, not empty.
        - `j0`, `j1`: the range of key positions, not empty.
        - `length`: the number of keys of the sequence: the true one, not a padded one.
        - `numbers`: the sequence's numbers, by name.

        **Returns:** a `Coverage`. "empty" and "full" are never wrong; "partial" may be either. It is of all query heads
        together. Where visibility asks for ancestors, the keys must be before the step's own tokens.
        """
        visibility = self._visibility(Given(numbers, is_ancestor=True))
        return visibility.coverage(p0, p1, j0, j1) & Coverage(some=j0 < length, full=j1 <= length)

    def any_numbers(self) -> dict[str, Any]:
        """Numbers for questions that come before any batch: so large that a window or a prefix shows everything."""
        one = {"int32": 2**30, "float32": 1.0}
        return {v.name: one[v.dtype] if v.size is None else (one[v.dtype],) * v.size for v in self.values}

    def page_intervals(self, page_size: int) -> PageIntervals | None:
        """The pages that query rows see, as intervals, where `coverage` proves that these pages are one run.

        **Arguments:**

        - `page_size`: tokens per page.

        **Returns:** the intervals, or None where nothing is proven. They are proven for causal masks, windows, chunks
        and their intersections, and for a user's mask whose coverage compares sums, products with constants and
        quotients.

        >>> spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, window=128)
        >>> intervals = Program.from_spec(spec).page_intervals(page_size=16)
        >>> [int(page) for page in intervals.visible(p0=199, p1=200, length=200, width=64)]
        [4, 13]
        """
        return page_intervals(self.coverage, self.values, page_size)

    def may_visit_unseen(self, page_size: int) -> bool:
        """Whether a page that `coverage` cannot rule out may still hold no visible key.

        **Arguments:**

        - `page_size`: tokens per page.

        **Returns:** False for causal masks, windows, chunks and their intersections, whose coverage is exact. Else
        True.

        >>> spec = AttentionSpec(num_q_heads=8, num_kv_heads=2, head_dim=64, window=128)
        >>> Program.from_spec(spec).may_visit_unseen(page_size=16)
        False
        """
        has_exact_coverage = not (self.visibility.is_opaque or self.has_heads or self.has_ancestors)
        return not has_exact_coverage or self.page_intervals(page_size) is None

    def __str__(self) -> str:
        heads = f"{self.num_q_heads} query heads over {self.num_kv_heads} KV heads ({self.group} to each)"
        lines = [f"attention of {heads}, head_dim {self.head_dim}", f"  s[j] = {self.scale:g} * <q, k[j]>"]
        lines += [f"  s[j] = {op}" for op in self.score_ops]
        terms = [str(self.visibility)] if isinstance(self.visibility, And) else [f"({self.visibility})"]
        terms = [] if isinstance(self.visibility, Everything) else terms
        lines += [f"  visible where {' & '.join([*terms, '(j < length)'])}"]
        sink = " + exp(sink[h])" if self.sinks else ""
        total = f"(sum_j exp(s[j]){sink})" if sink else "sum_j exp(s[j])"
        return "\n".join([*lines, f"  o = sum_j exp(s[j]) v[j] / {total}"])


def _without_trees(term: Any) -> Any:
    """A mask, or a tuple of masks, with everything visible in the place of each `Tree`."""
    if isinstance(term, tuple):
        return tuple(map(_without_trees, term))
    if not isinstance(term, Mask) or not any(inner.has_ancestors for inner in terms_in(term)):
        return term
    if isinstance(term, Tree):
        return Everything()
    changes: dict[str, Any] = {name: _without_trees(field) for name, field in fields_of(term)}
    return dataclasses.replace(term, **changes)  # pyright: ignore
