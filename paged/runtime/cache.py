"""`PagedCache`: attention over a cache of its own, without projections; the cache lives in Equinox state."""

import equinox as eqx
from jaxtyping import Array, Float

from paged.lower import Attend, Schedule, lower
from paged.spec import AttentionSpec, PageLayout, Pages, RaggedBatch


class PagedCache(eqx.Module):
    """A lowered attention with its pages, for models that make queries, keys and values themselves.

    ``PagedCache(spec, layout, num_pages, *, target="auto", schedule=None, check=True)``. The pages are held behind an
    ``eqx.nn.StateIndex``: build the model with ``eqx.nn.make_with_state``, and thread the state through.

    With ``check``, the default, every call checks the values of its batch as `paged.check` does: at once with concrete
    arrays, through a host callback under ``jax.jit``. A batch that `paged.check` has already passed, for a mask that
    sees at least as much, is not checked again: in a model of many layers, check once before the first. Raises what
    `paged.lower` raises.

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
    attend: Attend = eqx.field(static=True)

    def __init__(
        self,
        spec: AttentionSpec,
        layout: PageLayout,
        num_pages: int,
        *,
        target: str = "auto",
        schedule: Schedule | None = None,
        check: bool = True,
    ):
        self.attend = lower(spec, layout, target, schedule=schedule, check=check)
        self.index = eqx.nn.StateIndex(layout.init(num_pages))

    def __call__(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        batch: RaggedBatch,
        state: eqx.nn.State,
        sinks: Float[Array, " q_heads"] | None = None,
    ) -> tuple[Float[Array, "tokens q_heads value_dim"], eqx.nn.State]:
        """Write this step's keys and values, then attend; ``out`` in ``q``'s dtype, 0 in empty rows.

        The pages are updated in place under a jit to which the state is donated.
        """
        out, pages = self.attend_pages(q, k, v, batch, state.get(self.index), sinks)
        return out, state.set(self.index, pages)

    def attend_pages(
        self,
        q: Float[Array, "tokens q_heads head_dim"],
        k: Float[Array, "tokens kv_heads head_dim"],
        v: Float[Array, "tokens kv_heads value_dim"],
        batch: RaggedBatch,
        pages: Pages,
        sinks: Float[Array, " q_heads"] | None = None,
    ) -> tuple[Float[Array, "tokens q_heads value_dim"], Pages]:
        """The functional core: the same with the pages passed and returned, for ``jax.lax.scan`` over layers."""
        return self.attend.update(q, k, v, pages, batch, sinks)
