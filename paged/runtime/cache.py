"""`PagedCache`: attention with pages of its own, without projections; the pages live in Equinox state."""

import dataclasses
from typing import Any

import equinox as eqx
import jax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from paged.lower import (
    Attend,
    Axes,
    Plan,
    Schedule,
    Sequences,
    ShardedAttend,
    Step,
    check_values,
    demands_of,
    lower,
    write,
)
from paged.spec import AttentionSpec, PageLayout, Pages, RaggedBatch, Sinks, batch_for

from ._step_plans import is_in_stack, planned, planned_positions
from .calibration import CalibratingPages


class PagedCache(eqx.Module):
    """A lowered attention together with its pages, for models that compute queries, keys and values themselves.

    The pages are behind an ``eqx.nn.StateIndex``: build the model with ``eqx.nn.make_with_state``, and pass the state
    through every call.

    >>> spec = AttentionSpec(num_q_heads=2, num_kv_heads=1, head_dim=4)
    >>> layout = PageLayout(page_size=2, num_kv_heads=1, head_dim=4, dtype=jnp.float32)
    >>> cache, state = eqx.nn.make_with_state(PagedCache)(spec, layout, num_pages=4)
    >>> batch = RaggedBatch.prefill(length=3, block_table=[2, 0], query_rows=3)
    >>> q, kv = jnp.ones((3, 2, 4)), jnp.ones((3, 1, 4))
    >>> out, state = cache(q, kv, kv, batch, state)
    >>> out.shape
    (3, 2, 4)
    """

    index: eqx.nn.StateIndex[Pages]
    attend: Attend | ShardedAttend = eqx.field(static=True)

    def __init__(
        self,
        spec: AttentionSpec,
        layout: PageLayout,
        num_pages: int,
        *,
        target: str = "auto",
        schedule: Schedule | None = None,
        check: bool = True,
        interpret: Any = False,
        k_scale: Any = None,
        v_scale: Any = None,
        mesh: Mesh | None = None,
        axes: Axes | None = None,
    ):
        """**Arguments:**

        - `spec`: what the attention means.
        - `layout`: how the pages lie in memory.
        - `num_pages`: how many pages the state holds, zeroed at first.
        - `target`, `schedule`, `interpret`: see `paged.lower`.
        - `check`: whether every call checks the values of its batch with `paged.check`: at once for concrete arrays,
          through a host callback under ``jax.jit``. True by default in the runtime, where a wrong table is a bug of
          the server, and False in `paged.lower`, whose programs call no host unless asked to. A batch that
          `paged.check` has passed already, for a mask that sees at least as much, is not checked again: a model of
          many layers checks once, before the first.
        - `k_scale`, `v_scale`: per-tensor or per-head scales of quantised pages, see `PageLayout.init`. A cache of int8
          pages that has none of them raises when it is called: `calibrate` measures them.
        - `mesh`, `axes`: devices that share the attention, see `paged.lower`. The pages in the state lie where they are
          made: put them where ``cache.attend.shardings.pages`` says.

        Raises what `paged.lower` and `PageLayout.init` raise.
        """
        how: dict[str, Any] = {"schedule": schedule, "check": check, "interpret": interpret, "mesh": mesh, "axes": axes}
        self.attend = lower(spec, layout, target, **how)
        self.index = eqx.nn.StateIndex(layout.init(num_pages, k_scale=k_scale, v_scale=v_scale))

    def __call__(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        batch: Step,
        state: eqx.nn.State,
        sinks: Sinks | None = None,
    ) -> tuple[Float[Array, "tokens q_heads value_dim"], eqx.nn.State]:
        """Write this step's keys and values into the pages, then attend.

        **Arguments:**

        - `q`, `k`, `v`: this step's queries, keys and values, one row per token of the batch.
        - `batch`: whose rows these are, and where the tokens of their sequences lie: of a `GroupedBatch`, in the table
          of this spec's group. Or the plan that
          ``cache.attend.plan(q, pages, batch)`` makes once for all layers of one mask.
        - `state`: the state that holds the pages. Donate it to ``jax.jit``, and they are updated in place.
        - `sinks`: logits of the sinks, given exactly when the spec has them.

        **Returns:** the output in ``q``'s dtype, 0 in empty rows and in rows of no sequence, and the new state.

        Raises ``ValueError`` or ``TypeError`` for shapes and dtypes that do not fit, and with ``check`` for values.
        """
        out, pages = self.attend_pages(q, k, v, state.get(self.index), batch, sinks)
        return out, state.set(self.index, pages)

    def attend_pages(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        pages: Pages | CalibratingPages,
        batch: Step,
        sinks: Sinks | None = None,
    ) -> tuple[Float[Array, "tokens q_heads value_dim"], Any]:
        """A call with pages passed and returned instead of state.

        For a loop over many layers see `PagedAttention.attend_pages`. Otherwise this is ``cache.attend.update``,
        argument for argument. While `calibrate` runs, the pages are its own.
        """
        is_calibrating = isinstance(pages, CalibratingPages)
        step = batch_for(self.attend.spec, batch) if is_calibrating else planned(self.attend, q, pages, batch)
        if not isinstance(step, Plan) and step.values:
            step = step.naming(value.name for value in self.attend.spec.values)
        if is_calibrating:
            return pages.update(self.attend, q, k, v, step, sinks)
        return self.attend.update(q, k, v, pages, step, sinks)

    def positions(self, batch: Step, tokens: Any) -> Int[Array, " tokens"]:
        """The position of each row of a step in its sequence, for a rotary embedding.

        **Arguments:**

        - `batch`: whose rows these are. Or the step's plan.
        - `tokens`: how many rows the step has.

        **Returns:** the positions; what a row of no sequence gets means nothing.
        """
        if isinstance(batch, Plan):
            return batch.row_positions
        if batch.positions is not None:
            return batch.positions.reshape(-1)  # of all shards of sequences
        page_size = self.attend.layout.page_size
        planned = planned_positions(batch, tokens, page_size)
        if planned is not None:
            return planned
        own: RaggedBatch = batch_for(self.attend.spec, batch)
        rows = tokens if own.lengths.ndim == 1 else tokens // own.lengths.shape[0]
        positions_of = lambda batch: Sequences.of(batch, rows, page_size).rows(rows)[1]
        return positions_of(own) if own.lengths.ndim == 1 else jax.vmap(positions_of)(own).reshape(-1)

    def write_pages(
        self,
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        pages: Pages,
        batch: RaggedBatch,
    ) -> Pages:
        """Write keys and values into pages without attending, see `paged.write`: those that `read_pages` reads.

        **Arguments:**

        - `k`, `v`, `pages`, `batch`: as for `attend_pages`.

        **Returns:** the new pages. Raises as `attend_pages`, and ``ValueError`` inside of a `LayerStack`.
        """
        batch = self._checked("write", pages, batch, k.shape[0], is_written=True)
        lowering: Any = self.attend.lowerings[0]  # pyright: ignore[reportAttributeAccessIssue]
        return write(k, v, pages, batch, lowering.target, interpret=lowering.is_interpreted and lowering.interpret)

    def read_pages(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        pages: Pages,
        batch: RaggedBatch,
        sinks: Sinks | None = None,
    ) -> Float[Array, "tokens q_heads value_dim"]:
        """Attend over pages that were written before, and write nothing: for cross-attention.

        **Arguments:**

        - `q`, `sinks`: as for `attend_pages`.
        - `pages`: what `write_pages` returned.
        - `batch`: whose rows these are, and the lengths and tables of what they read. There may be more rows than
          tokens, and sequences may share pages.

        **Returns:** the output. Raises as `attend_pages`, and ``ValueError`` inside of a `LayerStack`.
        """
        batch = self._checked("read", pages, batch, q.shape[0], is_written=False)
        return dataclasses.replace(self.attend, check=False)(q, pages, batch, sinks)

    def _checked(self, what: str, pages: Any, batch: RaggedBatch, tokens: Any, is_written: bool) -> RaggedBatch:
        if is_in_stack():
            raise ValueError(
                f"{what} has a batch of its own, whose page numbers a LayerStack does not shift to its layer's pages: "
                "keep layers with cross-attention in a list."
            )
        if isinstance(self.attend, ShardedAttend):
            raise ValueError(f"{what} alone is not there for an attention on a mesh: leave out mesh= for this layer.")
        if isinstance(pages, CalibratingPages):
            raise ValueError(
                f"calibrate does not measure the pages that a model only {what}s: give them scales by k_scale= and "
                "v_scale=, or make them float pages or pages with per-token scales."
            )
        if not self.attend.check:
            return batch
        facts = {"page_size": self.attend.layout.page_size, "num_pages": pages.num_pages, "tokens": tokens}
        return check_values(batch, **facts, **demands_of(self.attend.spec), is_written=is_written)
