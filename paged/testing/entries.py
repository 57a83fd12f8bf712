"""The entry points of `paged.compat` as attentions: called with pages and a batch, as `Attend` is."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from paged.compat import page_attention, prefill_page_attention, ragged_page_attention_v2, ragged_page_attention_v3
from paged.spec import AttentionSpec, PageLayout, Pages, RaggedBatch

from .cases import Phase


@dataclasses.dataclass(frozen=True)
class EntryPoint:
    """An entry point: the order of its pages, the phases of its batches, and its names for arguments.

    ``writes`` says whether it takes new keys and values, and ``takes_sinks`` whether it takes sinks.
    """

    call: Callable[..., Any]
    order: str
    phases: tuple[Phase, ...]
    scale: str
    soft_cap: str
    writes: bool = False
    takes_sinks: bool = False

    def arguments(self, spec: AttentionSpec) -> dict[str, Any]:
        """A spec as arguments of this entry point."""
        said = {self.scale: spec.scale, self.soft_cap: spec.soft_cap, "sliding_window": spec.window}
        return {name: value for name, value in said.items() if value is not None}

    def arrays(self, q: Any, pages: Pages, batch: RaggedBatch, sinks: Any, new: tuple[Any, Any] | None) -> list[Any]:
        """The arrays of a call in the order of this entry point's arguments; ``new`` are keys and values to write."""
        if self.phases == ("decode",):
            # No argument says which sequences are live: the others have length 0.
            lengths = jnp.where(jnp.arange(batch.num_slots) < batch.num_seqs, batch.lengths, 0)
            return [q, *pages.arrays, lengths, batch.block_tables]
        if self.order == "split":
            return [q, *pages.arrays, jnp.where(batch.num_seqs > 0, batch.lengths, 0), batch.block_tables[0]]
        if not self.writes:
            return [q, *pages.arrays, batch.lengths, batch.block_tables, batch.query_starts, batch.num_seqs, sinks]
        if new is None:  # looked at for their shapes alone
            shape = (q.shape[0], pages.layout.num_kv_heads, pages.layout.head_dim)
            new = (jnp.zeros(shape, q.dtype), jnp.zeros(shape, q.dtype))
        ends = jnp.stack([jnp.int32(0), jnp.int32(0), jnp.asarray(batch.num_seqs, jnp.int32)])
        tables = batch.block_tables.reshape(-1)
        # The cache is donated: the caller keeps his.
        return [q, *new, jnp.copy(pages.arrays[0]), batch.lengths, tables, batch.query_starts, ends, sinks]

    def lower(self, spec: AttentionSpec, layout: PageLayout, **how: Any) -> "Called":
        """This entry point as an attention of the spec over the layout.

        **Arguments:**

        - `spec`, `layout`: of the attention. ``ValueError`` says what the entry point has no argument for.
        - `how`: arguments of every call, such as ``target="xla"``.
        """
        why_not = {
            f"pages in the order {layout.order!r}; it has {self.order!r}": layout.order != self.order,
            "quantised pages; this adaptor passes no scales": layout.is_quantised,
            f"value_dim {layout.value_dim} beside head_dim {layout.head_dim}": layout.value_dim != layout.head_dim,
            "a mask of its own": spec.mask is not None,
            "numbers that a batch brings": bool(spec.values),
            "score operations": bool(spec.scores),
            "sinks": spec.sinks and not self.takes_sinks,
            "attention that is not causal": not spec.causal and not self.writes,
        }
        reasons = [reason for reason, holds in why_not.items() if holds]
        if reasons:
            raise ValueError(f"{self.call.__name__} has no argument for {reasons[0]}.")
        given = {**self.arguments(spec), **({} if spec.causal else {"use_causal_mask": False}), **how}
        kind = CalledToWrite if self.writes else Called
        return kind(self, layout, tuple(given.items()))


@dataclasses.dataclass(frozen=True)
class Called:
    """An entry point with the arguments that are not arrays: ``attend(q, pages, batch, sinks)``."""

    entry: EntryPoint
    layout: PageLayout
    given: tuple[tuple[str, Any], ...]

    def __call__(self, q: jax.Array, pages: Pages, batch: RaggedBatch, sinks: jax.Array | None = None) -> jax.Array:
        """The output over the pages as they are."""
        arrays = self.entry.arrays(q, pages, batch, sinks, None)
        if not self.entry.writes:
            return self.entry.call(*arrays, **dict(self.given))
        return self.entry.call(*arrays, **dict(self.given), update_kv_cache=False)[0]


@dataclasses.dataclass(frozen=True)
class CalledToWrite(Called):
    """An entry point that writes: ``attend.update(q, k, v, pages, batch, sinks)``."""

    def update(
        self, q: jax.Array, k: jax.Array, v: jax.Array, pages: Pages, batch: RaggedBatch, sinks: jax.Array | None = None
    ) -> tuple[jax.Array, Pages]:
        """The output, and the pages with the new keys and values."""
        arrays = self.entry.arrays(q, pages, batch, sinks, (k, v))
        out, cache = self.entry.call(*arrays, **dict(self.given))
        return out, self.layout.wrap(cache)


ENTRY_POINTS: Mapping[str, EntryPoint] = {
    entry.call.__name__: entry
    for entry in (
        EntryPoint(page_attention, "split", ("decode",), "attn_scale", "attn_logits_soft_cap"),
        EntryPoint(prefill_page_attention, "split", ("prefill",), "softmax_scale", "attn_logits_soft_cap"),
        EntryPoint(
            ragged_page_attention_v2, "interleaved", ("ragged",), "softmax_scale", "logits_soft_cap", False, True
        ),
        EntryPoint(
            ragged_page_attention_v3, "interleaved", ("ragged",), "softmax_scale", "logits_soft_cap", True, True
        ),
    )
}
