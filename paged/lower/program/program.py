"""`Program`: the normal form of a spec, the same for every target; what the lowerings read."""

import dataclasses
from typing import Any

from paged.spec import And, AttentionSpec, Coverage, Everything, Mask, ScoreOp

from .simplify import normal_form


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
    """An attention in normal form. Made by `Program.from_spec`, read by lowerings, printed by people.

    Scores and visibility are written once, here, as functions of tiles of positions that work on plain arrays. A
    lowering owns data movement only, and asks `coverage` which rectangles to skip and which need no mask.

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
    mask: Mask
    sinks: bool

    @classmethod
    def from_spec(cls, spec: AttentionSpec) -> "Program":
        """The program of a spec: its mask simplified, its score operations bound and listed."""
        return cls(
            num_q_heads=spec.num_q_heads,
            num_kv_heads=spec.num_kv_heads,
            head_dim=spec.head_dim,
            scale=spec.softmax_scale,
            score_ops=spec.score_ops,
            mask=normal_form(spec.visibility),
            sinks=spec.sinks,
        )

    @property
    def group(self) -> int:
        """Query heads that share one KV head."""
        return self.num_q_heads // self.num_kv_heads

    def scores(self, s: Any, p: Any, j: Any, h: Any) -> Any:
        """Scores after every score operation, from scaled products ``s``; positions and heads broadcast against it."""
        for op in self.score_ops:
            s = op(s, p, j, h)
        return s

    def visible(self, p: Any, j: Any, length: Any) -> Any:
        """Which pairs of a tile are visible: the mask, and ``j < length``."""
        return self.mask(p, j) & (j < length)

    def coverage(self, p0: Any, p1: Any, j0: Any, j1: Any, length: Any) -> Coverage:
        """What is certain of ``[p0, p1) x [j0, j1)`` in a sequence of ``length`` tokens; never wrong when certain."""
        return self.mask.coverage(p0, p1, j0, j1) & Coverage(some=j0 < length, full=j1 <= length)

    def __str__(self) -> str:
        heads = f"{self.num_q_heads} query heads over {self.num_kv_heads} KV heads ({self.group} to each)"
        lines = [f"attention of {heads}, head_dim {self.head_dim}", f"  s[j] = {self.scale:g} * <q, k[j]>"]
        lines += [f"  s[j] = {op}" for op in self.score_ops]
        terms = [str(self.mask)] if isinstance(self.mask, And) else [f"({self.mask})"]
        terms = [] if isinstance(self.mask, Everything) else terms
        lines += [f"  visible where {' & '.join([*terms, '(j < length)'])}"]
        sink = " + exp(sink[h])" if self.sinks else ""
        total = f"(sum_j exp(s[j]){sink})" if sink else "sum_j exp(s[j])"
        return "\n".join([*lines, f"  o = sum_j exp(s[j]) v[j] / {total}"])
